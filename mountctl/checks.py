"""What a machine must have to mount a store, and what is good to have: the checks of `doctor`.

A check that FAILs stops something that was promised; a WARNing costs speed, safety or a
feature. Each says what it found, and what to do about it. Nothing is changed by looking.
"""

import ctypes
import importlib.util
import os
import platform
import resource
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from engine.errors import EngineError
from engine.host.leases import is_held
from engine.repository import Repository
from engine.storage.chunking import compiled
from engine.storage.ownership import check_owner
from engine.storage.store import NotAStoreError
from fsdriver.mountpoint import FILESYSTEM, is_dead, mounts
from mountctl.access import ask_status
from mountctl.failures import describe
from mountctl.text import count, quoted, size

OK, WARN, FAIL = "ok", "warn", "fail"

DEVICE = "/dev/fuse"
FUSE_CONFIGURATION = "/etc/fuse.conf"

_PIP = f"{shlex.quote(sys.executable)} -m pip install"
_ANSWER_SECONDS = 3.0
_LITTLE_ROOM = 1 << 30
_FEW_INODES = 10_000
_FEW_FILES = 1024
_USER_NAMESPACE = 0x10000000
"""CLONE_NEWUSER."""
_MOUNT_NAMESPACE = 0x20000
"""CLONE_NEWNS."""


class Check(NamedTuple):
    """What one check found; `hint` says what to do unless it is ok."""

    name: str
    status: str
    message: str
    hint: str = ""


def run_checks(store: str, *, trusted: bool) -> Iterator[Check]:
    """Yields all checks; `store` is the path of the store, which need not be there."""
    for check in (_python, _chunker, _pyfuse3, _device, _fusermount, _user_namespaces):
        yield check()
    yield _allow_other(FUSE_CONFIGURATION)
    yield _open_files()
    yield _dead_mounts()
    yield _daemon(store)
    yield _store(store, trusted)
    where = _existing(os.path.join(store, "sessions"))
    yield from _room(where)
    if os.access(where, os.W_OK) and _may_try(store, trusted):
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=where) as scratch:
            yield _attributes(scratch)
            yield _whiteouts(scratch)
            yield _overlay(scratch)
    else:
        yield Check(
            "store's disk", FAIL, f"you may not write to {quoted(where)}",
            "name a store in a directory that you can write to: --store DIR or AMALGAMFS_STORE",
        )  # fmt: skip


def _python() -> Check:
    # Nothing of this is there to run on a version that is too old.
    return Check("python", OK, platform.python_version())


def _chunker() -> Check:
    if compiled():
        return Check("fastcdc", OK, "compiled")
    return Check(
        "fastcdc", WARN, "not compiled: large files are read 200 times slower",
        f"install a C compiler, then `{_PIP} --force-reinstall --no-binary fastcdc fastcdc`",
    )  # fmt: skip


def _pyfuse3() -> Check:
    if importlib.util.find_spec("pyfuse3") is None:
        return Check("pyfuse3", FAIL, "not installed", f"install it: `{_PIP} pyfuse3`")
    for library in ("libfuse3.so.3", "libfuse3.so.4"):
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return Check("pyfuse3", OK, f"installed, with {library}")
    return Check("pyfuse3", FAIL, "libfuse 3 is missing", "install it: `apt install libfuse3-3`")


def _device() -> Check:
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return Check(
            "fuse device", FAIL, f"{DEVICE} does not exist",
            "load it: `modprobe fuse`; for a container: `--device /dev/fuse`",
        )  # fmt: skip
    except PermissionError:
        return Check(
            "fuse device", FAIL, f"you may not open {DEVICE}",
            f"as root: `chmod 666 {DEVICE}`; for a container: `--device /dev/fuse`",
        )  # fmt: skip
    except OSError as error:
        return Check("fuse device", FAIL, f"{DEVICE}: {error.strerror}", "load it: `modprobe fuse`")
    return Check("fuse device", OK, f"{DEVICE} can be opened")


def _fusermount() -> Check:
    if os.geteuid() == 0:
        return Check("fusermount3", OK, "not needed by root")
    path = shutil.which("fusermount3")
    if path is None:
        return Check(
            "fusermount3", FAIL, "not installed: only root can mount", "`apt install fuse3`"
        )
    status = os.stat(path)
    if status.st_uid != 0 or not status.st_mode & stat.S_ISUID:
        return Check(
            "fusermount3", FAIL, f"{path} is not setuid root",
            f"as root: `chown root {path} && chmod u+s {path}`",
        )  # fmt: skip
    return Check("fusermount3", OK, f"{path}, setuid root")


def _user_namespaces() -> Check:
    program = (
        "import ctypes, sys; libc = ctypes.CDLL(None, use_errno=True); "
        f"sys.exit(libc.unshare({_USER_NAMESPACE}) and ctypes.get_errno())"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], check=False)
    if done.returncode == 0:
        return Check("user namespaces", OK, "allowed")
    why, hint = f"refused: {os.strerror(done.returncode)}", "allow them, if you administer this"
    for name, bad in (
        ("user/max_user_namespaces", "0"),
        ("kernel/unprivileged_userns_clone", "0"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1"),
    ):
        if _read(f"/proc/sys/{name}") == bad:
            setting = name.replace("/", ".")
            why = f"{setting} is {bad}"
            hint = f"as root: `sysctl {setting}={'0' if bad == '1' else '1'}`"
            if name.startswith("user/"):
                hint = f"as root: `sysctl {setting}=10000`"
            break
    return Check("user namespaces", WARN, f"{why}; `mountctl run` goes by the mount", hint)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def _allow_other(configuration: str) -> Check:
    lines = [line.split("#")[0].strip() for line in _read(configuration).splitlines()]
    if os.geteuid() == 0 or "user_allow_other" in lines:
        return Check("other users", OK, "`mount --allow-other` is permitted")
    return Check(
        "other users", WARN, "`mount --allow-other` is for root alone here",
        f"as root, to permit it: `echo user_allow_other >> {configuration}`",
    )  # fmt: skip


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < _FEW_FILES:
        return Check(
            "open files",
            WARN,
            f"at most {hard}",
            f"have root raise the hard limit to {4096:,} or more: limits.conf(5)",
        )
    return Check("open files", OK, f"{soft:,}, and up to {hard:,} for the mount")


def _dead_mounts() -> Check:
    # A mount whose store has a daemon is not looked at: one that hangs would hang us.
    dead = [
        mount.path
        for mount in mounts()
        if mount.kind == FILESYSTEM and not _is_served(mount.source) and is_dead(mount.path)
    ]
    if not dead:
        return Check("dead mounts", OK, "none")
    named = ", ".join(quoted(path) for path in dead[:3])
    return Check(
        "dead mounts", WARN, f"{count(len(dead), 'mount')} without a daemon: {named}",
        "remove it: `mountctl umount PATH`",
    )  # fmt: skip


def _daemon(store: str) -> Check:
    """Tells a daemon that does not answer from one that is busy."""
    mount = ask_status(store, _ANSWER_SECONDS)
    if mount is None:
        return Check("mount", OK, "none of this store")
    if isinstance(mount, EngineError):
        return Check(
            "mount", FAIL, str(mount),
            "end it: `mountctl umount --force`; sessions keep what was written",
        )  # fmt: skip
    busy = "".join(f"; {doing.what}, for {doing.seconds:.0f} s" for doing in mount.doing)
    return Check("mount", OK, f"served by process {mount.pid}{busy}")


def _is_served(store: str) -> bool:
    try:
        return is_held(store, "mount")
    except (EngineError, OSError):
        return False


def _store(path: str, trusted: bool) -> Check:
    try:
        with Repository.open(path, trusted=trusted, to_read=True) as repository:
            counts = repository.store.statistics().counts
    except NotAStoreError:
        return Check("store", WARN, f"there is none at {quoted(path)}", "make it: `mountctl init`")
    except (EngineError, OSError) as error:
        failure = describe(error)
        return Check("store", FAIL, failure.message, failure.hint)
    return Check("store", OK, f"{quoted(path)}, {count(counts['snapshots'], 'snapshot')}")


def _may_try(store: str, trusted: bool) -> bool:
    """Tells whether something may be written to the store's directory, if there is one."""
    try:
        check_owner(store, trusted=trusted)
    except (EngineError, OSError):
        return False
    return True


def _existing(path: str) -> str:
    """Returns the path, or the nearest directory above it that exists."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def _room(where: str) -> Iterator[Check]:
    disk = os.statvfs(where)
    free = disk.f_bavail * disk.f_frsize
    message = f"{size(free)} free on the store's disk"
    if free < _LITTLE_ROOM:
        hint = "make room there, or put the store on another disk"
        yield Check("free space", WARN if free else FAIL, message, hint)
    else:
        yield Check("free space", OK, message)
    if not disk.f_files:
        yield Check("free inodes", OK, "without a limit on the store's disk")
        return
    message = f"{disk.f_favail:,} free on the store's disk"
    if disk.f_favail < _FEW_INODES:
        hint = "remove small files there, or put the store on another disk"
        yield Check("free inodes", WARN if disk.f_favail else FAIL, message, hint)
    else:
        yield Check("free inodes", OK, message)


def _attributes(scratch: str) -> Check:
    return _attempt(
        "attributes",
        lambda: os.setxattr(scratch, b"user.overlay.opaque", b"y"),
        "the store's disk keeps user.* attributes",
        Check(
            "attributes", FAIL, "the store's disk keeps no user.* attributes: sessions need them",
            "put the store on ext4, xfs, btrfs, or tmpfs of Linux 6.6 or later",
        ),
    )  # fmt: skip


def _whiteouts(scratch: str) -> Check:
    path = os.path.join(scratch, "whiteout")
    return _attempt(
        "whiteouts",
        lambda: os.mknod(path, stat.S_IFCHR, os.makedev(0, 0)),
        "the store's disk takes overlayfs whiteouts",
        Check(
            "whiteouts", WARN, "no 0:0 devices on the store's disk: removals are marked by files",
            "nothing is needed; Linux 5.8 or later outside of strict containers allows them",
        ),
    )  # fmt: skip


_MOUNTING = """
import ctypes, os, sys
libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
def must(failed):
    if failed:
        os._exit(ctypes.get_errno())
def write(name, text):
    with open("/proc/self/" + name, "w") as file:
        file.write(text)
must(libc.unshare({flags}))
write("setgroups", "deny")
write("uid_map", f"0 {{user}} 1")
write("gid_map", f"0 {{group}} 1")
must(libc.mount(b"overlay", b"merged", b"overlay", 0,
    b"userxattr,lowerdir=lower,upperdir=upper,workdir=work"))
os.mkdir("merged/new")
"""


def _overlay(scratch: str) -> Check:
    """Mounts what `mountctl run` would mount, in a namespace that ends with the attempt."""
    for name in ("lower", "upper", "work", "merged"):
        os.mkdir(os.path.join(scratch, name))
    program = _MOUNTING.format(flags=_USER_NAMESPACE | _MOUNT_NAMESPACE)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], cwd=scratch, stderr=subprocess.DEVNULL,
        check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return Check("overlayfs", OK, "the kernel's overlayfs takes the store's disk")
    return Check(
        "overlayfs", WARN,
        f"refused: {os.strerror(done.returncode)}; `mountctl run` goes by the mount",
        "nothing is needed; Linux 5.11 or later with user namespaces, on ext4, xfs or btrfs, "
        "makes `run` faster",
    )  # fmt: skip


def _attempt(name: str, action: Callable[[], None], done: str, otherwise: Check) -> Check:
    try:
        action()
    except OSError as error:
        return otherwise._replace(message=f"{otherwise.message} ({error.strerror})")
    return Check(name, OK, done)
