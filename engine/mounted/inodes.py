"""Inodes: what every object in a mount can be asked, whatever stands behind it.

The virtual filesystem (`vfs`) is a table of these by number. A method that changes something
raises EROFS here; a session's inodes override it. Everything is synchronous, and called from
one thread at a time. POSIX's answers are OSErrors; damage is a CorruptObjectError.
"""

import errno
import os
import stat
from bisect import bisect_right
from collections.abc import Generator, Iterator

import msgspec

from engine.host.hostfs import TYPE_BITS
from engine.host.owners import shown
from engine.host.ranges import COPY_STEP
from engine.ids import InodeNo, digest
from engine.storage.chunking import SMALLEST_CHUNK
from engine.storage.holes import stored_bytes
from engine.storage.nodes import Entry, Kind, Owner


class Attributes(msgspec.Struct, gc=False):
    """What stat tells. Times in ns, sizes in bytes, `blocks` of 512 bytes."""

    ino: InodeNo
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    blocks: int
    mtime_ns: int
    ctime_ns: int
    atime_ns: int
    rdev: int = 0


class Changes(msgspec.Struct, gc=False):
    """What setattr is to change; None leaves it. Times in ns."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


LAST_NAME = b"\xff" * 256
"""Comes after every name: `(cookie, LAST_NAME)` is behind what a listing has given so far."""

FOREVER = 2.0**31
"""A timeout, in seconds, for what the kernel may keep until told otherwise."""


def fail(code: int) -> OSError:
    """Returns the OSError for an errno."""
    return OSError(code, os.strerror(code))


def number(*parts: bytes) -> InodeNo:
    """Returns an inode number that depends on `parts` alone; never one of the first 2**32.

    Of 62 bits: overlayfs puts the layer into the two highest.
    """
    raw = int.from_bytes(digest(b"\0".join(parts))[:8], "big")
    return InodeNo((raw & 0x3FFF_FFFF_FFFF_FFFF) | 0x1_0000_0000)


class Inode:
    """One object in a mount. `lookups` counts the kernel's references, as FORGET undoes them."""

    __slots__ = ("ino", "lookups")

    keep_entry: float = FOREVER
    """How many seconds the kernel may keep a name that leads here."""
    keep_attributes: float = FOREVER
    """How many seconds the kernel may keep the attributes."""
    keep_missing: float = FOREVER
    """How many seconds the kernel may remember that a name is not in this directory."""
    read_only: bool = True
    """Whether every change is refused with EROFS."""

    def __init__(self, ino: InodeNo) -> None:
        self.ino = ino
        self.lookups = 0

    def attributes(self) -> Attributes:
        """Returns what stat tells."""
        raise fail(errno.EIO)

    def lookup(self, name: bytes) -> "Inode | None":
        """Returns the inode called `name` in this directory, or None."""
        raise fail(errno.ENOTDIR)

    def listing(self, cookie: int) -> "Iterator[tuple[int, bytes, Inode]]":
        """Yields (cookie, name, inode) of this directory's entries after `cookie` (0: all).

        Cookies stay good while the directory changes; what is there throughout comes once.
        """
        raise fail(errno.ENOTDIR)

    def read(self, offset: int, size: int) -> bytes:
        """Returns up to `size` bytes; fewer only at the end."""
        raise fail(errno.EISDIR if stat.S_ISDIR(self.attributes().mode) else errno.EINVAL)

    def read_unseen(self, offset: int, size: int) -> bytes:
        """Reads likewise for who has asked that the access time stay (O_NOATIME)."""
        return self.read(offset, size)

    def seek(self, offset: int, whence: int) -> int:
        """Returns where the next data (SEEK_DATA) or hole (SEEK_HOLE) begin, as lseek(2).

        A file whose holes nobody knows is all data. May be called from any thread.
        """
        size = self.attributes().size
        if not 0 <= offset < size:
            raise fail(errno.ENXIO)
        return offset if whence == os.SEEK_DATA else size

    def may_have_holes(self) -> bool:
        """Tells whether the kernel may have bytes for what `seek` takes for a hole of the disk."""
        return False

    def unchanging(self) -> int:
        """Returns the bytes of a file that will never change; 0 of anything else."""
        return 0

    def stream(self, offset: int, end: int) -> Generator[memoryview, None, None]:
        """Yields the bytes of a file that will never change, valid while the generator is open.

        May be called from any thread.
        """
        yield from ()

    def followers(self) -> "Iterator[Inode]":
        """Yields the files that come after this one in its directory's listing, if known."""
        return iter(())

    def files(self) -> "Iterator[Inode]":
        """Yields the files of this directory, if it was listed and does not change."""
        return iter(())

    def readlink(self) -> bytes:
        """Returns a link's target."""
        raise fail(errno.EINVAL)

    def xattrs(self) -> dict[bytes, bytes]:
        """Returns the extended attributes."""
        return {}

    # What changes something.

    def change(self, changes: Changes) -> Attributes:
        """Applies setattr and returns the new attributes."""
        raise fail(errno.EROFS)

    def write(self, offset: int, data: bytes) -> int:
        """Writes all of `data` and returns its length."""
        raise fail(errno.EROFS)

    def allocate(self, mode: int, offset: int, length: int) -> None:
        """Makes room, holes or zeros in a file, by fallocate(2)'s mode."""
        raise fail(errno.EROFS)

    def copy_range(self, offset: int, target: "Inode", to: int, length: int) -> int:
        """Copies a range to another file, or within this one, and returns how much was copied.

        That may be less than `length`, as with copy_file_range(2): the caller asks for the rest.
        """
        return target.write(to, self.read(offset, min(length, COPY_STEP)))

    def drop_set_id(self) -> bool:
        """Takes away set-user-ID, and set-group-ID where the group may execute.

        As Linux does at a write or truncation by whoever lacks CAP_FSETID. Returns True if the
        file had such a bit.
        """
        return False

    def create(self, name: bytes, mode: int, owner: Owner, device: int = 0) -> "Inode":
        """Makes a regular file (or a fifo, socket or device, by `mode`'s type bits)."""
        raise fail(errno.EROFS)

    def mkdir(self, name: bytes, mode: int, owner: Owner) -> "Inode":
        """Makes a directory."""
        raise fail(errno.EROFS)

    def symlink(self, name: bytes, target: bytes, owner: Owner) -> "Inode":
        """Makes a symbolic link."""
        raise fail(errno.EROFS)

    def link(self, name: bytes, file: "Inode") -> "Inode":
        """Gives a file another name in this directory."""
        raise fail(errno.EROFS)

    def unlink(self, name: bytes) -> None:
        """Removes a name that is not a directory's."""
        raise fail(errno.EROFS)

    def rmdir(self, name: bytes) -> None:
        """Removes an empty directory."""
        raise fail(errno.EROFS)

    def rename(self, name: bytes, target: "Inode", new_name: bytes, flags: int) -> None:
        """Renames to `new_name` in the directory `target`; flags as of renameat2(2)."""
        raise fail(errno.EROFS)

    def set_xattr(self, name: bytes, value: bytes, flags: int = 0) -> None:
        """Sets an extended attribute."""
        raise fail(errno.EROFS)

    def remove_xattr(self, name: bytes) -> None:
        """Removes an extended attribute."""
        raise fail(errno.EROFS)

    def open_to_sync(self) -> int:
        """Opens what an fsync makes durable all that was written by; -1 if nothing is to be done.

        The caller syncs it, which may block and be done in another thread, and closes it.
        """
        return -1

    def to_copy(self, changes: Changes | None = None) -> int:
        """Returns how many bytes the next change would have to copy first."""
        return 0

    def copied_without(self, name: bytes) -> "Inode | None":
        """Returns what must be copied before `name` can go from this directory, if anything."""
        return None

    def stage(self) -> None:
        """Does that copying ahead, perhaps in another thread; the change then finds it done."""

    def forgotten(self) -> None:
        """Called when the kernel's last reference went."""


def entry_attributes(ino: InodeNo, entry: Entry, owner: Owner) -> Attributes:
    """Returns the attributes of an entry in the store.

    A directory has one link: GNU find then does not count on subdirectories' `..`.
    """
    if entry.owner is not None:
        owner = shown(entry.owner, owner)
    kind = Kind(entry.kind)
    size = stored = entry.size
    if entry.totals is not None:
        size, stored = entry.totals.entries, 0
    elif kind == Kind.FILE and size > SMALLEST_CHUNK:  # a smaller one is one piece
        stored = stored_bytes(entry)
    return Attributes(
        ino,
        TYPE_BITS[kind] | entry.mode,
        entry.link.count if entry.link is not None else 1,
        owner.uid,
        owner.gid,
        size,
        (stored + 511) // 512,
        entry.mtime_ns,
        entry.mtime_ns,
        entry.mtime_ns,
    )


def host_attributes(ino: InodeNo, status: os.stat_result, mode: int, nlink: int) -> Attributes:
    """Returns the attributes of a file of the host that shows `mode` as its permission bits."""
    return Attributes(
        ino, stat.S_IFMT(status.st_mode) | mode, nlink,
        status.st_uid, status.st_gid, status.st_size, status.st_blocks,
        status.st_mtime_ns, status.st_ctime_ns, status.st_atime_ns, status.st_rdev,
    )  # fmt: skip


def cookie_of(name: bytes) -> int:
    """Returns a number that a name has for as long as the process lives; 1 and 2 are free."""
    return (hash(name) & 0x3FFF_FFFF_FFFF_FFFF) + 3


class VirtualDirectory(Inode):
    """A directory that exists only in the mount; subclasses say what is in it."""

    __slots__ = ("owner", "time_ns")

    keep_attributes = 1.0
    keep_missing = 0.0
    mode = 0o555

    def __init__(self, ino: InodeNo, owner: Owner, time_ns: int) -> None:
        super().__init__(ino)
        self.owner, self.time_ns = owner, time_ns

    def attributes(self) -> Attributes:
        t = self.changed_ns()
        return Attributes(self.ino, stat.S_IFDIR | self.mode, 1, *self.owner, 0, 0, t, t, t)

    def names(self) -> list[bytes]:
        """Returns the names in it, sorted."""
        return []

    def changed_ns(self) -> int:
        """Returns when the names last changed: a kernel that keeps the listing looks at it."""
        return self.time_ns

    def order(self) -> list[tuple[int, bytes]]:
        """Returns (cookie, name) of what is in it, sorted."""
        return sorted((cookie_of(name), name) for name in self.names())

    def listing(self, cookie: int) -> Iterator[tuple[int, bytes, Inode]]:
        order = self.order()
        for at, name in order[bisect_right(order, (cookie, LAST_NAME)) :]:
            inode = self.lookup(name)
            if inode is not None:
                yield at, name, inode


class VirtualLink(Inode):
    """A symbolic link that exists only in the mount."""

    __slots__ = ("owner", "target", "time_ns")

    keep_entry = 0.0
    keep_attributes = 0.0

    def __init__(self, ino: InodeNo, owner: Owner, time_ns: int, target: bytes) -> None:
        super().__init__(ino)
        self.owner, self.time_ns, self.target = owner, time_ns, target

    def attributes(self) -> Attributes:
        t = self.time_ns
        size = len(self.target)
        return Attributes(self.ino, stat.S_IFLNK | 0o777, 1, *self.owner, size, 0, t, t, t)

    def readlink(self) -> bytes:
        return self.target
