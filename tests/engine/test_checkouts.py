"""Checkouts: compared with their tree, switched to another, committed; killed in between."""

import contextlib
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from engine import Repository, SnapshotId
from engine.errors import CorruptObjectError, MissingObjectError
from engine.host.leases import LeaseHeldError
from engine.mounted.vfs import Vfs
from engine.plain import checkouts, importing
from engine.plain.checkout_records import PREFIX, NotACheckoutError, new_record
from engine.plain.checkouts import PartialCheckoutError, SwitchInterruptedError
from engine.plain.filling import OPEN_DIRECTORY, CheckoutRefusedError, Fill
from engine.plain.local_edits import LocalEditsError
from engine.plain.stat_cache import cache_prefix
from engine.storage.content import pieces
from engine.storage.nodes import DEEPEST, Owner
from engine.storage.store import Db
from engine.trees.diffing import ChangeKind
from engine.trees.directory import directory_id, find
from engine.upkeep.holders import Holder, Target
from tests.conftest import Run
from tests.engine.killing import KILLER, Killed
from tests.engine.test_session_machine import make_base
from tests.engine.trees import RECENT, age, clone, noise, of_directory, paths, without_times

A, M, R, T, U = (
    ChangeKind.ADDED, ChangeKind.MODIFIED, ChangeKind.REMOVED, ChangeKind.TYPE, ChangeKind.METADATA,
)  # fmt: skip


class World:
    """Two snapshots that differ in every way, the second made of the first."""

    def __init__(self, repository: Repository, path: Path) -> None:
        self.repository, self.path = repository, path
        self.first = path / "first"
        self.first.mkdir()
        make_base(self.first)
        (self.first / "same/deep").mkdir(parents=True)
        (self.first / "same/deep/file").write_bytes(noise(50_000))
        (self.first / "going/down").mkdir(parents=True)
        (self.first / "going/down/file").write_bytes(b"going")
        for name in ["changed", "to directory", "to link", "mode", "link one", "near"]:
            (self.first / name).write_bytes(noise(40_000, len(name)))
        os.link(self.first / "link one", self.first / "link two")
        (self.first / "to file").mkdir()
        (self.first / "to file/below").write_bytes(b"below")
        (self.first / "sub").mkdir(0o750)
        (self.first / "sub/changed").write_bytes(b"1")
        age(self.first)
        self.second = path / "second"
        clone(self.first, self.second)
        second = self.second
        shutil.rmtree(second / "going")
        (second / "changed").write_bytes(noise(40_000, 77))
        (second / "sub/changed").write_bytes(b"2")
        os.setxattr(second / "sub", b"user.sub", b"x")
        (second / "to directory").unlink()
        (second / "to directory/a/b").mkdir(parents=True)
        (second / "to directory/a/b/c").write_bytes(noise(30_000, 3))
        (second / "to link").unlink()
        (second / "to link").symlink_to("changed")
        shutil.rmtree(second / "to file")
        (second / "to file").write_bytes(b"file")
        (second / "mode").chmod(0o755)
        os.link(second / "link one", second / "link three")
        (second / "new/er").mkdir(parents=True)
        (second / "new/er/file").write_bytes(noise(20_000, 9))
        for number, (_, absolute, status) in enumerate(reversed(list(paths(bytes(second))))):
            if status.st_mtime_ns > RECENT:
                ns = 1_100_000_000_000_000_007 + number
                os.utime(absolute, ns=(ns, ns), follow_symlinks=False)
        self.ids = [
            SnapshotId(repository.import_directory(str(each)).snapshot)
            for each in (self.first, second)
        ]
        self.roots = [repository.snapshot(each).root for each in self.ids]
        self.trees = [of_directory(each) for each in (self.first, second)]
        self.target = path / "target"

    def check_out(self, which: int = 0) -> None:
        shutil.rmtree(self.target, ignore_errors=True)
        self.repository.check_out(
            self.roots[which], str(self.target), snapshot=self.ids[which], outside_links=True
        )

    def switch(self, which: int, **options: str):
        return self.repository.checkouts.switch(
            str(self.target), self.roots[which], snapshot=self.ids[which], outside_links=True,
            **options,  # type: ignore[arg-type]
        )  # fmt: skip

    def status(self) -> list[tuple[bytes, ChangeKind]]:
        edits = self.repository.checkouts.status(str(self.target))
        return [(edit.path, edit.kind) for edit in edits]


@pytest.fixture
def world(repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(importing, "FRESH_NS", -(10**18))  # no test waits for time to pass
    return World(repository, tmp_path)


def test_switching_there_and_back(world: World):
    world.check_out()
    assert world.status() == []
    for which in [1, 0, 1, 1, 0]:
        world.switch(which)
        assert of_directory(world.target) == world.trees[which]
        assert world.status() == []
        found = world.repository.checkouts.find(str(world.target))
        assert (found.snapshot, found.root) == (world.ids[which], world.roots[which])
        result = world.repository.import_directory(str(world.target))
        assert result.root == world.roots[which]


def test_what_is_the_same_is_not_touched(world: World):
    world.check_out()
    before = os.stat(world.target / "same/deep/file"), os.stat(world.target / "near")
    report = world.switch(1)
    assert (os.stat(world.target / "same/deep/file"), os.stat(world.target / "near"))[0] == before[
        0
    ]
    assert report.written < 20


def test_status_without_its_cache(world: World):
    world.check_out()

    def lose(writer) -> None:
        for key in list(writer.keys(Db.IMPORTS)):
            writer.delete(Db.IMPORTS, key)

    world.repository.store.write(lose)
    assert world.status() == []
    world.switch(1)
    assert of_directory(world.target) == world.trees[1]


def edit(target: Path) -> None:
    (target / "changed").write_bytes(noise(40_000, 5))
    (target / "near").write_bytes(noise(40_000, 6))
    (target / "mode").unlink()
    (target / "added").mkdir()
    (target / "added/file").write_bytes(b"added")
    (target / "same/deep").chmod(0o700)
    (target / "sub/changed").unlink()
    (target / "sub/changed").symlink_to("x")


EDITS = [
    (b"added", A), (b"added/file", A), (b"changed", M), (b"mode", R), (b"near", M),
    (b"same/deep", U), (b"sub/changed", T),
]  # fmt: skip


def test_edits_are_found_and_stand_in_the_way(world: World):
    world.check_out()
    edit(world.target)
    assert world.status() == EDITS
    before = of_directory(world.target)
    with pytest.raises(LocalEditsError, match="'changed'") as caught:
        world.switch(1)
    assert [each.path for each in caught.value.edits] == [b"changed", b"mode", b"sub/changed"]
    assert of_directory(world.target) == before


def test_edits_are_kept(world: World):
    world.check_out()
    edit(world.target)
    report = world.switch(1, edits="keep")
    assert [each.path for each in report.kept] == [b"changed", b"mode", b"sub/changed"]
    assert world.status() == EDITS
    assert (world.target / "changed").read_bytes() == noise(40_000, 5)
    seen = of_directory(world.target)
    edited = {path for path, _ in EDITS}
    assert {p: s.data for p, s in seen.items() if p not in edited} == {
        p: s.data for p, s in world.trees[1].items() if p not in edited
    }


def test_edits_are_overwritten(world: World):
    world.check_out()
    edit(world.target)
    (world.target / "going/untracked/x").mkdir(parents=True)
    (world.target / "going/untracked/file").write_bytes(b"x")
    with pytest.raises(LocalEditsError, match="going/untracked"):
        world.switch(1)
    world.switch(1, edits="overwrite")
    assert world.status() == [(p, k) for p, k in EDITS if p[:4] in {b"adde", b"near", b"same"}]
    assert not (world.target / "going").exists()


def test_an_edit_that_was_imported_is_still_an_edit(world: World):
    """The stat cache says then that the file is as it was imported, not as it was made."""
    world.check_out()
    (world.target / "same/deep/file").write_bytes(noise(50_000, 8))
    (world.target / "changed").write_bytes(noise(40_000, 8))
    age(world.target / "same", 1_200_000_000_000_000_000)
    world.repository.import_directory(str(world.target))
    assert (b"changed", M) in world.status()
    with pytest.raises(LocalEditsError):
        world.switch(1)
    world.switch(1, edits="keep")
    result = world.repository.import_directory(str(world.target))
    entry = find(world.repository.objects, result.root, b"same/deep/file")
    assert entry is not None
    assert entry != find(world.repository.objects, world.roots[1], b"same/deep/file")
    assert world.repository.checkouts.commit(str(world.target)).root == result.root


def test_commit_goes_on_from_the_new_snapshot(world: World):
    world.check_out()
    checkouts = world.repository.checkouts
    same = checkouts.commit(str(world.target))
    assert (same.snapshot, same.changed, same.report.read_files) == (world.ids[0], False, 0)
    edit(world.target)
    done = checkouts.commit(str(world.target), message="edited", ref="mine")
    record = world.repository.snapshot(SnapshotId(done.snapshot))
    assert record.parents == (world.ids[0],)
    assert (record.message, world.repository.refs()["mine"]) == ("edited", done.snapshot)
    assert done.report.read_files <= 6
    assert world.status() == []
    world.switch(0)
    assert of_directory(world.target) == world.trees[0]


def test_a_part_of_a_snapshot(world: World):
    entry = find(world.repository.objects, world.roots[0], b"same/deep")
    assert entry is not None
    target = str(world.target)
    world.repository.check_out(entry, target, snapshot=world.ids[0], within=b"same/deep")
    assert os.listdir(target) == ["file"]
    with pytest.raises(PartialCheckoutError):
        world.repository.checkouts.commit(target)
    file = find(world.repository.objects, world.roots[0], b"same/deep/file")
    assert file is not None
    world.repository.check_out(file, target + "2")
    assert Path(target + "2").read_bytes() == noise(50_000)


def test_what_is_no_checkout(world: World, tmp_path: Path):
    world.check_out()
    checkouts = world.repository.checkouts
    for path in [world.first, tmp_path / "none"]:
        with pytest.raises(NotACheckoutError):
            checkouts.find(str(path))
    clone(world.target, tmp_path / "copy")
    mark = os.getxattr(world.target, "user.amalgam.checkout")
    os.setxattr(tmp_path / "copy", "user.amalgam.checkout", mark)
    with pytest.raises(NotACheckoutError, match="copy"):
        checkouts.find(str(tmp_path / "copy"))
    world.target.rename(tmp_path / "moved")
    assert checkouts.status(str(tmp_path / "moved")) == []


def test_one_at_a_time(world: World):
    world.check_out()
    with (
        world.repository.checkouts._hold(str(world.target), "testing"),
        pytest.raises(LeaseHeldError),
    ):
        world.switch(1)


def test_collection_keeps_what_a_checkout_shows(world: World):
    world.check_out()
    world.repository.check_out(world.roots[1], str(world.path / "other"), outside_links=True)
    for each in world.ids:
        world.repository.store.write(lambda w, i=each: w.delete(Db.SNAPSHOTS, i))  # type: ignore[misc]
    world.repository.collect()
    assert world.status() == []
    world.switch(1)
    assert of_directory(world.target) == world.trees[1]
    shutil.rmtree(world.target)
    shutil.rmtree(world.path / "other")
    world.repository.collect()
    assert world.repository.checkouts.all() == []
    with world.repository.store.read() as reader:
        assert reader.count(Db.NODES) == 0


def test_what_a_checkout_shows_is_checked_and_counted(world: World):
    world.check_out()
    repository = world.repository
    for each in world.ids:
        repository.store.write(lambda w, i=each: w.delete(Db.SNAPSHOTS, i))  # type: ignore[misc]
    assert repository.verify().damage == []
    held = list(repository.holders(Target("node", directory_id(world.roots[0]))))
    assert held == [Holder("checkout", str(world.target))]
    assert [tree.kind for tree in repository.usage().trees] == ["checkout"]
    file = find(repository.objects, world.roots[0], b"same/deep/file")
    assert file is not None
    chunk = next(ref.id for ref in pieces(repository.objects, file) if ref.id is not None)
    repository.store.write(lambda writer: writer.delete(Db.CHUNKS, chunk))
    assert {(each.where, each.path) for each in repository.verify().damage} >= {
        (str(world.target), b"same/deep/file")
    }


def test_a_damaged_record(world: World):
    world.check_out()
    repository = world.repository
    mark = os.getxattr(world.target, "user.amalgam.checkout")
    repository.store.write(lambda writer: writer.put(Db.META, PREFIX + mark, b"\x81\x01"))
    with pytest.raises(CorruptObjectError):
        world.status()
    with pytest.raises(CorruptObjectError):
        repository.collect()
    assert [each.kind for each in repository.verify().damage] == ["checkout"]
    assert repository.repair().left.damage == []
    repository.collect()
    with pytest.raises(NotACheckoutError):
        world.status()


def test_a_tree_that_was_collected_meanwhile(world: World):
    """Somebody removes the snapshot between finding it and checking it out."""
    root, identifier = world.roots[1], world.ids[1]
    world.check_out()
    world.repository.store.write(lambda writer: writer.delete(Db.SNAPSHOTS, identifier))
    with pytest.raises(MissingObjectError):
        world.repository.check_out(root, str(world.path / "other"), snapshot=identifier)
    with pytest.raises(MissingObjectError):
        world.switch(1)
    assert world.status() == []
    assert not (world.path / "other").exists()
    assert len(list(Path(world.repository.path, "locks").glob("checkout-*"))) == 1


def test_a_collection_during_a_checkout(world: World, monkeypatch: pytest.MonkeyPatch):
    """The snapshot is removed while its tree is written: the checkout is whole all the same."""
    monkeypatch.setattr(
        checkouts, "new_record",
        lambda *arguments: (
            world.repository.store.write(lambda w: w.delete(Db.SNAPSHOTS, world.ids[0])),
            world.repository.collect(),
            new_record(*arguments),
        )[-1],
    )  # fmt: skip
    world.check_out()
    assert of_directory(world.target) == world.trees[0]
    assert world.repository.verify().damage == []
    assert world.status() == []


def test_a_killed_switch_is_ended_or_taken_back(world: World):
    world.check_out()
    steps = 0
    for step in range(1000):
        KILLER.arm(step)
        try:
            world.switch(1)
        except Killed:
            pass
        else:
            break
        finally:
            KILLER.disarm()
        steps += 1
        seen = of_directory(world.target)
        for path, each in seen.items():
            if b".amalgam-switch-" not in path and each.kind != 2:
                datas = {tree[path].data for tree in world.trees if path in tree}
                assert each.data in datas, path
        found = world.repository.checkouts.find(str(world.target))
        if step % 3 and found.interrupted:
            with pytest.raises(SwitchInterruptedError):
                world.repository.checkouts.commit(str(world.target))
            between = {b"to file", b"to directory"}  # what changes its kind is away for an instant
            assert [p for p, k in world.status() if k not in {U, A} and p not in between] == []
        which = step % 2
        world.switch(which)
        assert of_directory(world.target) == world.trees[which], step
        assert world.status() == []
        world.switch(0)
        assert of_directory(world.target) == world.trees[0]
    assert steps > 40


def test_directories_that_others_swap_for_links(world: World, tmp_path: Path):
    """Somebody replaces directories by links to elsewhere while a checkout is made there."""
    outside = tmp_path / "outside"
    outside.mkdir()
    base = tmp_path / "base"
    for n in range(60):
        (base / f"d{n}/e").mkdir(parents=True)
        for m in range(6):
            (base / f"d{n}/e/f{m}").write_bytes(noise(3000, n * 10 + m))
    root = world.repository.import_directory(str(base)).root
    stop = threading.Event()

    def swap() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            with contextlib.suppress(OSError):
                for found in tmp_path.glob(".hostile.checkout-*/d*/e"):
                    found.rename(tmp_path / f"stolen{number}")
                    found.symlink_to(outside)
                    break

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(5):
            try:
                world.repository.check_out(root, str(tmp_path / "hostile"))
            except OSError:
                continue
            shutil.rmtree(tmp_path / "hostile")
    finally:
        stop.set()
        thread.join()
    assert os.listdir(outside) == []


def test_what_a_dead_checkout_left_is_removed(world: World, tmp_path: Path):
    for step in [3, 30]:
        KILLER.arm(step)
        try:
            with pytest.raises(Killed):
                world.check_out()
        finally:
            KILLER.disarm()
    (left,) = tmp_path.glob(".target.checkout-*")  # the second has removed what the first left
    (tmp_path / ".target.checkout-00000000").mkdir()  # nobody's checkout
    world.check_out()
    assert not left.exists()
    assert [each.name for each in tmp_path.glob(".target*")] == [".target.checkout-00000000"]
    assert of_directory(world.target) == world.trees[0]


def test_a_large_file_is_written_in_ranges(repository: Repository, tmp_path: Path):
    base = tmp_path / "base"
    base.mkdir()
    with (base / "large").open("wb") as file:
        file.write(noise(20 << 20))
        file.seek(70 << 20)
        file.write(noise(9 << 20, 1))
        file.truncate(100 << 20)
    age(base)
    root = repository.import_directory(str(base)).root
    seen: list[int] = []
    repository.check_out(
        root, str(tmp_path / "target"), progress=lambda n, total, *_: seen.append(n)
    )
    assert of_directory(tmp_path / "target") == of_directory(base)
    assert (tmp_path / "target/large").stat().st_blocks * 512 < 31 << 20
    assert seen == sorted(seen)
    assert (len(seen) > 6, seen[-1]) == (True, 100 << 20)


def test_names_that_a_disk_takes_for_one(repository: Repository, tmp_path: Path):
    """What a disk that folds case says of the second name, said here of one that is there."""
    for kind in ["file", "directory"]:
        base, target = tmp_path / kind, tmp_path / f"{kind} target"
        (base / "d").mkdir(parents=True)
        (target / "d/readme").mkdir(parents=True)
        (base / "d/readme").mkdir() if kind == "directory" else (base / "d/readme").touch()
        (target / "d/readme").rename(target / "readme")
        (target / "d").rmdir()
        root = repository.import_directory(str(base / "d")).root
        fd = os.open(target, OPEN_DIRECTORY)
        try:
            with pytest.raises(CheckoutRefusedError, match="target/readme': the filesystem takes"):
                Fill(repository.objects, root, fd, str(target), None).run()
        finally:
            os.close(fd)


UNPRIVILEGED = """
import os, sys
from engine import Repository
base = sys.argv[1] + "/base"
os.makedirs(base + "/d")
open(base + "/d/file", "w").write("first")
os.chmod(base + "/d", 0o555); os.chmod(base, 0o555)
with Repository.create(sys.argv[1] + "/store") as repository:
    first = repository.import_directory(base).root
    os.chmod(base, 0o755); os.chmod(base + "/d", 0o755)
    open(base + "/d/file", "w").write("second"); open(base + "/d/new", "w").write("new")
    os.utime(base + "/d/file", (7, 7)); os.utime(base + "/d/new", (7, 7))
    os.chmod(base + "/d", 0o555); os.chmod(base, 0o555)
    second = repository.import_directory(base).root
    target = sys.argv[1] + "/target"
    repository.check_out(first, target)
    for root in [second, first, second]:
        repository.checkouts.switch(target, root)
        print([edit.path for edit in repository.checkouts.status(target)])
"""


@pytest.mark.unprivileged
def test_directories_that_nobody_may_write(public_path: Path, as_user: Run):
    done = as_user("-c", UNPRIVILEGED, str(public_path))
    assert (done.stderr, done.stdout) == ("", "[]\n" * 3)
    assert without_times(of_directory(public_path / "target")) == without_times(
        of_directory(public_path / "base")
    )
    subprocess.run(["chmod", "-R", "u+rwx", str(public_path)], check=True)


def test_a_session_that_is_checked_out(world: World):
    """Its snapshot, once committed, stands on what the session stood on."""
    repository, checkouts = world.repository, world.repository.checkouts
    repository.sessions.create("work", (None, None, world.ids[0]))
    vfs = Vfs(repository, Owner(os.getuid(), os.getgid()), {})
    with contextlib.closing(vfs):
        vfs.session("work").overlay.root.create(b"made in it", 0o644, vfs.owner)
    target = str(world.target)
    with repository.tree("@work") as root:
        repository.check_out(root, target, base=world.ids[0], outside_links=True)
    assert sorted(set(of_directory(target)) - set(world.trees[0])) == [b"made in it"]
    assert world.status() == []
    assert checkouts.find(target).base == world.ids[0]
    done = checkouts.commit(target)
    assert done.changed
    assert repository.snapshot(SnapshotId(done.snapshot)).parents == (world.ids[0],)
    assert checkouts.find(target).snapshot == done.snapshot
    checkouts.switch(target, world.roots[0], base=world.ids[0], outside_links=True)
    assert checkouts.commit(target).snapshot == world.ids[0]  # nothing differs from it


def test_one_that_was_made_in_the_place_of_another(world: World):
    world.check_out()
    shutil.rmtree(world.target)
    world.check_out(1)
    world.repository.collect()
    prefix = cache_prefix(str(world.target))
    with world.repository.store.read() as reader:
        assert any(key.startswith(prefix) for key in reader.keys(Db.IMPORTS))
    assert [each.snapshot for each in world.repository.checkouts.all()] == [world.ids[1]]
    assert world.status() == []


def test_another_part_of_a_snapshot(world: World):
    entry = find(world.repository.objects, world.roots[0], b"same")
    assert entry is not None
    world.check_out()
    checkouts, target = world.repository.checkouts, str(world.target)
    checkouts.switch(target, entry, snapshot=world.ids[0], within=b"same")
    assert os.listdir(target) == ["deep"]
    with pytest.raises(PartialCheckoutError):
        checkouts.commit(target)
    checkouts.switch(target, world.roots[1], snapshot=world.ids[1], within=b"", outside_links=True)
    assert checkouts.commit(target).snapshot == world.ids[1]


def test_a_file_that_gets_another_name(world: World):
    """One of its names stays as it was, and so does its entry: the other is linked to it."""
    first, second = world.path / "links1", world.path / "links2"
    (first / "d").mkdir(parents=True)
    (first / "d/stays").write_bytes(noise(5000))
    os.link(first / "d/stays", first / "goes")
    age(first)
    clone(first, second)
    (second / "goes").rename(second / "comes")
    roots = [world.repository.import_directory(str(each)).root for each in (first, second)]
    target = world.path / "linked"
    world.repository.check_out(roots[0], str(target))
    world.repository.checkouts.switch(str(target), roots[1])
    assert of_directory(target) == of_directory(second)
    (target / "d/stays").write_bytes(b"edited")
    (target / "comes").unlink()
    world.repository.checkouts.switch(str(target), roots[0], edits="keep")
    assert (target / "d/stays").read_bytes() == b"edited"
    assert (target / "goes").read_bytes() == noise(5000)


def test_the_progress_of_a_switch(world: World):
    world.check_out()
    seen: list[tuple[int, int | None]] = []
    report = world.repository.checkouts.switch(
        str(world.target), world.roots[1], outside_links=True,
        progress=lambda done, total, *_: seen.append((done, total)),
    )  # fmt: skip
    assert seen == sorted(seen)
    assert seen[-1] == (report.bytes, report.bytes)


def test_directories_that_stand_inside_each_other_as_deep_as_may_be(
    repository: Repository, tmp_path: Path
):
    roots = []
    for number in range(2):
        with contextlib.ExitStack() as stack:
            base = tmp_path / f"base{number}"
            base.mkdir()
            fd = os.open(base, OPEN_DIRECTORY)
            stack.callback(os.close, fd)
            for _ in range(DEEPEST):
                os.mkdir("d", dir_fd=fd)
                fd = os.open("d", OPEN_DIRECTORY, dir_fd=fd)
                stack.callback(os.close, fd)
            file = os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
            os.write(file, noise(200, number))
            os.close(file)
        roots.append(repository.import_directory(str(base)).root)
    target = str(tmp_path / "target")
    repository.check_out(roots[0], target)
    assert repository.checkouts.status(target) == []
    repository.checkouts.switch(target, roots[1])
    assert repository.import_directory(target, use_cache=False).root == roots[1]
    empty = tmp_path / "empty"
    empty.mkdir()
    repository.checkouts.switch(target, repository.import_directory(str(empty)).root)
    assert os.listdir(target) == []
