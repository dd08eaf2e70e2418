"""Merge: two trees that came from a third become one, by walking the three Merkle trees together.

What only one side changed is taken by id and never read; where both changed a directory, only
the names that both changed are looked at, so the cost follows the changes. Of a file, content,
permissions, each attribute and hard links merge by themselves: what one side changed is taken,
texts that both changed merge by lines. The time is the later one of those that changed.

What does not merge is a Conflict, with the entries of all three sides, never an error.

- A file that one side moved and the other changed is merged where it is now (see `renames`).
- A directory that one side removed stays for what the other side added or changed in it.
- Names share a file (hard links) as each side left them. A name that one side added to a file
  that the other side changed becomes a file of its own.
"""

from collections.abc import Mapping

import msgspec

from engine.errors import CorruptObjectError
from engine.merging.conflicts import Conflict, ConflictKind
from engine.merging.merge_drafts import Draft, relink, store_draft
from engine.merging.merge_moves import BASE, OURS, THEIRS, Moves, find_moves, is_made_up
from engine.merging.text_merging import Favor, Style, merge_text
from engine.merging.textdiff import lines_of
from engine.storage.content import Content, PutChunk, ingest_blocks
from engine.storage.nodes import DEEPEST, LONGEST_NAME, Entry, Kind, Link, Owner
from engine.storage.objects import NodeBuffer, Objects
from engine.trees.diffing import DiffTooLargeError, diff, pairs
from engine.trees.directory import Directory, directory_id
from engine.trees.similarity import read_text

MOST_CHANGES = 4_000_000
"""Trees of which a side changed more entries are not merged."""


class MergeResult(msgspec.Struct):
    """The merged tree, None if there are conflicts that were not to be written, and these.

    `merged_texts` are the paths of files that both sides changed and that merged by lines.
    `renames_limited`: too many files were added and removed to tell which of them were moved
    and changed, so what the other side did to these files was not brought along.
    """

    root: Entry | None
    conflicts: list[Conflict]
    merged_texts: list[bytes]
    renames_limited: bool = False


_Attributes = tuple[tuple[bytes, bytes], ...]
_Changes = dict[bytes, tuple[Entry | None, Entry | None]]
"""By name, what was and what is."""


_Result = Entry | Draft | None


def merge(
    objects: Objects,
    nodes: NodeBuffer,
    put_chunk: PutChunk,
    base: Entry,
    ours: Entry,
    theirs: Entry,
    *,
    favor: Favor | None = None,
    style: Style = Style.MERGE,
    names: tuple[bytes, bytes, bytes] = (b"base", b"ours", b"theirs"),
    write_conflicts: bool = False,
    renames: bool = True,
    limit: int | None = MOST_CHANGES,
) -> MergeResult:
    """Merges `theirs` into `ours`, two roots that came from `base`.

    New nodes go into `nodes`, new chunks to `put_chunk`. `favor` settles conflicts with a side;
    UNION those of texts only. With `write_conflicts`, the tree has them marked in the texts, and
    where that cannot be, ours in place and theirs beside it under a name with `~theirs`.

    Raises CorruptObjectError for forged nodes, DiffTooLargeError beyond `limit` changes.
    """
    options = _Options(favor, style, names, write_conflicts)
    sides = (base, ours, theirs)
    once = _Merge(objects, nodes, put_chunk, sides, options, limit, Moves())
    result = once.run()
    moves = Moves()
    if renames:
        once.note_lost_alike()
        moves = find_moves(objects, sides, once.lost, favor, limit)
    if moves.overrides or moves.conflicts:
        once = _Merge(objects, nodes, put_chunk, sides, options, limit, moves)
        result = once.run()
    conflicts = sorted(once.conflicts + moves.conflicts, key=lambda conflict: conflict.path)
    if conflicts and not write_conflicts:
        return MergeResult(None, conflicts, once.merged_texts, moves.limited)
    if isinstance(result, Draft):
        if once.may_break_links():
            relink(objects, result, once.link_keys)
        result = store_draft(objects, nodes, result)
    assert result is not None
    root = msgspec.structs.replace(result, name=b"")
    return MergeResult(root, conflicts, once.merged_texts, moves.limited)


class _Options(msgspec.Struct, frozen=True):
    favor: Favor | None
    style: Style
    names: tuple[bytes, bytes, bytes]
    write_conflicts: bool


class _Merge:
    """One merge of three trees."""

    def __init__(
        self,
        objects: Objects,
        nodes: NodeBuffer,
        put_chunk: PutChunk,
        sides: tuple[Entry, Entry, Entry],
        options: _Options,
        limit: int | None,
        moves: Moves,
    ) -> None:
        self._objects, self._nodes, self._put_chunk = objects, nodes, put_chunk
        self._sides, self._options, self._moves = sides, options, moves
        promised = [side.totals.entries if side.totals is not None else 0 for side in sides]
        self._promised = sum(promised) + promised[BASE] + sum(map(len, moves.overrides.values()))
        self._limit, self._seen = limit, 0
        self.conflicts: list[Conflict] = []
        self.merged_texts: list[bytes] = []
        self.link_keys: dict[bytes, object] = {}
        self._links_merged = False
        self.lost: tuple[set[bytes], set[bytes], set[bytes]] = (set(), set(), set())
        self.changed_alike: list[tuple[bytes, Entry, Entry]] = []

    def run(self) -> _Result:
        """Returns the merged root, with the conflicts as they are to be written."""
        base, ours, theirs = self._sides
        if not self._moves.touched:
            if theirs in {ours, base}:
                return ours
            if ours == base:
                return theirs
        return self._directory(b"", base, ours, theirs, 0)

    # Directories.

    def _directory(
        self, path: bytes, base: Entry | None, ours: Entry | None, theirs: Entry | None, depth: int
    ) -> _Result:
        """Merges directories; None stands for one that is not there, or is no directory."""
        if depth > DEEPEST:
            identifier = directory_id(self._sides[OURS])
            raise CorruptObjectError("node", identifier, "the tree is too deep")
        mine = self._changes(path, base, ours, OURS)
        other = self._changes(path, base, theirs, THEIRS)
        forced = self._moves.names(path)
        stored = None if ours is None or is_made_up(ours) else ours
        directory = None if stored is None else Directory(self._objects, directory_id(stored))
        edits: dict[bytes, Entry | Draft | None] = {}
        left = 0 if directory is None else len(directory)
        for name in sorted(other.keys() | forced):
            before, after = other[name]
            present = mine[name][1] if name in mine else before
            child = path + b"/" + name if path else name
            if present == before and child not in self._moves.touched:
                merged: _Result = after
            elif (between := self._directories(child, before, present, after)) is not None:
                merged = self._directory(child, *between, depth + 1)
            elif present != after and _is_mixed(before, present, after):
                merged, beside = self._mixed(child, before, present, after, depth + 1)
                self._put_beside(name, beside, edits, directory, other)
            else:
                merged, beside = self._entry(child, before, present, after)
                self._put_beside(name, beside, edits, directory, other)
                self._note_lost(child, before, present, after, depth + 1)
            kept = directory.get(name) if name in forced and directory is not None else present
            if name in forced and directory is None:
                kept = None
            if merged is not kept:
                edits[name] = merged
        for name, value in edits.items():
            was = directory.get(name) if directory is not None else None
            left += (value is not None) - (was is not None)
        if (ours is None or theirs is None) and not left:
            return None
        like = self._attributes(path, base, ours, theirs)
        if not edits and stored is not None and like == stored:
            return stored
        return Draft(stored, like, edits)

    def _changes(
        self, path: bytes, base: Entry | None, side: Entry | None, number: int
    ) -> _Changes:
        """Returns what differs between the base and a side, by name."""
        before = None if base is None or is_made_up(base) else base
        after = None if side is None or is_made_up(side) else side
        found: _Changes = {}
        if before is not None and after is not None:
            if before.content != after.content:
                for old, new in pairs(self._objects, before, after):
                    found[(old or new or base or before).name] = (old, new)
        elif before is not None:
            entries = Directory(self._objects, directory_id(before))
            found = {entry.name: (entry, None) for entry in entries}
        elif after is not None:
            entries = Directory(self._objects, directory_id(after))
            found = {entry.name: (None, entry) for entry in entries}
        self._count(len(found))
        for name in self._moves.names(path):
            found[name] = (
                self._get(BASE, path, before, name), self._get(number, path, after, name)
            )  # fmt: skip
        return found

    def _get(self, side: int, path: bytes, directory: Entry | None, name: bytes) -> Entry | None:
        overrides = self._moves.overrides.get((side, path), {})
        if name in overrides:
            return overrides[name]
        if directory is None:
            return None
        return Directory(self._objects, directory_id(directory)).get(name)

    def _count(self, entries: int) -> None:
        self._seen += entries
        if self._seen > self._promised:
            identifier = directory_id(self._sides[OURS])
            raise CorruptObjectError("node", identifier, "more is in the tree than it promises")
        if self._limit is not None and self._seen > self._limit:
            raise DiffTooLargeError(self._limit)

    def _directories(
        self, path: bytes, base: Entry | None, ours: Entry | None, theirs: Entry | None
    ) -> tuple[Entry | None, Entry | None, Entry | None] | None:
        """Returns the sides of which the directories are to be merged, None if they are not."""
        if path not in self._moves.touched and ours == theirs and ours is not None:
            return None
        before = _directory_or_none(base)
        sides = (ours, theirs)
        directories = [s for s in sides if s is not None and s.kind == Kind.DIRECTORY]
        if len(directories) == 2:
            if base is not None and before is None:
                self.lost[BASE].add(path)  # a file that neither side has there any more
            return before, ours, theirs
        is_open = before is not None or path in self._moves.touched
        if is_open and len(directories) + sides.count(None) == 2:
            return before, ours, theirs
        return None

    def _attributes(
        self, path: bytes, base: Entry | None, ours: Entry | None, theirs: Entry | None
    ) -> Entry:
        """Returns what a merged directory is like, apart from what is in it."""
        one = ours or theirs or base
        assert one is not None
        if ours is None or theirs is None:
            return one
        if base is None:
            mode, xattrs = ours.mode & theirs.mode, ours.xattrs
            owner = ours.owner
            if ours.xattrs != theirs.xattrs:
                xattrs = self._xattrs(path, None, ours, theirs)
        else:
            mode = self._mode(path, base, ours, theirs)
            xattrs = self._xattrs(path, base, ours, theirs)
            owner = self._owner(path, base, ours, theirs)
        time = _time(base, ours, theirs)
        return msgspec.structs.replace(ours, mode=mode, xattrs=xattrs, mtime_ns=time, owner=owner)

    # Other entries.

    def _entry(
        self, path: bytes, base: Entry | None, ours: Entry | None, theirs: Entry | None
    ) -> tuple[Entry | None, Entry | None]:
        """Merges what is not a directory on all sides; returns what is to be put beside, too."""
        if theirs in {ours, base}:
            return ours, None
        if ours == base:
            return theirs, None
        if ours is None or theirs is None:
            return self._deleted(path, base, ours, theirs), None
        merge_two = self._both if ours.kind == theirs.kind else self._types
        merged, beside = merge_two(path, base, ours, theirs)
        return merged, theirs if beside else None

    def _put_beside(
        self,
        name: bytes,
        entry: Entry | None,
        edits: "dict[bytes, Entry | Draft | None]",
        directory: Directory | None,
        other: _Changes,
    ) -> None:
        if entry is not None:
            free = _free_name(name, edits, directory, other)
            edits[free] = msgspec.structs.replace(entry, name=free)

    def _note_lost(
        self,
        path: bytes,
        base: Entry | None,
        ours: Entry | None,
        theirs: Entry | None,
        depth: int,
    ) -> None:
        """Notes files that neither side has any more, where both have the same now."""
        if ours != theirs or base is None:
            return
        if base.kind != Kind.DIRECTORY:
            if ours is None or ours.kind == Kind.DIRECTORY:
                self.lost[BASE].add(path)
        elif ours is None or ours.kind != Kind.DIRECTORY:
            self._directory(path, base, None, None, depth)
        else:
            self.changed_alike.append((path, base, ours))

    def note_lost_alike(self) -> None:
        """Notes files that are gone from directories which both sides changed alike."""
        for path, base, ours in self.changed_alike:
            for change in diff(self._objects, base, ours, path, limit=self._limit):
                is_gone = change.new is None or change.new.kind == Kind.DIRECTORY
                if change.old is not None and change.old.kind != Kind.DIRECTORY and is_gone:
                    self.lost[BASE].add(change.path)
        self.changed_alike = []

    def _mixed(
        self,
        path: bytes,
        base: Entry | None,
        ours: Entry | None,
        theirs: Entry | None,
        depth: int,
    ) -> tuple[_Result, Entry | None]:
        """Merges a directory and something else at one path, as if they had two names.

        What both of these leave there is a conflict. Returns what is to be put beside, too.
        """
        if path not in self._moves.touched and base in {ours, theirs}:
            return (theirs if ours == base else ours), None
        folder: _Result = _directory_or_none(ours) or _directory_or_none(theirs)
        files = [side for side in (ours, theirs) if side and side.kind != Kind.DIRECTORY]
        if len(files) == 2:
            self._directory(path, base, None, None, depth)
            return self._entry(path, base, ours, theirs)
        other = files[0] if files else None
        if base is not None and base.kind == Kind.DIRECTORY:
            so_far = len(self.conflicts), len(self.merged_texts)
            folder = self._directory(
                path, base, _directory_or_none(ours), _directory_or_none(theirs), depth
            )
            if folder is not None:
                del self.conflicts[so_far[0] :], self.merged_texts[so_far[1] :]
        elif base is not None and other is None:
            self.lost[BASE].add(path)
        elif base is not None and other is not None:
            if _is_same_file(base, other):
                other = None
            else:
                self.lost[OURS if other is theirs else THEIRS].add(path)
        if folder is None or other is None:
            return other or folder, None
        assert ours is not None
        assert theirs is not None
        merged, beside = self._types(path, base, ours, theirs)
        return merged, theirs if beside else None

    def _conflict(
        self,
        path: bytes,
        kind: ConflictKind,
        base: Entry | None,
        ours: Entry | None,
        theirs: Entry | None,
        regions: int = 0,
    ) -> None:
        was = [self._moves.origins.get((side, path), path) for side in range(3)]
        paths = (was[BASE], was[OURS], was[THEIRS])
        self.conflicts.append(Conflict(path, kind, base, ours, theirs, paths, regions))

    def _favored(self, ours: Entry | None, theirs: Entry | None) -> tuple[bool, Entry | None]:
        if self._options.favor in {Favor.OURS, Favor.THEIRS}:
            return True, ours if self._options.favor == Favor.OURS else theirs
        return False, None

    def _deleted(
        self, path: bytes, base: Entry | None, ours: Entry | None, theirs: Entry | None
    ) -> Entry | None:
        present = ours or theirs
        assert present is not None
        if base is not None and _is_same_file(base, present):
            self._links_merged |= base.link is not None or present.link is not None
            return None
        self.lost[THEIRS if theirs is None else OURS].add(path)
        settled, result = self._favored(ours, theirs)
        if settled:
            return result
        self._conflict(path, ConflictKind.MODIFY_DELETE, base, ours, theirs)
        return present

    def _types(
        self, path: bytes, base: Entry | None, ours: Entry, theirs: Entry
    ) -> tuple[Entry | None, bool]:
        """Merges entries of different kinds; tells whether theirs is to be put beside ours."""
        for one, other in ((ours, theirs), (theirs, ours)):
            if base is not None and _is_same_file(base, one):
                return other, False
        settled, result = self._favored(ours, theirs)
        if settled:
            return result, False
        self._conflict(path, ConflictKind.TYPE, base, ours, theirs)
        return ours, True

    def _both(
        self, path: bytes, base: Entry | None, ours: Entry, theirs: Entry
    ) -> tuple[Entry | None, bool]:
        """Merges two files, links or fifos; tells whether theirs is to be put beside ours."""
        before = _alike(base, ours)
        content: Content
        beside = False
        size = ours.size
        if ours.content == theirs.content or (before and before.content == theirs.content):
            content = ours.content
        elif before is not None and before.content == ours.content:
            content, size = theirs.content, theirs.size
        else:
            content, size, beside = self._content(path, base, ours, theirs)
        merged = msgspec.structs.replace(
            ours, content=content, size=size,
            mode=self._mode(path, base, ours, theirs),
            xattrs=self._xattrs(path, base, ours, theirs),
            mtime_ns=_time(before, ours, theirs),
            link=self._link(path, before, ours, theirs),
            owner=self._owner(path, base, ours, theirs),
        )  # fmt: skip
        return merged, beside

    def _content(
        self, path: bytes, base: Entry | None, ours: Entry, theirs: Entry
    ) -> tuple[Content, int, bool]:
        """Merges contents that both sides changed, or made."""
        kind = ConflictKind.ADD_ADD if base is None else ConflictKind.CONTENT
        favor = self._options.favor
        before = _alike(base, ours)
        texts: list[bytes] = []
        for entry in (before, ours, theirs) if ours.kind == Kind.FILE else ():
            text = read_text(self._objects, entry)
            if text is None:
                break
            texts.append(text)
        if len(texts) == 3:
            merged = merge_text(
                *map(lines_of, texts),
                favor=favor, style=self._options.style, names=self._options.names,
            )  # fmt: skip
            if not merged.conflicts:
                self.merged_texts.append(path)
            else:
                self._conflict(path, kind, base, ours, theirs, merged.conflicts)
                if not self._options.write_conflicts:
                    return ours.content, ours.size, False
            content, size = ingest_blocks(
                [b"".join(merged.lines)], self._put_chunk, self._nodes.put
            )
            return content, size, False
        settled, result = self._favored(ours, theirs)
        if settled and result is not None:
            return result.content, result.size, False
        self._conflict(path, kind, base, ours, theirs)
        return ours.content, ours.size, True

    def _mode(self, path: bytes, base: Entry | None, ours: Entry, theirs: Entry) -> int:
        before = _alike(base, ours)
        if ours.mode == theirs.mode or (before is not None and before.mode == theirs.mode):
            return ours.mode
        if before is not None and before.mode == ours.mode:
            return theirs.mode
        settled, result = self._favored(ours, theirs)
        if settled and result is not None:
            return result.mode
        self._conflict(path, ConflictKind.MODE, base, ours, theirs)
        return ours.mode

    def _owner(self, path: bytes, base: Entry | None, ours: Entry, theirs: Entry) -> Owner | None:
        """Merges owners as modes; who has none on one side is no change of the other's."""
        before = _alike(base, ours)
        if ours.owner == theirs.owner or (before is not None and before.owner == theirs.owner):
            return ours.owner
        if before is not None and before.owner == ours.owner:
            return theirs.owner
        settled, result = self._favored(ours, theirs)
        if settled and result is not None:
            return result.owner
        self._conflict(path, ConflictKind.OWNER, base, ours, theirs)
        return ours.owner

    def _xattrs(self, path: bytes, base: Entry | None, ours: Entry, theirs: Entry) -> _Attributes:
        if ours.xattrs == theirs.xattrs:
            return ours.xattrs
        before, mine, other = (
            dict(entry.xattrs) if entry is not None else {}
            for entry in (_alike(base, ours), ours, theirs)
        )
        merged: dict[bytes, bytes] = {}
        in_conflict = False
        for name in sorted({*before, *mine, *other}):
            value = mine.get(name)
            if value != other.get(name) and value == before.get(name):
                value = other.get(name)
            elif value != other.get(name) != before.get(name):
                in_conflict = True
                if self._options.favor == Favor.THEIRS:
                    value = other.get(name)
            if value is not None:
                merged[name] = value
        if in_conflict and not self._favored(ours, theirs)[0]:
            self._conflict(path, ConflictKind.XATTRS, base, ours, theirs)
        return tuple(merged.items())

    def _link(self, path: bytes, base: Entry | None, ours: Entry, theirs: Entry) -> Link | None:
        """Returns a link if the file may share its content with others; `relink` decides it."""
        before, mine, other = (
            entry.link.group if entry is not None and entry.link is not None else None
            for entry in (base, ours, theirs)
        )
        if before is None and mine is None and other is None:
            return None
        self._links_merged = True
        key: object = mine
        if mine == before:
            key = other
        elif other not in {before, mine}:
            key = (mine, other)
        self.link_keys[path] = key
        links = (entry.link for entry in (ours, theirs, base) if entry is not None)
        return None if key is None else next(link for link in links if link is not None)

    # Links, asked after the walk.

    def may_break_links(self) -> bool:
        """Tells whether the names of a hard link may not be what they say of themselves."""
        base, ours, theirs = self._sides
        if not any(side.totals is not None and side.totals.links for side in (ours, theirs)):
            return False
        return self._links_merged or all(
            any(
                entry is not None and entry.link is not None
                for change in diff(self._objects, base, side)
                for entry in (change.old, change.new)
            )
            for side in (ours, theirs)
        )


def _directory_or_none(entry: Entry | None) -> Entry | None:
    return entry if entry is not None and entry.kind == Kind.DIRECTORY else None


def _is_mixed(*sides: Entry | None) -> bool:
    """Tells whether a directory is among some entries, and something else."""
    return len({entry.kind == Kind.DIRECTORY for entry in sides if entry is not None}) == 2


def _alike(base: Entry | None, side: Entry) -> Entry | None:
    """Returns the base's entry if it is of the same kind."""
    return base if base is not None and base.kind == side.kind else None


def _is_same_file(one: Entry, other: Entry) -> bool:
    return (one.kind, one.content, one.mode, one.xattrs, one.owner) == (
        other.kind, other.content, other.mode, other.xattrs, other.owner
    )  # fmt: skip


def _time(base: Entry | None, ours: Entry, theirs: Entry) -> int:
    """Returns the latest of the times that differ from the base's."""
    times = [side.mtime_ns for side in (ours, theirs)]
    changed = [time for time in times if base is None or time != base.mtime_ns]
    return max(changed, default=times[0])


def _free_name(
    name: bytes, edits: Mapping[bytes, object], directory: Directory | None, other: _Changes
) -> bytes:
    """Returns a name for what stands beside `name`."""
    number = 1
    while True:
        end = b"~theirs" if number == 1 else b"~theirs%d" % number
        free = name[: LONGEST_NAME - len(end)] + end
        taken = directory is not None and directory.get(free) is not None
        if not taken and free not in edits and free not in other:
            return free
        number += 1
