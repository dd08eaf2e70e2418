"""Owners: what a session, a store and everything that goes in and out make of them.

Only root can give files away, so most of this is skipped for anybody else.
"""

import io
import os
import stat
import tarfile
from pathlib import Path

import msgspec
import pytest

from engine import Repository, SnapshotId
from engine.archives.bundles import BundleReader
from engine.errors import CorruptObjectError
from engine.host.losses import SET_ID
from engine.mounted.inodes import Changes, entry_attributes
from engine.mounted.vfs import SNAPSHOTS, Vfs, base_path
from engine.sessions.session_tree import SessionTree
from engine.sessions.sessions import CommitReport
from engine.storage.nodes import (
    Entry,
    Kind,
    Owner,
    Totals,
    decode,
    directory_node,
    encode,
    encode_item,
    node_id,
)
from engine.storage.store import Db
from engine.trees.diffing import ChangeKind
from engine.trees.directory import find, walk
from engine.upkeep.holders import Target
from tests.conftest import run_as_user
from tests.engine.kernel import Kernel
from tests.engine.trees import of_entry

ME = Owner(os.getuid(), os.getgid())
OTHER = Owner(4711, 4712)
THIRD = Owner(1, (1 << 32) - 2)

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def commit(repository: Repository, vfs: Vfs, name: str = "s") -> CommitReport:
    live = vfs.session(name)
    with repository.storing():
        freeze = live.held.freeze(live.overlay)
        freeze.prepare()
        report = live.held.commit(freeze, "", None, None, live.overlay)
    live.held.clean()
    return report


def owners(kernel: Kernel, *paths: bytes) -> list[Owner]:
    found = [kernel.stat(kernel.resolve(path)) for path in paths]
    return [Owner(each.uid, each.gid) for each in found]


def owners_of(repository: Repository, root: Entry) -> dict[bytes, Owner | None]:
    return {b"": root.owner} | {p: e.owner for p, e in walk(repository.objects, root)}


# The format.


def test_an_entry_without_an_owner_is_what_it_was():
    file = Entry(b"f", Kind.FILE, 0o644, 1, 0, b"")
    assert encode(file)[0] == 0x89
    assert encode(file) == encode_item(file)
    owned = msgspec.structs.replace(file, owner=THIRD)
    assert encode(owned)[0] == 0x8A
    assert encode(owned) == encode(file)[:0].join((b"\x8a", encode(file)[1:])) + bytes.fromhex(
        "82011afffffffe"
    )
    folder = Entry(b"d", Kind.DIRECTORY, 0o755, 1, 0, bytes(32), (), None, Totals(3, 1, 2), OTHER)
    for entry in (file, owned, folder, msgspec.structs.replace(folder, totals=Totals(3, 1))):
        node = directory_node((entry,))
        data = encode(node)
        assert encode_item(entry) == encode(entry)
        assert encode_item(entry) in data
        assert decode(node_id(data), data) == node


@pytest.mark.parametrize(
    "end", ["f6", "8101", "83010203", "820120", "82011b0000000100000000", "82011affffffff", "01"]
)
def test_owners_that_no_entry_can_have(end: str):
    file = encode(Entry(b"f", Kind.FILE, 0o644, 1, 0, b""))
    data = b"\x82\x01\x81\x8a" + file[1:] + bytes.fromhex(end)
    with pytest.raises(CorruptObjectError):
        decode(node_id(data), data)


def test_totals_say_none_by_leaving_it_out():
    folder = Entry(b"d", Kind.DIRECTORY, 0o755, 1, 0, bytes(32), (), None, Totals(3, 1, 2))
    data = encode(directory_node((folder,)))
    for wrong in (b"\x83\x03\x01\x00", b"\x83\x03\x01\x04"):
        bad = data.replace(b"\x83\x03\x01\x02", wrong)
        with pytest.raises(CorruptObjectError):
            decode(node_id(bad), bad)


# A live session in a store that keeps none.


@root_only
def test_a_live_session_keeps_its_owners_over_a_commit(repository: Repository, session: str):
    vfs = Vfs(repository, ME, {})
    kernel = Kernel(vfs, "s")
    for path in (b"a/c", b"d/deep", b"b/a", b"b/c", b"c"):
        kernel.change(kernel.resolve(path), Changes(uid=OTHER.uid, gid=OTHER.gid))
    kernel.change(kernel.resolve(b"a/c"), Changes(mode=0o4750))
    paths = (b"a/c", b"d/deep", b"b/a", b"b/c", b"c", b"a/new", b"a/b", b"")
    before = owners(kernel, *paths)
    assert before == [OTHER] * 6 + [ME] * 2
    report = commit(repository, vfs)
    assert report.lost_owners == 7  # `c` has three names
    assert owners(kernel, *paths) == before
    root = repository.snapshot(SnapshotId(report.snapshot)).root
    # A set-id bit stays where the owner does: in the session.
    assert report.lost == {SET_ID: 1}
    assert stat.S_IMODE(kernel.stat(kernel.resolve(b"a/c")).mode) == 0o4750
    assert find(repository.objects, root, b"a/c").mode == 0o750  # type: ignore[union-attr]
    assert set(owners_of(repository, root).values()) == {None}
    # What is copied up, renamed and written then goes on belonging to them.
    kernel.inode(kernel.resolve(b"a/c")).write(0, b"more")
    kernel.rename(kernel.resolve(b"d"), b"deep", kernel.root, b"moved")
    made = kernel.create(kernel.resolve(b"moved"), b"x", stat.S_IFREG | 0o644)
    assert owners(kernel, b"a/c", b"moved", b"moved/x", b"c") == [OTHER, OTHER, ME, OTHER]
    assert made
    second = commit(repository, vfs)
    assert owners(kernel, b"a/c", b"moved", b"c") == [OTHER] * 3
    # Nothing changed: no snapshot, no owner lost in the session.
    assert not commit(repository, vfs).changed
    assert commit(repository, vfs).snapshot == second.snapshot
    # Another process takes it: a daemon started anew.
    vfs.close()
    repository.fork("s", "t")
    for name in ("s", "t"):
        again = Vfs(repository, ME, {})
        other = Kernel(again, name)
        assert owners(other, b"a/c", b"moved", b"c", b"a/b") == [OTHER] * 3 + [ME]
        with repository.store.read() as reader:
            assert reader.has(Db.NODES, bytes(repository.sessions.get(name).root.content))  # type: ignore[arg-type]
        again.close()
    repository.collect()
    assert repository.verify().damage == []


@root_only
def test_the_tree_with_owners_shares_what_nobody_else_owns(repository: Repository, session: str):
    """So the cost of a commit follows what was given away, not the tree."""
    vfs = Vfs(repository, ME, {})
    kernel = Kernel(vfs, "s")
    kernel.change(kernel.resolve(b"a/c"), Changes(uid=OTHER.uid))
    commit(repository, vfs)
    record = repository.sessions.get("s")
    assert record.plain is not None
    for path in (b"b", b"d", b"a/sub"):
        assert find(repository.objects, record.root, path) == find(
            repository.objects, record.plain, path
        )
    # Both trees are the session's: it is one holder, and counted once.
    for tree in (record.root, record.plain):
        target = Target("node", bytes(tree.content))  # type: ignore[arg-type]  # a directory's
        found = [each.kind for each in repository.holders(target)]
        assert found.count("session") == 1
    (used,) = [each for each in repository.usage().trees if each.kind == "session"]
    assert used.own.nodes == 2  # the root and `a`, with owners
    # Back to us: the trees are one again.
    kernel.change(kernel.resolve(b"a/c"), Changes(uid=ME.uid))
    assert commit(repository, vfs).lost_owners == 0
    assert repository.sessions.get("s").plain is None
    vfs.close()


@root_only
def test_a_session_that_was_given_away_and_did_not_change_is_its_snapshot(
    repository: Repository, session: str, first: SnapshotId
):
    vfs = Vfs(repository, ME, {})
    kernel = Kernel(vfs, "s")
    kernel.change(kernel.resolve(b"a/c"), Changes(uid=OTHER.uid))
    report = commit(repository, vfs)
    assert (report.snapshot, report.changed, report.lost_owners) == (first, False, 1)
    assert owners(kernel, b"a/c") == [Owner(OTHER.uid, ME.gid)]
    with repository.store.read() as reader:
        assert reader.has(Db.SNAPSHOTS, first)
    vfs.close()
    with repository.tree("@s") as root:
        assert root == repository.snapshot(first).root


@root_only
def test_the_kernels_overlayfs_is_given_a_base_with_owners(repository: Repository, session: str):
    vfs = Vfs(repository, ME, {})
    kernel = Kernel(vfs, "s")
    kernel.change(kernel.resolve(b"a/c"), Changes(uid=OTHER.uid, gid=OTHER.gid))
    commit(repository, vfs)
    place = base_path(repository, repository.sessions.get("s"))
    at = vfs.inode(SNAPSHOTS).lookup(place.removeprefix("snapshots/").encode())
    for name in (b"a", b"c"):
        assert at is not None
        at = at.lookup(name)
    assert at is not None
    shown = at.attributes()
    assert Owner(shown.uid, shown.gid) == OTHER
    vfs.close()


@root_only
def test_a_full_tree_has_owners_and_brings_them_back(repository: Repository, session: str):
    vfs = Vfs(repository, ME, {})
    kernel = Kernel(vfs, "s")
    kernel.change(kernel.resolve(b"a/c"), Changes(uid=OTHER.uid, gid=OTHER.gid, mode=0o4711))
    commit(repository, vfs)
    vfs.close()
    with repository.sessions.hold("s", "running") as held, repository.storing():
        tree = SessionTree(repository.store, repository.objects, held)
        tree.make()
        status = os.lstat(tree.path + "/a/c")
        assert (status.st_uid, status.st_gid) == OTHER
        assert stat.S_IMODE(status.st_mode) == 0o4711
        os.chown(tree.path + "/a/b", *THIRD)
        tree.take_in()
    again = Kernel(Vfs(repository, ME, {}), "s")
    assert owners(again, b"a/c", b"a/b", b"b", b"") == [OTHER, THIRD, ME, ME]
    again.vfs.close()


# A store that keeps them.


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tree of three users."""
    path = tmp_path / "source"
    (path / "srv/db").mkdir(parents=True)
    (path / "srv/db/table").write_bytes(b"rows " * 1000)
    (path / "srv/link").symlink_to("db")
    (path / "mine").write_bytes(b"mine")
    os.mkfifo(path / "srv/pipe")
    for name in ("srv", "srv/db", "srv/db/table", "srv/pipe", "srv/link"):
        os.chown(path / name, *OTHER, follow_symlinks=False)
    os.chown(path / "srv/link", *THIRD, follow_symlinks=False)
    (path / "srv/db/table").chmod(0o2750)
    return path


SOURCE: dict[bytes, Owner | None] = {
    b"": ME, b"mine": ME, b"srv": OTHER, b"srv/db": OTHER, b"srv/db/table": OTHER,
    b"srv/link": THIRD, b"srv/pipe": OTHER,
}  # fmt: skip


@root_only
def test_a_directory_comes_in_with_its_owners_if_it_is_said(
    repository: Repository, source: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("engine.plain.importing.FRESH_NS", -(10**12))  # the clock is fine enough
    without = repository.import_directory(str(source))
    assert set(owners_of(repository, without.root).values()) == {None}
    assert without.report.lost_owners == 5
    kept = repository.import_directory(str(source), owners=True)
    assert owners_of(repository, kept.root) == SOURCE
    assert kept.report.lost_owners == 0
    assert kept.root.totals is not None
    assert kept.root.totals.owners == 6
    # Again, by the stat cache; and without, which is the same tree as ever.
    again = repository.import_directory(str(source), owners=True)
    assert (again.root, again.report.read_files) == (kept.root, 0)
    assert repository.import_directory(str(source)).root == without.root
    repository.keep_owners()
    assert repository.import_directory(str(source)).root == kept.root
    os.chown(source / "mine", *OTHER)
    changed = repository.import_directory(str(source)).root
    assert owners_of(repository, changed) == SOURCE | {b"mine": OTHER}
    (change,) = repository.diff(kept.root, changed)
    assert (change.path, change.kind) == (b"mine", ChangeKind.METADATA)
    assert repository.verify().damage == []


@root_only
def test_a_session_on_a_tree_with_owners_keeps_them_in_its_snapshots(
    repository: Repository, source: Path
):
    kept = repository.import_directory(str(source), owners=True)
    repository.sessions.create("s", (None, None, SnapshotId(kept.snapshot)))
    vfs = Vfs(repository, ME, {})
    kernel = Kernel(vfs, "s")
    assert owners(kernel, *SOURCE) == list(SOURCE.values())
    kernel.inode(kernel.resolve(b"srv/db/table")).write(0, b"x")
    kernel.create(kernel.resolve(b"srv"), b"new", stat.S_IFREG | 0o600)
    kernel.change(kernel.resolve(b"mine"), Changes(uid=THIRD.uid, gid=THIRD.gid))
    report = commit(repository, vfs)
    assert report.lost_owners == 0
    root = repository.snapshot(SnapshotId(report.snapshot)).root
    assert owners_of(repository, root) == SOURCE | {b"srv/new": ME, b"mine": THIRD}
    assert repository.sessions.get("s").plain is None
    vfs.close()


@root_only
def test_out_to_archives_and_directories_and_in_again(
    repository: Repository, source: Path, tmp_path: Path
):
    kept = repository.import_directory(str(source), owners=True).root
    archive = io.BytesIO()
    repository.export_tar(kept, archive, set_id=True)
    with tarfile.open(fileobj=io.BytesIO(archive.getvalue())) as opened:
        members = {each.name: each for each in opened}
    assert (members["srv/db/table"].uid, members["srv/db/table"].gid) == OTHER
    assert (members["srv/link"].uid, members["srv/link"].gid) == THIRD
    assert (members["srv"].uname, members["srv"].gname) == ("", "")
    archive.seek(0)
    assert repository.import_tar(archive, set_id=True, owners=True).root == kept
    archive.seek(0)
    asked = repository.import_tar(archive, owners=True)
    assert asked.report.lost == {SET_ID: 1}  # an archive may name any owner
    assert owners_of(repository, asked.root) == owners_of(repository, kept)
    archive.seek(0)
    plain = repository.import_tar(archive)
    assert set(owners_of(repository, plain.root).values()) == {None}
    assert plain.report.lost_owners == 3  # four of seven are one user's
    repository.export_oci([], kept, str(tmp_path / "image"), set_id=True)
    assert repository.import_oci(str(tmp_path / "image"), set_id=True, owners=True).root == kept
    safe = repository.check_out(kept, str(tmp_path / "safe"))
    assert safe.set_id_dropped == 1
    assert stat.S_IMODE(os.lstat(tmp_path / "safe/srv/db/table").st_mode) == 0o750
    assert repository.checkouts.status(str(tmp_path / "safe")) == []
    assert repository.checkouts.commit(str(tmp_path / "safe")).root == kept
    repository.check_out(kept, str(tmp_path / "out"), set_id=True)
    for path, owner in SOURCE.items():
        status = os.lstat(tmp_path / "out" / os.fsdecode(path))
        assert (status.st_uid, status.st_gid) == owner, path
    assert stat.S_IMODE(os.lstat(tmp_path / "out/srv/db/table").st_mode) == 0o2750
    assert repository.checkouts.status(str(tmp_path / "out")) == []
    os.chown(tmp_path / "out/mine", *OTHER)
    (edit,) = repository.checkouts.status(str(tmp_path / "out"))
    assert (edit.path, edit.kind) == (b"mine", ChangeKind.METADATA)
    done = repository.checkouts.commit(str(tmp_path / "out"))
    assert owners_of(repository, done.root) == SOURCE | {b"mine": OTHER}


@root_only
def test_bundles_carry_owners_as_another_version(
    repository: Repository, source: Path, tmp_path: Path
):
    (source / "many").mkdir()
    for number in range(300):  # a directory in pages
        (source / f"many/{number}").touch()
    kept = repository.import_directory(str(source), owners=True)
    bundle = io.BytesIO()
    repository.create_bundle(bundle)
    assert BundleReader(io.BytesIO(bundle.getvalue())).manifest.version == 2
    with Repository.create(str(tmp_path / "other")) as other:
        other.apply_bundle(io.BytesIO(bundle.getvalue()), set_id=True)
        there = other.snapshot(SnapshotId(kept.snapshot)).root
        assert owners_of(other, there) == owners_of(repository, kept.root)
        assert there.totals is not None
        assert there.totals.owners == there.totals.entries == 307
        assert other.verify().damage == []


@root_only
def test_owners_merge_as_modes_do(repository: Repository, source: Path):
    base = SnapshotId(repository.import_directory(str(source), owners=True).snapshot)

    def side(name: str, **given: Owner) -> SnapshotId:
        repository.sessions.create(name, (None, None, base))
        vfs = Vfs(repository, ME, {})
        kernel = Kernel(vfs, name)
        for path, owner in given.items():
            ino = kernel.resolve(path.encode())
            kernel.change(ino, Changes(uid=owner.uid, gid=owner.gid))
        report = commit(repository, vfs, name)
        vfs.close()
        return SnapshotId(report.snapshot)

    ours, theirs = side("ours", mine=OTHER), side("theirs", srv=THIRD)
    merged = repository.merge(ours, theirs)
    assert merged.snapshot is not None
    found = owners_of(repository, repository.snapshot(SnapshotId(merged.snapshot)).root)
    assert found == SOURCE | {b"mine": OTHER, b"srv": THIRD}
    both = repository.merge(ours, side("again", mine=THIRD))
    (conflict,) = both.conflicts
    assert (conflict.path, conflict.kind.value) == (b"mine", "owner")


@root_only
def test_a_workspace_keeps_the_owners_of_what_it_writes_to(repository: Repository, source: Path):
    base = SnapshotId(repository.import_directory(str(source), owners=True).snapshot)
    workspace = repository.workspace(base)
    workspace.write("srv/db/table", b"short")
    workspace.chmod("srv/db/table", 0o600)
    workspace.write("srv/db/new", b"new")
    root = workspace.commit().root
    assert owners_of(repository, root) == SOURCE | {b"srv/db/new": None}


def test_who_is_not_root_sees_all_files_as_his_own():
    program = """
import os
from engine.host.owners import Recording, shown
from engine.storage.nodes import Owner
me = Owner(os.getuid(), os.getgid())
assert shown(Owner(4711, 4712), me) == me == shown(None, me)
status = os.stat("/proc/self")
keeping, plain = Recording(keeps=True), Recording(keeps=False)
assert keeping.owner(status) == me and plain.owner(status) is None
# What was somebody else's, and is shown as one's own, stays that one's.
assert keeping.owner(status, Owner(4711, 4712)) == Owner(4711, 4712)
assert keeping.owner(status, me) == me
"""
    done = run_as_user("-c", program)
    assert done.returncode == 0, done.stderr


ORDINARY = """
import io, os, sys, tarfile
from pathlib import Path
from engine import Repository, SnapshotId
from engine.mounted.vfs import Vfs
from engine.sessions.session_tree import SessionTree
from engine.storage.nodes import Owner
from engine.trees.directory import walk
from tests.engine.kernel import Kernel

home, me = sys.argv[1], Owner(os.getuid(), os.getgid())
packed = io.BytesIO()
with tarfile.open(fileobj=packed, mode="w") as archive:
    for name, kind in [(".", tarfile.DIRTYPE), ("etc", tarfile.DIRTYPE), ("etc/a", tarfile.REGTYPE),
                       ("etc/b", tarfile.REGTYPE)]:
        member = tarfile.TarInfo(name)
        member.type, member.mode, member.size = kind, 0o755, 2 * (kind == tarfile.REGTYPE)
        member.uid, member.gid = (4711, 4712) if name == "etc/b" else (0, 0)
        archive.addfile(member, io.BytesIO(b"x\\n"))
packed.seek(0)
root, other = Owner(0, 0), Owner(4711, 4712)
expected = {b"etc": root, b"etc/a": root, b"etc/b": other}

def owners(repository, tree):
    assert tree.owner == root
    return {path: entry.owner for path, entry in walk(repository.objects, tree)}

with Repository.create(home + "/store") as repository:
    base = repository.import_tar(packed, owners=True)
    assert owners(repository, base.root) == expected
    repository.sessions.create("s", (None, None, SnapshotId(base.snapshot)))
    vfs = Vfs(repository, me, {})
    kernel = Kernel(vfs, "s")
    shown = kernel.stat(kernel.resolve(b"etc/b"))
    assert (shown.uid, shown.gid) == me
    kernel.inode(kernel.resolve(b"etc/b")).write(0, b"edited")
    kernel.create(kernel.resolve(b"etc"), b"new", 0o100644)
    vfs.close()
    expected[b"etc/new"] = me
    report = repository.commit("s")
    assert report.lost_owners == 0
    tree = repository.snapshot(SnapshotId(report.snapshot)).root
    assert owners(repository, tree) == expected
    # In a full tree, where all files are ours.
    with repository.sessions.hold("s", "running") as held, repository.storing():
        full = SessionTree(repository.store, repository.objects, held)
        full.make()
        Path(full.path + "/etc/a").write_bytes(b"in the tree")
        full.take_in()
    report = repository.commit("s")
    assert owners(repository, repository.snapshot(SnapshotId(report.snapshot)).root) == expected
    # And in a checkout.
    repository.check_out(tree, home + "/out", snapshot=SnapshotId(report.snapshot))
    assert repository.checkouts.status(home + "/out") == []
    Path(home + "/out/etc/b").write_bytes(b"in the checkout")
    done = repository.checkouts.commit(home + "/out")
    assert owners(repository, done.root) == expected
    assert repository.verify().damage == []
print("all is well")
"""


@pytest.mark.unprivileged
def test_what_an_ordinary_user_edits_stays_whose_it_was(public_path: Path):
    done = run_as_user("-c", ORDINARY, str(public_path))
    assert done.stdout == "all is well\n", done.stderr


def test_an_entry_without_an_owner_is_the_mounting_users():
    file = Entry(b"f", Kind.FILE, 0o644, 1, 0, b"")
    found = entry_attributes(5, file, OTHER)  # type: ignore[arg-type]
    assert Owner(found.uid, found.gid) == OTHER


def test_a_store_without_it_makes_the_same_trees_as_ever(repository: Repository, base: Path):
    root = repository.import_directory(str(base)).root
    assert not repository.keeps_owners()
    assert of_entry(repository.objects, root)
    assert set(owners_of(repository, root).values()) == {None}
    with repository.store.read() as reader:
        assert all(b"owner" not in bytes(key) for key, _ in reader.items(Db.META))
