"""What the store knows of the checkouts that were made of it.

A checkout is a directory on the host's disk with the attribute `user.amalgam.checkout`, the id
of the checkout: 32 hexadecimal digits. The store has a record of it, in `meta` under
`checkout:` and the id:

    [1, path, device, inode, root, within, snapshot, towards, towards snapshot, base]

`root` is the entry of the tree that the directory shows, `within` where in its snapshot that
tree is. For a session's tree `snapshot` is null, and `base` what the session stood on. `towards`
is null, or the tree that a switch under way makes of it: every path is then as in one tree or
the other. A copy of the directory has another inode number and is no checkout; one that was
moved still is. Garbage collection keeps the trees of a record, and forgets the records of
directories that are gone.

Which of the files were changed since, the stat cache tells (see `stat_cache`): a checkout writes
its rows as an import would. Losing them costs time, nothing else.
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator

import cbor2
import msgspec

from engine.errors import CorruptObjectError, EngineError
from engine.host.hostfs import MARK
from engine.storage.nodes import Entry, check_entry, encode
from engine.storage.store import Db, Reader, Writer

PREFIX = b"checkout:"
_VERSION = 1
_NONE = {errno.ENODATA, errno.ENOTSUP}


class NotACheckoutError(EngineError):
    """The directory is no checkout of this store. `path` is the directory."""

    def __init__(self, path: str, why: str = "it is no checkout of this store") -> None:
        super().__init__(f"{path!r}: {why}")
        self.path, self.why = path, why


class CheckoutRecord(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A checkout as the store knows it; see the module."""

    version: int
    path: bytes
    device: int
    inode: int
    root: Entry
    within: bytes = b""
    snapshot: bytes | None = None
    towards: Entry | None = None
    towards_snapshot: bytes | None = None
    base: bytes | None = None

    def trees(self) -> list[Entry]:
        """Returns the trees that the directory may show now: one, or two in a switch."""
        return [root for root in (self.root, self.towards) if root is not None]


def new_id() -> bytes:
    """Returns the id of a checkout that is about to be made."""
    return secrets.token_hex(16).encode()


def new_record(
    path: str,
    status: os.stat_result,
    root: Entry,
    within: bytes = b"",
    snapshot: bytes | None = None,
    base: bytes | None = None,
) -> CheckoutRecord:
    """Makes the record of a directory."""
    root = msgspec.structs.replace(root, name=b"")
    place = os.fsencode(path), status.st_dev, status.st_ino
    return CheckoutRecord(_VERSION, *place, root, within, snapshot, base=base)


def mark(fd: int, identifier: bytes) -> bool:
    """Marks an open directory as a checkout; False where there are no attributes."""
    try:
        os.setxattr(fd, MARK, identifier)
    except OSError as error:
        if error.errno in _NONE:
            return False
        raise
    return True


def unmark(fd: int) -> None:
    """Makes an open directory a plain one again."""
    with contextlib.suppress(OSError):
        os.removexattr(fd, MARK)


def mark_of(where: int | str | bytes) -> bytes | None:
    """Returns the id that a directory is marked with, or None."""
    try:
        value = os.getxattr(where, MARK, follow_symlinks=isinstance(where, int))
    except OSError as error:
        if error.errno in _NONE:
            return None
        raise
    return value if len(value) == 32 and value.isalnum() else None


def save(writer: Writer, identifier: bytes, record: CheckoutRecord) -> None:
    """Stores a record."""
    writer.put(Db.META, PREFIX + identifier, encode(record))


def forget(writer: Writer, identifier: bytes) -> None:
    """Removes a record."""
    writer.delete(Db.META, PREFIX + identifier)


def load(reader: Reader, identifier: bytes) -> CheckoutRecord | None:
    """Returns a record, or None. Raises CorruptObjectError."""
    raw = reader.get(Db.META, PREFIX + identifier)
    return None if raw is None else decode_checkout(identifier, raw)


def checkout_ids(reader: Reader) -> Iterator[bytes]:
    """Yields the ids of all records."""
    for key in reader.keys(Db.META, PREFIX):
        if not key.startswith(PREFIX):
            return
        yield key.removeprefix(PREFIX)


def records(reader: Reader) -> Iterator[tuple[bytes, CheckoutRecord]]:
    """Yields all records with their ids. Raises CorruptObjectError."""
    for identifier in checkout_ids(reader):
        record = load(reader, identifier)
        if record is not None:
            yield identifier, record


def decode_checkout(identifier: bytes, raw: memoryview) -> CheckoutRecord:
    """Reads a record. Raises CorruptObjectError."""
    try:
        record = msgspec.convert(cbor2.loads(raw), CheckoutRecord)
        for entry in (record.root, record.towards):
            if entry is not None:
                check_entry(entry)
        if record.version != _VERSION:
            raise ValueError("it is of another version")
    except (ValueError, TypeError, RecursionError, OverflowError, cbor2.CBORError) as error:
        raise CorruptObjectError("checkout", identifier, str(error)) from error
    return record


def is_at(record: CheckoutRecord, path: bytes, status: os.stat_result) -> bool:
    """Tells whether a directory is the one of a record, and no copy of it."""
    same_place = record.device == status.st_dev or record.path == path
    return record.inode == status.st_ino and same_place


def is_gone(identifier: bytes, record: CheckoutRecord) -> bool:
    """Tells whether the directory of a record is certainly there no more.

    Where even the directory around it is missing, a disk may not be mounted just now.
    """
    try:
        status = os.lstat(record.path)
        return not is_at(record, record.path, status) or mark_of(record.path) != identifier
    except (FileNotFoundError, NotADirectoryError):
        return os.path.isdir(os.path.dirname(record.path))
    except OSError:
        return False
