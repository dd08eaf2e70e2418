"""The directories of a session: the base's and the upper's, merged.

See `overlay` for how a session lives. Names are looked up in what the upper has, loaded when a
directory is first asked, and then in the base; a listing is ordered by a number that each name
has for as long as the process lives, so that it goes on where it was while names come and go.
"""

import contextlib
import errno
import os
import stat
from bisect import bisect_right
from collections.abc import Callable, Iterator

from engine.host.set_id import SET_ID
from engine.ids import InodeNo
from engine.mounted.inodes import LAST_NAME, Attributes, Changes, Inode, cookie_of, fail, number
from engine.mounted.overlay import Overlay, SessionInode, install_quietly, join
from engine.mounted.overlay_file import SessionFile
from engine.sessions.upper import EXCHANGE, NOREPLACE, OPAQUE, Upper
from engine.storage.nodes import LONGEST_NAME, Entry, Kind, Owner
from engine.storage.objects import Objects
from engine.trees.directory import Directory, directory_id, find


def open_overlay(objects: Objects, upper: Upper, base: Entry, key: bytes, owner: Owner) -> Overlay:
    """Opens the live view of a session whose upper and base these are."""
    overlay = Overlay(objects, upper, base, key, owner)
    overlay.root = SessionDirectory(overlay, number(key), None, b"", base, copied=True)
    return overlay


class SessionDirectory(SessionInode):
    """A directory in a session: the base's and the upper's, merged.

    `entry` is the base's directory merged here, None if there is none or it is hidden.
    `children` holds what was looked up and all that the upper has; None under a name means
    that the upper hides the base's.
    """

    __slots__ = ("_order", "children", "kept", "scanned")

    directory = True

    def __init__(
        self,
        overlay: Overlay,
        ino: InodeNo,
        parent: "SessionDirectory | None",
        name: bytes,
        entry: Entry | None,
        *,
        copied: bool,
    ) -> None:
        super().__init__(overlay, ino, parent, name, entry, copied=copied)
        self.children: dict[bytes, SessionFile | SessionDirectory | None] = {}
        self.scanned = not copied
        self.kept = False
        self._order: list[tuple[int, bytes]] | None = None

    # Looking.

    def status(self) -> os.stat_result:
        fd = self.overlay.known_place(self)
        return os.lstat(self.absolute()) if fd < 0 else os.fstat(fd)

    def base(self) -> Directory | None:
        """Returns the base's directory that is merged here."""
        if self.entry is None:
            return None
        return Directory(self.overlay.objects, directory_id(self.entry))

    def base_entry(self, name: bytes) -> Entry | None:
        """Returns what the base has under a name here, hidden or not."""
        base = self.base()
        return None if base is None else base.get(name)

    def base_path(self) -> bytes | None:
        """Returns the base's path of the directory that is merged here."""
        if self.entry is None:
            return None
        if self.parent is None:
            return b""
        redirect = self.overlay.upper.redirect(self.path()) if self.copied else None
        if redirect is not None:
            return redirect
        above = self.parent.base_path()
        return None if above is None else join(above, self.name)

    def scan(self) -> None:
        """Loads what the upper has in this directory."""
        if self.scanned:
            return
        self.scanned = True
        overlay = self.overlay
        path = self.path()
        for name, status in overlay.upper.scan(path):
            if name not in self.children:
                self.children[name] = self._load(name, join(path, name), status)

    def _load(
        self, name: bytes, path: bytes, status: os.stat_result | None
    ) -> "SessionFile | SessionDirectory | None":
        overlay = self.overlay
        if status is None:
            return None
        ino = self.default_number(name)
        if stat.S_ISDIR(status.st_mode):
            entry = None
            redirect = overlay.upper.redirect(path)
            if redirect is not None:
                entry = find(overlay.objects, overlay.base, redirect)
            elif not overlay.upper.is_opaque(path):
                entry = self.base_entry(name)
            if entry is not None and entry.kind != Kind.DIRECTORY:
                entry = None
            return SessionDirectory(overlay, ino, self, name, entry, copied=True)
        known = overlay.by_host.get(status.st_ino)
        if known is not None:
            known.found(self, name)
            return known
        file = SessionFile(overlay, ino, self, name, None, copied=True)
        if status.st_nlink > 1:
            file.join_host(status.st_ino)
        return file

    def default_number(self, name: bytes) -> InodeNo:
        return number(self.ino.to_bytes(8, "big"), name)

    def lookup(self, name: bytes) -> "SessionFile | SessionDirectory | None":
        if len(name) > LONGEST_NAME:
            raise fail(errno.ENAMETOOLONG)
        self.scan()
        try:
            return self.children[name]
        except KeyError:
            pass
        entry = self.base_entry(name)
        return None if entry is None else self._pristine(entry)

    def find(self, path: bytes) -> "tuple[SessionDirectory, bytes, SessionFile]":
        """Returns the place of a file below: its directory, its name in it, and the file."""
        name, _, rest = path.partition(b"/")
        child = self.lookup(name)
        if rest and isinstance(child, SessionDirectory):
            return child.find(rest)
        if rest or not isinstance(child, SessionFile):
            raise fail(errno.ENOENT)
        return self, name, child

    def find_directory(self, path: bytes) -> "SessionDirectory":
        """Returns a directory below, or this one for an empty path."""
        if not path:
            return self
        name, _, rest = path.partition(b"/")
        child = self.lookup(name)
        if not isinstance(child, SessionDirectory):
            raise fail(errno.ENOENT)
        return child.find_directory(rest)

    def _pristine(self, entry: Entry) -> "SessionFile | SessionDirectory":
        overlay, name = self.overlay, entry.name
        child: SessionFile | SessionDirectory
        if entry.kind == Kind.DIRECTORY:
            child = SessionDirectory(
                overlay, self.default_number(name), self, name, entry, copied=False
            )
        elif entry.link is not None and entry.link.group in overlay.by_group:
            child = overlay.by_group[entry.link.group]
            if child.copied:  # a name that a killed copy-up left behind
                child = SessionFile(
                    overlay, self.default_number(name), self, name, entry, copied=False
                )
            else:
                child.note_name((self, name))
        else:
            ino = self.default_number(name)
            if entry.link is not None:
                ino = overlay.link_number(entry.link)
            child = SessionFile(overlay, ino, self, name, entry, copied=False)
            if entry.link is not None:
                overlay.by_group[entry.link.group] = child
        self.children[name] = child
        return child

    def listing(self, cookie: int) -> Iterator[tuple[int, bytes, Inode]]:
        self.scan()
        if cookie == 0 or self._order is None:
            names = {name for name, child in self.children.items() if child is not None}
            base = self.base()
            if base is not None:
                names.update(e.name for e in base if e.name not in self.children)
            self._order = sorted((cookie_of(name), name) for name in names)
        order = self._order
        if self.copied and self.gone is None:
            self.overlay.place(self)
        for at in range(bisect_right(order, (cookie, LAST_NAME)), len(order)):
            name = order[at][1]
            child = self.lookup(name)
            if child is None:
                continue
            try:
                yield order[at][0], name, child
            finally:
                if not child.lookups:  # nobody took it
                    child.forgotten()

    def linked_names(self) -> list[tuple[bytes, bytes]]:
        """Returns (group, name) of the base's linked files here that nobody has looked up.

        From now on this object stays in its place, and stands for it.
        """
        self.scan()
        self.kept = True
        base = self.base()
        if base is None or not self.entry or not self.entry.totals or not self.entry.totals.links:
            return []
        found = []
        for below in base:
            if below.name in self.children:
                continue
            if below.kind == Kind.DIRECTORY and below.totals and below.totals.links:
                self._pristine(below)
            elif below.link is not None:
                found.append((below.link.group, below.name))
        return found

    def holders_of_links(self) -> list["SessionDirectory"]:
        """Returns the directories here, after `linked_names`, that may have such below them."""
        return [
            child
            for child in self.children.values()
            if isinstance(child, SessionDirectory) and child.may_hold_links()
        ]

    def shows_base(self, name: bytes) -> bool:
        """Tells whether a name that the base has here is to be seen, and was not looked up."""
        return self.entry is not None and self.gone is None and name not in self.children

    def may_hold_links(self) -> bool:
        """Tells whether a linked file of the base could show below."""
        totals = self.entry.totals if self.entry is not None else None
        return self.copied or (totals is not None and totals.links > 0)

    # Changing.

    def copy_up(self) -> None:
        self.overlay.changing()
        if self.copied:
            return
        entry, parent, upper = self.entry, self.parent, self.overlay.upper
        if entry is None or parent is None:
            raise fail(errno.ESTALE)
        parent.copy_up()
        with upper.making() as temporary:
            os.mkdir(temporary, 0o700)
            upper.dress(temporary, entry)
            install_quietly(upper, parent, self.name, temporary)
        self.copied = True
        self.mode = entry.mode

    def _free(self, name: bytes) -> tuple[bytes, bool]:
        """Gets ready for a new name; returns its path and whether a whiteout is there."""
        if len(name) > LONGEST_NAME:
            raise fail(errno.ENAMETOOLONG)
        if self.lookup(name) is not None:
            raise fail(errno.EEXIST)
        if self.parent is not None and self.parent.children.get(self.name) is not self:
            raise fail(errno.ENOENT)  # this directory was removed
        self.copy_up()
        return join(self.path(), name), name in self.children

    def _own(self, absolute: bytes, owner: Owner) -> bool:
        """Gives a new file to who made it, or to the group of a setgid directory.

        False if it stays ours, which only root can change.
        """
        if self.mode is None:
            self.attributes()
        if (self.mode or 0) & stat.S_ISGID:
            owner = Owner(owner.uid, self.status().st_gid)
        elif owner == self.overlay.owner:
            return True
        try:
            os.chown(absolute, owner.uid, owner.gid, follow_symlinks=False)
        except PermissionError:
            return owner.uid == self.overlay.owner.uid
        return True

    @contextlib.contextmanager
    def _making(self, name: bytes) -> Iterator[bytes]:
        """Gives a path to make something at, then puts it into place; all of it or nothing."""
        path, whiteout = self._free(name)
        upper = self.overlay.upper
        absolute = upper.scratch() if whiteout else upper.at(path)
        try:
            yield absolute
            if whiteout:
                upper.install(absolute, path, over_whiteout=True)
        except FileExistsError:  # not ours
            raise
        except OSError:
            upper.discard(absolute)
            raise

    def create(self, name: bytes, mode: int, owner: Owner, device: int = 0) -> "SessionFile":
        kind = stat.S_IFMT(mode) or stat.S_IFREG
        if kind == stat.S_IFCHR and not device:
            raise fail(errno.EPERM)  # in the upper it would be a whiteout
        fd = -1
        try:
            with self._making(name) as absolute:
                upper, mode = self.overlay.upper, stat.S_IMODE(mode)
                first = mode if upper.shows(mode, directory=False) else 0o600
                if kind == stat.S_IFREG:
                    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                    fd = os.open(absolute, flags, first)
                else:
                    os.mknod(absolute, kind | first, device)
                if not self._own(absolute, owner):
                    mode &= ~SET_ID  # else it would run as us what another user writes
                if fd < 0 or stat.S_IMODE(os.fstat(fd).st_mode) != mode:  # by a umask, or an owner
                    upper.chmod(absolute, mode, directory=False, new=True)
        except OSError:
            if fd >= 0:
                os.close(fd)
            raise
        file = SessionFile(self.overlay, self.overlay.next_number(), self, name, None, copied=True)
        file.mode = mode
        if fd >= 0:
            self.overlay.keep_open(file, fd)
            if self.overlay.changed is not None:  # its bits came after it: it may have been read
                self.overlay.touch(os.fstat(fd).st_ino)
        self._add(name, file)
        return file

    def _add(self, name: bytes, child: "SessionFile | SessionDirectory") -> None:
        self.children[name] = child

    def mkdir(self, name: bytes, mode: int, owner: Owner) -> "SessionDirectory":
        with self._making(name) as absolute:
            upper, mode = self.overlay.upper, stat.S_IMODE(mode)
            os.mkdir(absolute, mode if upper.shows(mode, directory=True) else 0o700)
            if name in self.children:
                os.setxattr(absolute, OPAQUE, b"y")
            self._own(absolute, owner)
            mode |= (self.mode or 0) & stat.S_ISGID
            if stat.S_IMODE(os.lstat(absolute).st_mode) != mode:
                upper.chmod(absolute, mode, directory=True, new=True)
        made = SessionDirectory(
            self.overlay, self.overlay.next_number(), self, name, None, copied=True
        )
        self.overlay.new_directories.add(made.ino)
        made.scanned = True
        made.mode = stat.S_IMODE(mode)
        self._add(name, made)
        return made

    def symlink(self, name: bytes, target: bytes, owner: Owner) -> "SessionFile":
        with self._making(name) as absolute:
            os.symlink(target, absolute)
            self._own(absolute, owner)
        file = SessionFile(self.overlay, self.overlay.next_number(), self, name, None, copied=True)
        self._add(name, file)
        return file

    def link(self, name: bytes, file: Inode) -> Inode:
        if not isinstance(file, SessionFile) or file.overlay is not self.overlay:
            raise fail(errno.EXDEV)
        if file.orphan:
            raise fail(errno.ENOENT)
        file.copy_up()
        with self._making(name) as absolute:
            os.link(file.absolute(), absolute, follow_symlinks=False)
        self._add(name, file)
        file.add_name(self, name)
        return file

    def copied_without(self, name: bytes) -> "SessionFile | None":
        child = self.lookup(name)
        if not isinstance(child, SessionFile) or child.entry is None or child.entry.link is None:
            return None
        return child  # its other names will have one link less

    def unlink(self, name: bytes) -> None:
        child = self.lookup(name)
        if child is None:
            raise fail(errno.ENOENT)
        if isinstance(child, SessionDirectory):
            raise fail(errno.EISDIR)
        if child.entry is not None and child.entry.link is not None:
            child.copy_up()  # its other names will have one link less
        self.copy_up()
        self.overlay.place(self)
        child.hold()
        self._hide(name, directory=False)
        child.drop_name(self, name)

    def _hide(self, name: bytes, *, directory: bool) -> None:
        """Removes an upper's file or empty directory; what the base has there goes too."""
        upper = self.overlay.upper
        place = self.overlay.place(self)
        if self.base_entry(name) is not None:
            if place < 0 or not upper.link_whiteout(name, place):
                upper.whiteout(join(self.path(), name))
            self.children[name] = None
            return
        if place >= 0 and not directory:
            os.unlink(name, dir_fd=place)
        else:
            upper.remove(join(self.path(), name), directory=directory)
        self.children.pop(name, None)

    def rmdir(self, name: bytes) -> None:
        child = self.lookup(name)
        if child is None:
            raise fail(errno.ENOENT)
        if not isinstance(child, SessionDirectory):
            raise fail(errno.ENOTDIR)
        child.check_empty()
        self.copy_up()
        gone = child.attributes()
        gone.nlink = 0
        self._hide(name, directory=True)
        child.gone = gone
        self.overlay.leave(child)

    def check_empty(self) -> None:
        """Raises ENOTEMPTY unless nothing is to be seen in it."""
        self.scan()
        if any(child is not None for child in self.children.values()):
            raise fail(errno.ENOTEMPTY)
        base = self.base()
        if base is not None and any(e.name not in self.children for e in base):
            raise fail(errno.ENOTEMPTY)

    def _movable(self) -> None:
        """Gets a directory ready to stand under another name."""
        self.copy_up()
        upper, path = self.overlay.upper, self.path()
        if self.entry is None:
            upper.set_opaque(path)
            return
        self.overlay.moved += 1
        if upper.redirect(path) is None:
            base = self.base_path()
            if base is None:
                raise fail(errno.EIO)
            upper.set_redirect(path, base)

    def rename(self, name: bytes, target: Inode, new_name: bytes, flags: int) -> None:
        if not isinstance(target, SessionDirectory) or target.overlay is not self.overlay:
            raise fail(errno.EXDEV)
        if flags & ~(NOREPLACE | EXCHANGE):
            raise fail(errno.EINVAL)
        if len(new_name) > LONGEST_NAME:
            raise fail(errno.ENAMETOOLONG)
        source = self.lookup(name)
        other = target.lookup(new_name)
        if source is None or (flags & EXCHANGE and other is None):
            raise fail(errno.ENOENT)
        if other is not None and flags & NOREPLACE:
            raise fail(errno.EEXIST)
        if source is other:
            return
        if isinstance(other, SessionDirectory) and not flags & EXCHANGE:
            if not isinstance(source, SessionDirectory):
                raise fail(errno.EISDIR)
            other.check_empty()
        elif isinstance(source, SessionDirectory) and other and not flags & EXCHANGE:
            raise fail(errno.ENOTDIR)
        self.copy_up()
        target.copy_up()
        for moved in (source, other if flags & EXCHANGE else None):
            if isinstance(moved, SessionDirectory):
                moved._movable()
            elif moved is not None:
                moved.copy_up()
        upper = self.overlay.upper
        old, new = join(self.path(), name), join(target.path(), new_name)
        if flags & EXCHANGE and other is not None:
            upper.exchange(old, new)
            self._place(name, other, (target, new_name))
            target._place(new_name, source, (self, name))
            return
        gone = None
        if isinstance(other, SessionDirectory):
            gone = other.attributes()
            gone.nlink = 0
            if other.children:  # whiteouts, which would be in the way
                upper.empty(new)
                other.entry = None
                other.children.clear()
        elif other is not None:
            if target.copied_without(new_name) is not None:
                other.copy_up()
            other.hold()
        hidden = self.base_entry(name) is not None
        onto_whiteout = other is None and new_name in target.children
        if onto_whiteout and isinstance(source, SessionDirectory):
            hidden = upper.move_onto_whiteout(old, new, leave_whiteout=hidden)
        else:
            upper.move(old, new, leave_whiteout=hidden)
        if hidden:
            self.children[name] = None
        else:
            self.children.pop(name, None)
        if isinstance(other, SessionDirectory):
            other.gone = gone
            self.overlay.leave(other)
        elif other is not None:
            other.drop_name(target, new_name)
        target._place(new_name, source, (self, name))

    def _place(
        self,
        name: bytes,
        child: "SessionFile | SessionDirectory",
        old: tuple["SessionDirectory", bytes],
    ) -> None:
        """Notes that a child stands here now."""
        self.children[name] = child
        if isinstance(child, SessionFile):
            child.replace_name(old, (self, name))
        else:
            child.parent, child.name = self, name

    # A removed directory that somebody has open: its path may be another's by now.

    def change(self, changes: Changes) -> Attributes:
        gone = self.gone
        if gone is None:
            return super().change(changes)
        if changes.mode is not None:
            gone.mode = stat.S_IFDIR | stat.S_IMODE(changes.mode)
        gone.uid = gone.uid if changes.uid is None else changes.uid
        gone.gid = gone.gid if changes.gid is None else changes.gid
        gone.atime_ns = gone.atime_ns if changes.atime_ns is None else changes.atime_ns
        gone.mtime_ns = gone.mtime_ns if changes.mtime_ns is None else changes.mtime_ns
        return gone

    def xattrs(self) -> dict[bytes, bytes]:
        return {} if self.gone is not None else super().xattrs()

    def set_xattr(self, name: bytes, value: bytes, flags: int = 0) -> None:
        if self.gone is not None:
            raise fail(errno.ENOENT)
        super().set_xattr(name, value, flags)

    def open_to_sync(self) -> int:
        self.overlay.check()
        if not self.copied or self.gone is not None:
            return -1
        return os.open(self.absolute(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def idle(self) -> bool:
        # What is kept here is found through here: names of linked files, numbers of moved ones.
        return not self.children and not self.kept and super().idle()

    def become_pristine(self, entry: Entry) -> None:
        """Takes the base's directory in place of what base and upper had together."""
        if not self.copied and self.entry is not None and self.entry.content == entry.content:
            self.entry = entry
            return
        self.entry = entry
        self.copied = False
        self.scanned = True
        self._order = None
        self.mode = None
        base = Directory(self.overlay.objects, directory_id(entry))
        get: Callable[[bytes], Entry | None] = base.get
        if len(base) < 8 * len(self.children):  # then reading all of it is faster
            get = {e.name: e for e in base}.get
        for name, child in list(self.children.items()):
            below = get(name)
            if child is None or below is None:
                del self.children[name]
            else:
                child.become_pristine(below)
