"""The live view of a session: its upper laid over its base, as inodes that can be written.

One `Overlay` is one session while a process holds it. It is the only user of the upper
meanwhile, so it keeps in memory which names the upper has and asks the disk only for
attributes. Files live as long as the kernel knows them (`lookups`), not by open and close: a
name that is removed keeps its file here until the kernel forgets the inode.

What is pristine comes from the base's nodes; the first change to it copies it up: made
complete in the work directory, then renamed into place. A directory of the base is renamed by
a redirect, whatever is in it. The names of a hard-linked file are copied up together.

Called from one thread at a time, except `stage`.
"""

import contextlib
import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, cast

import msgspec

from engine.errors import EngineError
from engine.host.forks import Inherited, OfOneProcess
from engine.host.hostfs import OVERLAY_PREFIX, kind_of, read_xattrs
from engine.ids import InodeNo
from engine.mounted.base_links import BaseLinks
from engine.mounted.inodes import (
    Attributes,
    Changes,
    Inode,
    entry_attributes,
    fail,
    host_attributes,
    number,
)
from engine.sessions.freezing import Changed
from engine.sessions.upper import Upper
from engine.storage.nodes import Entry, Link, Owner
from engine.storage.objects import Objects

if TYPE_CHECKING:
    from engine.mounted.overlay_directory import SessionDirectory
    from engine.mounted.overlay_file import SessionFile

OPEN_FILES = 256
"""How many of the upper's files are kept open for reading and writing."""

OPEN_DIRECTORIES = 8
"""How many of the upper's directories are kept open, to start a path from."""


class Lost(NamedTuple):
    """What could not be moved from one upper to the next: its path, and why."""

    path: bytes
    why: str


class OverlayStatistics(msgspec.Struct, frozen=True):
    """What an overlay holds in memory: descriptors, and files whose last name went."""

    open_files: int
    orphans: int
    open_directories: int


class Overlay(OfOneProcess):
    """A session's live state: its upper, its base and what is open.

    The root is made by `overlay_directory.open_overlay`. In a child of fork() it is closed.
    """

    root: "SessionDirectory"

    def __init__(
        self, objects: Objects, upper: Upper, base: Entry, key: bytes, owner: Owner
    ) -> None:
        """Opens the view. `key` makes the inode numbers this session's own."""
        self.objects, self.upper, self.base, self.key, self.owner = objects, upper, base, key, owner
        self.by_host: dict[int, SessionFile] = {}
        self.by_group: dict[bytes, SessionFile] = {}
        self.new_directories: set[InodeNo] = set()
        self.orphans: set[SessionFile] = set()
        self.changed: Changed | None = None
        self._base_links: BaseLinks | None = None
        self._open: OrderedDict[SessionFile, None] = OrderedDict()
        self._places: dict[SessionDirectory, int] = {}
        self.closed = False
        self.made = 0
        self.moved = 0
        """How often a directory of the base was renamed, which the kernel's overlayfs refuses."""
        self._pid = os.getpid()
        self._owned()

    def _inherit(self) -> None:
        what = f"the view of {os.fsdecode(self.upper.root)}"
        self.upper = cast(Upper, Inherited(what, self._pid))
        self.close()

    def next_number(self) -> InodeNo:
        """Returns the number of a file that is new in the session."""
        self.made += 1
        return number(self.key, b"new", b"%d" % self.made)

    def link_number(self, link: Link) -> InodeNo:
        """Returns the number of a hard-linked file of the base, the same by whatever name."""
        return number(self.key, b"link", link.group)

    def base_links(self) -> BaseLinks:
        """Returns where the base's linked files show; found when it is first asked for."""
        if self._base_links is None:
            self._base_links = BaseLinks(self.root)
        return self._base_links

    def touch(self, host_ino: int) -> None:
        """Notes that a file of the upper is being changed, for a commit that is reading it."""
        if self.changed is not None:
            self.changed.inodes.add(host_ino)
            self.changed.count += 1

    def keep_open(self, file: "SessionFile", fd: int) -> None:
        """Keeps a file's descriptor, closing the one unused longest.

        Descriptors are numbered from the lowest that is free: one in the upper half of what the
        process may have tells that all sessions together have many. Two are closed for it then.
        """
        file.fd = fd
        self._open[file] = None
        kept = len(self._open)
        room = OPEN_FILES if _is_low(fd) else max(kept - 2, 1)
        for _ in range(kept - room):
            self.close_file(next(iter(self._open)))

    def used(self, file: "SessionFile") -> None:
        """Notes that a descriptor was used."""
        if not file.orphan:
            self._open.move_to_end(file)

    def keep_orphan(self, file: "SessionFile") -> None:
        """Keeps a descriptor until the kernel forgets the file."""
        self._open.pop(file, None)
        self.orphans.add(file)

    def keep_named(self, file: "SessionFile") -> None:
        """Keeps a descriptor as any other again."""
        self.orphans.discard(file)
        self._open[file] = None

    def close_file(self, file: "SessionFile") -> None:
        """Closes a file's descriptor if it is open."""
        self._open.pop(file, None)
        self.orphans.discard(file)
        if file.fd >= 0:
            os.close(file.fd)
            file.fd = -1

    def place(self, directory: "SessionDirectory") -> int:
        """Returns a descriptor of the upper's directory, good until the next call; -1 if none.

        For names of one directory that are used one after the other: neither we nor the host then
        walk down to it each time.
        """
        fd = self._places.get(directory, -1)
        if fd < 0:
            flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                fd = os.open(directory.absolute(), flags)
            except OSError:
                return -1
            self._places[directory] = fd
            room = OPEN_DIRECTORIES if _is_low(fd) else 1
            for _ in range(len(self._places) - room):
                self.leave(next(iter(self._places)))
        return fd

    def known_place(self, directory: "SessionDirectory") -> int:
        """Returns a descriptor that there is already, or -1."""
        return self._places.get(directory, -1)

    def leave(self, directory: "SessionDirectory") -> None:
        """Closes the descriptor of a directory if there is one."""
        fd = self._places.pop(directory, -1)
        if fd >= 0:
            os.close(fd)

    def _leave_all(self) -> None:
        for directory in list(self._places):
            self.leave(directory)

    def close(self) -> None:
        """Closes every descriptor. Requests that are under way are answered ESTALE from now on."""
        self.closed = True
        self._leave_all()
        for file in [*self._open, *self.orphans]:
            self.close_file(file)

    def check(self) -> None:
        """Raises ESTALE once the session was let go: its upper may be somebody else's by now."""
        if self.closed:
            raise fail(errno.ESTALE)

    def changing(self) -> None:
        """Notes that something in the upper is about to be changed; raises as `check`."""
        self.check()
        if self.changed is not None:
            self.changed.count += 1

    def rebase(self, base: Entry, upper: Upper, left_out: list[bytes]) -> list[Lost]:
        """Takes over what a commit made: everything now is in `base`, `upper` is empty.

        Numbers, names and open files stay as they are. Files that lost their last name keep
        their descriptors. What `base` lacks, at the paths `left_out`, moves to the new upper.
        Returns what could not: that is still in the old one.
        """
        kept = [self.root.find(path) for path in left_out]
        self._leave_all()
        old, self.base, self.upper = self.upper, base, upper
        self._base_links = None
        self.by_host.clear()
        self.root.become_pristine(base)
        self.root.copied = True
        self.by_group = {group: file for group, file in self.by_group.items() if file.shows(group)}
        lost = []
        for path, (parent, name, file) in zip(left_out, kept, strict=True):
            try:
                parent.copy_up()
                install_quietly(upper, parent, name, old.at(path))
                parent.children[name] = file
            except OSError as error:
                lost.append(Lost(path, str(error)))
        return lost

    def bring_over(self, old: Upper) -> list[Lost]:
        """Does the rest of a commit whose process was killed: moves what the base lacks.

        `old` is the upper of the generation before. Returns what could not be moved.
        """
        lost = []
        for path in _left_out(old, b""):
            above, _, name = path.rpartition(b"/")
            try:
                parent = self.root.find_directory(above)
                if parent.lookup(name) is not None:
                    raise fail(errno.EEXIST)
                parent.copy_up()
                install_quietly(self.upper, parent, name, old.at(path))
            except (OSError, EngineError) as error:
                lost.append(Lost(path, str(error)))
        return lost

    def finish_copies(self) -> None:
        """Finishes copying linked files up where a killed holder was at it.

        Nothing was written to them yet: all names get the copy that some have.
        """
        for group, aside in self.upper.all_copying():
            names = list(self.base_links().names(group))
            for parent, _ in names:
                parent.copy_up()
            join_names(self.upper, aside, names, again=True)

    def statistics(self) -> OverlayStatistics:
        """Returns what is held in memory."""
        return OverlayStatistics(len(self._open), len(self.orphans), len(self._places))


def _is_low(fd: int) -> bool:
    """Tells whether a descriptor is in the lower half of what the process may have."""
    return fd < os.sysconf("SC_OPEN_MAX") // 2


class SessionInode(Inode):
    """What files and directories of a session share.

    `entry` is the base's entry, None if it is new in the session; `copied` tells whether the
    upper has it. As long as it is pristine and has the number that a new lookup would give it,
    nothing needs to be remembered of it.
    """

    __slots__ = ("copied", "entry", "gone", "mode", "name", "overlay", "parent")

    directory = False
    read_only = False

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
        super().__init__(ino)
        self.overlay, self.parent, self.name, self.entry = overlay, parent, name, entry
        self.copied = copied
        self.mode: int | None = None
        self.gone: Attributes | None = None

    def path(self) -> bytes:
        """Returns the path in the session."""
        parts = []
        at: SessionInode = self
        while at.parent is not None:
            parts.append(at.name)
            at = at.parent
        return b"/".join(reversed(parts))

    def where(self) -> bytes | int:
        """Returns where the upper has it: an absolute path, or a descriptor if it has no name."""
        return self.overlay.upper.at(self.path())

    def absolute(self) -> bytes:
        """Returns the upper's path of what has a name."""
        return self.overlay.upper.at(self.path())

    def status(self) -> os.stat_result:
        """Returns the upper's status."""
        return os.lstat(self.absolute())

    def attributes(self) -> Attributes:
        if self.gone is not None:
            return self.gone
        if not self.copied and self.entry is not None:
            return entry_attributes(self.ino, self.entry, self.overlay.owner)
        status = self.status()
        if self.mode is None:
            self.mode = self.overlay.upper.mode(self.where(), status)
        nlink = 1 if self.directory and self.entry is not None else status.st_nlink
        return host_attributes(self.ino, status, self.mode, nlink)

    def copy_up(self) -> None:
        """Makes the upper have it. Every change of the upper comes by here first."""
        raise fail(errno.EIO)

    def change(self, changes: Changes) -> Attributes:
        self.copy_up()
        where = self.where()
        follow = isinstance(where, int)
        if changes.uid is not None or changes.gid is not None:
            uid = -1 if changes.uid is None else changes.uid
            gid = -1 if changes.gid is None else changes.gid
            os.chown(where, uid, gid, follow_symlinks=follow)
            self.mode = None
            self.drop_set_id()  # the host has done so, but not with bits that are kept aside
        if changes.mode is not None:
            mode = stat.S_IMODE(changes.mode)
            self.mode = None  # until it is done
            self.overlay.upper.chmod(where, mode, self.directory)
            self.mode = mode
        if changes.atime_ns is not None or changes.mtime_ns is not None:
            status = os.stat(where, follow_symlinks=follow)
            atime = status.st_atime_ns if changes.atime_ns is None else changes.atime_ns
            mtime = status.st_mtime_ns if changes.mtime_ns is None else changes.mtime_ns
            os.utime(where, ns=(atime, mtime), follow_symlinks=follow)
        return self.attributes()

    def xattrs(self) -> dict[bytes, bytes]:
        if not self.copied and self.entry is not None:
            return dict(self.entry.xattrs)
        return dict(read_xattrs(self.where()))

    def set_xattr(self, name: bytes, value: bytes, flags: int = 0) -> None:
        _check_xattr(name)
        self.copy_up()
        where = self.where()
        os.setxattr(where, name, value, flags, follow_symlinks=isinstance(where, int))

    def remove_xattr(self, name: bytes) -> None:
        _check_xattr(name)
        if name not in self.xattrs():
            raise fail(errno.ENODATA)
        self.copy_up()
        where = self.where()
        os.removexattr(where, name, follow_symlinks=isinstance(where, int))

    def forgotten(self) -> None:
        self.let_go()

    def derived_number(self) -> InodeNo | None:
        """Returns the number that it would have if it were looked up anew."""
        return None if self.parent is None else self.parent.default_number(self.name)

    def let_go(self) -> None:
        """Drops it from its directory if it is idle, and those above that are idle then."""
        at: SessionInode = self
        while at.parent is not None and at.idle():
            del at.parent.children[at.name]
            at = at.parent

    def idle(self) -> bool:
        """Tells whether nobody uses it and looking it up anew would give the same."""
        parent = self.parent
        return (
            parent is not None
            and not self.lookups
            and not self.copied
            and parent.children.get(self.name) is self
            and self.ino == self.derived_number()
        )


def _check_xattr(name: bytes) -> None:
    if not name.startswith(b"user.") or name.startswith(OVERLAY_PREFIX):
        raise fail(errno.EOPNOTSUPP)


def _left_out(upper: Upper, path: bytes) -> Iterator[bytes]:
    """Yields the paths of sockets and devices."""
    for name, status in list(upper.scan(path)):
        if status is not None and stat.S_ISDIR(status.st_mode):
            yield from _left_out(upper, join(path, name))
        elif status is not None and kind_of(status.st_mode) is None:
            yield join(path, name)


def join_names(
    upper: Upper,
    aside: bytes,
    names: list[tuple["SessionDirectory", bytes]],
    *,
    again: bool = False,
) -> None:
    """Gives a copy in the work directory all of its names, or none, and takes it from there.

    Where some could not be taken away, or have it from before (`again`), it stays there: the
    session's next holder goes on.
    """
    done = []
    try:
        for parent, name in names:
            with upper.making() as spare:
                os.link(aside, spare, follow_symlinks=False)
                install_quietly(upper, parent, name, spare)
            done.append((parent, name))
    except OSError:
        undone = [uninstall_quietly(upper, parent, name) for parent, name in done]
        if all(undone) and not again:
            upper.discard(aside)
        raise
    upper.discard(aside)


def install_quietly(
    upper: Upper, parent: "SessionDirectory", name: bytes, temporary: bytes
) -> None:
    """Puts a copy into place without the directory's time telling of it."""
    where = parent.absolute()
    before = os.lstat(where)
    upper.install(temporary, join(parent.path(), name), over_whiteout=False)
    with contextlib.suppress(OSError):
        os.utime(where, ns=(before.st_atime_ns, before.st_mtime_ns))


def uninstall_quietly(upper: Upper, parent: "SessionDirectory", name: bytes) -> bool:
    """Takes a copy away again, so that the base's file shows once more; tells whether it could."""
    try:
        where = parent.absolute()
        before = os.lstat(where)
        os.unlink(upper.at(join(parent.path(), name)))
    except OSError:
        return False
    with contextlib.suppress(OSError):
        os.utime(where, ns=(before.st_atime_ns, before.st_mtime_ns))
    return True


def join(path: bytes, name: bytes) -> bytes:
    """Returns the path of a name in a directory whose own path may be empty."""
    return path + b"/" + name if path else name
