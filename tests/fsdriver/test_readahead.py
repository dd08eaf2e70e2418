"""What is read ahead: the same bytes with fewer requests, and only what does not change."""

import os
from pathlib import Path

import pytest

from engine import Repository
from fsdriver.readahead import AHEAD, FILES, PIECE, UNIT
from tests.engine.trees import noise
from tests.fsdriver.conftest import PLAIN, Mount, until

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(PLAIN, reason="pyfuse3 has the device, and nothing is read ahead"),
]

NUMBER, PAIRS = 300, 20


@pytest.fixture
def made(mount: Mount, tmp_path: Path) -> tuple[Path, Path]:
    """A new tree on the disk and where the mount shows it, of which nothing was read yet."""
    root = tmp_path / "tree"
    (root / "many").mkdir(parents=True)
    for number in range(NUMBER):
        # Contents of their own each time: the page cache has what earlier tests read.
        (root / "many" / f"{number:03}").write_bytes(os.urandom(100 + number * 20))
    (root / "large").write_bytes(noise(12 << 20, int.from_bytes(os.urandom(4), "big")))
    with mount.repository() as repository:
        found = repository.import_directory(str(root)).snapshot
    return root, mount.snapshots / found.hex()


def reads(mount: Mount) -> int:
    return mount.statistics()["messages"].get("READ", 0)


def given(mount: Mount) -> int:
    return mount.statistics()["ahead"]["given"]


def test_files_in_order_are_given_before_they_are_asked_for(mount, made):
    root, shown = made
    before, gave = reads(mount), given(mount)
    for name in sorted(os.listdir(shown / "many")):
        assert (shown / "many" / name).read_bytes() == (root / "many" / name).read_bytes()
    assert given(mount) > gave
    assert reads(mount) - before < NUMBER


def test_who_waits_for_the_thread_finds_everything_there(mount, made):
    root, shown = made
    names = sorted(os.listdir(shown / "many"))[: FILES + 2]
    gave = given(mount)
    for name in names[:2]:
        (shown / "many" / name).read_bytes()
    until(lambda: given(mount) - gave >= FILES)
    before = reads(mount)
    for name in names[2:]:
        assert (shown / "many" / name).read_bytes() == (root / "many" / name).read_bytes()
    assert reads(mount) == before


def test_the_next_directory_goes_on_in_order(mount, tmp_path):
    """Who takes too long between two directories has ended: it is tried with more than one pair."""
    root = tmp_path / "pairs"
    for pair in range(PAIRS):
        for name, number in {f"{pair}/one": 3, f"{pair}/other": 20}.items():
            (root / name).mkdir(parents=True)
            for file in range(number):
                (root / name / f"{file:03}").write_bytes(os.urandom(5000))
    with mount.repository() as repository:
        found = repository.import_directory(str(root)).snapshot
    shown = mount.snapshots / found.hex()
    for pair in range(PAIRS):
        one, other = shown / f"{pair}/one", shown / f"{pair}/other"
        names = sorted(os.listdir(one))
        settle(mount)
        gave = given(mount)
        for name in names[:2]:
            (one / name).read_bytes()
        others = sorted(os.listdir(other))
        settle(mount)
        if given(mount) - gave >= len(others):
            break
    assert given(mount) - gave == len(names[2:]) + len(others)
    before = reads(mount)
    for name in others:
        assert (other / name).read_bytes() == (root / f"{pair}/other" / name).read_bytes()
    assert reads(mount) == before


def test_one_file_here_and_there_gives_nothing(mount, made):
    _, shown = made
    names = sorted(os.listdir(shown / "many"))
    settle(mount)
    gave = given(mount)
    for name in names[::-7]:
        (shown / "many" / name).read_bytes()
    settle(mount)
    assert given(mount) == gave


def test_a_large_file_in_order(mount, made):
    root, shown = made
    gave = given(mount)
    assert (shown / "large").read_bytes() == (root / "large").read_bytes()
    assert given(mount) > gave


def test_a_large_file_from_anywhere(mount, made):
    root, shown = made
    data = (root / "large").read_bytes()
    fd = os.open(shown / "large", os.O_RDONLY)
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


def test_who_reads_a_large_file_slowly_is_asked_for_a_page_of_each_unit(mount, tmp_path):
    root = tmp_path / "tree"
    root.mkdir()
    data = noise(4 * AHEAD, int.from_bytes(os.urandom(4), "big"))
    (root / "larger").write_bytes(data)
    with mount.repository() as repository:
        found = repository.import_directory(str(root)).snapshot
    requests: list[int] = []
    with open(mount.snapshots / found.hex() / "larger", "rb", buffering=0) as file:
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


def test_a_session_is_never_read_ahead(mount, made):
    root, shown = made
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
