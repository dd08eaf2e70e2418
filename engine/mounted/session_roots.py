"""The root of a session that a mount shows but has not taken.

A mount lists every session and tells their attributes, and takes only those that somebody
looks into: another process may hold the others. The first question that needs what is inside
takes the session; from then on the table of inodes has the session's own root in its place.
"""

import errno
import os
from collections.abc import Callable, Iterator

from engine.errors import NotFoundError
from engine.ids import InodeNo
from engine.mounted.inodes import (
    Attributes,
    Changes,
    Inode,
    entry_attributes,
    fail,
    host_attributes,
)
from engine.sessions.sessions import Session, Sessions
from engine.storage.nodes import Owner


class SessionRoot(Inode):
    """Stands for a session's root until `take`, called with this, gives the root itself.

    `take` raises EBUSY while another process holds the session, ESTALE once it is gone.
    """

    __slots__ = ("_owner", "_sessions", "_take", "session")

    # Somebody else may remove, rename or change it, which shows as late as in the listing; each
    # absolute path of a command under the kernel's overlayfs leads through here.
    keep_entry = 1.0
    keep_attributes = 1.0
    read_only = False

    def __init__(
        self,
        ino: InodeNo,
        sessions: Sessions,
        session: Session,
        owner: Owner,
        take: Callable[["SessionRoot"], Inode],
    ) -> None:
        super().__init__(ino)
        self.session = session
        self._sessions, self._owner, self._take = sessions, owner, take

    def attributes(self) -> Attributes:
        try:
            session = self._sessions.get(self.session.name)
        except NotFoundError:
            raise fail(errno.ENOENT) from None
        if session.uid != self.session.uid:
            raise fail(errno.ESTALE)
        upper = self._sessions.upper(session)
        try:
            status = os.lstat(upper.root)
            mode = upper.mode(upper.root, status)
        except FileNotFoundError:  # its holder goes on to the next generation
            return entry_attributes(self.ino, session.root, self._owner)
        return host_attributes(self.ino, status, mode, 1)

    def lookup(self, name: bytes) -> Inode | None:
        return self._take(self).lookup(name)

    def listing(self, cookie: int) -> Iterator[tuple[int, bytes, Inode]]:
        return self._take(self).listing(cookie)

    def xattrs(self) -> dict[bytes, bytes]:
        return self._take(self).xattrs()

    def change(self, changes: Changes) -> Attributes:
        return self._take(self).change(changes)

    def create(self, name: bytes, mode: int, owner: Owner, device: int = 0) -> Inode:
        return self._take(self).create(name, mode, owner, device)

    def mkdir(self, name: bytes, mode: int, owner: Owner) -> Inode:
        return self._take(self).mkdir(name, mode, owner)

    def symlink(self, name: bytes, target: bytes, owner: Owner) -> Inode:
        return self._take(self).symlink(name, target, owner)

    def link(self, name: bytes, file: Inode) -> Inode:
        return self._take(self).link(name, file)

    def copied_without(self, name: bytes) -> Inode | None:
        return self._take(self).copied_without(name)

    def unlink(self, name: bytes) -> None:
        self._take(self).unlink(name)

    def rmdir(self, name: bytes) -> None:
        self._take(self).rmdir(name)

    def rename(self, name: bytes, target: Inode, new_name: bytes, flags: int) -> None:
        self._take(self).rename(name, target, new_name, flags)

    def set_xattr(self, name: bytes, value: bytes, flags: int = 0) -> None:
        self._take(self).set_xattr(name, value, flags)

    def remove_xattr(self, name: bytes) -> None:
        self._take(self).remove_xattr(name)

    def open_to_sync(self) -> int:
        return self._take(self).open_to_sync()
