"""System calls that Python has no name for, and the errors that calls give."""

import contextlib
import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
"""Flags of renameat2(2)."""

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100


def renameat2(old: str | bytes | Path, new: str | bytes | Path, flags: int) -> None:
    """renameat2(2)."""
    arguments = (_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new))
    if _libc.renameat2(*arguments, ctypes.c_uint(flags)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fsdecode(new))


KEEP_SIZE, PUNCH_HOLE = 1, 2
"""Flags of fallocate(2)."""


def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """fallocate(2), which fails where glibc's posix_fallocate would write zeros."""
    if _libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(size)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class Name(NamedTuple):
    """What getdents64(2) says of one name: `position` is where the listing goes on after it."""

    name: bytes
    ino: int
    kind: int
    position: int


_GETDENTS64 = {"x86_64": 217, "aarch64": 61}.get(platform.machine(), 61)


def getdents(fd: int, size: int) -> list[Name]:
    """getdents64(2) with a buffer of that many bytes, 280 at least: a part of a listing."""
    buffer = ctypes.create_string_buffer(size)
    count = _libc.syscall(ctypes.c_long(_GETDENTS64), fd, buffer, ctypes.c_long(size))
    if count < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    raw, at, found = buffer.raw[:count], 0, []
    while at < len(raw):
        ino, position, length, kind = struct.unpack_from("=QqHB", raw, at)
        name = raw[at + 19 : at + length].split(b"\0", 1)[0]
        found.append(Name(name, ino, kind, position))
        at += length
    return found


@contextlib.contextmanager
def refused(*codes: int) -> Iterator[None]:
    """Expects that what is inside fails with one of these errnos."""
    names = "/".join(errno.errorcode[code] for code in codes)
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            raise AssertionError(f"expected {names}: {error}") from error
    else:
        raise AssertionError(f"expected {names}, but it succeeded")
