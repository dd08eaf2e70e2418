"""Unlocking: a directory or file of ours is opened though its permission bits keep its owner out.

A checkout writes the bits that the tree says, and an ordinary user cannot look into a directory of
mode 000 afterwards. For as long as it is worked on, such a directory has u+rwx, and its attribute
`user.amalgam.mode` (octal) says what it had, and gets again. Whoever is killed in between leaves
the attribute, by which the next one to open the directory puts it right. A kill between the two
system calls that set both leaves u+rwx alone, which `checkout --status` shows as an edit.

A file without u+r gets it for the moment of being opened.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

LOCKED = b"user.amalgam.mode"
_READ = 0o500
_ALL = 0o700
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_AS_IT_IS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def unlocked(name: bytes | str, dir_fd: int | None = None) -> Iterator[int]:
    """Gives an open directory that its owner can look into; follows no link. Raises OSError."""
    fd = open_unlocked(name, dir_fd)
    try:
        yield fd
    finally:
        lock_again(fd)
        os.close(fd)


def open_unlocked(name: bytes | str, dir_fd: int | None = None) -> int:
    """Opens a directory likewise; the caller calls `lock_again` before it closes it."""
    try:
        fd = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=dir_fd)
    except PermissionError:
        return _open_locked(name, dir_fd)
    try:
        status = os.fstat(fd)
        if status.st_mode & _READ != _READ and status.st_uid == os.geteuid() != 0:
            _unlock(fd, status)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_locked(name: bytes | str, dir_fd: int | None) -> int:
    place = os.open(name, _AS_IT_IS | os.O_DIRECTORY, dir_fd=dir_fd)
    try:
        status = os.fstat(place)
        path = f"/proc/self/fd/{place}"
        _check_ours(status, name)
        os.chmod(path, stat.S_IMODE(status.st_mode) | _ALL)
        fd = os.open(path, _DIRECTORY)
    finally:
        os.close(place)
    _note(fd, status)
    return fd


def _check_ours(status: os.stat_result, name: bytes | str) -> None:
    if status.st_uid != os.geteuid():
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)


def _unlock(fd: int, status: os.stat_result) -> None:
    os.fchmod(fd, stat.S_IMODE(status.st_mode) | _ALL)
    _note(fd, status)


def _note(fd: int, status: os.stat_result) -> None:
    if _noted(fd) is None:  # else it is from one that was killed
        with contextlib.suppress(OSError):  # a disk without attributes
            os.setxattr(fd, LOCKED, b"%o" % stat.S_IMODE(status.st_mode))


def _noted(fd: int) -> int | None:
    try:
        return int(os.getxattr(fd, LOCKED), 8) & 0o7777
    except (OSError, ValueError):
        return None


def true_mode(fd: int) -> int:
    """Returns the permission bits that an open directory has when nobody works on it."""
    noted = _noted(fd)
    return stat.S_IMODE(os.fstat(fd).st_mode) if noted is None else noted


def lock_again(fd: int) -> None:
    """Gives an open directory the permission bits that it had before it was unlocked."""
    noted = _noted(fd)
    if noted is not None:
        settle(fd)
        os.fchmod(fd, noted)


def settle(fd: int) -> None:
    """Forgets what an open directory had: it is about to get permission bits for good."""
    with contextlib.suppress(OSError):
        os.removexattr(fd, LOCKED)


def open_file(name: bytes, flags: int, dir_fd: int) -> int:
    """Opens a file for reading, also one of ours without u+r. Raises OSError."""
    try:
        return os.open(name, flags, dir_fd=dir_fd)
    except PermissionError:
        place = os.open(name, _AS_IT_IS, dir_fd=dir_fd)
    try:
        status = os.fstat(place)
        if not stat.S_ISREG(status.st_mode):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        _check_ours(status, name)
        path, mode = f"/proc/self/fd/{place}", stat.S_IMODE(status.st_mode)
        os.chmod(path, mode | stat.S_IRUSR)
        try:
            return os.open(path, flags & ~os.O_NOFOLLOW)
        finally:
            os.chmod(path, mode)
    finally:
        os.close(place)
