"""Hostile trees, and others at work in the directory: nothing is written where it should not be."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from engine import Repository
from engine.host import removing
from engine.host.removing import MovedMeanwhileError, remove_tree
from engine.plain import checkouts
from engine.plain.checkout_records import new_record
from engine.plain.filling import CheckoutRefusedError
from engine.plain.local_edits import LocalEditsError
from engine.plain.surveying import Survey, TreeTooLargeError
from engine.plain.switching import Switch
from engine.storage.nodes import DEEPEST, LIST_REFS, Entry, Kind, Ref, Totals, list_node
from engine.storage.objects import ChunkSink, NodeBuffer
from engine.trees.directory import directory_entry
from engine.trees.outside_links import OutsideLinkError
from tests.conftest import ROOT
from tests.engine.killing import KILLER
from tests.engine.test_checkouts import T, World, world  # noqa: F401  # a fixture
from tests.engine.trees import age, noise, of_directory


class Forge:
    """Makes trees that no import would make."""

    def __init__(self, repository: Repository) -> None:
        self.repository, self.nodes = repository, NodeBuffer()
        self.sink = ChunkSink(repository.store)

    def chunk(self, data: bytes) -> Ref:
        return Ref(self.sink.put(data), len(data), 0)

    def list(self, refs: list[Ref]) -> Ref:
        node = self.nodes.put(list_node(tuple(refs)))
        return Ref(node, sum(ref.length for ref in refs), refs[0].level + 1)

    def file(self, name: bytes, *refs: Ref) -> Entry:
        return Entry(name, Kind.FILE, 0o644, 0, sum(ref.length for ref in refs), tuple(refs))

    def directory(self, name: bytes, *entries: Entry) -> Entry:
        made = directory_entry(
            self.nodes.put, sorted(entries, key=lambda entry: entry.name),
            name=name, mode=0o755, mtime_ns=0,
        )  # fmt: skip
        return msgspec.structs.replace(made, size=7, totals=Totals(1, 0))  # that is a lie

    def root(self, *entries: Entry) -> Entry:
        root = self.directory(b"", *entries)
        self.sink.flush()
        self.repository.store.write(self.nodes.flush)
        return root


@pytest.fixture
def forge(repository: Repository) -> Forge:
    return Forge(repository)


# More than there is room for.


def test_a_list_that_names_one_chunk_a_million_billion_times(forge: Forge, tmp_path: Path):
    ref = forge.chunk(noise(60_000))
    for _ in range(4):
        ref = forge.list([ref] * LIST_REFS)
    root = forge.root(forge.directory(b"d", forge.file(b"bomb", ref)))
    with pytest.raises(TreeTooLargeError, match="needs 65,970,697,666,560,000 bytes"):
        forge.repository.check_out(root, str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == ["store"]
    refused_by_a_switch(forge, root, tmp_path / "other")


def refused_by_a_switch(forge: Forge, root: Entry, target: Path) -> None:
    forge.repository.check_out(forge.root(), str(target))
    for within in [root, forge.root(msgspec.structs.replace(root, name=b"within"))]:
        with pytest.raises(TreeTooLargeError, match="there is no room"):
            forge.repository.checkouts.switch(str(target), within, outside_links=True)
    assert os.listdir(target) == []
    assert not forge.repository.checkouts.find(str(target)).interrupted
    shutil.rmtree(target)


def test_directories_that_name_one_directory_a_thousand_times(forge: Forge, tmp_path: Path):
    link = Entry(b"up", Kind.SYMLINK, 0o777, 0, 1, b"y")
    below = forge.directory(b"x", link, forge.file(b"f", forge.chunk(b"z" * 200)))
    for _ in range(40):
        below = forge.directory(
            b"x", *(msgspec.structs.replace(below, name=b"%03d" % number) for number in range(100))
        )
    root = forge.root(below)
    assert Survey(forge.repository.objects).of(root).entries > 10**80
    for outside_links in [False, True]:
        with pytest.raises(TreeTooLargeError, match="there is no room"):
            forge.repository.check_out(root, str(tmp_path / "out"), outside_links=outside_links)
    assert sorted(os.listdir(tmp_path)) == ["store"]
    refused_by_a_switch(forge, root, tmp_path / "other")


def test_a_tree_deeper_than_is_allowed(forge: Forge, tmp_path: Path):
    below = forge.file(b"x", forge.chunk(b"z" * 200))
    for _ in range(DEEPEST + 2):
        below = forge.directory(b"x", below)
    with pytest.raises(Exception, match="too deep"):
        forge.repository.check_out(forge.root(below), str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == ["store"]


def test_a_hole_larger_than_any_file(forge: Forge, tmp_path: Path):
    root = forge.root(forge.file(b"hole", Ref(None, 1 << 62, 0)))
    failed: OSError | None = None
    try:
        forge.repository.check_out(root, str(tmp_path / "out"))
    except OSError as error:
        failed = error
    if failed is not None:
        assert (failed.errno, failed.filename) == (errno.EFBIG, str(tmp_path / "out/hole"))
        assert sorted(os.listdir(tmp_path)) == ["store"]
    else:  # where files may be as large
        assert os.path.getsize(tmp_path / "out/hole") == 1 << 62


def test_terabytes_of_holes_take_no_time(forge: Forge, tmp_path: Path):
    data, hole = forge.chunk(noise(60_000)), Ref(None, 1 << 30, 0)
    lists = [forge.list([hole] * 512 + [data, hole]) for _ in range(2)]
    root = forge.root(forge.file(b"sparse", forge.list(lists), forge.list([forge.list([data])])))
    forge.repository.check_out(root, str(tmp_path / "out"))
    with (tmp_path / "out/sparse").open("rb") as file:
        size = 2 * ((513 << 30) + 60_000) + 60_000
        assert os.fstat(file.fileno()).st_size == size
        assert os.fstat(file.fileno()).st_blocks * 512 < 1 << 20
        for at in [512 << 30, (512 << 30) + (513 << 30) + 60_000, size - 60_000]:
            assert os.lseek(file.fileno(), at - 8192, os.SEEK_DATA) <= at
            file.seek(at)
            assert file.read(60_000) == noise(60_000)
    forge.repository.checkouts.switch(str(tmp_path / "out"), forge.root())
    assert os.listdir(tmp_path / "out") == []
    forge.repository.checkouts.switch(str(tmp_path / "out"), root)
    assert (tmp_path / "out/sparse").stat().st_blocks * 512 < 1 << 20


def test_the_room_that_a_tree_needs(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Holes need none, nor do the other names of a file; a full disk is stood in for."""
    base = tmp_path / "base"
    base.mkdir()
    with (base / "sparse").open("wb") as file:
        for number in range(40):  # too many for an entry
            file.seek(number << 26)
            file.write(noise(20_000, number))
    for number in range(1, 30):
        (base / "one").touch() if number == 1 else None
        os.link(base / "one", base / f"name {number}")
    (base / "one").write_bytes(noise(100_000))
    root = repository.import_directory(str(base)).root
    exact = Survey(repository.objects, exact=True).of(root)
    assert exact.bytes == 39 * 20_480 + 20_000 + 100_000  # data ends with a block
    assert Survey(repository.objects).of(root).bytes >= exact.bytes

    def disk(blocks: int, files: int = 0, free: int = 0) -> None:
        status = SimpleNamespace(
            f_blocks=10_000_000, f_bavail=blocks, f_frsize=1000, f_files=files, f_favail=free
        )
        monkeypatch.setattr(os, "fstatvfs", lambda fd: status)

    for blocks, files, free in [(900, 0, 0), (10_000, 1000, 30)]:
        disk(blocks, files, free)
        with pytest.raises(TreeTooLargeError, match="there is no room"):
            repository.check_out(root, str(tmp_path / "out"))
        assert sorted(os.listdir(tmp_path)) == ["base", "store"]
    disk(930, 1000, 31)
    repository.check_out(root, str(tmp_path / "out"))
    assert of_directory(tmp_path / "out") == of_directory(base)

    shutil.copy(base / "one", base / "more")  # only what comes needs room
    more = repository.import_directory(str(base)).root
    disk(90, 1000, 1)
    with pytest.raises(TreeTooLargeError, match="there is no room"):
        repository.checkouts.switch(str(tmp_path / "out"), more)
    assert of_directory(tmp_path / "out") != of_directory(base)
    disk(101, 1000, 1)
    repository.checkouts.switch(str(tmp_path / "out"), more)
    assert of_directory(tmp_path / "out") == of_directory(base)
    disk(0, 1000, 0)  # room enough for less
    repository.checkouts.switch(str(tmp_path / "out"), root)


# What a tree may not bring along.


def test_attributes_that_give_privileges(forge: Forge, tmp_path: Path):
    capability = bytes.fromhex("0100000200200000" + "00" * 12)
    bad = tuple(sorted([
        (b"security.capability", capability), (b"trusted.overlay.opaque", b"y"),
        (b"user.amalgam.checkout", b"0" * 32), (b"user.overlay.opaque", b"y"),
        (b"user.kept", b"value"),
    ]))  # fmt: skip
    file = msgspec.structs.replace(forge.file(b"f", forge.chunk(b"z" * 200)), xattrs=bad)
    below = msgspec.structs.replace(forge.directory(b"d", file), xattrs=bad)
    root, empty = forge.root(below), forge.root()
    out = tmp_path / "out"
    forge.repository.check_out(root, str(out))
    for turn in range(2):
        for path in [out / "d", out / "d/f"]:
            assert os.listxattr(path) == ["user.kept"]
        assert forge.repository.checkouts.status(str(out)) == []
        if not turn:
            forge.repository.checkouts.switch(str(out), empty)
            forge.repository.checkouts.switch(str(out), root)


@pytest.mark.parametrize("name", [b"..", b".", b"../escaped", b"/etc/x", b"a\0b", b"x" * 256])
def test_names_that_would_lead_a_switch_out(forge: Forge, tmp_path: Path, name: bytes):
    deep = tmp_path / "deep"
    deep.mkdir()
    forge.repository.check_out(forge.root(), str(deep / "out"))
    root = forge.root(forge.file(name, forge.chunk(b"z" * 200)))
    with pytest.raises(Exception, match="corrupt"):
        forge.repository.checkouts.switch(str(deep / "out"), root, outside_links=True)
    assert (os.listdir(deep), os.listdir(deep / "out")) == (["out"], [])
    assert not forge.repository.checkouts.find(str(deep / "out")).interrupted


def test_a_switch_makes_no_link_that_leads_out(forge: Forge, tmp_path: Path):
    out = str(tmp_path / "out")
    forge.repository.check_out(forge.root(), out)
    root = forge.root(
        forge.directory(b"d", Entry(b"bad", Kind.SYMLINK, 0o777, 0, 9, b"../../etc")),
        forge.file(b"f", forge.chunk(b"z" * 200)),
    )
    with pytest.raises(OutsideLinkError, match="'d/bad'"):
        forge.repository.checkouts.switch(out, root)
    assert os.listdir(out) == []
    forge.repository.checkouts.switch(out, root, outside_links=True)
    assert os.readlink(out + "/d/bad") == "../../etc"


# Others who work in the directory.


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory with what a switch would write, where it may write nothing."""
    path = tmp_path / "outside"
    (path / "below").mkdir(parents=True)
    (path / "changed").write_bytes(b"1")
    (path / "below/changed").write_bytes(b"1")
    age(path)
    return path


def swapped(world: World, monkeypatch: pytest.MonkeyPatch, swap) -> None:  # noqa: F811
    """Does `swap` when a switch has looked at everything and is about to begin."""
    run = Switch.run

    def swap_and_run(job: Switch) -> None:
        monkeypatch.setattr(Switch, "run", run)
        swap()
        run(job)

    monkeypatch.setattr(Switch, "run", swap_and_run)


def test_a_directory_becomes_a_link_in_a_switch(world: World, outside: Path, monkeypatch):  # noqa: F811
    world.check_out()

    def swap() -> None:
        (world.target / "sub").rename(world.path / "stolen")
        (world.target / "sub").symlink_to(outside)

    swapped(world, monkeypatch, swap)
    before = of_directory(outside)
    with pytest.raises(OSError, match="sub"):
        world.switch(1)
    assert of_directory(outside) == before
    assert (b"sub", T) in world.status()
    with pytest.raises(LocalEditsError):
        world.switch(1)
    world.switch(1, edits="overwrite")
    assert of_directory(outside) == before
    assert of_directory(world.target) == world.trees[1]


def test_a_file_becomes_a_link_in_a_switch(world: World, outside: Path, monkeypatch):  # noqa: F811
    world.check_out()

    def swap() -> None:
        (world.target / "changed").unlink()
        (world.target / "changed").symlink_to(outside / "changed")

    swapped(world, monkeypatch, swap)
    before = of_directory(outside)
    with pytest.raises(LocalEditsError, match="'changed'"):
        world.switch(1)
    assert of_directory(outside) == before
    assert os.readlink(world.target / "changed") == str(outside / "changed")


def test_links_where_a_tree_has_directories(world: World, outside: Path):  # noqa: F811
    world.check_out()
    for name in ["sub", "same", "going"]:
        shutil.rmtree(world.target / name)
        (world.target / name).symlink_to(outside)
    before = of_directory(outside)
    assert [path for path, kind in world.status() if kind == T] == [b"going", b"same", b"sub"]
    with pytest.raises(LocalEditsError):
        world.switch(1)
    world.switch(1, edits="overwrite")
    assert of_directory(outside) == before
    assert os.readlink(world.target / "same") == str(outside)  # in nobody's way
    assert not os.path.lexists(world.target / "going")


def test_a_tree_that_leaves_a_link_and_one_that_is_written_through_it(
    forge: Forge, outside: Path, tmp_path: Path
):
    """What many programs have met: each tree alone does no harm."""
    link = Entry(b"x", Kind.SYMLINK, 0o777, 0, len(bytes(outside)), bytes(outside))
    file = forge.file(b"changed", forge.chunk(b"z" * 200))
    first = forge.root(link)
    second = forge.root(forge.directory(b"x", file, forge.directory(b"below", file)))
    before = of_directory(outside)
    out, checkouts = str(tmp_path / "out"), forge.repository.checkouts
    forge.repository.check_out(first, out, outside_links=True)
    for root in [second, first, second]:
        checkouts.switch(out, root, outside_links=True)
        assert os.path.islink(out + "/x") == (root is first)
        assert of_directory(outside) == before
    assert Path(out + "/x/below/changed").read_bytes() == b"z" * 200
    (tmp_path / "link").symlink_to(outside)
    with pytest.raises(CheckoutRefusedError):  # nor is a target reached through one
        forge.repository.check_out(second, str(tmp_path / "link"))


def test_a_removal_is_not_led_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Somebody moves a directory that is just being emptied into another one."""
    (tmp_path / "doomed/a/b").mkdir(parents=True)
    (tmp_path / "doomed/a/b/c").touch()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").touch()
    remove_files = removing._remove_files

    def move_and_remove(fd: int) -> str | None:
        if os.listdir(fd) == ["c"]:
            (tmp_path / "doomed/a/b").rename(tmp_path / "precious/b")
        return remove_files(fd)

    monkeypatch.setattr(removing, "_remove_files", move_and_remove)
    with pytest.raises(MovedMeanwhileError, match="moved meanwhile"):
        remove_tree(bytes(tmp_path / "doomed"))
    assert sorted(os.listdir(tmp_path / "precious")) == ["b", "file"]


def test_what_somebody_else_removes_meanwhile_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As a collection that finds a session's directory just as `session rm` removes it."""
    remove_files, enter = removing._remove_files, removing._enter
    for gone in ("doomed", "doomed/a", "doomed/a/b", "doomed/a/b/c", "doomed/d"):
        for at in range(1, 12):
            (tmp_path / "doomed/a/b/c").mkdir(parents=True)
            (tmp_path / "doomed/d").touch()
            left = at

            def meanwhile(gone: str = gone) -> None:
                nonlocal left
                left -= 1
                path = tmp_path / gone
                if left == 0 and path.is_dir():
                    shutil.rmtree(path)
                elif left == 0:
                    path.unlink(missing_ok=True)

            def files(fd: int) -> str | None:
                meanwhile()
                return remove_files(fd)

            def entered(path: str | bytes, directory: int | None) -> int:
                meanwhile()
                return enter(path, directory)

            with monkeypatch.context() as patch:
                patch.setattr(removing, "_remove_files", files)
                patch.setattr(removing, "_enter", entered)
                remove_tree(bytes(tmp_path / "doomed"))
            assert not (tmp_path / "doomed").exists()


def test_a_target_that_comes_meanwhile(world: World, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    """What somebody else makes at the target while a checkout is made is not replaced."""
    for make in [
        lambda: (world.target.mkdir(), (world.target / "mine").write_text("mine")),
        lambda: world.target.write_text("mine"),
        lambda: world.target.symlink_to("elsewhere"),
    ]:
        monkeypatch.setattr(
            checkouts, "new_record", lambda *words, make=make: (make(), new_record(*words))[1]
        )
        with pytest.raises(CheckoutRefusedError, match="has come there meanwhile"):
            world.repository.check_out(
                world.roots[0], str(world.target), outside_links=True, snapshot=world.ids[0]
            )
        assert world.repository.checkouts.all() == []
        if world.target.is_dir():
            assert (world.target / "mine").read_text() == "mine"
            shutil.rmtree(world.target)
        else:
            world.target.unlink()
        assert list(world.path.glob(".target*")) == []


# A disk that is full, a process that is killed.


def test_a_full_disk_in_a_switch(world: World):  # noqa: F811
    """Whatever cannot be made, nothing is lost, and the switch is ended or taken back later."""
    world.check_out()
    failed = []
    for step in range(1000):
        KILLER.arm(step, errno.ENOSPC)
        try:
            world.switch(1)
        except OSError as error:
            failed.append(error.errno)
        if KILLER.armed:  # nothing is left that could fail
            KILLER.disarm()
            break
        which = step % 2
        world.switch(which)
        assert of_directory(world.target) == world.trees[which], step
        assert world.status() == []
        world.switch(0)
    assert set(failed) == {errno.ENOSPC}
    assert len(failed) > 30


SWITCHING = """
import sys
from engine import Repository
with Repository.open(sys.argv[1]) as repository:
    roots = [repository.snapshot(bytes.fromhex(each)).root for each in sys.argv[3:]]
    number = 0
    while True:
        number += 1
        repository.checkouts.switch(sys.argv[2], roots[number % 2], outside_links=True)
        print(number, flush=True)
"""


@pytest.mark.parametrize("after", [1, 2, 5, 8])
def test_a_process_is_killed_while_it_switches(world: World, after: int):  # noqa: F811
    world.check_out()
    ids = [each.hex() for each in world.ids]
    command = [sys.executable, "-c", SWITCHING, world.repository.path, str(world.target), *ids]
    for which in [0, 1]:
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        assert child.stdout is not None
        for _ in range(after):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        for path, seen in of_directory(world.target).items():
            if b".amalgam-switch-" not in path and seen.kind != Kind.DIRECTORY:
                assert seen.data in {tree[path].data for tree in world.trees if path in tree}
        world.switch(which)
        assert of_directory(world.target) == world.trees[which]
        assert world.status() == []


def test_names_longer_than_a_disk_allows(forge: Forge, tmp_path: Path):
    """Deep paths are no matter, as each name is made in its directory; a target's own may be."""
    below = forge.file(b"f" * 255, forge.chunk(b"z" * 200))
    for _ in range(60):
        below = forge.directory(b"d" * 255, below)
    root = forge.root(below)
    forge.repository.check_out(root, str(tmp_path / "out"))
    assert forge.repository.checkouts.status(str(tmp_path / "out")) == []
    forge.repository.checkouts.switch(str(tmp_path / "out"), forge.root())
    assert os.listdir(tmp_path / "out") == []
    for target in [str(tmp_path / ("x" * 256)), str(tmp_path) + "/y" * 4000]:
        with pytest.raises(CheckoutRefusedError, match="name is too long"):
            forge.repository.check_out(root, target)
