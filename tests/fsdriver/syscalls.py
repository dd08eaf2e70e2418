"""System calls that Python has no name for, and the errors that calls give."""

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

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
