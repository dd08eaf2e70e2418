"""What programs do to files, in a session and on the disk below it: both must answer alike.

Every test that takes `at` runs twice, so that the disk says whether the test itself is right.
"""

import errno
import fcntl
import mmap
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.engine.trees import noise
from tests.fsdriver.syscalls import EXCHANGE, NOREPLACE, WHITEOUT, refused, renameat2

pytestmark = pytest.mark.fuse

YEAR_2001 = 1_000_000_000_123_456_789

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may do this")


def run(program: str, *arguments: str | Path, cwd: Path | None = None) -> str:
    """Runs Python in a process of its own and returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# Contents.


def test_create_write_read(at):
    file = at / "src/new"
    with file.open("xb") as opened:
        opened.write(b"one")
        opened.flush()
        assert file.read_bytes() == b"one"
        opened.seek(1)
        opened.write(b"NE two")
    assert file.read_bytes() == b"oNE two"
    with refused(errno.EEXIST):
        file.open("xb")
    assert sorted(os.listdir(at / "src")) == ["lib", "main.c", "new", "tool.sh"]


def test_large_files(at):
    data = noise(9_000_001, 3)
    (at / "large").write_bytes(data)
    assert (at / "large").read_bytes() == data
    with (at / "large").open("r+b") as file:
        file.seek(5_000_000)
        file.write(b"middle")
    assert (at / "large").read_bytes() == data[:5_000_000] + b"middle" + data[5_000_006:]


def test_a_file_of_the_base_is_changed_in_place(at):
    file = at / "src/lib/big"
    data = file.read_bytes()
    with file.open("r+b") as opened:
        opened.seek(1_500_000)
        opened.write(b"changed")
    assert file.read_bytes() == data[:1_500_000] + b"changed" + data[1_500_007:]
    with file.open("ab") as opened:
        opened.write(b"more")
    assert file.stat().st_size == len(data) + 4


@pytest.mark.parametrize("size", [0, 1, 8, 100, 70_000])
@pytest.mark.parametrize("name", ["README", "src/lib/big", "src/lib/zero", "src/lib/sparse"])
def test_truncate(at, name, size):
    data = (at / name).read_bytes()
    os.truncate(at / name, size)
    assert (at / name).read_bytes() == data[:size].ljust(size, b"\0")


def test_open_truncates(at):
    os.close(os.open(at / "src/main.c", os.O_WRONLY | os.O_TRUNC))
    assert (at / "src/main.c").read_bytes() == b""
    assert (at / "src/main.c").stat().st_mtime_ns > YEAR_2001


def test_holes_read_as_zeros(at):
    with (at / "hole").open("wb") as file:
        file.seek(3_000_000)
        file.write(b"end")
    assert (at / "hole").read_bytes() == bytes(3_000_000) + b"end"
    assert (at / "hole").stat().st_blocks < 1000
    with (at / "src/lib/sparse").open("r+b") as file:
        file.write(b"start")
    assert (at / "src/lib/sparse").read_bytes() == b"start" + bytes(4_999_995) + b"end"


def test_files_beyond_four_gigabytes(at):
    far = 5 << 30
    with (at / "far").open("w+b", buffering=0) as file:
        file.truncate(far + 1000)
        os.pwrite(file.fileno(), b"far away", far)
        assert os.pread(file.fileno(), 10, far - 2) == b"\0\0far away"
        assert os.fstat(file.fileno()).st_size == far + 1000
        with mmap.mmap(file.fileno(), 1000, offset=far) as shared:
            assert shared[:8] == b"far away"
    assert (at / "far").stat().st_blocks < 1000


def test_several_threads_change_a_file_of_the_base_at_once(at):
    start = threading.Barrier(6)
    expected = bytearray((at / "src/lib/big").read_bytes())

    def write(number: int) -> None:
        fd = os.open(at / "src/lib/big", os.O_RDWR)
        start.wait(120)
        for part in range(5):
            os.pwrite(fd, b"%d" % number * 100, number * 500_000 + part * 100)
        os.close(fd)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for number, thread in enumerate(threads):
        thread.join()
        expected[number * 500_000 : number * 500_000 + 500] = b"%d" % number * 500
    assert (at / "src/lib/big").read_bytes() == bytes(expected)


def test_positioned_and_vectored_calls(at):
    fd = os.open(at / "v", os.O_RDWR | os.O_CREAT)
    assert os.pwritev(fd, [b"one", b"two"], 5) == 6
    assert os.pwrite(fd, b"x", 100) == 1
    parts = [bytearray(2), bytearray(9)]
    assert os.preadv(fd, parts, 4) == 11
    assert bytes(parts[0] + parts[1]) == b"\0onetwo\0\0\0\0"
    assert os.pread(fd, 10, 200) == b""
    os.close(fd)


def test_copies_by_the_kernel(at):
    with (at / "src/lib/big").open("rb") as source, (at / "copy").open("wb") as target:
        left = 3_000_000
        while left:
            left -= os.copy_file_range(source.fileno(), target.fileno(), left)
    assert (at / "copy").read_bytes() == (at / "src/lib/big").read_bytes()
    shutil.copyfile(at / "copy", at / "copy2")  # sendfile
    assert (at / "copy2").read_bytes() == (at / "copy").read_bytes()


def test_preallocation(at):
    with (at / "space").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 100_000)
    assert (at / "space").read_bytes() == bytes(100_000)


@pytest.mark.parametrize("name", ["new", "README"])
def test_shared_maps_write_the_file(at, name):
    (at / "new").write_bytes(bytes(10_000))
    with (at / name).open("r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
        shared[2:5] = b"map"
        assert (at / name).read_bytes()[2:5] == b"map"
        file.seek(0)
        file.write(b"w")
        file.flush()
        assert shared[0:1] == b"w"
        shared.flush()
    assert (at / name).read_bytes()[:5] == (b"wemap" if name == "README" else b"w\0map")


def test_private_maps_do_not(at):
    before = (at / "README").read_bytes()
    with (at / "README").open("rb") as file:
        private = mmap.mmap(
            file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
        private[0:4] = b"mine"
        assert (at / "README").read_bytes() == before
        private.close()


def test_a_map_of_the_base_shows_what_is_written(at):
    with (at / "README").open("r+b") as file:
        shared = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        assert shared[:4] == b"read"
        os.pwrite(file.fileno(), b"READ", 0)
        assert shared[:4] == b"READ"
        shared.close()


def test_syncs(at):
    for name in ["README", "src/new"]:
        with (at / name).open("ab") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
            os.fdatasync(file.fileno())
    for directory in [at, at / "src", at / "empty"]:
        fd = os.open(directory, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def test_several_writers_append(at):
    program = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
for number in range(200):
    os.write(fd, f"{sys.argv[2]} {number}\\n".encode())
"""
    writers = [
        subprocess.Popen([sys.executable, "-c", program, at / "README", str(n)]) for n in range(4)
    ]
    assert [writer.wait() for writer in writers] == [0] * 4
    lines = (at / "README").read_text().splitlines()
    assert lines[0] == "read me"
    for n in range(4):
        mine = [line for line in lines if line.startswith(f"{n} ")]
        assert mine == [f"{n} {number}" for number in range(200)]


# Names.


def test_rename_files(at):
    (at / "README").rename(at / "src/moved")
    assert (at / "src/moved").read_bytes() == b"read me\n"
    assert not (at / "README").exists()
    (at / "src/moved").rename(at / "src/main.c")
    assert (at / "src/main.c").read_bytes() == b"read me\n"
    (at / "src/main.c").rename(at / "README")
    assert sorted(os.listdir(at / "src")) == ["lib", "tool.sh"]
    with refused(errno.ENOENT):
        (at / "src/main.c").rename(at / "x")


def test_rename_directories_of_the_base(at):
    before = (at / "src/lib/deep/text").read_bytes()
    (at / "src").rename(at / "docs/code")
    assert sorted(os.listdir(at / "docs/code/lib")) == ["big", "deep", "sparse", "zero"]
    assert (at / "docs/code/lib/deep/text").read_bytes() == before
    assert not (at / "src").exists()
    (at / "src").mkdir()
    assert os.listdir(at / "src") == []
    (at / "docs/code/lib").rename(at / "src/lib2")
    (at / "docs").rename(at / "other")
    assert sorted(os.listdir(at / "other/code")) == ["main.c", "tool.sh"]
    (at / "src/lib2/deep/text").write_bytes(b"new")
    (at / "src/lib2").rename(at / "other/code/lib")
    (at / "other/code").rename(at / "back")
    assert (at / "back/lib/deep/text").read_bytes() == b"new"
    assert (at / "back/lib/big").stat().st_size == 3_000_000


def test_rename_directories_over_others(at):
    (at / "src/lib").rename(at / "empty")
    assert sorted(os.listdir(at / "empty")) == ["big", "deep", "sparse", "zero"]
    with refused(errno.ENOTEMPTY, errno.EEXIST):
        (at / "docs").rename(at / "empty")
    with refused(errno.EISDIR):
        (at / "README").rename(at / "empty")
    with refused(errno.ENOTDIR):
        (at / "empty").rename(at / "README")
    with refused(errno.EINVAL):
        (at / "empty").rename(at / "empty/deep/inside")
    with refused(errno.ENOTEMPTY, errno.EEXIST):
        (at / "empty/deep").rename(at / "empty")
    (at / "fresh").mkdir()
    (at / "fresh").rename(at / "src/fresh")
    (at / "empty").rename(at / "src/fresh")
    assert (at / "src/fresh/deep/text").exists()


def test_rename_to_itself_or_to_another_name_of_it(at):
    (at / "README").rename(at / "README")
    (at / "README").rename(at / "docs/linked")
    assert (at / "README").stat().st_nlink == 3
    (at / "src").rename(at / "src")
    assert (at / "src/main.c").exists()


def test_rename_without_replacing(at):
    with refused(errno.EEXIST):
        renameat2(at / "README", at / "src/main.c", NOREPLACE)
    renameat2(at / "README", at / "src/new", NOREPLACE)
    renameat2(at / "docs", at / "src/docs", NOREPLACE)
    assert (at / "src/docs/linked").exists()


@pytest.mark.parametrize(
    ("one", "other"),
    [("README", "src/main.c"), ("src", "docs"), ("README", "src"), ("docs/link", "src/lib"),
     ("src/lib/deep", "docs"), ("new", "README"), ("newdir", "src"), ("newdir", "new")],
)  # fmt: skip
def test_exchange(at, one, other):
    (at / "new").write_text("new")
    (at / "newdir").mkdir()
    (at / "newdir/in").write_text("in")
    first, second = (at / one).lstat(), (at / other).lstat()
    renameat2(at / one, at / other, EXCHANGE)
    assert (at / other).lstat().st_ino == first.st_ino
    assert (at / one).lstat().st_ino == second.st_ino
    assert (at / other).lstat().st_mode == first.st_mode
    renameat2(at / one, at / other, EXCHANGE)
    assert (at / "src/lib/deep/text").exists()
    assert (at / "newdir/in").read_text() == "in"
    assert (at / "docs/link").read_bytes() == b"read me\n"


def test_exchange_needs_both_and_not_inside_each_other(at):
    with refused(errno.ENOENT):
        renameat2(at / "README", at / "nothing", EXCHANGE)
    with refused(errno.EINVAL):
        renameat2(at / "src", at / "src/lib", EXCHANGE)
    with refused(errno.EINVAL):
        renameat2(at / "src/lib", at / "src", EXCHANGE)
    with refused(errno.EINVAL):
        renameat2(at / "src", at / "docs", EXCHANGE | NOREPLACE)


def test_whiteouts_are_not_for_programs(session):
    with refused(errno.EINVAL, errno.EPERM):
        renameat2(session / "README", session / "x", WHITEOUT)
    assert (session / "README").exists()


def test_rename_over_an_open_file(at):
    with (at / "src/main.c").open("r+b") as old:
        (at / "README").rename(at / "src/main.c")
        assert (at / "src/main.c").read_bytes() == b"read me\n"
        assert old.read(3) == b"int"
        assert os.fstat(old.fileno()).st_nlink == 0
        os.pwrite(old.fileno(), b"INT", 0)
        assert os.pread(old.fileno(), 3, 0) == b"INT"
    assert (at / "src/main.c").read_bytes() == b"read me\n"


@pytest.mark.parametrize("name", ["src/main.c", "new"])
def test_unlink_an_open_file(at, name):
    (at / "new").write_bytes(b"int " * 10)
    with (at / name).open("r+b") as file:
        size = (at / name).stat().st_size
        (at / name).unlink()
        assert not (at / name).exists()
        fd = file.fileno()
        status = os.fstat(fd)
        assert (status.st_nlink, status.st_size) == (0, size)
        assert os.pread(fd, 3, 0) == b"int"
        os.pwrite(fd, b"tail", size)
        os.fchmod(fd, 0o640)
        os.utime(fd, ns=(5, 7))
        os.setxattr(fd, b"user.late", b"x")
        assert os.getxattr(fd, b"user.late") == b"x"
        os.fsync(fd)
        status = os.fstat(fd)
        assert (status.st_size, status.st_mtime_ns) == (size + 4, 7)
        assert stat.S_IMODE(status.st_mode) == 0o640
        os.ftruncate(fd, 2)
        assert os.pread(fd, 10, 0) == b"in"
        (at / name).write_bytes(b"another")
        assert os.pread(fd, 10, 0) == b"in"
    assert (at / name).read_bytes() == b"another"


def test_unlink_what_only_a_program_far_away_has_open(at):
    """A pristine file is read on after its name went, and is written only then."""
    fd = os.open(at / "src/lib/big", os.O_RDWR)
    (at / "src/lib/big").unlink()
    shutil.rmtree(at / "src")
    data = os.pread(fd, 4_000_000, 0)
    assert data == noise(3_000_000, 1)
    os.pwrite(fd, b"late", 10)
    assert os.pread(fd, 4, 10) == b"late"
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)


def test_fifos_and_links_that_lost_their_name(at):
    fifo = os.open(at / "docs/fifo", os.O_RDWR | os.O_NONBLOCK)
    os.mkfifo(at / "fresh")
    fresh = os.open(at / "fresh", os.O_RDWR | os.O_NONBLOCK)
    (at / "docs/fifo").unlink()
    (at / "fresh").unlink()
    for fd in [fifo, fresh]:
        os.write(fd, b"through")
        assert os.read(fd, 100) == b"through"
        os.fchmod(fd, 0o600)
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
        assert os.fstat(fd).st_nlink == 0
        os.close(fd)
    for name in ["docs/link", "loose"]:
        if name == "loose":
            (at / name).symlink_to("target")
        fd = os.open(at / name, os.O_PATH | os.O_NOFOLLOW)
        (at / name).unlink()
        assert os.readlink("", dir_fd=fd) in {"../README", "target"}
        os.close(fd)


def test_symbolic_links(at):
    target = "../" + "x" * 3000
    (at / "long").symlink_to(target)
    assert os.readlink(at / "long") == target
    assert (at / "long").lstat().st_size == len(target)
    assert (at / "docs/link").read_bytes() == b"read me\n"
    assert not (at / "docs/dangling").exists()
    (at / "docs/link").unlink()
    (at / "docs/link").symlink_to("/")
    assert (at / "docs/link").resolve() == Path("/")
    with refused(errno.ELOOP):
        os.open(at / "docs/link", os.O_RDONLY | os.O_NOFOLLOW)
    (at / "round").symlink_to("round")
    with refused(errno.ELOOP):
        (at / "round").open()


def test_hard_links(at):
    (at / "new").write_text("new")
    os.link(at / "new", at / "src/new")
    os.link(at / "src/main.c", at / "docs/main.c")
    for one, other in [("new", "src/new"), ("src/main.c", "docs/main.c")]:
        assert (at / one).stat().st_nlink == 2
        assert (at / one).samefile(at / other)
        (at / one).write_text("through one")
        assert (at / other).read_text() == "through one"
        (at / one).unlink()
        assert (at / other).stat().st_nlink == 1
        assert (at / other).read_text() == "through one"
    with refused(errno.EEXIST):
        os.link(at / "README", at / "src/tool.sh")
    with refused(errno.EPERM):
        os.link(at / "src", at / "docs/src")
    os.link(at / "docs/link", at / "linked-link", follow_symlinks=False)
    assert (at / "linked-link").is_symlink()


@pytest.mark.parametrize("looked", [True, False], ids=["looked at", "unseen"])
def test_links_of_the_base_are_changed_together(at, looked):
    names = [at / "README", at / "docs/linked", at / "src/lib/deep/linked"]
    if looked:
        assert {name.stat().st_nlink for name in names} == {3}
    with names[0].open("ab") as file:
        file.write(b"more\n")
    assert [name.read_bytes() for name in names] == [b"read me\nmore\n"] * 3
    assert len({name.stat().st_ino for name in names}) == 1
    assert {name.stat().st_nlink for name in names} == {3}
    names[1].unlink()
    assert {names[0].stat().st_nlink, names[2].stat().st_nlink} == {2}
    os.link(names[2], names[1])
    names[0].unlink()
    assert names[1].stat().st_nlink == 2
    names[2].write_bytes(b"last")
    assert names[1].read_bytes() == b"last"


def test_one_of_the_bases_links_goes(at):
    with (at / "docs/linked").open("rb") as opened:
        (at / "docs/linked").unlink()
        assert os.fstat(opened.fileno()).st_nlink == 2
        (at / "README").write_bytes(b"other")
        assert opened.read() == b"other"
    (at / "src/lib").rename(at / "lib")
    assert (at / "lib/deep/linked").stat().st_nlink == 2
    (at / "README").rename(at / "lib/deep/linked")
    assert (at / "README").exists(), "rename of one name over another of the same file"
    (at / "lib/deep/linked").unlink()
    assert (at / "README").stat().st_nlink == 1


# Directories.


def test_directories(at):
    (at / "a/b/c").mkdir(parents=True)
    assert (at / "a").stat().st_nlink == 3
    (at / "a/b/c/file").write_text("x")
    with refused(errno.ENOTEMPTY):
        (at / "a/b").rmdir()
    with refused(errno.EEXIST):
        (at / "a").mkdir()
    with refused(errno.ENOTDIR):
        (at / "README/x").mkdir()
    with refused(errno.ENOTDIR):
        (at / "README").rmdir()
    with refused(errno.EISDIR):
        os.unlink(at / "a")
    with refused(errno.ENOENT):
        (at / "nothing/x").mkdir()
    shutil.rmtree(at / "a")
    assert "a" not in os.listdir(at)


def test_a_removed_directory_of_the_base_does_not_come_back(at):
    with refused(errno.ENOTEMPTY):
        (at / "src").rmdir()
    shutil.rmtree(at / "src")
    assert not (at / "src").exists()
    (at / "src").mkdir()
    assert os.listdir(at / "src") == []
    (at / "src/lib").write_text("a file where a directory was")
    (at / "src/lib").unlink()
    (at / "src/lib").mkdir()
    assert os.listdir(at / "src/lib") == []
    (at / "src/lib").rmdir()
    (at / "src").rmdir()
    (at / "src").symlink_to("docs")
    assert (at / "src/linked").exists()
    (at / "src").unlink()
    os.mkfifo(at / "src")
    assert stat.S_ISFIFO((at / "src").stat().st_mode)


def test_the_working_directory_is_removed(at):
    (at / "gone").mkdir()
    for name in ["gone", "empty"]:
        said = run(
            """
import errno, os, sys
os.chdir(sys.argv[1])
os.rmdir(sys.argv[1])
def code(call, *arguments):
    try:
        return repr(call(*arguments))
    except OSError as error:
        return errno.errorcode[error.errno]
print(code(os.getcwd), code(os.listdir, "."), code(open, "x", "w"), code(os.mkdir, "y"),
      code(os.stat, "nothing"), os.stat(".").st_nlink)
""",
            at / name,
        )
        assert said.split() == ["ENOENT", "[]", "ENOENT", "ENOENT", "ENOENT", "0"]


def test_delete_while_listing(at):
    many = at / "many"
    many.mkdir()
    for number in range(3000):
        (many / f"{number}").touch()
    seen = []
    with os.scandir(many) as listing:
        for entry in listing:
            seen.append(entry.name)
            os.unlink(entry.path)
    assert sorted(seen, key=int) == [str(number) for number in range(3000)]
    many.rmdir()


def test_create_while_listing(at):
    many = at / "many"
    many.mkdir()
    before = {f"old-{number:04}" for number in range(1000)}
    for name in before:
        (many / name).touch()
    seen: list[str] = []
    with os.scandir(many) as listing:
        for number, entry in enumerate(listing):
            seen.append(entry.name)
            if number < 500:
                (many / f"new-{number:04}").touch()
    assert len(seen) == len(set(seen))
    assert before <= set(seen)
    assert len(os.listdir(many)) == 1500


def test_delete_what_the_base_has_while_listing(session, mount, tmp_path):
    (tmp_path / "many").mkdir()
    for number in range(3000):
        (tmp_path / "many" / f"{number}").touch()
    (tmp_path / "many" / "sub").mkdir()
    (tmp_path / "many" / "sub" / "file").touch()
    with mount.repository() as repository:
        found = repository.import_directory(str(tmp_path)).snapshot
        repository.sessions.create(session.name + "-many", (None, None, found))
    at = mount.sessions / (session.name + "-many") / "many"
    with (at / "sub" / "more").open("w"):
        pass
    assert subprocess.run(["rm", "-rf", at], check=False).returncode == 0
    assert "many" not in os.listdir(at.parent)
    at.mkdir()
    assert os.listdir(at) == []


def test_listings_begin_with_the_directory_and_what_it_is_in(at):
    (at / "src/new").mkdir()
    for name in ["src", "empty", "src/new"]:
        listed = subprocess.check_output(["ls", "-aU", at / name], text=True)
        names = listed.split("\n")[:-1]
        assert sorted(names) == sorted([".", "..", *os.listdir(at / name)])


def test_positions_in_a_listing_stay_good(at):
    program = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
class Entry(ctypes.Structure):
    _fields_ = [("ino", ctypes.c_uint64), ("off", ctypes.c_int64), ("len", ctypes.c_uint16),
                ("type", ctypes.c_uint8), ("name", ctypes.c_char * 256)]
libc.opendir.restype = ctypes.c_void_p
libc.readdir.restype = ctypes.POINTER(Entry)
libc.telldir.restype = ctypes.c_long
for call in (libc.readdir, libc.telldir, libc.rewinddir): call.argtypes = [ctypes.c_void_p]
libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
d = libc.opendir(os.fsencode(sys.argv[1]))
def rest():
    names = []
    while (e := libc.readdir(d)):
        if e.contents.name not in (b".", b".."): names.append(e.contents.name)
    return names
at = [(libc.telldir(d), None)]
while (e := libc.readdir(d)):
    at.append((libc.telldir(d), e.contents.name))
names = [n for _, n in at]
for number in range(0, len(at), 7):
    libc.seekdir(d, at[number][0])
    want = [n for n in names[number + 1:] if n not in (b".", b"..")]
    assert rest() == want, number
libc.rewinddir(d)
os.close(os.open(sys.argv[1] + "/late", os.O_CREAT))
libc.rewinddir(d)
assert b"late" in rest()
"""
    for number in range(300):
        (at / "docs" / f"n{number}").touch()
    run(program, at / "docs")


def test_trees_deeper_than_a_path_may_be_long(at):
    name = "d" * 200
    program = """
import os, sys
name = "d" * 200
for _ in range(30):
    os.mkdir(name)
    os.chdir(name)
with open("file", "w") as file:
    file.write("deep")
os.link("file", "other")
os.rename("other", "third")
os.symlink("file", "link")
os.mkdir("sub")
os.rename("sub", "sub2")
os.chmod("file", 0o600)
os.setxattr("file", b"user.x", b"y")
print(open("link").read(), os.stat("file").st_nlink, sorted(os.listdir(".")))
"""
    assert run(program, cwd=at) == "deep 2 ['file', 'link', 'sub2', 'third']\n"
    with refused(errno.ENAMETOOLONG):
        (at / "/".join([name] * 21)).stat()
    fd = os.open(at / "/".join([name] * 15), os.O_RDONLY)
    below = os.open("/".join([name] * 15), os.O_RDONLY, dir_fd=fd)
    assert os.stat("file", dir_fd=below).st_size == 4
    os.close(fd)
    os.close(below)
    shutil.rmtree(at / name)
    assert name not in os.listdir(at)


def test_names_of_every_kind(at):
    for name in [b"\xff\xfe not utf-8", b"new\nline", b"x" * 255, b" ", b"-rf", b"\x01", b"..."]:
        path = os.fsencode(at) + b"/docs/" + name
        with open(path, "ab") as file:
            file.write(b"more")
        assert name in os.listdir(os.fsencode(at) + b"/docs")
        os.rename(path, os.fsencode(at) + b"/" + name)
        os.unlink(os.fsencode(at) + b"/" + name)
    with refused(errno.ENAMETOOLONG):
        (at / ("x" * 256)).touch()
    with refused(errno.ENAMETOOLONG):
        (at / "README").rename(at / ("x" * 256))
    with refused(errno.ENOENT):
        os.stat(os.fsencode(at) + b"/" + b"\xfe" * 255)


# Attributes.


def test_modes(at):
    file, directory = at / "README", at / "src"
    for mode in [0o777, 0o604, 0o400, 0o000, 0o4755, 0o200, 0o644]:
        file.chmod(mode)
        assert stat.S_IMODE(file.stat().st_mode) == mode
    for mode in [0o700, 0o1777, 0o2755, 0o000, 0o555, 0o300, 0o755]:
        directory.chmod(mode)
        assert stat.S_IMODE(directory.stat().st_mode) == mode
    before = os.umask(0o027)
    try:
        os.close(os.open(at / "a", os.O_CREAT | os.O_WRONLY, 0o666))
        (at / "b").mkdir()
        os.mkfifo(at / "c", 0o666)
    finally:
        os.umask(before)
    assert [stat.S_IMODE((at / name).stat().st_mode) for name in "abc"] == [0o640, 0o750, 0o640]


def test_a_file_made_read_only_is_written_by_who_made_it(at):
    for number, mode in enumerate([0o444, 0o000, 0o200, 0o400]):
        fd = os.open(at / f"{number}", os.O_CREAT | os.O_EXCL | os.O_RDWR, mode)
        os.write(fd, b"written")
        assert os.pread(fd, 10, 0) == b"written"
        os.close(fd)
        assert stat.S_IMODE((at / f"{number}").stat().st_mode) == mode


def test_new_files_in_a_setgid_directory_inherit_it(at):
    (at / "src").chmod(0o2755)
    (at / "src/sub").mkdir()
    assert stat.S_IMODE((at / "src/sub").stat().st_mode) & stat.S_ISGID
    (at / "src/sub/below").mkdir()
    assert stat.S_IMODE((at / "src/sub/below").stat().st_mode) & stat.S_ISGID
    (at / "src/file").touch()
    assert not stat.S_IMODE((at / "src/file").stat().st_mode) & stat.S_ISGID


def test_writing_takes_the_setuid_bit(at):
    for name in ["README", "new"]:
        (at / name).touch()
        (at / name).chmod(0o6755)
        if os.geteuid() != 0:
            (at / name).write_text("x")
            assert stat.S_IMODE((at / name).stat().st_mode) == 0o755
        os.chown(at / name, os.getuid(), os.getgid())
        assert stat.S_IMODE((at / name).stat().st_mode) == 0o755


def test_times(at):
    for name in ["README", "src", "new"]:
        if name == "new":
            (at / name).touch()
        for ns in [0, 1, 999_999_999, 1_500_000_000_000_000_001, -1_500_000_001]:
            os.utime(at / name, ns=(ns + 5, ns))
            assert (at / name).stat().st_mtime_ns == ns
            assert (at / name).stat().st_atime_ns == ns + 5
        os.utime(at / name)
        assert (at / name).stat().st_mtime_ns > YEAR_2001
    os.utime(at / "docs/link", ns=(3, 4), follow_symlinks=False)
    assert (at / "docs/link").lstat().st_mtime_ns == 4
    assert (at / "README").stat().st_mtime_ns > YEAR_2001


def test_times_change_where_something_changed_and_nowhere_else(at):
    old = {name: (at / name).lstat().st_mtime_ns for name in ["src", "src/lib", "docs", "empty"]}
    with (at / "src/main.c").open("r+b") as file:
        file.write(b"x")
    (at / "src/tool.sh").chmod(0o700)
    os.setxattr(at / "docs/linked", b"user.x", b"y")
    assert {name: (at / name).lstat().st_mtime_ns for name in old} == old
    assert (at / "src/main.c").stat().st_mtime_ns > YEAR_2001
    chmodded = (at / "src/tool.sh").stat()
    assert chmodded.st_mtime_ns < 1_100_000_000_000_000_000 < chmodded.st_ctime_ns
    (at / "docs/link").unlink()
    (at / "empty/new").touch()
    (at / "src/lib/zero").rename(at / "src/lib/nil")
    now = {name: (at / name).lstat().st_mtime_ns for name in old}
    assert now["src"] == old["src"]
    for name in ["src/lib", "docs", "empty"]:
        assert now[name] > YEAR_2001 * 1.5


def test_extended_attributes(at):
    for name in ["README", "src", "new"]:
        path = at / name
        path.touch()
        before = set(os.listxattr(path))
        os.setxattr(path, b"user.a", b"1", os.XATTR_CREATE)
        with refused(errno.EEXIST):
            os.setxattr(path, b"user.a", b"2", os.XATTR_CREATE)
        os.setxattr(path, b"user.a", bytes(range(256)) * 4, os.XATTR_REPLACE)
        with refused(errno.ENODATA):
            os.setxattr(path, b"user.b", b"2", os.XATTR_REPLACE)
        assert os.getxattr(path, b"user.a") == bytes(range(256)) * 4
        assert set(os.listxattr(path)) == before | {"user.a"}
        os.setxattr(path, b"user.empty", b"")
        assert os.getxattr(path, b"user.empty") == b""
        os.removexattr(path, b"user.a")
        os.removexattr(path, b"user.empty")
        with refused(errno.ENODATA):
            os.removexattr(path, b"user.a")
        with refused(errno.ENODATA):
            os.getxattr(path, b"user.a")
        assert set(os.listxattr(path)) == before
    assert os.getxattr(at / "README", b"user.note") == b"\x00\xff"
    with refused(errno.EPERM):
        os.setxattr(at / "docs/link", b"user.x", b"", follow_symlinks=False)


def test_the_formats_own_attributes_are_not_for_programs(session):
    (session / "src").rename(session / "code")
    assert os.listxattr(session / "code") == ["user.on-directory"]
    for name in [b"user.overlay.opaque", b"user.overlay.redirect"]:
        with refused(errno.ENODATA):
            os.getxattr(session / "code", name)
        with refused(errno.EOPNOTSUPP):
            os.setxattr(session / "code", name, b"y")
    for name in [b"trusted.x", b"security.x"]:
        with refused(errno.EOPNOTSUPP, errno.EPERM):
            os.setxattr(session / "README", name, b"y")


@as_root
def test_owners_of_new_files_stay_until_the_commit(at):
    os.chown(at / "README", 12, 34)
    assert ((at / "README").stat().st_uid, (at / "README").stat().st_gid) == (12, 34)
    os.chown(at / "src", 12, -1)
    assert (at / "src").stat().st_uid == 12


# Special files and locks.


def test_fifos(at):
    os.mkfifo(at / "new", 0o600)
    for name in ["docs/fifo", "new"]:
        reader = os.open(at / name, os.O_RDONLY | os.O_NONBLOCK)
        writer = os.open(at / name, os.O_WRONLY)
        os.write(writer, b"through")
        assert os.read(reader, 100) == b"through"
        os.close(reader)
        os.close(writer)


def test_unix_sockets(at, monkeypatch):
    monkeypatch.chdir(at)  # the path would be too long for a socket
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("socket")
        assert stat.S_ISSOCK((at / "socket").stat().st_mode)
        server.listen()
        client.connect("socket")
        client.sendall(b"hello")
        connection, _ = server.accept()
        assert connection.recv(10) == b"hello"
        connection.close()
        (at / "socket").rename(at / "moved")
        with socket.socket(socket.AF_UNIX) as other:
            other.connect("moved")
        (at / "moved").unlink()
    assert "moved" not in os.listdir(at)


@as_root
def test_devices(at):
    os.mknod(at / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    assert (at / "null").stat().st_rdev == os.makedev(1, 3)
    (at / "null").rename(at / "src/null")
    os.mknod(at / "disk", stat.S_IFBLK | 0o600, os.makedev(259, 1000))
    assert (at / "disk").stat().st_rdev == os.makedev(259, 1000)
    (at / "disk").unlink()


@as_root
def test_a_whiteout_cannot_be_made(session):
    with refused(errno.EPERM):
        os.mknod(session / "README2", stat.S_IFCHR | 0o600, os.makedev(0, 0))


LOCKER = """
import fcntl, os, sys, errno
fd = os.open(sys.argv[1], os.O_RDWR)
for call, arguments in [(fcntl.lockf, (0, 5)), (fcntl.lockf, (5, 5)), (fcntl.flock, ())]:
    flags = (fcntl.LOCK_EX if call is fcntl.flock else fcntl.LOCK_EX) | fcntl.LOCK_NB
    try:
        call(fd, flags, *(reversed(arguments)))
        print("got", end=" ")
    except OSError as error:
        print(errno.errorcode[error.errno], end=" ")
"""


@pytest.mark.parametrize("name", ["README", "new"])
def test_locks_between_processes(at, name):
    (at / "new").touch()
    fd = os.open(at / name, os.O_RDWR)
    fcntl.lockf(fd, fcntl.LOCK_EX, 5, 0)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert run(LOCKER, at / name).split() == ["EAGAIN", "got", "EAGAIN"]
    os.pwrite(fd, b"copied up while locked", 0)
    assert run(LOCKER, at / name).split() == ["EAGAIN", "got", "EAGAIN"]
    fcntl.lockf(fd, fcntl.LOCK_UN)
    fcntl.flock(fd, fcntl.LOCK_UN)
    assert run(LOCKER, at / name).split() == ["got", "got", "got"]
    os.close(fd)


def test_open_file_description_locks(at):
    one, other = (os.open(at / "README", os.O_RDWR) for _ in range(2))
    fcntl.fcntl(one, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 1, 0))
    with refused(errno.EAGAIN):
        fcntl.fcntl(other, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 1, 0))
    os.close(one)
    fcntl.fcntl(other, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 1, 0))
    os.close(other)


def test_a_waiting_lock_is_given(at):
    fd, got = os.open(at / "README", os.O_RDWR), threading.Event()
    fcntl.flock(fd, fcntl.LOCK_EX)

    def wait() -> None:
        with (at / "README").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            got.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not got.wait(0.05)
    fcntl.flock(fd, fcntl.LOCK_UN)
    assert got.wait(120)
    thread.join()
    os.close(fd)


# What a session does not have.


def test_unnamed_files_are_told_to_be_unsupported(session):
    """Python's tempfile and others then fall back to a name that they remove at once."""
    with refused(errno.EOPNOTSUPP):
        os.open(session, os.O_TMPFILE | os.O_RDWR)


# Numbers.


def test_inode_numbers_last(at):
    numbers = {name: (at / name).stat().st_ino for name in ["README", "src", "src/main.c"]}
    with (at / "README").open("ab") as file:
        file.write(b"copied up")
        assert os.fstat(file.fileno()).st_ino == numbers["README"]
    assert (at / "README").stat().st_ino == numbers["README"]
    (at / "src").rename(at / "code")
    assert (at / "code").stat().st_ino == numbers["src"]
    assert (at / "code/main.c").stat().st_ino == numbers["src/main.c"]
    listed = {entry.name: entry.inode() for entry in os.scandir(at)}
    assert listed == {name: (at / name).lstat().st_ino for name in os.listdir(at)}
    assert len(set(listed.values())) == len(listed)


def test_two_sessions_share_no_number(mount, snapshot, session):
    other = mount.create(session.name + "-2", snapshot)
    assert (session / "README").stat().st_ino != (other / "README").stat().st_ino
    with refused(errno.EXDEV):
        os.link(session / "README", other / "new")
    with refused(errno.EXDEV):
        (session / "README").rename(other / "new")
    assert session.stat().st_dev == other.stat().st_dev
