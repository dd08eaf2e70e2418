"""What LMDB's errors mean for a store: each class of them has one row here.

An error says that the file is damaged only if it is: whoever is told so looks for a copy. A test
walks all classes of the library and fails on one without a row.
"""

import errno
import mmap
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lmdb

from engine.storage.store import (
    StoreBusyError,
    StoreDamagedError,
    StoreDiskError,
    StoreError,
    StoreFullError,
    StoreInternalError,
    StoreMemoryError,
    StorePermissionError,
    StoreReadOnlyError,
)

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

HANDLED = (lmdb.MapFullError, lmdb.MapResizedError, lmdb.NotFoundError)
"""Left as they are: the store grows its map, or knows what it has not found."""

MEANINGS: dict[type[lmdb.Error], Callable[[str, str], StoreError]] = {
    # The file's pages are not what they should be.
    lmdb.BadChecksumError: StoreDamagedError,
    lmdb.CorruptedError: StoreDamagedError,
    lmdb.CursorFullError: StoreDamagedError,  # a tree deeper than any can be
    lmdb.IncompatibleError: StoreDamagedError,  # flags of a database that the store never sets
    lmdb.InvalidError: StoreDamagedError,
    lmdb.PageFullError: StoreDamagedError,
    lmdb.PageNotFoundError: StoreDamagedError,
    lmdb.ProblemError: StoreDamagedError,
    lmdb.VersionMismatchError: StoreDamagedError,
    # There is something that others have now.
    lmdb.LockError: StoreBusyError,
    lmdb.ReadersFullError: StoreBusyError,
    # This process has not enough of something.
    lmdb.MemoryError: StoreMemoryError,
    lmdb.TlsFullError: StoreMemoryError,
    # The machine.
    lmdb.DiskError: lambda path, _: StoreFullError(path),
    lmdb.PanicError: StoreDiskError,  # a write of the page that all hangs on failed before
    lmdb.ReadonlyError: StorePermissionError,
    # We have called it wrongly.
    lmdb.BadDbiError: StoreInternalError,
    lmdb.BadRslotError: StoreInternalError,
    lmdb.BadTxnError: StoreInternalError,
    lmdb.BadValsizeError: StoreInternalError,
    lmdb.CryptoFailError: StoreInternalError,
    lmdb.DbsFullError: StoreInternalError,
    lmdb.EnvEncryptionError: StoreInternalError,
    lmdb.InvalidParameterError: StoreInternalError,
    lmdb.KeyExistsError: StoreInternalError,
    lmdb.TxnFullError: StoreInternalError,
}
"""What an error means by its class, unless its errno has a row below."""

_CODES: dict[int, Callable[[str, str], StoreError]] = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), StorePermissionError),
    errno.EROFS: lambda path, _: StoreReadOnlyError(path),
    **dict.fromkeys((errno.EAGAIN, errno.EBUSY, errno.EINTR), StoreBusyError),
    errno.EIO: StoreDiskError,
    **dict.fromkeys((errno.EFAULT, errno.EINVAL), StoreDamagedError),
    errno.ENOMEM: StoreMemoryError,
}
"""What an errno of the system means; of others the system's own words are enough."""


@contextmanager
def translated(path: str) -> Iterator[None]:
    """Turns LMDB's errors into the store's, leaving those of `HANDLED`."""
    try:
        yield
    except HANDLED:
        raise
    except lmdb.Error as error:
        raise meaning(path, error) from error


def meaning(path: str, error: lmdb.Error) -> Exception:
    """Returns the error that a caller of the store gets."""
    code = getattr(error, "code", 0) or 0
    if code in FULL or (code == errno.EIO and _is_full(path)):
        return StoreFullError(path)
    made = MEANINGS.get(type(error)) or _CODES.get(code)
    if made is not None:
        return made(path, str(error))
    if code > 0:
        return OSError(code, os.strerror(code), path)
    return StoreInternalError(path, str(error))


def is_no_room(error: lmdb.Error) -> bool:
    """True if the address space was too small."""
    return isinstance(error, lmdb.MemoryError) or getattr(error, "code", 0) == errno.ENOMEM


def _is_full(path: str) -> bool:
    """True if the disk has no room, of which LMDB says EIO when it could write a part.

    Also if the process may not make its file larger.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if most != resource.RLIM_INFINITY:
            size = os.stat(os.path.join(path, "db", "data.mdb")).st_size
            if size >= most - mmap.PAGESIZE:
                return True
        fd = os.open(path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, 1 << 20)
        finally:
            os.close(fd)
    except OSError as error:
        return error.errno in FULL
    return False
