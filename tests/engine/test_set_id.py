"""Set-id bits and other losses on every way into a store and out of one."""

import io
import os
import stat
import tarfile
from pathlib import Path

import pytest

from engine.archives.bundle_applying import BundleSetIdError
from engine.ids import SnapshotId
from engine.repository import Repository
from engine.storage.nodes import Entry
from engine.trees.directory import find, walk

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has files of others")
NOBODY = 65534


@pytest.fixture
def repository(tmp_path: Path):
    with Repository.create(str(tmp_path / "store")) as repository:
        yield repository


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory with a file of each kind of owner; ours only, if we are no root."""
    path = tmp_path / "source"
    path.mkdir()
    owners = {"ours": (-1, -1)}
    if os.geteuid() == 0:
        owners |= {"theirs": (NOBODY, NOBODY), "group": (-1, NOBODY)}
    for name, (uid, gid) in owners.items():
        for mode in (0o4755, 0o2755, 0o6711, 0o755):
            file = path / f"{name}-{mode:o}"
            file.write_text(name)
            os.chown(file, uid, gid)
            file.chmod(mode)
    (path / "folder").mkdir()
    (path / "folder").chmod(0o2775)
    return path


def modes(repository: Repository, root: Entry) -> dict[str, int]:
    return {os.fsdecode(path): entry.mode for path, entry in walk(repository.objects, root)}


def on_disk(path: Path) -> dict[str, int]:
    return {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.iterdir()}


EVERYTHING = {
    "ours-4755": 0o4755, "ours-2755": 0o2755, "ours-6711": 0o6711, "ours-755": 0o755,
    "folder": 0o2775,
}  # fmt: skip
OF_OTHERS = {
    "theirs-4755": 0o755, "theirs-2755": 0o755, "theirs-6711": 0o711, "theirs-755": 0o755,
    "group-4755": 0o4755, "group-2755": 0o755, "group-6711": 0o711, "group-755": 0o755,
}  # fmt: skip


def test_a_file_of_ones_own_keeps_its_bits(repository, source):
    result = repository.import_directory(str(source))
    assert modes(repository, result.root).items() >= EVERYTHING.items()


@as_root
def test_a_file_of_another_owner_loses_them_in_an_import(repository, source):
    for _ in range(2):  # and the second one says so again, though nothing is read
        result = repository.import_directory(str(source))
        assert modes(repository, result.root) == EVERYTHING | OF_OTHERS
        assert result.report.lost == {"set_id": 5}
        assert len([line for line in result.report.warnings if "set-id" in line]) == 5
    kept = repository.import_directory(str(source), set_id=True)
    assert modes(repository, kept.root)["theirs-6711"] == 0o6711
    assert kept.report.lost == {}
    assert repository.import_directory(str(source)).root == result.root  # not the cache's


def in_upper(repository: Repository, source: Path) -> str:
    made = repository.import_directory(str(source))
    repository.sessions.create("s", (None, None, SnapshotId(made.snapshot)))
    with repository.sessions.hold("s", "test") as held:
        return os.fsdecode(held.upper().root)


@as_root
def test_a_file_of_another_owner_loses_them_in_a_commit(repository, source, tmp_path):
    (tmp_path / "empty").mkdir()
    upper = in_upper(repository, tmp_path / "empty")
    for each in source.iterdir():
        os.rename(each, os.path.join(upper, each.name))
    report = repository.commit("s")
    assert modes(repository, repository.snapshot(report.snapshot).root) == EVERYTHING | OF_OTHERS
    assert report.lost == {"set_id": 5}


def archived(path: Path) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.add(path, "")
    return out.getvalue()


def test_an_archive_has_none_unless_asked(repository, source):
    data = archived(source)
    result = repository.import_tar(io.BytesIO(data))
    found = modes(repository, result.root)
    assert {mode & 0o6000 for name, mode in found.items() if name != "folder"} == {0}
    assert found["folder"] == 0o2775
    assert result.report.lost["set_id"] == 3 * (len(found) // 4)
    asked = repository.import_tar(io.BytesIO(data), set_id=True)
    assert modes(repository, asked.root).items() >= EVERYTHING.items()


def test_what_is_written_into_an_archive_or_image_has_none_unless_asked(
    repository, source, tmp_path
):
    root = repository.import_directory(str(source), set_id=True).root
    for asked in (False, True):
        out = io.BytesIO()
        report = repository.export_tar(root, out, set_id=asked)
        out.seek(0)
        with tarfile.open(fileobj=out) as archive:
            kept = {member.name: member.mode for member in archive}
        assert kept["ours-6711"] == (0o6711 if asked else 0o711)
        made = repository.export_oci([], root, str(tmp_path / f"image-{asked}"), set_id=asked)
        assert (report.set_id_dropped > 0, made.set_id_dropped > 0) == (not asked, not asked)
        again = repository.import_oci(str(tmp_path / f"image-{asked}"), set_id=True)
        assert (again.root == root) == asked


def test_a_bundle_with_one_is_refused_unless_asked(repository, source, tmp_path):
    made = repository.import_directory(str(source), ref="main")
    out = io.BytesIO()
    repository.create_bundle(out)
    with Repository.create(str(tmp_path / "other")) as other:
        with pytest.raises(BundleSetIdError, match="set-id bits"):
            other.apply_bundle(io.BytesIO(out.getvalue()))
        assert list(other.snapshots()) == []
        other.apply_bundle(io.BytesIO(out.getvalue()), set_id=True)
        assert list(other.snapshots()) == [made.snapshot]
        other.apply_bundle(io.BytesIO(out.getvalue()))  # all of it is there


def test_a_checkout_has_them_as_its_owner_may(repository, source, tmp_path):
    made = repository.import_directory(str(source))
    checkouts, root = repository.checkouts, made.root
    masked = {name: mode & ~0o6000 for name, mode in EVERYTHING.items()} | {"folder": 0o2775}
    expected = masked if os.geteuid() == 0 else EVERYTHING
    out = tmp_path / "out"
    report = repository.check_out(root, str(out), snapshot=made.snapshot)
    assert on_disk(out).items() >= expected.items()
    assert (report.set_id_dropped > 0) == (os.geteuid() == 0)
    assert checkouts.status(str(out)) == []
    os.utime(out / "ours-6711", ns=(7, 7))
    assert [edit.path for edit in checkouts.status(str(out))] == [b"ours-6711"]
    # What was not edited is stored as it was.
    again = checkouts.commit(str(out))
    assert modes(repository, again.root)["ours-4755"] == 0o4755
    asked = tmp_path / "asked"
    repository.check_out(root, str(asked), snapshot=made.snapshot, set_id=True)
    assert on_disk(asked).items() >= EVERYTHING.items()
    (asked / "ours-4755").chmod(0o755)
    assert [edit.path for edit in checkouts.status(str(asked))] == [b"ours-4755"]
    entry = find(repository.objects, root, b"ours-4755")
    repository.check_out(entry, str(tmp_path / "single"))
    single = stat.S_IMODE((tmp_path / "single").stat().st_mode)
    assert single == (0o755 if os.geteuid() == 0 else 0o4755)


@as_root
def test_a_switch_drops_them_too(repository, source, tmp_path):
    first = repository.import_directory(str(source))
    (source / "ours-4755").write_text("another")
    (source / "ours-4755").chmod(0o4755)
    second = repository.import_directory(str(source))
    out = tmp_path / "out"
    repository.check_out(first.root, str(out), snapshot=first.snapshot)
    switch = repository.checkouts.switch
    report = switch(str(out), second.root, snapshot=second.snapshot)
    assert (report.written, report.set_id_dropped) == (1, 1)
    assert on_disk(out)["ours-4755"] == 0o755
    switch(str(out), first.root, snapshot=first.snapshot, set_id=True)
    assert on_disk(out)["ours-4755"] == 0o4755


# Other losses.


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A directory with attributes and times that a tree cannot keep."""
    path = tmp_path / "odd"
    path.mkdir()
    (path / "late").write_text("x")
    os.utime(path / "late", (0, 13_569_465_600))  # 2400
    (path / "early").write_text("x")
    os.utime(path / "early", (0, -10_000_000_000))  # 1653; ext4 makes that 1901
    (path / "marked").write_text("x")
    os.setxattr(path / "marked", "user.overlay.x", b"1")
    os.setxattr(path / "marked", "user.kept", b"1")
    if os.geteuid() == 0:
        capability = bytes.fromhex("0100000200040000000000000000000000000000")
        os.setxattr(path / "marked", "security.capability", capability)
        os.setxattr(path / "marked", "trusted.x", b"1")
    return path


def lost(odd: Path) -> dict[str, int]:
    """What an import of it is to lose."""
    expected = {"attributes": 1, "time": 1}
    early = (odd / "early").stat().st_mtime_ns
    expected["time"] += not -(2**63) <= early < 2**63
    if os.geteuid() == 0:
        expected["capabilities"] = 1
    return expected


def test_an_import_says_what_it_loses(repository, odd):
    for _ in range(2):
        result = repository.import_directory(str(odd))
        assert result.report.lost == lost(odd)
        assert len(result.report.warnings) == sum(result.report.lost.values())
    entry = find(repository.objects, result.root, b"marked")
    assert entry is not None
    assert entry.xattrs == ((b"user.kept", b"1"),)


def test_a_commit_says_what_it_loses(repository, odd, tmp_path):
    (tmp_path / "empty").mkdir()
    upper = in_upper(repository, tmp_path / "empty")
    os.rename(odd, os.path.join(upper, "odd"))
    marked = os.path.join(upper, "odd", "marked")
    os.removexattr(marked, "user.overlay.x")
    os.setxattr(marked, "user.overlay.overlay.x", b"1")  # as the kernel's overlayfs keeps it
    report = repository.commit("s")
    assert report.lost == lost(Path(upper, "odd")) if os.path.exists(upper) else report.lost
    assert report.lost["attributes"] == 1
    assert report.lost["time"] >= 1


def test_an_archive_says_what_it_loses(repository):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("file")
        member.pax_headers = {
            "mtime": "13569465600.5", "SCHILY.xattr.user.overlay.x": "1",
            "SCHILY.xattr.security.capability": "1", "SCHILY.xattr.security.selinux": "1",
            "SCHILY.xattr.user.kept": "1", "SCHILY.acl.access": "user::rwx",
        }  # fmt: skip
        archive.addfile(member)
    result = repository.import_tar(io.BytesIO(out.getvalue()))
    assert result.report.lost == {"acls": 1, "attributes": 1, "capabilities": 1, "time": 1}
    entry = find(repository.objects, result.root, b"file")
    assert entry is not None
    assert entry.xattrs == ((b"user.kept", b"1"),)


def test_an_attribute_that_no_import_keeps_is_not_written_either(repository):
    """A bundle may bring a tree with any attribute."""
    from engine.archives.tar_headers import header

    bad = ((b"security.capability", b"1"), (b"user.kept", b"1"), (b"user.overlay.opaque", b"y"))
    entry = Entry(b"f", 1, 0o644, 0, 1, b"x", bad)
    made = header(b"f", entry, None)
    assert b"security" not in made
    assert b"overlay" not in made
    assert b"SCHILY.xattr.user.kept=1" in made
