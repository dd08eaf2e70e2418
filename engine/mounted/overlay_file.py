"""A file of a session: pristine in the store until it is changed, then in the upper.

It lives by its names and the kernel's lookup count. The first change copies it up, with all of
its names; `stage` does the copying ahead, and is the one thing here that may run in a thread.
"""

import contextlib
import errno
import fcntl
import os
import stat
from typing import TYPE_CHECKING

from engine.host import ranges
from engine.ids import InodeNo
from engine.mounted.inodes import Attributes, Changes, Inode, fail
from engine.mounted.overlay import Overlay, SessionInode, install_quietly, join_names
from engine.storage import content
from engine.storage.holes import seek
from engine.storage.nodes import Entry, Kind

if TYPE_CHECKING:
    from engine.mounted.overlay_directory import SessionDirectory

    Place = tuple[SessionDirectory, bytes]


class SessionFile(SessionInode):
    """A file, symbolic link or fifo in a session.

    Its first name is `name` in `parent`; `_more` has the others. A file without any is an
    orphan that lives by the kernel's lookup count, in an open descriptor `fd` or, while pristine,
    in the store.
    """

    __slots__ = ("_more", "fd", "host", "orphan", "regular", "staged")

    def __init__(
        self,
        overlay: Overlay,
        ino: InodeNo,
        parent: "SessionDirectory",
        name: bytes,
        entry: Entry | None,
        *,
        copied: bool,
    ) -> None:
        super().__init__(overlay, ino, parent, name, entry, copied=copied)
        self.orphan = False
        self._more: dict[Place, None] | None = None
        self.fd = -1
        self.host = 0
        self.regular = False
        self.staged: tuple[Entry, bytes] | None = None

    @property
    def names(self) -> "list[Place]":
        """All of its places: as many steps as there are, so for what takes as many anyhow."""
        if self.orphan or self.parent is None:
            return []
        return [(self.parent, self.name), *(self._more or ())]

    def _has_name(self, place: "Place") -> bool:
        if self._more is not None and place in self._more:
            return True
        return not self.orphan and self.parent is place[0] and self.name == place[1]

    def note_name(self, place: "Place") -> None:
        """Notes a place that it has, in one step however many there are."""
        if self._has_name(place):
            return
        if self.orphan:
            (self.parent, self.name), self.orphan = place, False
        elif self._more is None:
            self._more = {place: None}
        else:
            self._more[place] = None

    def where(self) -> bytes | int:
        return self.fd if self.orphan else self.absolute()

    def status(self) -> os.stat_result:
        if self.fd >= 0:
            status = os.fstat(self.fd)
        else:
            path, place = self._from_place()
            status = os.stat(path, dir_fd=place, follow_symlinks=False)
        self.regular = stat.S_ISREG(status.st_mode)
        return status

    def _from_place(self) -> tuple[bytes, int | None]:
        """Returns the upper's path of what has a name, and the descriptor that it starts from."""
        place = self.overlay.known_place(self.parent) if self.parent is not None else -1
        return (self.absolute(), None) if place < 0 else (self.name, place)

    def attributes(self) -> Attributes:
        attributes = super().attributes()
        if self.orphan and not self.copied:
            attributes.nlink = 0
        return attributes

    def change(self, changes: Changes) -> Attributes:
        if changes.size is not None:
            if not self.copied:
                self._copy_up(empty=changes.size == 0)
            fd = self.descriptor()
            os.ftruncate(fd, changes.size)
            if self.overlay.changed is not None:
                self.overlay.touch(os.fstat(fd).st_ino)
        return super().change(changes)

    def descriptor(self) -> int:
        """Returns a descriptor of the upper's file, for reading and writing."""
        self.overlay.check()
        if self.fd >= 0:
            self.overlay.used(self)
        elif self.orphan:
            raise fail(errno.ESTALE)
        else:
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            self.overlay.keep_open(self, os.open(self.absolute(), flags))
        return self.fd

    def read(self, offset: int, size: int) -> bytes:
        if not self.copied and self.entry is not None:
            return content.read(self.overlay.objects, self.entry, offset, size)
        try:
            fd = self.descriptor()
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            return self._read_of_read_only(offset, size)
        return os.pread(fd, size, offset)

    def _read_of_read_only(self, offset: int, size: int) -> bytes:
        """Reads from an upper on a disk that became read-only."""
        fd = os.open(self.absolute(), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)

    def write(self, offset: int, data: bytes) -> int:
        self.copy_up()
        fd = self.descriptor()
        if self.overlay.changed is not None:
            self.overlay.touch(os.fstat(fd).st_ino)
        done = os.pwrite(fd, data, offset)
        return (
            done if done == len(data) else done + ranges.write_all(fd, data[done:], offset + done)
        )

    def read_unseen(self, offset: int, size: int) -> bytes:
        if not self.copied:
            return self.read(offset, size)
        fd = self.descriptor()
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_NOATIME)
        except PermissionError:  # it belongs to another by now
            return os.pread(fd, size, offset)
        try:
            return os.pread(fd, size, offset)
        finally:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)

    def seek(self, offset: int, whence: int) -> int:
        entry = self.entry
        if not self.copied and entry is not None:
            found = seek(self.overlay.objects, entry, offset, whence)
            if found is None:
                raise fail(errno.ENXIO)
            return found
        return os.lseek(self.descriptor(), offset, whence)

    def may_have_holes(self) -> bool:
        return self.copied

    def allocate(self, mode: int, offset: int, length: int) -> None:
        self.copy_up()
        ranges.allocate(self.descriptor(), mode, offset, length)

    def copy_range(self, offset: int, target: Inode, to: int, length: int) -> int:
        if not self.copied or not isinstance(target, SessionFile):
            return super().copy_range(offset, target, to, length)
        target.copy_up()
        source = os.dup(self.descriptor())  # opening the other may close it
        try:
            return ranges.copy(source, offset, target.descriptor(), to, length)
        finally:
            os.close(source)

    def drop_set_id(self) -> bool:
        mode = self.mode if self.copied and self.mode is not None else self.attributes().mode
        mode = stat.S_IMODE(mode)
        kept = mode & ~stat.S_ISUID
        if mode & stat.S_IXGRP:
            kept &= ~stat.S_ISGID
        if kept == mode:
            return False
        self.change(Changes(mode=kept))
        return True

    def readlink(self) -> bytes:
        if not self.copied and self.entry is not None:
            if self.entry.kind != Kind.SYMLINK or not isinstance(self.entry.content, bytes):
                return super().readlink()
            return self.entry.content
        return os.readlink(b"", dir_fd=self.fd) if self.orphan else os.readlink(self.absolute())

    def open_to_sync(self) -> int:
        self.overlay.check()
        if not self.copied:
            return -1
        if self.fd >= 0:
            return os.dup(self.fd)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        return os.open(self.absolute(), flags)

    def shows(self, group: bytes) -> bool:
        """Tells whether it stands for the base's file of a link group."""
        link = self.entry.link if self.entry is not None and not self.copied else None
        return link is not None and link.group == group

    def to_copy(self, changes: Changes | None = None) -> int:
        if self.copied or self.entry is None or (changes is not None and changes.size == 0):
            return 0
        return self.entry.size

    def stage(self) -> None:
        """Copies the content into the work directory; `copy_up` puts it into place."""
        entry = self.entry
        if entry is not None and not self.copied and self.staged is None:
            # With what it is a copy of: by now somebody else may have copied it up, or more.
            self.staged = (entry, self._fill(entry, empty=False))

    def _unstage(self) -> None:
        staged, self.staged = self.staged, None
        if staged is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(staged[1])

    def copy_up(self) -> None:
        self.overlay.changing()
        if not self.copied:
            self._copy_up(empty=False)
        if self.overlay.changed is not None:
            self.overlay.touch(self.status().st_ino)

    def _copy_up(self, *, empty: bool) -> None:
        entry, upper = self.entry, self.overlay.upper
        if entry is None:
            raise fail(errno.ESTALE)
        if entry.link is not None and not self.orphan:
            self._find_other_names(entry.link.group)
        names = self.names
        for parent, _ in names:
            parent.copy_up()
        if self.staged is not None and self.staged[0] == entry:
            temporary, self.staged = self.staged[1], None
        else:
            self._unstage()
            temporary = self._fill(entry, empty=empty)
        try:
            self._put_into_place(entry, temporary, names)
        except BaseException:
            upper.discard(temporary)
            raise
        self.copied, self.mode = True, entry.mode
        if len(names) > 1:
            self.join_host(self.status().st_ino)

    def _put_into_place(self, entry: Entry, temporary: bytes, names: "list[Place]") -> None:
        """Gives a complete copy its names, or keeps it open where it has none any more."""
        upper = self.overlay.upper
        if not names:
            fd = os.open(temporary, os.O_RDWR | os.O_CLOEXEC)
            os.unlink(temporary)
            self.fd = fd
            self.overlay.keep_orphan(self)
        elif len(names) > 1:
            # Killed in between, the session's next holder finds it by this name, and goes on.
            aside = upper.copying(entry.link.group if entry.link is not None else b"")
            os.rename(temporary, aside)
            join_names(upper, aside, names)
        else:
            install_quietly(upper, *names[0], temporary)

    def _fill(self, entry: Entry, *, empty: bool) -> bytes:
        """Makes a complete copy of the base's file in the work directory; durable.

        Synced before it hides the base's, as overlayfs does: after a power cut there must not
        be an empty file where the base has a good one.
        """
        with self.overlay.upper.making() as temporary:
            if entry.kind == Kind.SYMLINK:
                os.symlink(entry.content if isinstance(entry.content, bytes) else b"", temporary)
            elif entry.kind == Kind.FIFO:
                os.mkfifo(temporary, 0o600)
            else:
                fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                try:
                    if not empty:
                        content.write_out(self.overlay.objects, entry, fd)
                        os.fdatasync(fd)
                finally:
                    os.close(fd)
            self.overlay.upper.dress(temporary, entry)
        return temporary

    def _find_other_names(self, group: bytes) -> None:
        """Finds the session's names of a hard-linked file that were not looked up yet."""
        for parent, name in self.overlay.base_links().names(group):
            if not self._has_name((parent, name)):
                self.note_name((parent, name))
                parent.children[name] = self

    def found(self, parent: "SessionDirectory", name: bytes) -> None:
        """Notes a name that it has had, perhaps when it had lost all that were known."""
        if self.orphan:
            self.overlay.keep_named(self)
        self.note_name((parent, name))

    def add_name(self, parent: "SessionDirectory", name: bytes) -> None:
        """Notes another name."""
        self.note_name((parent, name))
        self.join_host(self.status().st_ino)

    def replace_name(self, old: "Place", new: "Place") -> None:
        """Notes that a name became another."""
        if self._more is not None and old in self._more:
            del self._more[old]
            self._more[new] = None
        else:
            self.parent, self.name = new

    def hold(self) -> None:
        """Opens what is about to lose its last name, if the kernel may have it open."""
        if self._more or not self.lookups or not self.copied:
            return
        kind = os.O_RDWR
        if self.mode is None or not self.regular:
            status = self.status()
            if self.mode is None:
                self.mode = self.overlay.upper.mode(self.absolute(), status)
            fifo = stat.S_ISFIFO(status.st_mode)
            if fifo and self.fd < 0 and status.st_mode & 0o600 != 0o600:
                os.chmod(self.absolute(), stat.S_IMODE(status.st_mode) | 0o600)
            kind = os.O_RDWR if fifo or self.regular else os.O_PATH
        if self.fd < 0:
            flags = kind | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            path, place = self._from_place()
            self.overlay.keep_open(self, os.open(path, flags, dir_fd=place))

    def drop_name(self, parent: "SessionDirectory", name: bytes) -> None:
        """Notes that a name went; `hold` came before."""
        if self._more and (parent, name) in self._more:
            del self._more[parent, name]
        elif self._more:
            (self.parent, self.name), _ = self._more.popitem()
        else:
            self.orphan = True
        if not self.orphan:
            return
        if self.lookups and self.copied:
            self.overlay.keep_orphan(self)
        else:
            self.overlay.close_file(self)
        self._leave_group()
        if self.host and (self.fd < 0 or not os.fstat(self.fd).st_nlink):
            self._leave_host()  # else it has names that nobody looked at yet

    def _leave_group(self) -> None:
        link = self.entry.link if self.entry is not None else None
        if link is not None and self.overlay.by_group.get(link.group) is self:
            del self.overlay.by_group[link.group]

    def join_host(self, host_ino: int) -> None:
        """Makes other names of the upper's file, when they are looked up, lead here."""
        self.overlay.by_host[host_ino] = self
        self.host = host_ino

    def _leave_host(self) -> None:
        if self.overlay.by_host.get(self.host) is self:
            del self.overlay.by_host[self.host]

    def become_pristine(self, entry: Entry) -> None:
        """Takes the base's entry in place of what the upper had."""
        self.entry = entry
        self._unstage()
        if self.copied:
            self.overlay.close_file(self)
            self.copied, self.mode = False, None
        if entry.link is not None:
            self.overlay.by_group[entry.link.group] = self

    def forgotten(self) -> None:
        self._unstage()
        if self.orphan:
            self.overlay.close_file(self)
            self._leave_host()
        elif not self._more:  # the number of a file with several names is kept
            self.let_go()

    def derived_number(self) -> InodeNo | None:
        if self.entry is not None and self.entry.link is not None:
            return self.overlay.link_number(self.entry.link)
        return super().derived_number()

    def let_go(self) -> None:
        super().let_go()
        if self.parent is not None and self.parent.children.get(self.name) is not self:
            self._leave_group()
