"""Renames and copies: which of what was added is what was removed, or is still there.

A directory that is elsewhere now, with all that is in it, is found by its id without reading
it. A file is found by its content's id, and otherwise by what it shares with a removed file: at
least half of the larger one's bytes (git's rule), in chunks for large files and in lines for
others. An empty file is nobody's rename.
"""

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from engine.errors import CorruptObjectError
from engine.storage import content
from engine.storage.nodes import Entry, Kind
from engine.storage.objects import Objects
from engine.trees.diffing import Change, ChangeKind, DiffTooLargeError, diff
from engine.trees.directory import Directory, directory_id
from engine.trees.similarity import (
    LARGEST_SPANS,
    SpanIndex,
    Spans,
    chunk_spans,
    line_spans,
    score,
)

THRESHOLD = 0.5
"""The least similarity of a rename."""
MOST_COMPARED = 1000
"""As many removed and as many added files are compared by what is in them: git's limit."""

_MOST_READ = 256 << 20
"""So many bytes are read for one comparison."""
_NEAREST = 4
"""Removed files of which the exact similarity to an added one is found."""

File = tuple[bytes, Entry]
"""A path and what is there."""


class Pair(NamedTuple):
    """A file that is another one now."""

    old: File
    new: File
    similarity: float


class Renamed(msgspec.Struct):
    """Changes by path, renames among them. `limited`: there were too many files to compare."""

    changes: list[Change]
    limited: bool


def diff_with_renames(
    objects: Objects,
    old: Entry,
    new: Entry,
    *,
    copies: bool = False,
    limit: int | None = None,
    most_compared: int = MOST_COMPARED,
) -> Renamed:
    """Returns the changes between two trees with renames, and with `copies` those of files that
    changed in the same diff.

    Ordered by path; a directory that was removed comes after what was in it. Raises what `diff`
    does.
    """
    search = _Search(objects, limit)
    for change in diff(objects, old, new, whole=False, limit=limit):
        search.take(change)
    search.match_directories()
    pairs, limited = pair_files(objects, search.removed, search.added, most_compared=most_compared)
    changes = search.changes
    gone = {pair.old[0] for pair in pairs}
    found = {pair.new[0] for pair in pairs}
    for (old_path, before), (path, after), similarity in pairs:
        changes.append(
            Change(path, ChangeKind.RENAMED, before, after, old_path, round(similarity, 4))
        )
    rest = [file for file in search.added if file[0] not in found]
    if copies and rest:
        sources = search.removed + [
            (change.path, change.old)
            for change in changes
            if change.kind == ChangeKind.MODIFIED and change.old is not None
        ]
        copied, too_many = pair_files(
            objects, sources, rest, copies=True, most_compared=most_compared
        )
        limited |= too_many
        for (old_path, before), (path, after), similarity in copied:
            found.add(path)
            changes.append(
                Change(path, ChangeKind.COPIED, before, after, old_path, round(similarity, 4))
            )
    changes += [Change(p, ChangeKind.ADDED, None, e) for p, e in rest if p not in found]
    changes += [Change(p, ChangeKind.REMOVED, e, None) for p, e in search.removed if p not in gone]
    changes.sort(key=_place)
    return Renamed(changes, limited)


def _place(change: Change) -> tuple[list[bytes], bool]:
    parts = change.path.split(b"/")
    old, new = change.old, change.new
    last = old is not None and old.kind == Kind.DIRECTORY
    last = last and (new is None or new.kind != Kind.DIRECTORY)
    return ([*parts, b"\xff" * 256] if last else parts), last


class _Search:
    """What was added and removed, with directories opened as far as they have no partner."""

    def __init__(self, objects: Objects, limit: int | None) -> None:
        self._objects, self._limit = objects, limit
        self._opened = 0
        self.changes: list[Change] = []
        self.removed: list[File] = []
        self.added: list[File] = []
        self._directories: tuple[list[tuple[int, bytes]], list[tuple[int, bytes]]] = ([], [])
        self._entries: tuple[dict[bytes, Entry], dict[bytes, Entry]] = ({}, {})

    def take(self, change: Change) -> None:
        """Sorts a change of a diff whose directories were not followed."""
        if change.kind == ChangeKind.REMOVED and change.old is not None:
            self._take(0, change.path, change.old)
        elif change.kind == ChangeKind.ADDED and change.new is not None:
            self._take(1, change.path, change.new)
        else:
            self.changes.append(change)
            if change.kind == ChangeKind.TYPE and change.old and change.new:
                for side, entry in enumerate((change.old, change.new)):
                    if entry.kind == Kind.DIRECTORY:
                        self._open(side, change.path, entry)

    def _take(self, side: int, path: bytes, entry: Entry) -> None:
        if entry.kind == Kind.DIRECTORY:
            heapq.heappush(self._directories[side], (-_size(entry), path))
            self._entries[side][path] = entry
        else:
            (self.added if side else self.removed).append((path, entry))

    def _open(self, side: int, path: bytes, entry: Entry) -> None:
        """Takes what is in a directory, which promises how much that is."""
        promised = _size(entry)
        self._opened += len(directory := Directory(self._objects, directory_id(entry)))
        if self._limit is not None and self._opened > self._limit:
            raise DiffTooLargeError(self._limit)
        for below in directory:
            promised -= 1 + _size(below)
            if promised < 0:
                why = "more is in the directory than it promises"
                raise CorruptObjectError("node", directory_id(entry), why)
            self._take(side, path + b"/" + below.name, below)

    def match_directories(self) -> None:
        """Finds directories that are elsewhere now, from the largest to the smallest.

        Equal ones are equally large, and lie in larger ones: when a size's turn has come, all
        of that size are known.
        """
        while any(self._directories):
            size = -min(heap[0][0] for heap in self._directories if heap)
            paths: list[list[bytes]] = []
            for heap in self._directories:
                paths.append([])
                while heap and -heap[0][0] == size:
                    paths[-1].append(heapq.heappop(heap)[1])
            gone, come = ([(path, entries.pop(path)) for path in side]
                          for side, entries in zip(paths, self._entries, strict=True))  # fmt: skip
            pairs = _same_content(gone, come) if size else []
            for (old_path, before), (path, after), _ in pairs:
                self.changes.append(Change(path, ChangeKind.RENAMED, before, after, old_path, 1.0))
            partners = {(0, pair.old[0]) for pair in pairs} | {(1, pair.new[0]) for pair in pairs}
            for side, files in enumerate((gone, come)):
                for path, entry in files:
                    if (side, path) in partners:
                        continue
                    change = (None, entry) if side else (entry, None)
                    kind = ChangeKind.ADDED if side else ChangeKind.REMOVED
                    self.changes.append(Change(path, kind, *change))
                    self._open(side, path, entry)


def _size(entry: Entry) -> int:
    return entry.totals.entries if entry.totals is not None else 0


def pair_files(
    objects: Objects,
    removed: list[File],
    added: list[File],
    *,
    copies: bool = False,
    relevant: set[bytes] | None = None,
    most_compared: int = MOST_COMPARED,
) -> tuple[list[Pair], bool]:
    """Returns which added file is which removed one, and whether there were too many to tell.

    Each removed file has one partner, or with `copies` any number. Files of equal content are
    found first, of one name preferably; then the most similar ones. With `relevant`, only those
    removed files are compared by what is in them.
    """
    if not removed or not added:
        return [], False
    pairs = _same_content(removed, added, copies=copies)
    gone = set() if copies else {pair.old[0] for pair in pairs}
    found = {pair.new[0] for pair in pairs}
    sources = [file for file in removed if file[0] not in gone and _is_comparable(file)]
    if relevant is not None:
        sources = [file for file in sources if file[0] in relevant]
    targets = [file for file in added if file[0] not in found and _is_comparable(file)]
    sources, targets = _of_similar_size(sources, targets), _of_similar_size(targets, sources)
    if not sources or not targets:
        return pairs, False
    if len(sources) * len(targets) > most_compared**2:
        return pairs, True
    similar, limited = _similar(objects, sources, targets)
    for rating, _, at, number in sorted(similar):
        old, new = sources[at], targets[number]
        if new[0] not in found and old[0] not in gone:
            found.add(new[0])
            if not copies:
                gone.add(old[0])
            pairs.append(Pair(old, new, -rating))
    return pairs, limited


def _same_content(
    removed: Iterable[File], added: Iterable[File], *, copies: bool = False
) -> list[Pair]:
    """Returns the pairs of one content and kind, first those whose names are the same."""
    by_name: dict[tuple[object, ...], list[File]] = {}
    by_content: dict[tuple[object, ...], list[File]] = {}
    for file in reversed(list(removed)):
        entry = file[1]
        if entry.size or entry.kind == Kind.DIRECTORY:
            by_name.setdefault((entry.kind, entry.content, entry.name), []).append(file)
            by_content.setdefault((entry.kind, entry.content), []).append(file)
    pairs: list[Pair] = []
    gone: set[bytes] = set()
    rest = []
    for file in added:
        entry = file[1]
        same = by_name.get((entry.kind, entry.content, entry.name))
        if same:
            old = same[-1] if copies else same.pop()
            gone.add(old[0])
            pairs.append(Pair(old, file, 1.0))
        else:
            rest.append(file)
    for file in rest:
        same = by_content.get((file[1].kind, file[1].content), [])
        while same and not copies and same[-1][0] in gone:
            same.pop()
        if same:
            pairs.append(Pair(same[-1] if copies else same.pop(), file, 1.0))
    return pairs


def _is_comparable(file: File) -> bool:
    return file[1].kind == Kind.FILE and file[1].size > 0


def _of_similar_size(files: list[File], others: list[File]) -> list[File]:
    """Returns the files that are at least half, at most twice as large as one of the others."""
    sizes = sorted(entry.size for _, entry in others)
    return [
        (path, entry)
        for path, entry in files
        if bisect_left(sizes, entry.size * THRESHOLD) < bisect_right(sizes, entry.size / THRESHOLD)
    ]


_Rated = tuple[float, bool, int, int]
"""Minus the similarity, whether the names differ, and the numbers of source and target."""


def _similar(
    objects: Objects, sources: list[File], targets: list[File]
) -> tuple[list[_Rated], bool]:
    found: list[_Rated] = []
    readable = _MOST_READ
    limited = False

    def spans(file: File, large: bool) -> Spans:
        nonlocal readable, limited
        entry = file[1]
        if large:
            return chunk_spans(objects, entry)
        if entry.size > LARGEST_SPANS:
            return {}
        readable -= entry.size
        if readable < 0:
            limited = True
            return {}
        return line_spans(content.read(objects, entry, 0, entry.size))

    # Large files by their chunks, the others by their lines.
    for large in (True, False):
        files = [spans(file, large) for file in sources]
        index = SpanIndex(files)
        for number, target in enumerate(targets):
            mine = spans(target, large)
            for at in index.candidates(mine, _NEAREST):
                sizes = (sources[at][1].size, target[1].size)
                if large and max(sizes) <= LARGEST_SPANS:
                    continue
                rating = score(files[at], mine, max(sizes))
                if rating >= THRESHOLD:
                    names_differ = sources[at][1].name != target[1].name
                    found.append((-rating, names_differ, at, number))
    return found, limited
