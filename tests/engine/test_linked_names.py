"""Files with many names cost as many steps as they have names. Counted, not timed."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import Repository, SnapshotId
from engine.mounted.inodes import Inode
from engine.mounted.overlay_directory import SessionDirectory
from engine.mounted.vfs import SNAPSHOTS, Vfs
from engine.storage.nodes import Owner

MANY = 300
EACH = 20
"""So many comparisons of names, or steps, may each of them take."""


class Counted(bytes):
    """A name that counts how often any was compared."""

    compared = 0
    __hash__ = bytes.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return bytes.__eq__(self, other) is True


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """`one` has many names in `many`; `pairs` and `other` have as many files of two names."""
    root = tmp_path / "tree"
    for name in ("many", "pairs", "other", "new"):
        (root / name).mkdir(parents=True)
    (root / "one").write_bytes(b"one")
    for at in range(MANY):
        os.link(root / "one", root / f"many/{at:04}")
        (root / f"pairs/{at:04}").write_bytes(b"%d" % at)
        os.link(root / f"pairs/{at:04}", root / f"other/{at:04}")
    return root


@pytest.fixture
def vfs(repository: Repository, tree: Path) -> Iterator[Vfs]:
    snapshot = SnapshotId(repository.import_directory(str(tree)).snapshot)
    repository.sessions.create("s", (None, None, snapshot))
    made = Vfs(repository, Owner(os.getuid(), os.getgid()), {})
    yield made
    made.close()


def found(vfs: Vfs, *names: bytes) -> SessionDirectory:
    at: Inode | None = vfs.session("s").overlay.root
    for name in names:
        assert at is not None
        at = at.lookup(name)
        assert at is not None
        at = vfs.refer(at)
    assert isinstance(at, SessionDirectory)
    return at


def listed(vfs: Vfs, directory: Inode) -> list[Counted]:
    """Lists a directory as the kernel does, which then knows all that is in it."""
    names = []
    for _, name, inode in directory.listing(0):
        vfs.refer(vfs.known(inode))
        names.append(Counted(name))
    return names


@pytest.mark.parametrize("where", ["many", "new"])
def test_each_name_of_a_file_takes_the_same_however_many_there_are(vfs: Vfs, where: str):
    directory = found(vfs, where.encode())
    Counted.compared = 0
    if where == "new":
        root = found(vfs)
        first = root.create(b"first", 0o100644, Owner(os.getuid(), os.getgid()))
        vfs.refer(first)
        for at in range(MANY):
            directory.link(Counted(b"%04d" % at), first)
    names = listed(vfs, directory)
    assert len(names) == MANY
    for name in names[: MANY // 2]:
        directory.unlink(name)
    for name in names[MANY // 2 :]:
        directory.rename(name, directory, Counted(b"x" + name), 0)
    left = MANY - MANY // 2 + 1
    child = directory.lookup(b"x" + names[-1])
    assert child is not None
    assert child.attributes().nlink == left
    assert 0 < Counted.compared < EACH * MANY


def test_all_groups_of_linked_files_are_found_in_one_walk(vfs: Vfs):
    pairs = found(vfs, b"pairs")
    for name in listed(vfs, pairs):
        pairs.unlink(name)
    overlay = pairs.overlay
    assert 0 < overlay.base_links().steps < EACH * MANY
    other = found(vfs, b"other")
    assert {child.attributes().nlink for _, _, child in other.listing(0)} == {1}


def test_names_are_found_where_their_directory_has_moved(vfs: Vfs):
    root = found(vfs)
    root.rename(b"other", found(vfs, b"new"), b"moved", 0)
    for _, name, _ in list(found(vfs, b"pairs").listing(0)):
        found(vfs, b"pairs").unlink(name)
    moved = found(vfs, b"new", b"moved")
    assert {child.attributes().nlink for _, _, child in moved.listing(0)} == {1}
    file = moved.lookup(b"0007")
    assert file is not None
    assert file.read(0, 9) == b"7"


def test_a_linked_file_is_another_in_another_snapshot(vfs: Vfs, repository: Repository, tree: Path):
    (tree / "more").write_bytes(b"more")
    other = SnapshotId(repository.import_directory(str(tree)).snapshot)
    first = repository.sessions.get("s").parent
    numbers: list[dict[bytes, int]] = []
    for snapshot in (first, other):
        root = vfs.inode(SNAPSHOTS).lookup(SnapshotId(snapshot).hex().encode())
        assert root is not None
        many = root.lookup(b"many")
        assert many is not None
        one = root.lookup(b"one")
        assert one is not None
        assert {i.ino for _, _, i in many.listing(0)} == {one.ino}
        numbers.append({name: i.ino for _, name, i in root.listing(0)})
    assert numbers[0][b"one"] != numbers[1][b"one"]
