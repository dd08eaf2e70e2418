"""What is read ahead: the same bytes with fewer requests, and only what does not change."""

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import Repository
from fsdriver.readahead import AHEAD, FILES, PIECE, RECENT, UNIT
from tests.fsdriver.conftest import PLAIN, Mount, until, with_luck

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(PLAIN, reason="pyfuse3 has the device, and nothing is read ahead"),
]

PAIRS = 20
Make = Callable[[dict[str, list[int]]], tuple[Path, Path]]


@pytest.fixture
def make(mount: Mount, tmp_path: Path) -> Make:
    """Makes trees on the disk, and tells where the mount shows them; nothing of them was read.

    Given are the sizes of the files in each directory. They are called 000, 001 and so on. Their
    contents are their own each time: the page cache has what was read before.
    """
    count = itertools.count()

    def make(sizes: dict[str, list[int]]) -> tuple[Path, Path]:
        root = tmp_path / f"tree{next(count)}"
        for directory, files in sizes.items():
            (root / directory).mkdir(parents=True)
            for number, size in enumerate(files):
                (root / directory / f"{number:03}").write_bytes(os.urandom(size))
        with mount.repository() as repository:
            found = repository.import_directory(str(root)).snapshot
        settle(mount)
        time.sleep(RECENT)  # what was read before has ended, and a listing is no part of it
        return root, mount.snapshots / found.hex()

    return make


MANY = {"many": [100 + number * 20 for number in range(300)]}
LARGE = {"large": [12 << 20]}


def reads(mount: Mount) -> int:
    return mount.statistics()["messages"].get("READ", 0)


def given(mount: Mount) -> int:
    return mount.statistics()["ahead"]["given"]


def test_files_in_order_are_given_before_they_are_asked_for(mount, make):
    root, shown = make(MANY)
    before, gave = reads(mount), given(mount)
    for name in sorted(os.listdir(shown / "many")):
        assert (shown / "many" / name).read_bytes() == (root / "many" / name).read_bytes()
    assert given(mount) > gave
    assert reads(mount) - before < len(MANY["many"])


@with_luck
def test_who_waits_for_the_thread_finds_everything_there(mount, make):
    root, shown = make(MANY)
    names = sorted(os.listdir(shown / "many"))[: FILES + 2]
    gave = given(mount)
    for name in names[:2]:
        (shown / "many" / name).read_bytes()
    until(lambda: given(mount) - gave >= FILES)
    before = reads(mount)
    for name in names[2:]:
        assert (shown / "many" / name).read_bytes() == (root / "many" / name).read_bytes()
    assert reads(mount) == before


@with_luck
def test_the_next_directory_goes_on_in_order(mount, make):
    """Who takes too long between two directories has ended: it is tried with more than one pair."""
    pairs = [(f"{number}/one", f"{number}/other") for number in range(PAIRS)]
    sizes = [{one: [5000] * 3, other: [5000] * 20} for one, other in pairs]
    root, shown = make({name: files for pair in sizes for name, files in pair.items()})
    for one, other in pairs:
        names = sorted(os.listdir(shown / one))
        settle(mount)
        gave = given(mount)
        for name in names[:2]:
            (shown / one / name).read_bytes()
        others = sorted(os.listdir(shown / other))
        settle(mount)
        if given(mount) - gave >= len(others):
            break
    assert given(mount) - gave == len(names[2:]) + len(others)
    before = reads(mount)
    for name in others:
        assert (shown / other / name).read_bytes() == (root / other / name).read_bytes()
    assert reads(mount) == before


def test_one_file_here_and_there_gives_nothing(mount, make):
    _, shown = make(MANY)
    names = sorted(os.listdir(shown / "many"))
    settle(mount)
    gave = given(mount)
    for name in names[::-7]:
        (shown / "many" / name).read_bytes()
    settle(mount)
    assert given(mount) == gave


def test_a_large_file_in_order(mount, make):
    root, shown = make(LARGE)
    gave = given(mount)
    assert (shown / "large/000").read_bytes() == (root / "large/000").read_bytes()
    assert given(mount) > gave


def test_a_large_file_from_anywhere(mount, make):
    root, shown = make(LARGE)
    data = (root / "large/000").read_bytes()
    fd = os.open(shown / "large/000", os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        settle(mount)
        gave = given(mount)
        for place in [11 << 20, 5 << 20, 9 << 20, 0, 3 << 20]:
            assert os.pread(fd, 4096, place) == data[place : place + 4096]
        settle(mount)
        assert given(mount) == gave
        for place in range(6 << 20, 7 << 20, 4096):  # in order, from its middle
            assert os.pread(fd, 4096, place) == data[place : place + 4096]
        until(lambda: given(mount) - gave >= UNIT // PIECE)
        assert os.pread(fd, 8 << 20, 7 << 20) == data[7 << 20 :]
    finally:
        os.close(fd)


@with_luck
def test_who_reads_a_large_file_slowly_is_asked_for_a_page_of_each_unit(mount, make):
    root, shown = make({"larger": [4 * AHEAD]})
    data = (root / "larger/000").read_bytes()
    requests: list[int] = []
    with open(shown / "larger/000", "rb", buffering=0) as file:
        for at in range(0, len(data), PIECE):
            before = reads(mount)
            assert file.read(PIECE) == data[at : at + PIECE]
            settle(mount)
            requests.append(reads(mount) - before)
    assert sum(requests[2 * UNIT // PIECE :]) <= len(data) // UNIT + 2
    steady = requests[len(requests) // 2 :]
    assert max(steady) <= 1
    assert sum(steady) >= len(steady) * PIECE // UNIT - 1


def settle(mount: Mount) -> None:
    """Waits until the thread has nothing to do."""
    until(lambda: mount.statistics()["ahead"]["waiting"] == 0)


def test_a_session_is_never_read_ahead(mount, make):
    root, shown = make(MANY)
    with mount.repository() as repository:
        create(repository, shown.name)
    session = mount.sessions / f"ahead-{shown.name[:8]}"
    settle(mount)
    gave = given(mount)
    for name in sorted(os.listdir(session / "many")):
        assert (session / "many" / name).read_bytes() == (root / "many" / name).read_bytes()
    settle(mount)
    assert given(mount) == gave


def create(repository: Repository, snapshot: str) -> None:
    identifier = repository.resolve(snapshot)
    repository.sessions.create(f"ahead-{snapshot[:8]}", (None, None, identifier))
