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
from engine.archives.tar_headers import header
from engine.archives.tar_reading import ArchiveDamagedError, TarReader
from engine.archives.tar_writing import everything, write_tar
from engine.plain.importing import ImportReport, ImportResult
from engine.storage import content
from engine.storage.chunking import SMALLEST_CHUNK, cut
from engine.storage.nodes import Entry, Kind, Ref
from engine.trees.directory import directory_entry
from engine.trees.drafts import ArchiveRefusedError
from tests.engine.planted import trees
from tests.engine.plants import Garden, Leaf
from tests.engine.trees import Tree, age, noise, of_directory, of_entry

many = settings(
    max_examples=80, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip


def tarred(garden: Garden, root: Entry) -> bytes:
    out = io.BytesIO()
    write_tar(garden.objects, everything(garden.objects, root), out, set_id=True)
    return out.getvalue()


def read(garden: Garden, data: bytes) -> Entry:
    reader = TarReader(garden.sink, garden.nodes, set_id=True)
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


@given(
    st.sampled_from([b"a/b", b"n" * 100, b"n" * 101, "ü".encode(), b"-"]),
    st.sampled_from([Kind.FILE, Kind.DIRECTORY, Kind.SYMLINK, Kind.FIFO]),
    st.integers(0, 0o7777), st.integers(0, 8**11 - 1), st.integers(-(2**33), 2**34),
    st.sampled_from([0, 1, 500_000_000, 123_456_789]), st.sampled_from([None, b"t", b"t" * 101]),
)  # fmt: skip
@many
def test_headers_are_read_as_they_are_meant(path, kind, mode, size, seconds, ns, target):
    text = b"to" if kind == Kind.SYMLINK else b""
    entry = Entry(b"", kind, mode, seconds * 10**9 + ns, size, text)
    if kind == Kind.DIRECTORY:  # has one name
        target = None
    made = header(path, entry, target)
    with tarfile.TarFile(fileobj=io.BytesIO(made + bytes(1024))) as archive:
        found = archive.next()
    assert found is not None
    assert os.fsencode(found.name) == path
    assert found.isdir() == (kind == Kind.DIRECTORY and target is None)
    assert found.mode == mode
    assert found.mtime == pytest.approx(seconds + ns / 10**9, rel=1e-12)
    assert (found.uid, found.gid, found.uname, found.gname) == (0, 0, "", "")
    assert found.islnk() == (target is not None)
    assert os.fsencode(found.linkname) == (target if target is not None else text)
    assert found.size == (size if kind == Kind.FILE and target is None else 0)


# Sparse.

BLOCK = tarfile.BLOCKSIZE
PIECES = [noise(BLOCK), bytes(4 * BLOCK), noise(600 * BLOCK), b"x", noise(100), noise(70_001)]
WHOLE = 3
"""How many of them are of whole blocks."""


def planted_sparse(garden: Garden, drawn: list[tuple[int, int]], tail: int) -> Entry:
    """Plants a tree of one file: of holes with a piece after each, and perhaps a hole at last."""
    refs: list[Ref] = []
    for gap, number in drawn:
        refs += [Ref(None, gap, 0)] if gap else []
        piece = PIECES[number]
        at = 0
        for length in cut(piece, last=True):
            refs.append(Ref(garden.sink.put(piece[at : at + length]), length, 0))
            at += length
    refs += [Ref(None, tail, 0)] if tail else []
    pieces = content.fold(refs, garden.nodes.put)
    file = Entry(b"f\xff", Kind.FILE, 0o644, 1, content.sum_of(refs), pieces)
    other = Entry(b"g", Kind.FILE, 0o644, 1, 1, b"!")
    root = directory_entry(garden.nodes.put, [file, other], name=b"", mode=0o755, mtime_ns=1)
    garden.save()
    return root


gaps = st.integers(1, 1 << 40)


@given(st.lists(st.tuples(gaps, st.integers(0, WHOLE - 1)), max_size=40), gaps,
       st.integers(0, len(PIECES) - 1), st.sampled_from([0, 1, 17_000, 1 << 50]))  # fmt: skip
@many
def test_holes_come_back(drawn, gap, last, tail):
    """As they are where data are whole blocks, which they are in every filesystem."""
    garden = Garden()
    root = planted_sparse(garden, [(SMALLEST_CHUNK, 0), *[(g, n) for g, n in drawn if g >= BLOCK],
                                   (gap + BLOCK, last)], tail)  # fmt: skip
    data = tarred(garden, root)
    held = sum(len(PIECES[number]) for _, number in drawn) + len(PIECES[last])
    assert len(data) < held + (64 << 10)
    assert data == tarred(garden, root)
    assert read(Garden(), data) == root


@given(st.lists(st.tuples(st.integers(0, 2_000), st.integers(0, len(PIECES) - 1)), max_size=9),
       st.integers(0, 20_000))  # fmt: skip
@many
def test_holes_that_begin_anywhere_read_the_same(drawn, tail):
    garden, fresh = Garden(), Garden()
    root = planted_sparse(garden, drawn, tail if drawn else tail + 1)
    data = tarred(garden, root)
    expected = of_entry(garden.objects, root)
    assert of_entry(fresh.objects, read(fresh, data)) == expected
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as archive:
        file = archive.extractfile(os.fsdecode(b"f\xff"))
        assert file is not None
        assert file.read() == expected[b"f\xff"].data


@pytest.fixture
def sparse_tree(tmp_path: Path) -> Path:
    """Files with holes at the begin, in the middle, at the end and everywhere."""
    path = tmp_path / "sparse"
    deep = path / ("d" * 99)
    deep.mkdir(parents=True)
    shapes: dict[Path, list[int]] = {  # size, then where there is something
        path / "begin": [300_000, 200_000], path / "end": [1 << 30, 0],
        path / "middle": [70_001, 0, 70_000], path / "everywhere": [1 << 40],
        path / "many": [1 << 22, *range(0, 1 << 22, 1 << 15)], path / "small": [16_384, 8_192],
        path / "larger": [16_385, 8_192], path / "tiny": [100], path / "none": [5_000, 0, 4_096],
        deep / "long": [1 << 20, 4_096], path / os.fsdecode(b"\xff\n="): [1 << 20, 4_096],
    }  # fmt: skip
    for number, (file, (size, *places)) in enumerate(shapes.items()):
        with file.open("wb") as out:
            for place in places:
                out.seek(place)
                out.write(noise(min(5_000, size - place), number))
            out.truncate(size)
    os.link(path / "end", path / "of end")
    age(path)
    for item in [path, *path.rglob("*")]:
        os.utime(item, (1_500_000_000, 1_500_000_000))
    return path


@pytest.mark.parametrize("form", ["gnu", "oldgnu", "pax 0.0", "pax 0.1", "pax 1.0"])
def test_what_gnu_tar_says_of_holes(repository: Repository, sparse_tree: Path, form: str):
    form, _, version = form.partition(" ")
    options = [f"--format={form}", *([f"--sparse-version={version}"] if version else [])]
    done = subprocess.run(
        ["tar", "--sparse", *options, "-cC", sparse_tree, "."], capture_output=True, check=True
    )
    assert len(done.stdout) < 2 << 20
    expected = repository.import_directory(str(sparse_tree)).root
    assert imported(repository, done.stdout).root == expected
    assert repository.verify().damage == []


def test_gnu_tar_makes_the_holes_we_write(
    repository: Repository, sparse_tree: Path, tmp_path: Path
):
    root = repository.import_directory(str(sparse_tree)).root
    with (tmp_path / "x.tar").open("wb") as out:
        repository.export_tar(root, out)
    assert (tmp_path / "x.tar").stat().st_size < 2 << 20
    (tmp_path / "out").mkdir()
    subprocess.run(
        ["tar", "-xpf", tmp_path / "x.tar", "-C", tmp_path / "out"], check=True, capture_output=True
    )
    for name in ("end", "everywhere", "many"):
        assert (tmp_path / "out" / name).stat().st_blocks * BLOCK < 2 << 20
    assert repository.import_directory(str(tmp_path / "out")).root == root
    with tarfile.open(tmp_path / "x.tar") as archive:
        assert archive.getmember("everywhere").size == 1 << 40
    with (tmp_path / "x.tar").open("rb") as archive_again:
        assert repository.import_tar(archive_again).root == root


def sparse_member(text: bytes, data: bytes, *, size: int, more: dict[str, str]) -> bytes:
    """A sparse member of format 1.0, its map given, with more records."""
    body = text + bytes(-len(text) % BLOCK) + data
    records = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "f",
               "GNU.sparse.realsize": str(size)}  # fmt: skip
    return member("GNUSparseFile.0/f", data=body, pax_headers=records | more)


def test_records_for_programs_that_know_no_sparse_files():
    """As GNU tar writes them for more than 8 GiB of data, and for long names."""
    text, data = b"2\n20000\n600\n30000\n0\n", noise(600)
    more = {"path": "GNUSparseFile.0/f", "size": str(BLOCK + 600)}
    archive = sparse_member(text, data, size=30_000, more=more) + member("g", data=b"after") + END
    garden = Garden()
    found = of_entry(garden.objects, read(garden, archive))
    assert found.keys() == {b"", b"f", b"g"}
    assert found[b"f"].data == bytes(20_000) + data + bytes(9_400)
    assert found[b"g"].data == b"after"


def test_the_length_of_a_large_sparse_member():
    for size in (8**11 - 1, 8**11, 1 << 50):
        entry = Entry(b"", Kind.FILE, 0o644, 0, 1 << 60, (Ref(None, 1 << 60, 0),))
        head = header(b"d/f", entry, None, size)[-BLOCK:]
        assert tarfile.TarInfo.frombuf(head, "utf-8", "strict").size == size


@pytest.mark.parametrize(
    "text",
    [b"1\n0\n40000\n", b"2\n100\n200\n200\n100\n", b"1\n-5\n100\n", b"1\n100\n-5\n",
     b"2\n0\n100\n50\n100\n", b"1\n29999\n2\n", b"x\n", b"",
     b"9\n1\n1\n", b"99999999999999\n" + b"0\n" * 1000],
)  # fmt: skip
def test_maps_that_are_wrong(text: bytes):
    archive = sparse_member(text, bytes(5_000), size=30_000, more={}) + END
    with pytest.raises(ArchiveDamagedError):
        read(Garden(), archive)


def test_a_map_without_end_is_not_kept():
    text = b"%d\n" % (1 << 40) + b"0\n" * (16 << 20)
    archive = gzip.compress(sparse_member(text, b"", size=30_000, more={}), 1)
    with pytest.raises(ArchiveDamagedError, match="headers are too long"):
        read(Garden(), archive)


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
    assert result.report.left_out == {
        "device": 2, "name of what is left out": 1, "type Z": 1
    }  # fmt: skip
    assert seen(repository, result).keys() == {b"", b"f"}


def test_attributes_of_others_are_left_out():
    data = member("f", pax_headers={
        "SCHILY.xattr.security.capability": "x", "SCHILY.xattr.user.overlay.opaque": "y",
        "SCHILY.xattr.user.mine": "z",
    }) + END  # fmt: skip
    garden = Garden()
    assert of_entry(garden.objects, read(garden, data))[b"f"].xattrs == ((b"user.mine", b"z"),)


def report_of(data: bytes) -> ImportReport:
    garden = Garden()
    reader = TarReader(garden.sink, garden.nodes)
    reader.read(io.BytesIO(data))
    return reader.report


def test_records_that_are_not_understood_are_counted():
    ours = {"mtime": "5.5", "comment": "x", "SCHILY.xattr.user.mine": "1", "atime": "1"}
    odd = {
        "RHT.security.selinux": "x",
        "SCHILY.xattr.user.a": "1",
        "VENDOR.new": "x",
        "LIBARCHIVE.xattr.user.a": "MQ",
        "LIBARCHIVE.xattr.security.ima": "MQ",
    }
    data = member("a", pax_headers=ours) + member("b", pax_headers=odd)
    data += member("c", pax_headers={"VENDOR.new": "y"})
    assert report_of(data + END).left_out == {
        "record RHT.security.selinux": 1,
        "record VENDOR.new": 2,
        "attribute security.ima": 1,
    }


def test_what_only_gnu_tar_writes():
    garden = Garden()
    reader = TarReader(garden.sink, garden.nodes)
    dump = member("d/", b"D", b"Yin\0\0", mode=0o700)
    reader.read(io.BytesIO(member("label", b"V") + dump + member("d/in") + END))
    root = reader.draft.build(garden.nodes)
    garden.save()
    found = of_entry(garden.objects, root)
    assert found.keys() == {b"", b"d", b"d/in"}
    assert found[b"d"].mode & 0o7777 == 0o700
    assert reader.report.left_out == {"label": 1}
    with pytest.raises(ArchiveRefusedError, match="began in another volume"):
        report_of(member("f", b"M", b"rest") + END)


@pytest.mark.parametrize("records", [{"GNU.sparse.major": "2", "GNU.sparse.minor": "0"},
                                     {"SCHILY.realsize": "500"}])  # fmt: skip
def test_holes_in_an_unknown_form_are_refused(records):
    with pytest.raises(ArchiveRefusedError, match="a form that is not known"):
        report_of(member("f", data=b"x", pax_headers=records) + END)


def test_what_follows_the_end_is_named():
    whole = member("a", data=b"x") + END
    assert report_of(whole + bytes(10240)).left_out == {}
    report = report_of(whole + member("b") + END)
    assert report.left_out.keys() == {"bytes after the archive's end"}
    assert "several archives" in report.warnings[0]


def rawheader(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_long_headers_are_not_read(kind: bytes):
    bomb = gzip.compress(rawheader(kind, 1 << 40) + bytes(64 << 20))
    with pytest.raises(ArchiveDamagedError, match="no header has"):
        read(Garden(), bomb)


def test_headers_on_headers():
    chain = b"".join(rawheader(tarfile.XGLTYPE, 0) for _ in range(5000))
    with pytest.raises(ArchiveDamagedError):
        read(Garden(), chain + member("f") + bytes(100))


def test_a_forged_size_allocates_nothing():
    for kind in (tarfile.REGTYPE, b"Z"):
        with pytest.raises(ArchiveDamagedError, match="it ends there"):
            read(Garden(), rawheader(kind, 1 << 50) + bytes(5000))
    with pytest.raises(ArchiveDamagedError):
        read(Garden(), rawheader(tarfile.REGTYPE, -(1 << 40)) + END)


def test_times_that_are_none():
    for text in ("nan", "1e9", "--1", "9" * 40, "inf", "1.x"):
        with pytest.raises(ArchiveDamagedError):
            read(Garden(), member("f", pax_headers={"mtime": text}) + END)
