"""What a program in the mount is told when the engine raises: one row per error."""

import errno

from engine.bisecting import BisectRefusedError
from engine.bundle_applying import BundleBaseError
from engine.bundles import (
    BundleFormatError,
    BundleTooLargeError,
    BundleTruncatedError,
    BundleVersionError,
)
from engine.checkout_records import NotACheckoutError
from engine.checkouts import PartialCheckoutError, SwitchInterruptedError
from engine.codec import CompressionError
from engine.content import SourceChangedError
from engine.diffing import DiffTooLargeError
from engine.drafts import ArchiveRefusedError
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
from engine.filling import CheckoutRefusedError
from engine.freezing import TooDeepError
from engine.git_repository import GitMissingError, GitRefusedError, GitSourceError
from engine.importing import ImportSourceError
from engine.leases import LeaseHeldError
from engine.local_edits import LocalEditsError
from engine.oci_reading import ImageDamagedError
from engine.oci_writing import ImageRefusedError
from engine.outside_links import OutsideLinkError
from engine.patch_parsing import PatchFormatError
from engine.patching import PatchRefusedError
from engine.paths import (
    InvalidPathError,
    MissingPathError,
    NoDirectoryError,
    NoFileError,
    NotEmptyError,
    PathError,
    PathExistsError,
)
from engine.snapshot_merging import NoMergeBaseError
from engine.steps import CorruptStepError, InvalidStepError
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
from engine.surveying import TreeTooLargeError
from engine.tar_reading import ArchiveDamagedError

ERRNOS: dict[type[EngineError], int] = {
    AmbiguousIdError: errno.ENOENT,
    BisectRefusedError: errno.EINVAL,
    ArchiveDamagedError: errno.EINVAL,
    ArchiveRefusedError: errno.EINVAL,
    BundleBaseError: errno.ENOENT,
    BundleFormatError: errno.EINVAL,
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
    ImageDamagedError: errno.EIO,
    ImageRefusedError: errno.EINVAL,
    GitMissingError: errno.EIO,
    GitRefusedError: errno.EIO,
    GitSourceError: errno.EIO,
    ImportSourceError: errno.EIO,
    InUseError: errno.EBUSY,
    InvalidNameError: errno.EINVAL,
    InvalidStepError: errno.EINVAL,
    InvalidPathError: errno.EINVAL,
    LeaseHeldError: errno.EBUSY,
    LocalEditsError: errno.EBUSY,
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
    StoreError: errno.EIO,
    StoreExistsError: errno.EEXIST,
    StoreFullError: errno.ENOSPC,
    TreeTooLargeError: errno.ENOSPC,
    StorePermissionError: errno.EACCES,
    TooDeepError: errno.ENAMETOOLONG,
}


def errno_of(error: EngineError) -> int:
    """Returns the errno for an error of the engine, by the nearest class in the table."""
    for kind in type(error).__mro__:
        if kind in ERRNOS:
            return ERRNOS[kind]
    return errno.EIO
