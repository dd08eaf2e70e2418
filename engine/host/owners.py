"""Owners on the host: what the user and group of a file become on the way into and out of a tree.

Root gives every file to whom it belongs. Anybody else may not, so for them all files are their
own, except for groups that they are members of. On the way back the same: a file that belongs to
somebody else in the tree, and could only be shown as one's own, goes on belonging to that one.
"""

import contextlib
import errno
import os

from engine.storage.nodes import Owner

_REFUSED = {errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EROFS}
"""What chown answers to who may not: without privileges, or beyond the ids of a user namespace."""


def myself() -> Owner:
    """Returns who the files are that this process makes."""
    return Owner(os.getuid(), os.getgid())


def shown(owner: Owner | None, me: Owner) -> Owner:
    """Returns whose a file is to be here, that belongs to `owner` in a tree; None is nobody."""
    if owner is None:
        return me
    if os.geteuid() == 0:
        return owner
    if owner.uid == me.uid and owner.gid in os.getgroups():
        return owner
    return me


def give(
    where: bytes | int, owner: Owner | None, *, dir_fd: int | None = None, me: Owner | None = None
) -> None:
    """Gives a file that this process has just made to its owner, as far as it may.

    Before its mode is set: chown takes set-id bits away. Raises OSError for what a disk says.
    """
    if owner is None:
        return
    me = me or myself()
    wanted = shown(owner, me)
    if wanted == me:
        return
    try:
        if isinstance(where, int):
            os.fchown(where, *wanted)
        else:
            os.chown(where, *wanted, dir_fd=dir_fd, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise


def belongs_to_another(status: os.stat_result, owner: Owner | None) -> bool:
    """Tells whether a file was given to somebody else than a tree says; only root can tell."""
    if owner is None or os.geteuid() != 0:
        return False
    return (status.st_uid, status.st_gid) != owner


class Recording:
    """How owners are recorded in one tree that is made of files of the host."""

    def __init__(self, *, keeps: bool, beside: bytes | None = None) -> None:
        """With `keeps` every entry has an owner, else those whose is another than this process.

        `beside` is a directory that we have made: where a directory hands its group down, what
        this process makes has that group.
        """
        self.keeps = keeps
        self.maps = os.geteuid() != 0
        """Whether files of others may have been shown as our own."""
        self._me = myself()
        self._groups = {self._me.gid}
        if beside is not None:
            with contextlib.suppress(OSError):
                self._groups.add(os.lstat(beside).st_gid)

    def owner(self, status: os.stat_result, before: Owner | None = None) -> Owner | None:
        """Returns the owner that a file gets in the tree; `before` is what it had there."""
        found = Owner(status.st_uid, status.st_gid)
        mine = found.uid == self._me.uid and found.gid in self._groups
        if before is not None and before != found:
            here = shown(before, self._me)
            if here != before and (here == found or mine):
                return before
        return None if mine and not self.keeps else found
