"""Set-id bits and devices in a mount: nobody becomes another user by way of one."""

import ctypes
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from engine import Repository
from engine.ids import SnapshotId
from tests.conftest import run_as_user
from tests.fsdriver.conftest import Mount

pytestmark = [pytest.mark.fuse, pytest.mark.unprivileged]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may let others in")

WHO = "import os; os.execv({path!r}, ['id', '-un'])"
STATX_MODE, AT_FDCWD = 2, -100


@pytest.fixture
def public(public_path: Path):
    """A mount of root's that others may use, with a session that they may write to."""
    mount = Mount(public_path)
    source = public_path / "source"
    source.mkdir()
    (source / "tmp").mkdir()
    (source / "tmp").chmod(0o1777)
    (source / "id").write_bytes(Path("/usr/bin/id").read_bytes())
    (source / "id").chmod(0o4755)
    with Repository.create(str(mount.store)) as repository:
        found = SnapshotId(repository.import_directory(str(source)).snapshot)
        repository.set_ref("main", found)
        repository.sessions.create("s", (None, None, found))
    yield mount
    mount.clear()


def flags_of(path: Path) -> int:
    return os.statvfs(path).f_flag & (os.ST_NOSUID | 4)


def who(path: Path) -> str:
    """Tells who an ordinary user is in a program."""
    return run_as_user("-c", WHO.format(path=str(path))).stdout.strip()


@as_root
@pytest.mark.parametrize("plain", [False, True], ids=["channel", "plain"])
def test_a_program_of_root_gives_nobody_root(public, plain):
    public.start(allow_other=True, plain=plain)
    for shown in (public.sessions / "s", public.snapshots / "main"):
        assert flags_of(shown) == os.ST_NOSUID | 4
        assert who(shown / "id") != "root"
    public.stop()


@as_root
@pytest.mark.parametrize("plain", [False, True], ids=["channel", "plain"])
def test_root_may_ask_for_both(public, plain):
    public.start(allow_other=True, suid=True, dev=True, plain=plain)
    for shown in (public.sessions / "s", public.snapshots / "main"):
        assert flags_of(shown) == 0
        assert who(shown / "id") == "root"
    null = public.sessions / "s" / "null"
    os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    assert null.read_bytes() == b""
    public.stop()


PLANT = """
import os, shutil, sys
shutil.copyfile("/usr/bin/id", sys.argv[1])
os.chmod(sys.argv[1], 0o6755)
"""


@as_root
def test_what_another_user_planted_has_lost_its_bits_in_the_snapshot(public):
    public.start(allow_other=True, suid=True)
    planted = public.sessions / "s" / "tmp" / "planted"
    done = run_as_user("-c", PLANT, str(planted))
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE(planted.stat().st_mode) == 0o6755
    (public.sessions / "s" / "own").write_bytes(b"x")
    (public.sessions / "s" / "own").chmod(0o4755)
    public.commit("s", "after")
    shown = public.snapshots / "after"
    assert stat.S_IMODE((shown / "tmp/planted").stat().st_mode) == 0o755
    assert stat.S_IMODE((shown / "own").stat().st_mode) == 0o4755
    assert who(shown / "tmp/planted") != "root"
    public.stop()


def mode_that_is_cached(path: Path) -> int:
    """Returns the mode as `stat -c %A` asks for it: nothing else, so the kernel may know it."""
    buffer = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.statx(AT_FDCWD, os.fsencode(path), 0, STATX_MODE, buffer) == 0
    return stat.S_IMODE(int.from_bytes(buffer.raw[28:30], sys.byteorder))


CHANGES = {
    "write": "os.write(os.open(path, os.O_WRONLY), b'x')",
    "direct": "import mmap; m = mmap.mmap(-1, 4096);"
    "os.write(os.open(path, os.O_WRONLY | os.O_DIRECT), m)",
    "append": "os.write(os.open(path, os.O_WRONLY | os.O_APPEND), b'x')",
    "truncate": "os.truncate(path, 3)",
    "open": "os.open(path, os.O_WRONLY | os.O_TRUNC)",
    "copy_file_range": "os.copy_file_range(os.open(os.path.dirname(path) + '/id', 0),"
    "os.open(path, os.O_WRONLY), 5)",
    "sendfile": "os.sendfile(os.open(path, os.O_WRONLY), os.open('/proc/self/exe', 0), 0, 5)",
}


@as_root
@pytest.mark.parametrize("plain", [False, True], ids=["channel", "plain"])
def test_the_kernel_knows_at_once_that_a_write_took_the_bits(public, plain):
    public.start(allow_other=True, suid=True, plain=plain)
    paths = {name: public.sessions / "s" / name for name in CHANGES}
    for path in paths.values():
        path.write_bytes(bytes(8192))
        path.chmod(0o6777)
    assert [mode_that_is_cached(path) for path in paths.values()] == [0o6777] * len(paths)
    script = "import os, sys\n" + "\n".join(
        f"path = {str(path)!r}\ntry:\n    {CHANGES[name]}\nexcept OSError as error:\n"
        f"    print({name!r}, error)"
        for name, path in paths.items()
    )
    done = run_as_user("-c", script)
    assert (done.stdout, done.returncode) == ("", 0), done.stdout + done.stderr
    modes = {name: oct(mode_that_is_cached(path)) for name, path in paths.items()}
    assert modes == dict.fromkeys(paths, "0o777")
    public.stop()


RUN = "stat -f -c %n . >/dev/null; grep ' '\"$PWD\"' ' /proc/self/mounts | tail -1 | cut -d' ' -f4"


@pytest.mark.parametrize("mode", ["overlay", "full"])
def test_what_run_shows_has_neither(tmp_path, mode):
    store = tmp_path / "store"
    with Repository.create(str(store)) as repository:
        source = tmp_path / "source"
        source.mkdir()
        found = SnapshotId(repository.import_directory(str(source)).snapshot)
        repository.sessions.create("s", (None, None, found))
    words = [sys.executable, "-m", "mountctl", "--store", str(store), "run", "s", "--mode", mode]
    done = subprocess.run(
        [*words, "--", "sh", "-c", RUN], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {"nosuid", "nodev"} <= set(done.stdout.strip().split(",")), done.stdout
