"""Tar: what goes out comes back, GNU tar reads it, and nothing hostile comes in."""

import bz2
import gzip
import io
import lzma
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import Repository, SnapshotId
from engine.drafts import ArchiveRefusedError
from engine.importing import ImportResult
from engine.nodes import Entry
from engine.tar_reading import ArchiveDamagedError, TarReader
from engine.tar_writing import everything, write_tar
from tests.engine.planted import trees
from tests.engine.plants import Garden, Leaf
from tests.engine.trees import Tree, age, noise, of_directory, of_entry

many = settings(
    max_examples=80, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip


def tarred(garden: Garden, root: Entry) -> bytes:
    out = io.BytesIO()
    write_tar(garden.objects, everything(garden.objects, root), out)
    return out.getvalue()


def read(garden: Garden, data: bytes) -> Entry:
    reader = TarReader(garden.sink, garden.nodes)
    reader.read(io.BytesIO(data))
    root = reader.draft.build(garden.nodes)
    garden.save()
    return root


@given(trees())
@many
def test_a_tree_comes_back_with_the_same_id(tree):
    garden = Garden()
    root = tree(garden)
    data = tarred(garden, root)
    assert len(data) % 10240 == 0
    assert data == tarred(garden, root)
    fresh = Garden()
    found = read(fresh, data)
    assert of_entry(fresh.objects, found) == of_entry(garden.objects, root)
    assert found == root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    path = tmp_path / "tree"
    (path / "sub" / "empty").mkdir(parents=True)
    (path / "long").write_bytes(noise(2_000_000))
    (path / "sub" / "text").write_text("line\n" * 20_000)
    (path / "sub" / ("n" * 200)).write_bytes(b"x" * 300)
    (path / os.fsdecode(b"\xff\xfe")).write_bytes(b"no UTF-8")
    os.link(path / "sub" / "text", path / "a name")
    (path / "link").symlink_to("/etc/passwd")
    os.mkfifo(path / "fifo", 0o640)
    os.setxattr(path / "long", b"user.a=b", b"\x00\xff")
    age(path)
    return path


def imported(repository: Repository, data: bytes) -> ImportResult:
    return repository.import_tar(io.BytesIO(data))


def seen(repository: Repository, result: ImportResult) -> Tree:
    root = repository.snapshot(SnapshotId(result.snapshot)).root
    return of_entry(repository.objects, root)


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar", "oldgnu"])
def test_what_gnu_tar_writes(repository: Repository, tree: Path, form: str):
    if form == "ustar":
        (tree / "sub" / ("n" * 200)).unlink()
    done = subprocess.run(
        ["tar", f"--format={form}", *(["--xattrs"] if form == "pax" else []), "-cC", tree, "."],
        capture_output=True, check=True,
    )  # fmt: skip
    found = seen(repository, imported(repository, done.stdout))
    expected = of_directory(tree)
    if form != "pax":
        expected = {
            path: each._replace(mtime_ns=each.mtime_ns // 10**9 * 10**9, xattrs=())
            for path, each in expected.items()
        }
    assert found == expected
    assert repository.verify().damage == []


def test_gnu_tar_reads_what_we_write(repository: Repository, tree: Path, tmp_path: Path):
    root = repository.import_directory(str(tree)).root
    with (tmp_path / "x.tar").open("wb") as out:
        report = repository.export_tar(root, out)
    assert report.bytes == (tmp_path / "x.tar").stat().st_size
    assert report.entries == len(of_directory(tree))
    (tmp_path / "out").mkdir()
    subprocess.run(
        ["tar", "--xattrs", "-xpf", tmp_path / "x.tar", "-C", tmp_path / "out"],
        check=True, capture_output=True,
    )  # fmt: skip
    found, expected = of_directory(tmp_path / "out"), of_directory(tree)
    assert found == expected


def test_a_sparse_file_keeps_its_holes(repository: Repository, tmp_path: Path):
    (tmp_path / "t").mkdir()
    with (tmp_path / "t" / "sparse").open("wb") as file:
        file.write(noise(70_000))
        file.truncate(1 << 30)
    for form in (["--format=gnu"], ["--format=pax"], ["--format=pax", "--sparse-version=0.1"]):
        done = subprocess.run(
            ["tar", "-S", *form, "-cC", tmp_path / "t", "."], capture_output=True, check=True
        )
        assert len(done.stdout) < 1 << 20
        found = imported(repository, done.stdout)
        assert found.root.size == 1 << 30
        assert found.report.new_bytes < 100_000
        assert repository.verify().damage == []


@pytest.mark.parametrize(
    "compress",
    [gzip.compress, bz2.compress, lzma.compress, zstandard.ZstdCompressor().compress,
     lambda data: gzip.compress(data[:1000]) + gzip.compress(data[1000:]),
     lambda data: zstandard.ZstdCompressor().compress(data[:1000])
     + zstandard.ZstdCompressor().compress(data[1000:])],
    ids=["gzip", "bzip2", "xz", "zstd", "two members", "two frames"],
)  # fmt: skip
def test_compressed(compress):
    garden = Garden()
    root = garden.plant({b"a": Leaf(b"text\n" * 9000), b"b/c": Leaf(noise(300_000))})
    data = tarred(garden, root)
    packed = compress(data)
    assert read(Garden(), packed) == root
    for bad in (packed[: len(packed) // 2], packed[:-3]):
        with pytest.raises(ArchiveDamagedError):
            read(Garden(), bad)


def test_the_same_tree_makes_no_second_snapshot(repository: Repository, tree: Path):
    root = repository.import_directory(str(tree), ref="main").root
    out = io.BytesIO()
    repository.export_tar(root, out)
    again = repository.import_tar(io.BytesIO(out.getvalue()), ref="main")
    assert not again.changed
    assert again.root == root


# Damaged.


def small() -> bytes:
    garden = Garden()
    root = garden.plant({b"a/b": Leaf(noise(200)), b"c": Leaf(b"text\n" * 900), b"d": Leaf(b"1")})
    return tarred(garden, root)


def test_cut_short_anywhere():
    data = small()
    end = len(data.rstrip(b"\0")) + 512 & ~511
    for at in [*range(0, end, 100), *range(0, end + 1, 512)]:
        with pytest.raises(ArchiveDamagedError):
            read(Garden(), data[:at])


@given(st.data())
@many
def test_a_flipped_bit_in_a_header_is_seen(data):
    good = small()
    headers = [at for at in range(0, len(good), 512) if good[at + 257 : at + 262] == b"ustar"]
    bad = bytearray(good)
    at = data.draw(st.sampled_from(headers)) + data.draw(st.integers(0, 511))
    bad[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises((ArchiveDamagedError, ArchiveRefusedError)):
        read(Garden(), bytes(bad))


@given(st.binary(max_size=2000))
@many
def test_noise_is_refused(data):
    with pytest.raises(ArchiveDamagedError):
        read(Garden(), data + b"!" * 600)


# Hostile.


def member(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    head = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    return head + data + bytes(-len(data) % 512)


END = bytes(1024)

HOSTILE = {
    "up": member("../x"),
    "up inside": member("a/../../x"),
    "up last": member("a/.."),
    "absolute": member("/etc/passwd"),
    "absolute directory": member("/etc", tarfile.DIRTYPE),
    "through a link": member("l", tarfile.SYMTYPE, linkname="/etc") + member("l/passwd"),
    "through a file": member("f", data=b"x") + member("f/g"),
    "hard link out": member("x", tarfile.LNKTYPE, linkname="../../etc/passwd"),
    "hard link absolute": member("x", tarfile.LNKTYPE, linkname="/etc/passwd"),
    "hard link to what comes later": member("x", tarfile.LNKTYPE, linkname="y") + member("y"),
    "hard link to itself": member("x", tarfile.LNKTYPE, linkname="x"),
    "hard link to a directory": member("d", tarfile.DIRTYPE)
    + member("x", tarfile.LNKTYPE, linkname="d"),
    "hard link through a link": member("l", tarfile.SYMTYPE, linkname="/etc")
    + member("x", tarfile.LNKTYPE, linkname="l/passwd"),
    "links that name each other": member("a", tarfile.LNKTYPE, linkname="b")
    + member("b", tarfile.LNKTYPE, linkname="a"),
    "the root as a file": member("."),
    "a directory with files": member("d/f") + member("d"),
    "a long name": member("n" * 256),
    "too deep": member("d/" * 514 + "f"),
    "a link to nothing": member("l", tarfile.SYMTYPE, linkname=""),
    "a link too long": member("l", tarfile.SYMTYPE, linkname="x" * 4096),
    "a long attribute": member("f", pax_headers={"SCHILY.xattr.user.x": "x" * 65537}),
    "a long attribute's name": member("f", pax_headers={"SCHILY.xattr.user." + "x" * 300: ""}),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_members_are_refused(repository: Repository, data: bytes):
    with pytest.raises(ArchiveRefusedError, match="the archive's member"):
        imported(repository, member("innocent", data=b"x") + data + END)
    assert repository.snapshots() == []


def test_duplicate_members_the_last_one_holds():
    data = (
        member("f", data=b"first") + member("l", tarfile.LNKTYPE, linkname="f")
        + member("f", data=b"second") + member("e", tarfile.DIRTYPE) + member("e", data=b"file")
        + member("s", tarfile.SYMTYPE, linkname="/etc") + member("s", tarfile.DIRTYPE)
        + member("s/in", data=b"in") + END
    )  # fmt: skip
    garden = Garden()
    found = of_entry(garden.objects, read(garden, data))
    assert found[b"f"].data == b"second"
    assert found[b"l"].data == b"first"
    assert found[b"l"].names == ()
    assert found[b"e"].data == b"file"
    assert found[b"s/in"].data == b"in"


def test_devices_are_left_out(repository: Repository):
    data = (
        member("null", tarfile.CHRTYPE, devmajor=1, devminor=3) + member("sda", tarfile.BLKTYPE)
        + member("also", tarfile.LNKTYPE, linkname="null") + member("odd", b"Z", b"data")
        + member("f", data=b"x") + END
    )  # fmt: skip
    result = imported(repository, data)
    assert len(result.report.warnings) == 4
    assert seen(repository, result).keys() == {b"", b"f"}


def test_attributes_of_others_are_left_out():
    data = member("f", pax_headers={
        "SCHILY.xattr.security.capability": "x", "SCHILY.xattr.user.overlay.opaque": "y",
        "SCHILY.xattr.user.mine": "z",
    }) + END  # fmt: skip
    garden = Garden()
    assert of_entry(garden.objects, read(garden, data))[b"f"].xattrs == ((b"user.mine", b"z"),)


def raw_header(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_long_headers_are_not_read(kind: bytes):
    bomb = gzip.compress(raw_header(kind, 1 << 40) + bytes(64 << 20))
    with pytest.raises(ArchiveDamagedError, match="no header has"):
        read(Garden(), bomb)


def test_headers_on_headers():
    chain = b"".join(raw_header(tarfile.XGLTYPE, 0) for _ in range(5000))
    with pytest.raises(ArchiveDamagedError):
        read(Garden(), chain + member("f") + bytes(100))


def test_a_forged_size_allocates_nothing():
    for kind in (tarfile.REGTYPE, b"Z"):
        with pytest.raises(ArchiveDamagedError, match="it ends there"):
            read(Garden(), raw_header(kind, 1 << 50) + bytes(5000))
    with pytest.raises(ArchiveDamagedError):
        read(Garden(), raw_header(tarfile.REGTYPE, -(1 << 40)) + END)


def test_times_that_are_none():
    for text in ("nan", "1e9", "--1", "9" * 40, "inf", "1.x"):
        with pytest.raises(ArchiveDamagedError):
            read(Garden(), member("f", pax_headers={"mtime": text}) + END)
