"""Switch: a checkout of one tree becomes one of another; only what differs is touched.

First a plan: the two Merkle trees are walked together, and every path that differs is looked at
on the disk. What is there must be what the old tree has, else it was edited, and the switch ends
before it has changed anything. Then the plan is done, folder by folder: what goes is removed,
what comes is written beside its place and renamed into it. Whenever it is killed, every path is
as in one of the two trees; the record of the checkout names both, and the next switch, to
whatever tree, takes both for unedited.
"""

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from engine.errors import CorruptObjectError
from engine.host.hostfs import kept_xattrs, mtime_of, read_xattrs
from engine.host.set_id import leaving
from engine.host.unlocking import settle, true_mode, unlocked
from engine.plain.filling import dress_directory, way_opened, write_entry
from engine.plain.local_edits import Edit, Known, LocalEditsError, difference, listing
from engine.plain.stat_cache import (
    FRESH,
    FRESH_NS,
    Row,
    encode_folder,
    encode_rows,
    folder_result,
    row_of,
)
from engine.plain.surveying import Room, Survey
from engine.progress import Progress, unheard
from engine.storage.nodes import DEEPEST, Entry, Kind
from engine.storage.objects import Objects
from engine.trees.diffing import ChangeKind, pairs
from engine.trees.directory import Directory, directory_id
from engine.trees.outside_links import OutsideLinkError, leads_out
from engine.trees.paths import joined

TEMPORARY = b".amalgam-switch-"
"""What the names of files that are being written begin with, and the checkout's id after it."""

EditPolicy = Literal["refuse", "keep", "overwrite"]
"""What happens to local edits in the way: nothing is done at all, they stay, they are lost."""


class SwitchReport(msgspec.Struct):
    """What a switch did. `kept` are the edits that it left as they are."""

    written: int = 0
    removed: int = 0
    bytes: int = 0
    kept: list[Edit] = []
    overwritten: list[Edit] = []
    set_id_dropped: int = 0


class _Step(msgspec.Struct):
    """A name that is to become `new`, or to go; `seen` is what was there."""

    name: bytes
    new: Entry | None
    seen: os.stat_result | None

    def bytes(self) -> int:
        """Returns how many bytes are to be written."""
        return self.new.size if self.new is not None and self.new.kind == Kind.FILE else 0


class _Folder(msgspec.Struct):
    """A directory in which something differs; `new` is None for one that is to go."""

    name: bytes
    olds: list[Entry]
    new: Entry | None
    make: bool = False
    steps: list[_Step] = []
    folders: list["_Folder"] = []
    kept: bool = False
    known: Known | None = None


class Switch:
    """A switch of the directory open as `fd`. `olds` are the trees that it may show now."""

    def __init__(
        self, objects: Objects, prefix: bytes, identifier: bytes, fd: int, path: str,
        olds: list[Entry], new: Entry, *, edits: EditPolicy = "refuse",
        outside_links: bool = False, set_id: bool = False, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        """Gets ready. Files of root's get no set-id bits unless `set_id`."""
        self.objects, self.prefix, self.fd, self.path = objects, prefix, fd, path
        self.report = SwitchReport()
        self.values: dict[bytes, bytes | None] = {}
        self._temporary = TEMPORARY + identifier[:8] + b"-"
        self._count = 0
        self._bits = leaving(asked=set_id)
        self._edits: EditPolicy = edits
        self._outside_links = outside_links
        self._progress = progress or unheard
        self._coming = 0
        self._interrupted = len(olds) > 1
        self._found: list[Edit] = []
        self._groups: dict[bytes, tuple[list[bytes], bytes]] = {}
        self._root = _Folder(b"", olds, new)
        self._whole, self._survey = Room.whole(fd), Survey(objects)

    # The plan.

    def plan(self) -> None:
        """Looks at everything that differs; changes nothing.

        Raises LocalEditsError, TreeTooLargeError.
        """
        self._plan(self.fd, self._root, ())
        if self._found and self._edits == "refuse":
            raise LocalEditsError(self.path, self._found)
        self._check_room()

    def _check_room(self) -> None:
        """Raises TreeTooLargeError if what comes does not fit in what is free, and what goes."""
        coming: list[Entry] = []
        entries, size = Room.free(self.fd)
        for folder in self._folders():
            for step in folder.steps:
                coming += [step.new] if step.new is not None else []
                if step.seen is not None and not stat.S_ISDIR(step.seen.st_mode):
                    size += step.seen.st_blocks * 512 if step.seen.st_nlink == 1 else 0
                    entries = None if entries is None else entries + 1
        Room(entries, size).check(self.objects, coming, Survey(self.objects), self.path)

    def _folders(self) -> Iterator[_Folder]:
        waiting = [self._root]
        while waiting:
            folder = waiting.pop()
            yield folder
            waiting += folder.folders

    def _plan(self, fd: int | None, folder: _Folder, way: tuple[bytes, ...]) -> None:
        if len(way) > DEEPEST:
            raise CorruptObjectError("node", directory_id(folder.olds[0]), "the tree is too deep")
        known = folder.known = Known(self.objects, self.prefix, joined(way))
        for name, olds, new in self._differences(fd, folder):
            status = _look(fd, name)
            here = status is not None and stat.S_ISDIR(status.st_mode)
            directories = [old for old in olds if old.kind == Kind.DIRECTORY]
            if new is not None and new.kind == Kind.SYMLINK:
                self._check_link(way, new)
            if here and new is None and not olds:
                self._found.append(Edit(joined((*way, name)), ChangeKind.ADDED))
                if self._edits == "keep":
                    folder.kept = True
                    continue
                with self._entered(fd, folder, _Folder(name, [], None), way) as (below, child):
                    self._plan(below, child, (*way, name))
                continue
            if here and new is not None and new.kind == Kind.DIRECTORY:
                found = _Folder(name, directories, new)
                with self._entered(fd, folder, found, way) as (below, child):
                    self._plan(below, child, (*way, name))
                continue
            if here and directories:
                found = _Folder(name, directories, None)
                with self._entered(fd, folder, found, way) as (below, child):
                    self._plan(below, child, (*way, name))
                if new is not None and not child.kept:
                    folder.steps.append(_Step(name, new, status))
                continue
            edit = self._edit_of(fd, name, olds, new, status, known)
            if status is not None and not status.st_mode & stat.S_IRUSR:
                status = _look(fd, name)  # it was made readable to be compared
            if edit is not None:
                self._found.append(Edit(joined((*way, name)), edit))
                if self._edits == "keep":
                    folder.kept = True
                    continue
                if here:
                    with self._entered(fd, folder, _Folder(name, [], None), way) as (below, child):
                        self._plan(below, child, (*way, name))
            if new is not None and new.kind == Kind.DIRECTORY:
                if status is not None:
                    folder.steps.append(_Step(name, None, status))
                found = _Folder(name, [], new, make=True)
                if fd is not None:  # else it was counted with the one that it is in
                    self._whole.check(self.objects, [new], self._survey, self.path)
                with self._entered(None, folder, found, way) as (below, child):
                    self._plan(below, child, (*way, name))
            elif new is not None or (status is not None and not here):
                folder.steps.append(_Step(name, new, status))

    def _check_link(self, way: tuple[bytes, ...], link: Entry) -> None:
        """Raises OutsideLinkError for a link that leads out of the new tree, if it is to."""
        if self._outside_links or not isinstance(link.content, bytes):
            return
        assert self._root.new is not None
        directories = [self._root.new]
        for name in way:
            below = Directory(self.objects, directory_id(directories[-1])).get(name)
            assert below is not None
            directories.append(below)
        if leads_out(self.objects, directories, link.content):
            raise OutsideLinkError(joined((*way, link.name)), link.content)

    @contextlib.contextmanager
    def _entered(
        self, fd: int | None, folder: _Folder, child: _Folder, way: tuple[bytes, ...]
    ) -> Iterator[tuple[int | None, _Folder]]:
        """Adds a folder to the one around it, for the caller to plan: one frame for each."""
        folder.folders.append(child)
        if fd is None:
            yield None, child
            return
        with unlocked(child.name, fd) as below:
            if child.new is not None and child.olds and self._attributes_edited(below, child):
                self._found.append(Edit(joined((*way, child.name)), ChangeKind.METADATA))
            yield below, child
        folder.kept = folder.kept or child.kept

    def _differences(
        self, fd: int | None, folder: _Folder
    ) -> Iterable[tuple[bytes, list[Entry], Entry | None]]:
        """Returns the names that differ, with the entries that the old trees have there."""
        found: dict[bytes, tuple[list[Entry], Entry | None]] = {}
        for old in folder.olds:
            if folder.new is None:
                for entry in Directory(self.objects, directory_id(old)):
                    found.setdefault(entry.name, ([], None))[0].append(entry)
            elif old.content != folder.new.content:
                for before, after in pairs(self.objects, old, folder.new):
                    name = (after or before or old).name
                    olds = found.setdefault(name, ([], after))[0]
                    olds += [before] if before is not None else []
        if not folder.olds and folder.new is not None:
            for entry in Directory(self.objects, directory_id(folder.new)):
                found[entry.name] = ([], entry)
        if fd is not None:
            for name, _ in listing(fd) if folder.new is None or self._interrupted else []:
                if name.startswith(self._temporary) or folder.new is None:
                    found.setdefault(name, ([], None))
        return [(name, *found[name]) for name in sorted(found)]

    def _edit_of(
        self, fd: int | None, name: bytes, olds: list[Entry], new: Entry | None,
        status: os.stat_result | None, known: Known,
    ) -> ChangeKind | None:  # fmt: skip
        """Tells how what is there differs from what a switch may overwrite; None if it does not."""
        if status is None or fd is None:
            lost = bool(olds) and new is not None and fd is not None and not self._interrupted
            return ChangeKind.REMOVED if lost else None
        if name.startswith(self._temporary):
            return None
        edit: ChangeKind | None = ChangeKind.ADDED
        for entry in [*olds, *([new] if new is not None else [])]:
            if entry.kind == Kind.DIRECTORY:
                edit = ChangeKind.TYPE
                continue
            kind = difference(self.objects, fd, entry, status, known)
            if kind is None:
                return None
            edit = kind if entry in olds else edit
        return edit

    def _attributes_edited(self, fd: int, folder: _Folder) -> bool:
        """Tells whether a directory has attributes of its user's that are to be replaced."""
        assert folder.new is not None
        new = _dress_of(folder.new)
        olds = [_dress_of(old) for old in folder.olds]
        if all(old == new for old in olds) or self._interrupted:
            return False
        return (true_mode(fd), read_xattrs(fd)) not in [new, *olds]

    # Doing it.

    def run(self) -> None:
        """Does the plan. Raises LocalEditsError for what is changed meanwhile, and OSError."""
        if self._edits == "keep":
            self.report.kept = self._found
        else:
            self.report.overwritten = self._found
        self._fresh = time.time_ns() - FRESH_NS
        planned: dict[bytes, int] = {}
        for folder in self._folders():
            for step in folder.steps:
                self._coming += step.bytes()
                if step.new is not None and step.new.link is not None:
                    link = step.new.link
                    planned[link.group] = planned.get(link.group, link.count) - 1
        self._find_linked({group for group, others in planned.items() if others > 0})
        self._run(self.fd, self._root, [])

    def _find_linked(self, groups: set[bytes]) -> None:
        """Finds files that are to get other names, and are there under names that stay."""
        stack: list[tuple[tuple[bytes, ...], Entry]] = []
        if groups and self._root.new is not None:
            stack = [((), self._root.new)]
        while stack:
            way, folder = stack.pop()
            if folder.totals is None or not folder.totals.links or len(way) > DEEPEST:
                continue
            linked = []
            for entry in Directory(self.objects, directory_id(folder)):
                if entry.kind == Kind.DIRECTORY:
                    stack.append(((*way, entry.name), entry))
                elif entry.link is not None and entry.link.group in groups - self._groups.keys():
                    linked.append(entry)
            if linked:
                self._find_there(way, linked)

    def _find_there(self, way: tuple[bytes, ...], linked: list[Entry]) -> None:
        """Notes those entries of one directory that are on the disk, unedited."""
        with contextlib.suppress(OSError), way_opened(self.fd, list(way)) as fd:
            # An OSError: it is still to be made, or is not as it was.
            known = Known(self.objects, self.prefix, joined(way))
            for entry in linked:
                status = _look(fd, entry.name)
                if status is not None and entry.link is not None:
                    edit = difference(self.objects, fd, entry, status, known)
                    if edit is None:
                        self._groups.setdefault(entry.link.group, (list(way), entry.name))

    def _run(self, fd: int, folder: _Folder, way: list[bytes]) -> None:
        before = os.fstat(fd)
        if before.st_mode & 0o700 != 0o700:
            os.fchmod(fd, stat.S_IMODE(before.st_mode) | 0o700)
        rows: list[Row] = []
        for child in folder.folders:
            if child.new is None:
                with unlocked(child.name, fd) as below:
                    self._run(below, child, [*way, child.name])
                self._remove(fd, child)
        for step in folder.steps:
            self._do(fd, step, way, rows)
        for child in folder.folders:
            if child.new is not None:
                if child.make:
                    os.mkdir(child.name, 0o700, dir_fd=fd)
                    self.report.written += 1
                with unlocked(child.name, fd) as below:
                    self._run(below, child, [*way, child.name])
                    rows.append(self._row(child.name, os.fstat(below)))
        self._dress(fd, folder, stat.S_IMODE(before.st_mode))
        self._remember(folder, rows)

    def _remove(self, fd: int, folder: _Folder) -> None:
        """Removes a directory that has been emptied."""
        if folder.kept:
            return
        try:
            os.rmdir(folder.name, dir_fd=fd)
        except OSError as error:  # something that no tree has, as a socket, or that just came
            if error.errno != errno.ENOTEMPTY:
                raise
        else:
            self.report.removed += 1

    def _do(self, fd: int, step: _Step, way: list[bytes], rows: list[Row]) -> None:
        now = _look(fd, step.name)
        directory = step.seen is not None and stat.S_ISDIR(step.seen.st_mode)
        if not directory and not _same(now, step.seen):
            path = joined((*way, step.name))
            raise LocalEditsError(self.path, [Edit(path, ChangeKind.MODIFIED)])
        if step.new is None:
            os.unlink(step.name, dir_fd=fd)
            self.report.removed += 1
            return
        self._count += 1
        temporary = self._temporary + str(self._count).encode()
        group = step.new.link.group if step.new.link is not None else None
        try:
            if group is not None and group in self._groups:
                self._link(fd, temporary, *self._groups[group])
            else:
                write_entry(self.objects, fd, step.new, temporary, bits=self._bits)
                if step.new.kind == Kind.FILE and step.new.mode & ~self._bits:
                    self.report.set_id_dropped += 1
            os.rename(temporary, step.name, src_dir_fd=fd, dst_dir_fd=fd)
            if group is not None:  # a rename of a file to a name that it has leaves both
                self._groups.setdefault(group, (list(way), step.name))
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=fd)
            where = os.path.join(self.path, os.fsdecode(joined((*way, step.name))))
            raise OSError(error.errno, error.strerror, where) from error
        self.report.written += 1
        self.report.bytes += step.bytes()
        self._progress(self.report.bytes, self._coming)
        if group is None:  # the status of one with several names changes once more
            rows.append(self._row(step.name, os.stat(step.name, dir_fd=fd, follow_symlinks=False)))

    def _link(self, fd: int, temporary: bytes, way: list[bytes], first: bytes) -> None:
        with way_opened(self.fd, way) as there:
            os.link(first, temporary, src_dir_fd=there, dst_dir_fd=fd, follow_symlinks=False)

    def _dress(self, fd: int, folder: _Folder, mode: int) -> None:
        """Gives a directory the new tree's attributes, or leaves it with its user's."""
        new = folder.new
        if new is None:
            return
        same = all(
            _dress_of(old) == _dress_of(new) and old.owner == new.owner for old in folder.olds
        )
        if folder.make or self._interrupted or not same:
            wanted = {name for name, _ in kept_xattrs(new.xattrs)}
            for name, _ in read_xattrs(fd):
                if name not in wanted:
                    os.removexattr(fd, name)
            settle(fd)
            dress_directory(fd, new)
            return
        if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
            os.fchmod(fd, mode)
        os.utime(fd, ns=(new.mtime_ns, new.mtime_ns))

    # The stat cache.

    def _row(self, name: bytes, status: os.stat_result) -> Row:
        row = row_of(name, status)
        fresh = mtime_of(status) > self._fresh
        return (*row[:5], FRESH, row[6]) if fresh else row

    def _remember(self, folder: _Folder, rows: list[Row]) -> None:
        """Keeps what the cache says of a folder from now on.

        Its old rows hold on only if they were of the old tree: else something was imported
        meanwhile, and they are of that.
        """
        known = folder.known
        assert known is not None
        self.values[known.key] = None
        new = folder.new
        if new is None or new.totals is None or folder.kept:
            return
        if folder.make:
            kept: dict[bytes, Row] = {}
        elif (
            len(folder.olds) == 1
            and known.result is not None
            and known.result.node == folder.olds[0].content
        ):
            kept = known.rows
            for name in [step.name for step in folder.steps] + [f.name for f in folder.folders]:
                kept.pop(name, None)
        else:
            return
        kept.update((row[0], row) for row in rows)
        result = folder_result(new, new.totals)
        encoded = encode_rows([kept[name] for name in sorted(kept)])
        self.values[known.key] = encode_folder(encoded, result)


def _dress_of(entry: Entry) -> tuple[int, tuple[tuple[bytes, bytes], ...]]:
    """Returns the attributes that a directory of an entry has, but for its time."""
    return entry.mode, kept_xattrs(entry.xattrs)


def _look(fd: int | None, name: bytes) -> os.stat_result | None:
    if fd is None:
        return None
    try:
        return os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _same(one: os.stat_result | None, other: os.stat_result | None) -> bool:
    if one is None or other is None:
        return one is other
    last = 5 if other.st_nlink > 1 else 6  # another of its names may have gone a moment ago
    return row_of(b"", one)[:last] == row_of(b"", other)[:last]
