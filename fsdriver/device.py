"""Mounting: how a process comes to hold an open /dev/fuse that is a mount.

As root, or as root of a user namespace, mount(2). Otherwise fusermount3, which is setuid, mounts
and hands the descriptor over a socket (`_FUSE_COMMFD`, see libfuse's lib/mount.c). fusermount3
mounts with `nosuid,nodev`; mount(2) is asked for the same unless `Access` says otherwise.
"""

import ctypes
import os
import shutil
import socket
import stat
import subprocess
from typing import NamedTuple

from engine import EngineError
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


def mount(mountpoint: str, *, source: str, access: Access, part: bool = False) -> int:
    """Mounts and returns the descriptor of the connection. Raises MountRefusedError.

    A `part` is read-only for the kernel. fusermount3 cannot mount it inside of another mount
    that only its user may enter: the kernel looks at who is effective, which is root.
    """
    how = _mount_directly if os.geteuid() == 0 else _mount_with_helper
    return how(mountpoint, source, access, part)


def _mount_directly(mountpoint: str, source: str, access: Access, part: bool) -> int:
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MountRefusedError(f"cannot open {DEVICE}: {error.strerror}") from error
    kind = stat.S_IFMT(os.stat(mountpoint).st_mode)
    options = f"fd={fd},rootmode={kind:o},user_id={os.getuid()},group_id={os.getgid()}"
    options += ",default_permissions" + (",allow_other" if access.allow_other else "")
    libc = ctypes.CDLL(None, use_errno=True)
    kind_name = f"fuse.{PART_SUBTYPE if part else SUBTYPE}"
    arguments = [os.fsencode(text) for text in (source, mountpoint, kind_name)]
    flags = ctypes.c_ulong(access.flags() | (_MS_RDONLY if part else 0))
    if libc.mount(*arguments, flags, options.encode()):
        os.close(fd)
        raise MountRefusedError(f"mount(2) was refused: {os.strerror(ctypes.get_errno())}")
    return fd


def _mount_with_helper(mountpoint: str, source: str, access: Access, part: bool) -> int:
    tool = shutil.which("fusermount3")
    if tool is None:
        raise MountRefusedError("fusermount3 is not installed, and only root can mount without it")
    name = source.replace("\\", "\\\\").replace(",", "\\,")
    options = f"default_permissions,fsname={name},subtype={PART_SUBTYPE if part else SUBTYPE}"
    options += (",allow_other" if access.allow_other else "") + (",ro" if part else "")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        done = subprocess.run(
            [tool, "-o", options, "--", mountpoint],
            env={"PATH": os.defpath, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, capture_output=True,
            text=True, errors="replace", check=False,
        )  # fmt: skip
        if done.returncode:
            why = done.stderr.strip() or f"fusermount3 failed ({done.returncode})"
            raise MountRefusedError(why)
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    if not descriptors:
        raise MountRefusedError("fusermount3 did not hand the mount over")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]
