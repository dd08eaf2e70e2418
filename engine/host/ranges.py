"""Ranges of a file on the host: room for them, holes in them, copies of them.

Everything works on open descriptors and blocks on the disk for a bounded time only: what may
take long is done in steps, and a copy ends early, as copy_file_range(2) may.
"""

import ctypes
import errno
import os
from time import perf_counter_ns

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
"""Flags of fallocate(2)."""

COPY_STEP = 8 << 20
"""So many bytes at most are copied at once: the disk's own time for them is a few ms."""

COPY_NS = 10_000_000
"""After so long a copy ends with what it has, and the caller asks for the rest."""

_ROOM_STEP = 64 << 20
"""So much room at most is asked for at once: where it is memory, it has to be cleared."""

_FALL_BACK = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ETXTBSY, errno.EBADF}
)

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate64 if hasattr(_libc, "fallocate64") else _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def allocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2): EOPNOTSUPP is the filesystem's own answer. Raises OSError.

    Without PUNCH_HOLE and ZERO_RANGE the room comes first, then the size: with ENOSPC the size
    stays as it was.
    """
    if not mode & ~KEEP_SIZE:
        for at in range(offset, offset + length, _ROOM_STEP):
            _call(fd, KEEP_SIZE, at, min(_ROOM_STEP, offset + length - at))
    if mode != KEEP_SIZE:
        _call(fd, mode, offset, length)


def _call(fd: int, mode: int, offset: int, length: int) -> None:
    while _fallocate(fd, mode, offset, length):
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def copy(source: int, at: int, target: int, to: int, length: int) -> int:
    """Copies a range of an open file to another, or within one, and tells how much.

    The filesystem shares the blocks where it can. Fewer than `length` bytes are copied where the
    source ends, or COPY_NS have passed. Raises OSError if nothing was copied.
    """
    began, done = perf_counter_ns(), 0
    while done < length:
        step = min(COPY_STEP, length - done)
        try:
            count = _copy_once(source, at + done, target, to + done, step)
        except OSError:
            if not done:
                raise
            return done
        done += count
        if not count or perf_counter_ns() - began > COPY_NS:
            break
    return done


def _copy_once(source: int, at: int, target: int, to: int, length: int) -> int:
    try:
        return os.copy_file_range(source, target, length, at, to)
    except OSError as error:
        if error.errno not in _FALL_BACK:
            raise
    return write_all(target, os.pread(source, length, at), to)


def write_all(fd: int, data: bytes, to: int) -> int:
    """Writes all of `data` and returns its length. Raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:] if done else data, to + done)
    return done
