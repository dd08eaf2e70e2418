"""The host's filesystem as trees see it: kinds, extended attributes, names.

What import, checkout and sessions share about real files. Only `user.*` attributes are kept:
the others carry owners and privileges, which a tree does not.
"""

import contextlib
import ctypes
import errno
import os
import stat

from engine.storage.nodes import EARLIEST_NS, LATEST_NS, Kind

OVERLAY_PREFIX = b"user.overlay."
"""Attributes in this namespace belong to the format of a session's upper."""

MARK = b"user.amalgam.checkout"
"""Tells of a directory which checkout it is; no part of what a tree keeps."""

_NOT_KEPT = (OVERLAY_PREFIX, b"user.amalgam.")
_KINDS = {
    stat.S_IFREG: Kind.FILE,
    stat.S_IFDIR: Kind.DIRECTORY,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFIFO: Kind.FIFO,
}
TYPE_BITS = {kind: bits for bits, kind in _KINDS.items()}
_libc = ctypes.CDLL(None)
_WITHOUT = {errno.ENOTSUP, errno.ENODATA, errno.ENOENT}


def kind_of(mode: int) -> Kind | None:
    """Returns the kind for a stat mode; None for sockets and devices."""
    return _KINDS.get(stat.S_IFMT(mode))


def describe(mode: int) -> str:
    """Names what kind of file a stat mode is, for a message."""
    names = {stat.S_IFSOCK: "socket", stat.S_IFBLK: "block device", stat.S_IFCHR: "device"}
    return names.get(stat.S_IFMT(mode), "file of unknown kind")


def read_xattrs(
    where: int | bytes, others: list[bytes] | None = None
) -> tuple[tuple[bytes, bytes], ...]:
    """Returns the `user.*` attributes of a descriptor or path, sorted; links not followed.

    The names of attributes that are not kept are added to `others`.
    """
    try:
        follow = isinstance(where, int)
        names = os.listxattr(where, follow_symlinks=follow)
    except OSError as error:
        if error.errno in _WITHOUT:
            return ()
        raise
    pairs = []
    for text in names:
        name = os.fsencode(text)
        if is_kept(name):
            with contextlib.suppress(FileNotFoundError):
                pairs.append((name, os.getxattr(where, name, follow_symlinks=follow)))
        elif others is not None:
            others.append(name)
    return tuple(sorted(pairs))


def kept_xattrs(pairs: tuple[tuple[bytes, bytes], ...]) -> tuple[tuple[bytes, bytes], ...]:
    """Returns the attributes that a directory may have; a tree made by others may have more.

    What gives a program privileges, or means something to this one, no tree brings along.
    """
    return tuple(pair for pair in pairs if is_kept(pair[0]))


def is_kept(name: bytes) -> bool:
    """Tells whether a tree keeps an extended attribute."""
    return name.startswith(b"user.") and not name.startswith(_NOT_KEPT)


def is_in_range(time_ns: int) -> bool:
    """Tells whether a tree can keep a time: those from 1677 to 2262."""
    return EARLIEST_NS <= time_ns <= LATEST_NS


def mtime_of(status: os.stat_result) -> int:
    """Returns the modification time in ns; of times beyond what a tree can say, the nearest."""
    return min(max(status.st_mtime_ns, EARLIEST_NS), LATEST_NS)


def write_xattrs(where: int | bytes, pairs: tuple[tuple[bytes, bytes], ...]) -> None:
    """Sets attributes on a descriptor or path, those that a tree keeps. Raises OSError."""
    for name, value in kept_xattrs(pairs):
        os.setxattr(where, name, value, follow_symlinks=isinstance(where, int))


def reserve(fd: int, start: int, size: int) -> None:
    """Has the disk set aside what will be written next, which writing it is faster with.

    A filesystem that cannot, or a full disk, is no error: the write tells.
    """
    # Not os.posix_fallocate: where the filesystem cannot, the C library writes to every block.
    _libc.fallocate(fd, 0, ctypes.c_int64(start), ctypes.c_int64(size))


def set_times(path: bytes, mtime_ns: int, *, dir_fd: int | None = None) -> None:
    """Sets the modification time of a path (the access time with it), links not followed."""
    os.utime(path, ns=(mtime_ns, mtime_ns), dir_fd=dir_fd, follow_symlinks=False)
