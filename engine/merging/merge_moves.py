"""Moves: files that one side of a merge moved, and the other changed, moved or removed.

A merge first runs by paths. What one side has lost there is looked for elsewhere on that side,
and if it is found, the merge runs again as if the other side and the base had it there too.
"""

import msgspec

from engine.merging.conflicts import Conflict, ConflictKind
from engine.merging.text_merging import Favor
from engine.storage.nodes import Entry, Kind, Totals
from engine.storage.objects import Objects
from engine.trees.diffing import diff
from engine.trees.directory import find
from engine.trees.renames import pair_files

BASE, OURS, THEIRS = range(3)
"""The sides of a merge."""

Sides = tuple[Entry, Entry, Entry]
"""The roots of the base, of ours, of theirs."""


class Moves(msgspec.Struct):
    """Files of a side that count as moved, because the other side moved them.

    `overrides` are by side and directory: names with what is there instead. `touched` are the
    directories above them, `origins` where files really are. `limited`: there were too many
    files to find out which were moved and changed.
    """

    overrides: dict[tuple[int, bytes], dict[bytes, Entry | None]] = {}
    touched: set[bytes] = set()
    conflicts: list[Conflict] = []
    origins: dict[tuple[int, bytes], bytes] = {}
    limited: bool = False

    def put(self, side: int, path: bytes, entry: Entry | None) -> None:
        above, _, name = path.rpartition(b"/")
        if entry is not None:
            entry = msgspec.structs.replace(entry, name=name)
        self.overrides.setdefault((side, above), {})[name] = entry
        while above:
            self.touched.add(above)
            above = above.rpartition(b"/")[0]
        self.touched.add(b"")

    def names(self, path: bytes) -> set[bytes]:
        """Returns the names in a directory that are other than they are stored."""
        found = {name for side in range(3) for name in self.overrides.get((side, path), ())}
        if path in self.touched:
            prefix = path + b"/" if path else b""
            found |= {
                each[len(prefix) :]
                for each in self.touched
                if each and each.startswith(prefix) and b"/" not in each[len(prefix) :]
            }
        return found


def find_moves(
    objects: Objects,
    sides: Sides,
    lost: tuple[set[bytes], set[bytes], set[bytes]],
    favor: Favor | None,
    limit: int | None,
) -> Moves:
    """Returns where files are that are not where they were.

    `lost` are, of each side, paths of files that it removed and the other side changed; of the
    base, those that both removed. Reads files only to compare these with what was added.
    """
    return _Search(objects, sides, lost, favor, limit).run()


def moved_files(
    objects: Objects,
    base: Entry,
    side: Entry,
    relevant: set[bytes] | None = None,
    *,
    limit: int | None = None,
) -> tuple[dict[bytes, bytes], bool]:
    """Returns where files of the base are on a side, and whether there were too many to tell.

    A file that is a directory now, or the other way round, is gone from there. With `relevant`,
    only these files are told of.
    """
    gone, come = [], []
    for change in diff(objects, base, side, limit=limit):
        old, new = _file(change.old), _file(change.new)
        if old is not None and new is None:
            gone.append((change.path, old))
        elif new is not None and old is None:
            come.append((change.path, new))
    found, limited = pair_files(objects, gone, come, relevant=relevant)
    pairs = {pair.old[0]: pair.new[0] for pair in found}
    if relevant is not None:
        pairs = {old: new for old, new in pairs.items() if old in relevant}
    return pairs, limited


def _file(entry: Entry | None) -> Entry | None:
    """Returns an entry if it is what can be moved by itself."""
    return entry if entry is not None and entry.kind in {Kind.FILE, Kind.SYMLINK} else None


class _Search:
    def __init__(
        self,
        objects: Objects,
        sides: Sides,
        lost: tuple[set[bytes], set[bytes], set[bytes]],
        favor: Favor | None,
        limit: int | None,
    ) -> None:
        self._objects, self._sides, self._lost = objects, sides, lost
        self._favor, self._limit = favor, limit
        self.moves = Moves()

    def run(self) -> Moves:
        found: dict[int, dict[bytes, bytes]] = {}
        both_removed = self._lost[BASE]
        for side in (OURS, THEIRS):
            relevant = self._lost[side] | both_removed
            found[side] = self._moved(side, relevant) if relevant else {}
        for side, away in ((OURS, THEIRS), (THEIRS, OURS)):
            for path in sorted(self._lost[side]):
                target = found[side].get(path)
                kinds = {
                    entry.kind if entry is not None else None
                    for entry in (
                        find(self._objects, self._sides[each], path) for each in (BASE, away)
                    )
                }
                if target is not None and len(kinds) == 1 and self._is_free(away, target, path):
                    self._move(BASE, path, target, side)
                    self._move(away, path, target, side)
        for path in sorted(both_removed):
            self._moved_and_gone(path, found[OURS].get(path), found[THEIRS].get(path))
        return self.moves

    def _moved(self, side: int, relevant: set[bytes]) -> dict[bytes, bytes]:
        base, root = self._sides[BASE], self._sides[side]
        found, limited = moved_files(self._objects, base, root, relevant, limit=self._limit)
        self.moves.limited |= limited
        return found

    def _is_free(self, side: int, path: bytes, leaving: bytes) -> bool:
        """Tells whether a side has nothing at a path, and directories at most above it.

        What is at `leaving` goes to that path, so it is in nobody's way.
        """
        root = self._sides[side]
        if find(self._objects, root, path) is not None:
            return False
        above = path.rpartition(b"/")[0]
        while above:
            entry = find(self._objects, root, above)
            if entry is not None and above != leaving:
                return entry.kind == Kind.DIRECTORY
            above = above.rpartition(b"/")[0]
        return True

    def _move(self, side: int, old: bytes, new: bytes, like: int) -> None:
        """Moves a file of a side, with directories above its new path as side `like` has them."""
        entry = find(self._objects, self._sides[side], old)
        self.moves.put(side, old, None)
        self.moves.put(side, new, entry)
        self.moves.origins[side, new] = old
        above = new.rpartition(b"/")[0]
        while above:
            present = find(self._objects, self._sides[side], above)
            if present is not None and present.kind == Kind.DIRECTORY:
                break
            directory = find(self._objects, self._sides[like], above)
            assert directory is not None
            self.moves.put(side, above, made_up(directory))
            above = above.rpartition(b"/")[0]

    def _moved_and_gone(self, path: bytes, ours: bytes | None, theirs: bytes | None) -> None:
        """Settles a file that neither side has where it was, and a side has elsewhere."""
        if ours is None and theirs is None:
            return
        if ours is not None and ours == theirs:
            self._move(BASE, path, ours, OURS)
            return
        favor = self._favor
        if favor in {Favor.OURS, Favor.THEIRS}:
            side, away = (OURS, THEIRS) if favor == Favor.OURS else (THEIRS, OURS)
            kept, dropped = (ours, theirs) if favor == Favor.OURS else (theirs, ours)
            if dropped is not None:
                if kept is not None and self._is_free(away, kept, dropped):
                    self._move(away, dropped, kept, side)
                    self._move(BASE, path, kept, side)
                elif kept is None:
                    self.moves.put(away, dropped, None)
            return
        kind = ConflictKind.RENAME_RENAME
        if ours is None or theirs is None:
            kind = ConflictKind.RENAME_DELETE
        places = (path, path if ours is None else ours, path if theirs is None else theirs)
        base, mine, other = (
            find(self._objects, root, place)
            for root, place in zip(self._sides, places, strict=True)
        )
        self.moves.conflicts.append(Conflict(path, kind, base, mine, other, places))


def made_up(directory: Entry) -> Entry:
    """Returns a directory that is like another one and has nothing in it but overrides."""
    return msgspec.structs.replace(directory, content=b"", size=0, totals=Totals(0, 0))


def is_made_up(directory: Entry) -> bool:
    """Tells whether a directory is one of `made_up`, which is stored nowhere."""
    return directory.content == b""
