"""The messages of FUSE, as far as the channel reads or writes them: include/uapi/linux/fuse.h."""

import struct

IN = struct.Struct("=IIQQIIIHH")
"""A request's head: length, opcode, unique, node, uid, gid, pid, extension, padding."""
OUT = struct.Struct("=IiQ")
"""A reply's head: length, error (negative) or notification, unique (0: a notification)."""
INIT_IN = struct.Struct("=IIII")
"""Major, minor, max_readahead, flags; then more flags."""
INIT_OUT = struct.Struct("=IIIIHHIIHH")
"""Major, minor, max_readahead, flags, background, congestion, max_write, time_gran, max_pages."""
OPEN_REPLY = struct.Struct("=IiQQII")
"""A reply's head; then handle, flags, padding."""
FALLOCATE_IN = struct.Struct("=QQQI4x")
"""Of a FALLOCATE, after the head: handle, offset, length, mode."""
LSEEK_IN = struct.Struct("=QQI4x")
"""Of an LSEEK: handle, offset, whence."""
COPY_IN = struct.Struct("=QQQQQQQ")
"""Of a COPY_FILE_RANGE: handle, offset; node, handle, offset of the target; length, flags."""
COPY_OUT = struct.Struct("=I4x")
"""How many bytes a COPY_FILE_RANGE has copied."""
BATCH_HEAD = struct.Struct("=II")
"""Of a BATCH_FORGET, after a request's head: how many, padding; then node and count of each."""
WORD = struct.Struct("=Q")
HALF = struct.Struct("=I")

UNIQUE_AT, NODE_AT, BODY_AT = 8, 16, IN.size
"""Where in a request they stand; in a reply `unique` has the same place."""
SIZE_AT = BODY_AT + 16
"""Where in a READ or READDIR stands how much is wanted."""

FORGET, SETATTR, OPEN, READ, WRITE, RELEASE, FSYNC = 2, 4, 14, 15, 16, 18, 20
GETXATTR, INIT, READDIR = 22, 26, 28
FSYNCDIR, INTERRUPT, IOCTL, BATCH_FORGET, READDIRPLUS = 30, 36, 39, 42, 44
FALLOCATE, LSEEK, COPY_FILE_RANGE, COPY_FILE_RANGE_64 = 43, 46, 47, 53

NAMES = {
    1: "LOOKUP", 2: "FORGET", 3: "GETATTR", 4: "SETATTR", 5: "READLINK", 6: "SYMLINK", 8: "MKNOD",
    9: "MKDIR", 10: "UNLINK", 11: "RMDIR", 12: "RENAME", 13: "LINK", 14: "OPEN", 15: "READ",
    16: "WRITE", 17: "STATFS", 18: "RELEASE", 20: "FSYNC", 21: "SETXATTR", 22: "GETXATTR",
    23: "LISTXATTR", 24: "REMOVEXATTR", 25: "FLUSH", 26: "INIT", 27: "OPENDIR", 28: "READDIR",
    29: "RELEASEDIR", 30: "FSYNCDIR", 31: "GETLK", 32: "SETLK", 33: "SETLKW", 34: "ACCESS",
    35: "CREATE", 36: "INTERRUPT", 37: "BMAP", 38: "DESTROY", 39: "IOCTL", 40: "POLL",
    42: "BATCH_FORGET", 43: "FALLOCATE", 44: "READDIRPLUS", 45: "RENAME2", 46: "LSEEK",
    47: "COPY_FILE_RANGE", 50: "SYNCFS", 51: "TMPFILE", 52: "STATX",
    53: "COPY_FILE_RANGE_64",
}  # fmt: skip
"""Of requests, by opcode."""

LARGEST_IO = 1 << 20
"""The most that a read or write moves in one message, if the socket's buffer has room."""
HEADROOM = 8192
"""A request may be so much longer."""

BY_HANDLE = frozenset({READ, WRITE, FSYNC, READDIR, READDIRPLUS, FSYNCDIR})
"""Requests whose body begins with a file handle, which pyfuse3 passes on without the node."""
SIZED = frozenset({READ, READDIR, READDIRPLUS})
ABOUT_ROOM = frozenset(
    opcode
    for opcode, name in NAMES.items()
    if name in {
        "COPY_FILE_RANGE", "COPY_FILE_RANGE_64", "CREATE", "FALLOCATE", "LINK", "MKDIR", "MKNOD",
        "RENAME", "RENAME2", "SETATTR", "SETXATTR", "STATFS", "SYMLINK", "TMPFILE", "WRITE",
    }
)  # fmt: skip
"""Requests that take room on the disk, or ask how much there is."""
ABOUT_RANGES = frozenset({FALLOCATE, LSEEK, COPY_FILE_RANGE, COPY_FILE_RANGE_64})
"""Requests that pyfuse3 has no handlers for: see `ranges`."""
WITHOUT_REPLY = frozenset({FORGET, BATCH_FORGET, INTERRUPT})

NO_OPEN_SUPPORT = 1 << 17
PARALLEL_DIROPS = 1 << 18
MAX_PAGES = 1 << 22
CACHE_SYMLINKS = 1 << 23
NO_OPENDIR_SUPPORT = 1 << 24
ATOMIC_O_TRUNC = 1 << 3
AUTO_INVAL_DATA = 1 << 12
ASYNC_DIO = 1 << 15
HANDLE_KILLPRIV_V2 = 1 << 28

WRITE_FLAGS_AT, WRITE_KILL_SUIDGID = BODY_AT + 20, 1 << 2
SETATTR_HANDLE_AT, ATTR_HANDLE, ATTR_KILL_SUIDGID = BODY_AT + 8, 1 << 6, 1 << 11
"""Where and how a WRITE or SETATTR asks that set-user-ID and set-group-ID bits go."""

KILL_SUIDGID = 1 << 63
"""In a file handle that pyfuse3 gets: that was asked for. No inode has this bit."""

READ_FLAGS_AT = BODY_AT + 32
"""Where in a READ stand the flags by which the file was opened."""
UNSEEN = 1 << 62
"""In the file handle of a READ that pyfuse3 gets: the access time is to stay. Likewise."""

XATTR_NAME_AT = BODY_AT + 8
SERVED_XATTRS, OVERLAY_XATTRS = b"user.", b"user.overlay."
"""Extended attributes of other namespaces do not exist; nor do those that overlayfs, mounted over a
snapshot, asks for with each file and would obey."""


def is_served(name: bytes | memoryview) -> bool:
    """Tells whether an extended attribute may exist."""
    return bytes(name[:5]) == SERVED_XATTRS and bytes(name[:13]) != OVERLAY_XATTRS


KEEP_CACHE, NO_FLUSH = 1 << 1, 1 << 5
"""Flags of a reply to OPEN."""

INVAL_INODE, INVAL_ENTRY, STORE, RESEND = 2, 3, 4, 7
"""Notifications."""
STORE_HEAD = struct.Struct("=IiQQQII")
"""A notification's head; then node, offset, size, padding. The data follow."""
