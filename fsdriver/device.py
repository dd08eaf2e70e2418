"""Mounting: how a process comes to hold an open /dev/fuse that is a mount.

As root, or as root of a user namespace, mount(2). Otherwise fusermount3, which is setuid, mounts
and hands the descriptor over a socket (`_FUSE_COMMFD`, see libfuse's lib/mount.c).
"""

import ctypes
import os
import shutil
import socket
import stat
import subprocess

from engine import EngineError

DEVICE = "/dev/fuse"
SUBTYPE = "amalgamfs"


class MountRefusedError(EngineError):
    """The kernel or fusermount3 refused the mount."""


def mount(mountpoint: str, *, source: str, allow_other: bool) -> int:
    """Mounts and returns the descriptor of the connection. Raises MountRefusedError."""
    if os.geteuid() == 0:
        return _mount_directly(mountpoint, source, allow_other)
    return _mount_with_helper(mountpoint, source, allow_other)


def _mount_directly(mountpoint: str, source: str, allow_other: bool) -> int:
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MountRefusedError(f"cannot open {DEVICE}: {error.strerror}") from error
    kind = stat.S_IFMT(os.stat(mountpoint).st_mode)
    options = f"fd={fd},rootmode={kind:o},user_id={os.getuid()},group_id={os.getgid()}"
    options += ",default_permissions" + (",allow_other" if allow_other else "")
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = [os.fsencode(text) for text in (source, mountpoint, f"fuse.{SUBTYPE}")]
    if libc.mount(*arguments, ctypes.c_ulong(0), options.encode()):
        os.close(fd)
        raise MountRefusedError(f"mount(2) was refused: {os.strerror(ctypes.get_errno())}")
    return fd


def _mount_with_helper(mountpoint: str, source: str, allow_other: bool) -> int:
    tool = shutil.which("fusermount3")
    if tool is None:
        raise MountRefusedError("fusermount3 is not installed, and only root can mount without it")
    name = source.replace("\\", "\\\\").replace(",", "\\,")
    options = f"default_permissions,fsname={name},subtype={SUBTYPE}"
    options += ",allow_other" if allow_other else ""
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
