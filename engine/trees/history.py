"""The graph of snapshots: who came from whom, and where two of them met.

Works on a function that gives a snapshot's parents and time, so it serves records that are in
the store and records that are not there yet. Nothing is stored beside the records: a walk reads
what it passes. Times order the walks and never decide an answer, so a clock that went backwards
costs time only. A parent that was removed ends the walk there; `History.missing` names it.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterator

from engine.ids import SnapshotId
from engine.storage.objects import Objects
from engine.storage.snapshots import Links, decode_links
from engine.storage.store import Db

ReadLinks = Callable[[SnapshotId], Links | None]
"""Returns the links of a snapshot, or None if there is no such snapshot."""

_AHEAD = 128
"""Records read in one transaction once one is needed; beginning one costs as much as a record."""

_ONE, _OTHER, _STALE = 1, 2, 4
_BOTH = _ONE | _OTHER


class StoredLinks:
    """Reads links of snapshots, some ahead, and keeps what it has read: for one walk."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._known: dict[SnapshotId, Links] = {}

    def __call__(self, identifier: SnapshotId) -> Links | None:
        """Returns the links, None if there is no such snapshot. Raises CorruptObjectError."""
        found = self._known.get(identifier)
        if found is None:
            self._read_from(identifier)
            found = self._known.get(identifier)
        return found

    def _read_from(self, start: SnapshotId) -> None:
        waiting = deque([start])
        coming = dict(self._objects.pending.snapshots)  # before the view: they leave after it
        with self._objects.store.read() as reader:
            for _ in range(_AHEAD):
                if not waiting:
                    return
                identifier = waiting.popleft()
                if identifier in self._known:
                    continue
                record = coming.get(identifier)
                if record is not None:
                    links = Links(tuple(map(SnapshotId, record.parents)), record.time_ns)
                else:
                    raw = reader.get(Db.SNAPSHOTS, identifier)
                    if raw is None:
                        continue
                    links = decode_links(identifier, raw)
                self._known[identifier] = links
                waiting.extend(each for each in links.parents if each not in self._known)


class History:
    """Questions about the ancestors of snapshots; a snapshot is an ancestor of itself.

    `missing` gathers the parents that were asked for and are not there. Make a new one for each
    question or a few: it may keep what it has read.
    """

    def __init__(self, links: ReadLinks) -> None:
        self._links = links
        self.missing: set[SnapshotId] = set()

    def links(self, identifier: SnapshotId) -> Links | None:
        """Returns parents and time; None, noted in `missing`, if there is no such snapshot."""
        links = self._links(identifier)
        if links is None:
            self.missing.add(identifier)
        return links

    def parents(self, identifier: SnapshotId, *, first_only: bool = False) -> list[SnapshotId]:
        """Returns the parents that are there, in their order and each once."""
        links = self.links(identifier)
        if links is None:
            return []
        asked = links.parents[:1] if first_only else dict.fromkeys(links.parents)
        return [parent for parent in asked if self.links(parent) is not None]

    def ancestors(self, *starts: SnapshotId, first_only: bool = False) -> Iterator[SnapshotId]:
        """Yields snapshots and their ancestors, each once and before all of its parents.

        One line of history follows the other where the graph allows it (git's --topo-order; Kahn,
        "Topological sorting of large networks", 1962, with a stack). With `first_only`, other
        parents than the first are not followed. Reads the whole graph before the first.
        """
        children: dict[SnapshotId, int] = {}
        waiting = [each for each in dict.fromkeys(starts) if self.links(each) is not None]
        tips = list(waiting)
        children.update(dict.fromkeys(waiting, 0))
        while waiting:
            for parent in self.parents(waiting.pop(), first_only=first_only):
                if parent not in children:
                    children[parent] = 0
                    waiting.append(parent)
                children[parent] += 1
        ready = sorted((each for each in tips if not children[each]), key=self._time)
        while ready:
            identifier = ready.pop()
            yield identifier
            for parent in self.parents(identifier, first_only=first_only):
                children[parent] -= 1
                if not children[parent]:
                    ready.append(parent)

    def latest_first(self, start: SnapshotId) -> Iterator[SnapshotId]:
        """Yields a snapshot and its ancestors by their times, the latest known one next.

        Reads as it goes. Where a clock went backwards a parent may come before its child.
        """
        seen = {start}
        heap = [(-self._time(start), start)] if self.links(start) is not None else []
        while heap:
            _, identifier = heapq.heappop(heap)
            yield identifier
            for parent in self.parents(identifier):
                if parent not in seen:
                    seen.add(parent)
                    heapq.heappush(heap, (-self._time(parent), parent))

    def is_ancestor(self, old: SnapshotId, new: SnapshotId) -> bool:
        """Tells whether `new` came from `old`, or is it."""
        if self.links(old) is None or self.links(new) is None:
            return False
        return old == new or bool(self._paint(old, [new])[1][old] & _OTHER)

    def merge_base(self, one: SnapshotId, other: SnapshotId) -> SnapshotId | None:
        """Returns the latest of the best common ancestors, None if there is none."""
        return next(iter(self.merge_bases(one, other)), None)

    def merge_bases(self, one: SnapshotId, other: SnapshotId) -> list[SnapshotId]:
        """Returns the best common ancestors: those that no other common ancestor came from.

        Latest first. The way of git's `merge-base --all`: two colours flow down from the two, the
        latest snapshot next; what has both is common and what is below it stale; the walk ends
        when all that waits is stale. Up to there a wrong time can only have hidden that one found
        came before another one found, so these are compared with each other in the same way.
        """
        if self.links(one) is None or self.links(other) is None:
            return []
        if one == other:
            return [one]
        found, colours = self._paint(one, [other])
        bases = [each for each in found if not colours[each] & _STALE]
        if len(bases) > 1:
            bases = [each for each in bases if not self._is_below(each, bases)]
        return sorted(bases, key=lambda each: (-self._time(each), each))

    def _is_below(self, base: SnapshotId, bases: list[SnapshotId]) -> bool:
        others = [each for each in bases if each != base]
        return bool(self._paint(base, others)[1][base] & _OTHER)

    def _time(self, identifier: SnapshotId) -> int:
        links = self.links(identifier)
        return 0 if links is None else links.time_ns

    def _paint(
        self, one: SnapshotId, others: list[SnapshotId]
    ) -> tuple[list[SnapshotId], dict[SnapshotId, int]]:
        """Returns what was found common, and all colours.

        Every snapshot that is not below a common one has all its colours when this ends.
        """
        colours = {one: _ONE}
        for each in others:
            colours[each] = colours.get(each, 0) | _OTHER
        heap = [(-self._time(each), each) for each in colours]
        heapq.heapify(heap)
        queued = set(colours)
        fresh = len(queued)  # of the queued, how many are not stale
        found: dict[SnapshotId, None] = {}
        while fresh:
            _, identifier = heapq.heappop(heap)
            queued.remove(identifier)
            colour = colours[identifier]
            fresh -= not colour & _STALE
            if colour & _BOTH == _BOTH:
                if not colour & _STALE:
                    found[identifier] = None
                colour |= _STALE
            for parent in self.parents(identifier):
                before = colours.get(parent, 0)
                after = before | colour
                if after == before:
                    continue
                colours[parent] = after
                if parent not in queued:
                    queued.add(parent)
                    heapq.heappush(heap, (-self._time(parent), parent))
                    fresh += not after & _STALE
                elif after & _STALE and not before & _STALE:
                    fresh -= 1
        return list(found), colours
