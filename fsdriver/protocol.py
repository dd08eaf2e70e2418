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
WORD = struct.Struct("=Q")
HALF = struct.Struct("=I")

UNIQUE_AT, NODE_AT, BODY_AT = 8, 16, IN.size
"""Where in a request they stand; in a reply `unique` has the same place."""
SIZE_AT = BODY_AT + 16
"""Where in a READ or READDIR stands how much is wanted."""

FORGET, OPEN, READ, WRITE, RELEASE, FSYNC, INIT, READDIR = 2, 14, 15, 16, 18, 20, 26, 28
FSYNCDIR, INTERRUPT, IOCTL, BATCH_FORGET, READDIRPLUS = 30, 36, 39, 42, 44

BY_HANDLE = frozenset({READ, WRITE, FSYNC, READDIR, READDIRPLUS, FSYNCDIR})
"""Requests whose body begins with a file handle, which pyfuse3 passes on without the node."""
SIZED = frozenset({READ, READDIR, READDIRPLUS})
WITHOUT_REPLY = frozenset({FORGET, BATCH_FORGET, INTERRUPT})

NO_OPEN_SUPPORT = 1 << 17
PARALLEL_DIROPS = 1 << 18
MAX_PAGES = 1 << 22
CACHE_SYMLINKS = 1 << 23
NO_OPENDIR_SUPPORT = 1 << 24
ATOMIC_O_TRUNC = 1 << 3

KEEP_CACHE, NO_FLUSH = 1 << 1, 1 << 5
"""Flags of a reply to OPEN."""

INVAL_INODE, INVAL_ENTRY = 2, 3
"""Notifications."""
