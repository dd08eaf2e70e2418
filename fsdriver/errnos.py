"""What a program in the mount is told when the engine raises: one row per error."""

import errno

from engine.checkout import CheckoutRefusedError, OutsideLinkError
from engine.codec import CompressionError
from engine.content import SourceChangedError
from engine.errors import (
    AmbiguousIdError,
    CorruptObjectError,
    EngineError,
    InUseError,
    InvalidNameError,
    MissingObjectError,
    NameTakenError,
    NotFoundError,
)
from engine.freezing import TooDeepError
from engine.importing import ImportSourceError
from engine.leases import LeaseHeldError
from engine.store import (
    CompactionRefusedError,
    NewerFormatError,
    NotAStoreError,
    StoreDamagedError,
    StoreError,
    StoreExistsError,
    StoreFullError,
    StorePermissionError,
)

ERRNOS: dict[type[EngineError], int] = {
    AmbiguousIdError: errno.ENOENT,
    CheckoutRefusedError: errno.EIO,
    CompactionRefusedError: errno.EBUSY,
    CompressionError: errno.EINVAL,
    CorruptObjectError: errno.EIO,
    EngineError: errno.EIO,
    ImportSourceError: errno.EIO,
    InUseError: errno.EBUSY,
    InvalidNameError: errno.EINVAL,
    LeaseHeldError: errno.EBUSY,
    MissingObjectError: errno.EIO,
    NameTakenError: errno.EEXIST,
    NewerFormatError: errno.EIO,
    NotAStoreError: errno.EIO,
    NotFoundError: errno.ENOENT,
    OutsideLinkError: errno.EIO,
    SourceChangedError: errno.EAGAIN,
    StoreDamagedError: errno.EIO,
    StoreError: errno.EIO,
    StoreExistsError: errno.EEXIST,
    StoreFullError: errno.ENOSPC,
    StorePermissionError: errno.EACCES,
    TooDeepError: errno.ENAMETOOLONG,
}


def errno_of(error: EngineError) -> int:
    """Returns the errno for an error of the engine, by the nearest class in the table."""
    for kind in type(error).__mro__:
        if kind in ERRNOS:
            return ERRNOS[kind]
    return errno.EIO
