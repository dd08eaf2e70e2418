"""Mounting: how a process comes to hold an open /dev/fuse that is a mount.

As root, or as root of a user namespace, mount(2). Otherwise fusermount3, which is setuid, mounts
and hands the descriptor over a socket (`_FUSE_COMMFD`, see libfuse's lib/mount.c). What is mounted
inside of a mount of this process is mounted by an errand: the way there leads through that.
fusermount3 mounts with `nosuid,nodev`; mount(2) is asked for that unless `Access` says otherwise.
"""

import ctypes
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import trio

from engine import EngineError
from fsdriver.errand import PATIENCE, Errand, call
from fsdriver.launch import DEVICE

SUBTYPE = "amalgamfs"
PART_SUBTYPE = "amalgamfs.part"
"""Of a mount that shows a part of another one, read-only for the kernel."""

_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4


class MountRefusedError(EngineError):
    """The kernel or fusermount3 refused the mount."""


class Access(NamedTuple):
    """Who may use a mount, and what files may do there. fusermount3 ignores `suid` and `dev`."""

    allow_other: bool = False
    suid: bool = False
    """Whether set-user-ID and set-group-ID bits work."""
    dev: bool = False
    """Whether device nodes work."""

    def flags(self) -> int:
        """Returns the flags for mount(2)."""
        return (0 if self.suid else _MS_NOSUID) | (0 if self.dev else _MS_NODEV)


def mount(mountpoint: str, *, source: str, access: Access) -> int:
    """Mounts and returns the descriptor of the connection. Raises MountRefusedError."""
    if os.geteuid() == 0:
        fd = _open_device()
        kind = stat.S_IFMT(os.stat(mountpoint).st_mode)
        *texts, flags, options = _arguments(mountpoint, source, access, False, fd, kind)
        libc = ctypes.CDLL(None, use_errno=True)
        arguments = [os.fsencode(text) for text in texts]
        if libc.mount(*arguments, ctypes.c_ulong(int(flags)), options.encode()):
            os.close(fd)
            _refuse(ctypes.get_errno())
        return fd
    with _helper(mountpoint, source, access, False) as (errand, ours):
        if not errand.wait():
            raise MountRefusedError(f"fusermount3 has not mounted within {PATIENCE:.0f} seconds")
        return _handed_over(errand, ours)


async def mount_part(where: str, *, source: str, access: Access) -> int:
    """Mounts inside of a mount of this process, read-only for the kernel; as `mount`.

    Waits as long as it takes, and can be cancelled while the outer mount answers nobody.
    fusermount3 cannot mount inside of a mount that only its user may enter: the kernel looks at
    who is effective, which is root.
    """
    if os.geteuid() != 0:
        with _helper(where, source, access, True) as (errand, ours):
            await trio.lowlevel.wait_readable(errand.fileno())
            return _handed_over(errand, ours)
    fd = _open_device()
    try:
        words = _arguments(where, source, access, True, fd, stat.S_IFDIR)
        with Errand(call("mount", *words), pass_fds=(fd,)) as errand:
            await trio.lowlevel.wait_readable(errand.fileno())
            status, _ = errand.done()
        if status:
            _refuse(status)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_device() -> int:
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MountRefusedError(f"cannot open {DEVICE}: {error.strerror}") from error


def _arguments(
    where: str, source: str, access: Access, part: bool, fd: int, kind: int
) -> list[str]:
    """Returns what mount(2) takes, in its order; `kind` is the type in the mode of `where`."""
    options = f"fd={fd},rootmode={kind:o},user_id={os.getuid()},group_id={os.getgid()}"
    options += ",default_permissions" + (",allow_other" if access.allow_other else "")
    flags = access.flags() | (_MS_RDONLY if part else 0)
    return [source, where, f"fuse.{PART_SUBTYPE if part else SUBTYPE}", str(flags), options]


def _refuse(code: int) -> None:
    why = os.strerror(code) if code > 0 else "the process that called it was killed"
    raise MountRefusedError(f"mount(2) was refused: {why}")


@contextmanager
def _helper(
    where: str, source: str, access: Access, part: bool
) -> Iterator[tuple[Errand, socket.socket]]:
    """Sends fusermount3; gives it, and where it hands the descriptor over."""
    tool = shutil.which("fusermount3")
    if tool is None:
        raise MountRefusedError("fusermount3 is not installed, and only root can mount without it")
    name = source.replace("\\", "\\\\").replace(",", "\\,")
    options = f"default_permissions,fsname={name},subtype={PART_SUBTYPE if part else SUBTYPE}"
    options += (",allow_other" if access.allow_other else "") + (",ro" if part else "")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        command = [tool, "-o", options, "--", where]
        env = {"PATH": os.defpath, "_FUSE_COMMFD": str(theirs.fileno())}
        with Errand(command, pass_fds=(theirs.fileno(),), env=env) as errand:
            ours.setblocking(False)
            yield errand, ours


def _handed_over(errand: Errand, ours: socket.socket) -> int:
    """Returns the descriptor from a helper that has ended."""
    status, said = errand.done()
    if status:
        raise MountRefusedError(said.strip() or f"fusermount3 failed ({status})")
    _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    if not descriptors:
        raise MountRefusedError("fusermount3 did not hand the mount over")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]
