"""What programs take for one file: device, number and count of links, in all that a mount shows.

Two trees that are copied together must come out as two: whatever names share a file in the copy
shared it in one of the trees.
"""

import itertools
import os
import shutil
import stat
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine import Repository
from engine.ids import SnapshotId
from tests.engine.trees import age
from tests.fsdriver.conftest import Mount

LINKED = ("a", "b", "deep/c")
FILES = (*LINKED, "single", "deep/single")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Two snapshots and two sessions of nearly the same tree, by name."""
    home = tmp_path_factory.mktemp("identity")
    tree = home / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "a").write_bytes(b"linked")
    for name in LINKED[1:]:
        os.link(tree / "a", tree / name)
    for name in FILES[len(LINKED) :]:
        (tree / name).write_bytes(b"single")
    age(tree)
    mount = Mount(home)
    try:
        with Repository.create(str(mount.store)) as repository:
            first = SnapshotId(repository.import_directory(str(tree), ref="one").snapshot)
            (tree / "more").write_bytes(b"more")
            second = SnapshotId(repository.import_directory(str(tree), ref="two").snapshot)
            for name, snapshot in [("s", first), ("t", second)]:
                repository.sessions.create(name, (None, None, snapshot))
        mount.start()
        places = {
            "snapshot 1": mount.snapshots / first.hex(),
            "snapshot 2": mount.snapshots / second.hex(),
            "ref": mount.snapshots / "one",
            "layer": mount.path / "layers/s/2-blueprint",
            "session s": mount.sessions / "s",
            "session t": mount.sessions / "t",
        }
        os.utime(places["session t"] / "a", ns=(1, 1))  # in the upper, with all of its names
        yield places
        mount.stop()
    finally:
        mount.clear()


def groups(root: Path) -> set[frozenset[str]]:
    """Returns which names below a directory share a file."""
    found = defaultdict(set)
    for path in root.rglob("*"):
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode):
            found[status.st_dev, status.st_ino].add(str(path.relative_to(root)))
            assert status.st_nlink >= len(found[status.st_dev, status.st_ino])
    return {frozenset(names) for names in found.values()}


def cp(sources: list[Path], to: Path) -> None:
    subprocess.run(["cp", "-a", *sources, to], check=True)


def rsync(sources: list[Path], to: Path) -> None:
    subprocess.run(["rsync", "-aH", *sources, to], check=True)


def tar(sources: list[Path], to: Path) -> None:
    """Packs the directory that both are in, as one argument: two would be taken for one tree."""
    above = sources[0].parent
    others = {path.name for path in above.iterdir()} - {source.name for source in sources}
    excluded = [f"--exclude=./{name}" for name in others]
    packed = subprocess.run(
        ["tar", "-c", "-C", above, *excluded, "."], check=True, stdout=subprocess.PIPE
    )
    subprocess.run(["tar", "-x", "-C", to], input=packed.stdout, check=True)


SNAPSHOTS, SESSIONS = ("snapshot 1", "snapshot 2"), ("session s", "session t")
MIXED = [("snapshot 1", "session s"), ("snapshot 2", "session t")]


@pytest.mark.parametrize(
    ("program", "pair"),
    [
        *itertools.product([cp, rsync], [SNAPSHOTS, SESSIONS, *MIXED]),
        *itertools.product([tar], [SNAPSHOTS, SESSIONS]),
    ],
)
def test_copies_of_two_trees_share_no_file(
    two: dict[str, Path],
    tmp_path: Path,
    program: Callable[[list[Path], Path], None],
    pair: tuple[str, str],
):
    if not shutil.which(program.__name__):
        pytest.skip(f"{program.__name__} is not installed")
    sources = [two[name] for name in pair]
    program(sources, tmp_path)
    expected = set()
    for source in sources:
        for names in ([*LINKED], ["single"], ["deep/single"]):
            expected.add(frozenset(f"{source.name}/{name}" for name in names))
        if (source / "more").exists():
            expected.add(frozenset([f"{source.name}/more"]))
    assert groups(tmp_path) == expected


def test_numbers_tell_files_apart_within_each_tree_and_between_them(two: dict[str, Path]):
    seen = {
        (place, name): ((root / name).stat().st_dev, (root / name).stat().st_ino)
        for place, root in two.items()
        for name in FILES
    }
    for place, root in two.items():
        assert len({seen[place, name] for name in LINKED}) == 1
        assert len({seen[place, name] for name in FILES}) == 3
        assert {(root / name).stat().st_nlink for name in LINKED} == {3}
        assert (root / "single").stat().st_nlink == 1
    assert all(seen["snapshot 1", name] == seen["ref", name] for name in FILES)
    assert all(seen["snapshot 1", name] == seen["layer", name] for name in FILES)
    trees = ["snapshot 1", "snapshot 2", "session s", "session t"]
    for one, other in itertools.combinations(trees, 2):
        assert seen[one, "a"] != seen[other, "a"]
        shared = (one, other) == ("snapshot 1", "snapshot 2")
        assert (seen[one, "single"] == seen[other, "single"]) == shared


def test_find_and_du_count_a_linked_file_once(two: dict[str, Path]):
    for place in ("snapshot 1", "session s", "session t"):
        root = two[place]
        found = subprocess.run(
            ["find", root, "-samefile", root / "a", "-printf", "%P\n"],
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert set(found.stdout.split()) == set(LINKED)
    both = [two["snapshot 1"], two["snapshot 2"]]
    listed = subprocess.run(
        ["du", "--apparent-size", "-b", "-a", "-c", *both],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    names = [line.split("\t")[1] for line in listed.stdout.splitlines()]
    linked = [name for name in names if name.rpartition("/")[2] in {"a", "b", "c"}]
    assert len(linked) == 2  # once for each snapshot
