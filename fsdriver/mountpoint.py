"""Mount points: which there are, whether one can be used, and how it is given up.

Light: used by the command line too. A mount whose daemon died answers ENOTCONN ("Transport
endpoint is not connected"); such a one of ours is unmounted when its place is wanted again.
"""

import contextlib
import ctypes
import errno
import os
import shlex
import shutil
from typing import NamedTuple

from engine.errors import EngineError
from engine.host.leases import LeaseHeldError, share_unseen
from fsdriver.errand import PATIENCE, Errand, call

FILESYSTEM = "fuse.amalgamfs"
PART = "fuse.amalgamfs.part"
"""What is mounted on `snapshots` inside of one."""

ANSWER_SECONDS = 3.0
"""How long a mount may take to tell that it lives; who has not by then may do so later."""

_MNT_DETACH = 2


class MountPointError(EngineError):
    """A directory cannot be mounted on. `path` names it."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"cannot mount on {path!r}: {why}")
        self.path, self.why = path, why


class UnmountError(EngineError):
    """A mount cannot be ended. `path` is where it is."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"cannot unmount {path!r}: {why}")
        self.path, self.why = path, why


class UnmountRefusedError(UnmountError):
    """A mount cannot be ended, and not because it is in use. `target` is for a shell."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(path, why)
        self.target = shlex.quote(path)


class Mount(NamedTuple):
    """One line of /proc/self/mountinfo. `source` of ours is the store's path.

    `device` is its number, as in `0:40`.
    """

    path: str
    kind: str
    source: str
    device: str = ""


def mounts() -> list[Mount]:
    """Returns all mounts that this process sees, the latest last."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            kind, source = after.split()[:2]
            fields = before.split()
            found.append(Mount(_plain(fields[4]), kind, _plain(source), fields[2]))
    return found


def _plain(field: str) -> str:
    """Undoes the octal escapes of mountinfo."""
    raw = os.fsencode(field)
    for code in (b"040", b"011", b"012", b"043", b"134"):
        raw = raw.replace(b"\\" + code, bytes([int(code, 8)]))
    return os.fsdecode(raw)


def in_memory(path: str) -> bool:
    """Tells whether a path is on a file system that waits for no disk."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    return any(mount.device == number and mount.kind == "tmpfs" for mount in mounts())


def our_mount(path: str) -> Mount | None:
    """Returns the AmalgamFS mount at exactly this path."""
    path = os.path.abspath(path)
    here = [m for m in mounts() if m.path in {path, _real(path)}]
    return here[-1] if here and here[-1].kind == FILESYSTEM else None


def _real(path: str) -> str:
    """Resolves a path up to its last part, which may be a dead mount."""
    parent, name = os.path.split(path)
    return os.path.join(os.path.realpath(parent), name)


def is_dead(path: str) -> bool:
    """Tells whether a mount's daemon is gone. Asks what the kernel cannot answer by itself.

    False as well where nobody answers for `ANSWER_SECONDS`: a daemon is there, and hangs.
    """
    with Errand(call("statvfs", path)) as errand:
        return errand.wait(ANSWER_SECONDS) and errand.done()[0] in {
            errno.ENOTCONN, errno.ECONNABORTED,
        }  # fmt: skip


def mounts_of(store_path: str) -> list[Mount]:
    """Returns the mounts of a store, parts and all, the latest last; asks none of them anything."""
    names = {os.path.abspath(store_path), os.path.realpath(store_path)}
    return [
        mount for mount in mounts() if mount.kind in {FILESYSTEM, PART} and mount.source in names
    ]


def clear_dead(store_path: str) -> list[str]:
    """Unmounts what killed daemons of a store have left; returns where that was.

    A mount of a store that nobody serves is dead: the lease tells, and is held meanwhile, so that
    no daemon begins. What another user has mounted stays.
    """
    cleared = []
    try:
        with share_unseen(store_path, "mount"):
            for mount in reversed(mounts_of(store_path)):
                if mount.kind == FILESYSTEM:
                    with contextlib.suppress(UnmountError):
                        unmount(mount.path, lazy=True)
                        cleared.append(mount.path)
    except (LeaseHeldError, FileNotFoundError):
        pass  # somebody serves it, or nobody ever has
    return cleared


def check(path: str, store_path: str) -> str:
    """Returns the absolute path of a directory that can be mounted on.

    A dead mount of ours there is unmounted first. Raises MountPointError.
    """
    path = os.path.abspath(path)
    mount = our_mount(path)
    if mount is not None:
        if not is_dead(path):
            raise MountPointError(path, f"the store {mount.source} is mounted there")
        unmount(path)
    try:
        if os.path.islink(path):
            raise MountPointError(path, "it is a symbolic link")
        if not os.path.isdir(path):
            raise MountPointError(path, "it is not a directory" if os.path.exists(path) else
                                  "there is no such directory")  # fmt: skip
        if os.listdir(path):
            raise MountPointError(path, "the directory is not empty")
        if not os.access(path, os.W_OK):
            raise MountPointError(path, "you may not write to it")
    except OSError as error:
        raise MountPointError(path, error.strerror or str(error)) from error
    real, store = os.path.realpath(path) + os.sep, os.path.realpath(store_path) + os.sep
    if real.startswith(store):
        raise MountPointError(path, "it is inside of the store")
    if store.startswith(real):
        raise MountPointError(path, "the store is inside of it")
    return os.path.realpath(path)


def unmount(path: str, *, lazy: bool = False) -> None:
    """Ends a mount, as root or with fusermount3.

    Raises UnmountError while it is in use, UnmountRefusedError for any other reason.

    What of ours is mounted inside goes first, or together with a dead mount: no path may
    lead through that any more. Waits no longer than `PATIENCE` for a daemon that hangs.
    """
    if not lazy:
        for inside in parts_in(path):
            try:
                unmount(inside)
            except UnmountError:
                if not is_dead(path):
                    raise
                lazy = True
    if lazy and os.geteuid() == 0:  # asks nothing of the mount: no path leads into it
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.umount2(os.fsencode(path), _MNT_DETACH):
            raise UnmountRefusedError(path, os.strerror(ctypes.get_errno()))
        return
    with Errand(unmount_command(path, lazy=lazy)) as errand:
        if not errand.wait():
            raise UnmountError(path, f"nobody has answered for {PATIENCE:.0f} seconds")
        check_unmounted(path, *errand.done())


def parts_in(path: str) -> list[str]:
    """Returns what of ours is mounted inside of a mount, the latest first."""
    return [
        mount.path
        for mount in reversed(mounts())
        if mount.kind == PART and mount.path.startswith(path + os.sep)
    ]


def unmount_command(path: str, *, lazy: bool = False) -> list[str]:
    """Returns the errand that ends one mount. Raises UnmountRefusedError without fusermount3."""
    if os.geteuid() == 0:
        return call("umount", path, "lazy" if lazy else "")
    tool = shutil.which("fusermount3") or shutil.which("fusermount")
    if tool is None:
        raise UnmountRefusedError(path, "fusermount3 is not installed")
    return [tool, "-u", *(["-z"] if lazy else []), "--", path]


def check_unmounted(path: str, status: int, said: str) -> None:
    """Raises UnmountError if that errand failed: with `status`, and what it said."""
    if not status:
        return
    why = said.strip() or f"fusermount3 failed ({status})"
    if os.geteuid() == 0 and status > 0:
        why = os.strerror(status)
    kind = UnmountError if os.strerror(errno.EBUSY) in why else UnmountRefusedError
    raise kind(path, why)
