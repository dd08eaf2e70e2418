"""Set-id bits: when a file keeps set-user-ID and set-group-ID on its way into or out of a store.

The rule is that of cp(1) and tar(1) without `-p`: a file that changes its owner loses the bits.
Where a tree says nothing of owners, whoever writes a file out becomes its owner. A bit may stay

1. on the way in, if the file is the importing user's own, by its user and its group;
2. on the way in from a directory or a session, if the tree keeps the file's owner;
3. on the way out of an ordinary user's store, whose files with such a bit were that user's;
4. where the caller asks for it (`--set-id`).

An archive may name any owner, so rule 2 is not for archives. Root's files written out would let
anybody be root, so rule 3 is not for root, whether a tree has owners or not. The rule is for
regular files. A directory's set-group-ID gives no privilege, only a group to what is made in it:
it stays.
"""

import os
import stat

SET_ID = stat.S_ISUID | stat.S_ISGID
EVERY_BIT = 0o7777


def has_set_id(mode: int) -> bool:
    """Tells whether a stat mode is of a regular file with such a bit."""
    return bool(mode & SET_ID) and stat.S_ISREG(mode)


def is_ours(status: os.stat_result) -> bool:
    """Tells whether a host's file keeps its bits when this process takes it into a store."""
    if status.st_uid != os.geteuid():
        return False
    return not status.st_mode & stat.S_ISGID or status.st_gid == os.getegid()


def arriving(mode: int, status: os.stat_result) -> int:
    """Returns the permission bits that a tree keeps of a host's file, of those in `mode`."""
    if not mode & SET_ID or not stat.S_ISREG(status.st_mode) or is_ours(status):
        return mode
    return mode & ~SET_ID


def leaving(*, asked: bool) -> int:
    """Returns the mask for the permission bits of files that this process writes out."""
    return EVERY_BIT if asked or os.geteuid() != 0 else EVERY_BIT & ~SET_ID
