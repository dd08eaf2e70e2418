"""Checkout: a tree becomes a directory with all that it keeps, or nothing at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import NodeId, Repository, SnapshotId
from engine.errors import CorruptObjectError, MissingObjectError
from engine.plain.filling import CheckoutRefusedError
from engine.storage.nodes import Entry, Kind, directory_node
from engine.storage.objects import NodeBuffer
from engine.storage.store import Db
from engine.trees.directory import directory_entry
from engine.trees.outside_links import OutsideLinkError
from tests.conftest import ROOT, Run
from tests.engine.trees import age, noise, of_directory


def root_of(repository: Repository, path: Path) -> Entry:
    result = repository.import_directory(str(path))
    return repository.snapshot(SnapshotId(result.snapshot)).root


def test_everything_is_as_it_was(repository: Repository, base: Path, tmp_path: Path):
    os.mkdir(os.fsencode(base) + b"/\xff\n")
    (base / "d").chmod(0o500 if os.geteuid() else 0o000)
    age(base)
    root = root_of(repository, base)
    target = tmp_path / "target"
    seen: list[tuple[int, int | None]] = []
    report = repository.check_out(
        root, str(target), outside_links=True, progress=lambda n, total, *_: seen.append((n, total))
    )
    assert of_directory(target) == of_directory(base)
    assert root.totals is not None
    assert seen[-1] == (root.size, root.size)
    assert report.entries == root.totals.entries
    assert sorted(os.listdir(tmp_path)) == ["base", "store", "target"]
    assert root_of(repository, target) == root


def test_an_empty_directory_is_replaced(repository: Repository, base: Path, tmp_path: Path):
    (tmp_path / "target").mkdir()
    repository.check_out(root_of(repository, base), str(tmp_path / "target"), outside_links=True)
    assert of_directory(tmp_path / "target") == of_directory(base)


def test_targets_that_are_refused(repository: Repository, base: Path, tmp_path: Path):
    root = root_of(repository, base)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link to empty").symlink_to("empty")
    (tmp_path / "to the store").symlink_to(repository.path)
    before = sorted(os.listdir(tmp_path))
    for target, why in {
        "base": "not empty", "file": "not a directory", "link": "not a directory",
        "link to empty": "not a directory", "none/below": "is not a directory",
        "file/below": "is not a directory",
        "store": "inside of the store", "store/new": "inside of the store",
        "store/db/new": "inside of the store", "to the store/new": "inside of the store",
    }.items():  # fmt: skip
        with pytest.raises(CheckoutRefusedError, match=why):
            repository.check_out(root, str(tmp_path / target), outside_links=True)
    assert sorted(os.listdir(tmp_path)) == before
    assert sorted(os.listdir(repository.path)) == ["db", "locks", "log", "sessions"]


def test_a_long_name_for_the_target(repository: Repository, base: Path, tmp_path: Path):
    for name in ["x" * 255, "ä" * 127, os.fsdecode(b"\xff" * 255)]:
        repository.check_out(root_of(repository, base), str(tmp_path / name), outside_links=True)
        assert of_directory(tmp_path / name) == of_directory(base)


# Links.

INSIDE = [
    ("a", "b"), ("a", "d/../b"), ("d/a", "../b"), ("d/e/a", "../../b"), ("a", "."), ("a", "./d/.."),
    ("d/a", ".."), ("a", "none/none"), ("a", "a"), ("a", "d//e"), ("a", "dl//e"), ("a", "dl/f"),
    ("d/a", "../dl/e/.."),
]  # fmt: skip
OUTSIDE = [
    ("a", "/"), ("a", "/etc/passwd"), ("a", ".."), ("a", "../x"), ("a", "d/../.."),
    ("d/a", "../.."), ("d/e/a", "../../../x"), ("a", "none/../.."), ("a", "dl/../.."),
    ("a", "./../x"), ("d/a", "../dl/../../x"), ("a", "up"), ("a", "up/x"), ("d/a", "../up/.."),
]  # fmt: skip


def linked_tree(path: Path, name: str, target: str) -> Path:
    (path / "d/e").mkdir(parents=True)
    (path / "b").touch()
    (path / "dl").symlink_to("d")
    if "up" in target:
        (path / "up").symlink_to("d/x")
        (path / "d/x").symlink_to("../..")
    (path / name).symlink_to(target)
    return path


@pytest.mark.parametrize(("name", "target"), INSIDE)
def test_links_that_stay_inside(repository: Repository, tmp_path: Path, name: str, target: str):
    root = root_of(repository, linked_tree(tmp_path / "base", name, target))
    repository.check_out(root, str(tmp_path / "target"))
    assert os.readlink(tmp_path / "target" / name) == target


@pytest.mark.parametrize(("name", "target"), OUTSIDE)
def test_links_that_lead_out(repository: Repository, tmp_path: Path, name: str, target: str):
    root = root_of(repository, linked_tree(tmp_path / "base", name, target))
    with pytest.raises(OutsideLinkError, match="leads out") as caught:
        repository.check_out(root, str(tmp_path / "target"))
    assert caught.value.target in {os.fsencode(target), b"d/x", b"../.."}
    assert sorted(os.listdir(tmp_path)) == ["base", "store"]
    repository.check_out(root, str(tmp_path / "target"), outside_links=True)
    assert of_directory(tmp_path / "target") == of_directory(tmp_path / "base")


def test_links_in_a_ring_end(repository: Repository, tmp_path: Path):
    base = tmp_path / "base"
    base.mkdir()
    for n in range(30):
        (base / f"{n}").symlink_to(f"{(n + 1) % 30}/{(n + 7) % 30}/..")
    repository.check_out(root_of(repository, base), str(tmp_path / "target"))


# Trees that nobody imported.


def hostile(repository: Repository, entries: list[Entry]) -> Entry:
    """Stores entries that break the format's rules, as another program might."""
    nodes = NodeBuffer()
    root = directory_entry(nodes.put, entries, name=b"", mode=0o755, mtime_ns=0)
    repository.store.write(nodes.flush)
    return root


@pytest.mark.parametrize("name", [b"..", b".", b"", b"../escaped", b"/etc/x", b"a\0b", b"x" * 256])
def test_names_that_would_lead_out(repository: Repository, tmp_path: Path, name: bytes):
    root = hostile(repository, [Entry(name, Kind.FILE, 0o644, 0, 1, b"x")])
    (tmp_path / "deep").mkdir()
    with pytest.raises(CorruptObjectError):
        repository.check_out(root, str(tmp_path / "deep/target"), outside_links=True)
    assert os.listdir(tmp_path / "deep") == []
    assert sorted(os.listdir(tmp_path)) == ["deep", "store"]


def test_a_name_that_is_a_link_and_a_directory(repository: Repository, tmp_path: Path):
    below = hostile(repository, [Entry(b"x", Kind.FILE, 0o644, 0, 1, b"x")])
    assert isinstance(below.content, bytes)
    link = Entry(b"a", Kind.SYMLINK, 0o777, 0, 4, b"/tmp")
    directory = Entry(b"a", Kind.DIRECTORY, 0o755, 0, 1, below.content, totals=below.totals)
    root = hostile(repository, [link, directory])
    with pytest.raises(CorruptObjectError):
        repository.check_out(root, str(tmp_path / "target"), outside_links=True)


def test_what_is_missing_or_damaged_leaves_nothing(
    repository: Repository, tmp_path: Path, base: Path
):
    root = root_of(repository, base)
    with repository.store.read() as reader:
        chunks = {key: bytes(value) for key, value in reader.items(Db.CHUNKS)}
    for key, value in chunks.items():
        for bad in [None, value[:-1], value[:9] + bytes([value[9] ^ 1]) + value[10:]]:
            if bad is None:
                repository.store.write(lambda w, k=key: w.delete(Db.CHUNKS, k))  # type: ignore[misc]
            else:
                repository.store.write(lambda w, k=key, b=bad: w.put(Db.CHUNKS, k, b))  # type: ignore[misc]
            repository.objects.shed()
            error = MissingObjectError if bad is None else CorruptObjectError
            with pytest.raises(error):
                repository.check_out(root, str(tmp_path / "target"), outside_links=True)
            assert sorted(os.listdir(tmp_path)) == ["base", "store"]
        repository.store.write(lambda w, k=key, v=value: w.put(Db.CHUNKS, k, v))  # type: ignore[misc]
    repository.check_out(root, str(tmp_path / "target"), outside_links=True)


def test_a_missing_node(repository: Repository, tmp_path: Path, base: Path):
    root = root_of(repository, base)
    empty = NodeId(NodeBuffer().put(directory_node(())))
    repository.store.write(lambda w: w.delete(Db.NODES, empty))
    repository.objects.shed()
    with pytest.raises(MissingObjectError):
        repository.check_out(root, str(tmp_path / "target"), outside_links=True)
    assert sorted(os.listdir(tmp_path)) == ["base", "store"]


# Where it cannot be made.


def test_a_full_disk_leaves_nothing(repository: Repository, tmp_path: Path):
    """A limit on the size of files stands for the disk's."""
    base = tmp_path / "base"
    (base / "d").mkdir(parents=True)
    (base / "d/large").write_bytes(noise(300_000))
    root_of(repository, base)
    code = f"""
import resource, sys
from engine import Repository
with Repository.open({repository.path!r}) as repository:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    root = repository.snapshot(repository.snapshots()[0]).root
    try:
        repository.check_out(root, {str(tmp_path / "target")!r})
    except OSError as error:
        print(error.strerror)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "File too large\n"
    assert sorted(os.listdir(tmp_path)) == ["base", "store"]


UNPRIVILEGED = """
import sys
from engine import Repository
from engine.storage.store import Db
with Repository.create(sys.argv[1] + "/store") as repository:
    result = repository.import_directory(sys.argv[1] + "/base")
    if sys.argv[2] == "fail":
        repository.store.write(lambda w: [w.delete(Db.CHUNKS, k) for k in list(w.keys(Db.CHUNKS))])
    try:
        repository.check_out(result.root, sys.argv[1] + "/target", outside_links=True)
    except Exception as error:
        print(type(error).__name__)
"""


def closed_tree(path: Path) -> None:
    """A tree whose directories nobody may write, and with links between them."""
    for name in ["a", "b", "c"]:
        (path / name / "below").mkdir(parents=True)
    for name in ["a", "b"]:
        (path / name / "linked").write_bytes(b"linked")
    (path / "c/z").write_bytes(noise(1000))
    os.link(path / "a/linked", path / "c/linked")
    os.link(path / "a/linked", path / "b/below/linked")
    age(path)
    for name in ["a/below", "a", "b/below", "c/below", "c", ""]:
        (path / name).chmod(0o555)
    (path / "b").chmod(0o555)


@pytest.mark.unprivileged
@pytest.mark.parametrize("what", ["work", "fail"])
def test_directories_that_nobody_may_write(public_path: Path, as_user: Run, what: str):
    closed_tree(public_path / "base")
    done = as_user("-c", UNPRIVILEGED, str(public_path), what)
    assert done.stderr == ""
    if what == "fail":
        assert done.stdout == "MissingObjectError\n"
        assert sorted(os.listdir(public_path)) == ["base", "store"]
    else:
        assert of_directory(public_path / "target") == of_directory(public_path / "base")
    subprocess.run(["chmod", "-R", "u+rwx", str(public_path)], check=True)


@pytest.mark.unprivileged
def test_a_place_where_one_may_not_write(public_path: Path, as_user: Run):
    (public_path / "base").mkdir()
    (public_path / "target").mkdir(0o555)
    done = as_user("-c", UNPRIVILEGED.replace('"/target"', '"/target/below"'), str(public_path), "")
    assert done.stdout == "PermissionError\n"
