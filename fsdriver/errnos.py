"""What a program in the mount is told when the engine raises: one row per error."""

import errno

from engine.archives.bundle_applying import BundleBaseError, BundleSetIdError
from engine.archives.bundles import (
    BundleFormatError,
    BundleTooLargeError,
    BundleTruncatedError,
    BundleVersionError,
)
from engine.archives.oci_reading import ImageChoiceError, ImageDamagedError
from engine.archives.oci_writing import ImageRefusedError
from engine.archives.tar_reading import ArchiveDamagedError
from engine.episodes.bisecting import BisectRefusedError
from engine.episodes.steps import CorruptStepError, InvalidStepError
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
from engine.git.git_repository import (
    GitMissingError,
    GitOwnerError,
    GitRefusedError,
    GitSourceError,
)
from engine.host.forks import ForkedError
from engine.host.leases import LeaseHeldError
from engine.host.own_files import StrangeFileError
from engine.merging.snapshot_merging import NoMergeBaseError
from engine.patches.patch_parsing import PatchFormatError
from engine.patches.patching import PatchRefusedError
from engine.plain.checkout_records import NotACheckoutError
from engine.plain.checkouts import PartialCheckoutError, SwitchInterruptedError
from engine.plain.filling import CheckoutRefusedError
from engine.plain.importing import ImportSourceError
from engine.plain.local_edits import LocalEditsError
from engine.plain.surveying import TreeTooLargeError
from engine.sessions.changes import UncommittedChangesError
from engine.sessions.freezing import TooDeepError
from engine.storage.codec import CompressionError
from engine.storage.content import SourceChangedError
from engine.storage.store import (
    CompactionRefusedError,
    NewerFormatError,
    NotAStoreError,
    StoreBusyError,
    StoreDamagedError,
    StoreDiskError,
    StoreError,
    StoreExistsError,
    StoreFullError,
    StoreInternalError,
    StoreMemoryError,
    StoreOpenError,
    StoreOwnerError,
    StorePermissionError,
    StorePlaceError,
    StoreReadOnlyError,
)
from engine.trees.diffing import DiffTooLargeError
from engine.trees.drafts import ArchiveRefusedError
from engine.trees.outside_links import OutsideLinkError
from engine.trees.paths import (
    InvalidPathError,
    MissingPathError,
    NoDirectoryError,
    NoFileError,
    NotEmptyError,
    PathError,
    PathExistsError,
)

ERRNOS: dict[type[EngineError], int] = {
    AmbiguousIdError: errno.ENOENT,
    BisectRefusedError: errno.EINVAL,
    ArchiveDamagedError: errno.EINVAL,
    ArchiveRefusedError: errno.EINVAL,
    BundleBaseError: errno.ENOENT,
    BundleFormatError: errno.EINVAL,
    BundleSetIdError: errno.EPERM,
    BundleTooLargeError: errno.EFBIG,
    BundleTruncatedError: errno.EINVAL,
    BundleVersionError: errno.EINVAL,
    CheckoutRefusedError: errno.EIO,
    CompactionRefusedError: errno.EBUSY,
    CompressionError: errno.EINVAL,
    CorruptObjectError: errno.EIO,
    CorruptStepError: errno.EIO,
    DiffTooLargeError: errno.E2BIG,
    EngineError: errno.EIO,
    ForkedError: errno.EIO,
    ImageChoiceError: errno.EINVAL,
    ImageDamagedError: errno.EIO,
    ImageRefusedError: errno.EINVAL,
    GitMissingError: errno.EIO,
    GitOwnerError: errno.EACCES,
    GitRefusedError: errno.EIO,
    GitSourceError: errno.EIO,
    ImportSourceError: errno.EIO,
    InUseError: errno.EBUSY,
    InvalidNameError: errno.EINVAL,
    InvalidStepError: errno.EINVAL,
    InvalidPathError: errno.EINVAL,
    LeaseHeldError: errno.EBUSY,
    LocalEditsError: errno.EBUSY,
    UncommittedChangesError: errno.EBUSY,
    MissingObjectError: errno.EIO,
    MissingPathError: errno.ENOENT,
    NameTakenError: errno.EEXIST,
    NewerFormatError: errno.EIO,
    NoDirectoryError: errno.ENOTDIR,
    NoFileError: errno.EISDIR,
    NoMergeBaseError: errno.EINVAL,
    NotACheckoutError: errno.EINVAL,
    NotAStoreError: errno.EIO,
    NotEmptyError: errno.ENOTEMPTY,
    NotFoundError: errno.ENOENT,
    OutsideLinkError: errno.EIO,
    PartialCheckoutError: errno.EINVAL,
    PathError: errno.EIO,
    PathExistsError: errno.EEXIST,
    PatchFormatError: errno.EINVAL,
    PatchRefusedError: errno.EINVAL,
    SourceChangedError: errno.EAGAIN,
    SwitchInterruptedError: errno.EBUSY,
    StoreDamagedError: errno.EIO,
    StoreDiskError: errno.EIO,
    StoreError: errno.EIO,
    StoreExistsError: errno.EEXIST,
    StoreFullError: errno.ENOSPC,
    StoreBusyError: errno.EAGAIN,
    StoreMemoryError: errno.ENOMEM,
    StoreInternalError: errno.EIO,
    TreeTooLargeError: errno.ENOSPC,
    StoreOpenError: errno.EBUSY,
    StoreOwnerError: errno.EACCES,
    StorePermissionError: errno.EACCES,
    StorePlaceError: errno.EACCES,
    StoreReadOnlyError: errno.EROFS,
    StrangeFileError: errno.EACCES,
    TooDeepError: errno.ENAMETOOLONG,
}


def is_of_memory(error: Exception) -> bool:
    """True if there is no memory; or none for a thread, for which Python has no class."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and str(error) == "can't start new thread"
    )


def errno_of(error: EngineError) -> int:
    """Returns the errno for an error of the engine, by the nearest class in the table."""
    for kind in type(error).__mro__:
        if kind in ERRNOS:
            return ERRNOS[kind]
    return errno.EIO
