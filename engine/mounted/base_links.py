"""Where a session still shows the names of the base's linked files.

All names of a linked file are copied up together, also those that nobody has looked up yet. To
find them takes a walk through what the base has of linked files and through all directories of
the upper; so it is done once, for all groups, and what it found is checked when it is used. A
commit changes the base, and begins anew.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.mounted.overlay_directory import SessionDirectory


class BaseLinks:
    """The places of the base's linked files, by group; of one overlay between two commits."""

    def __init__(self, root: "SessionDirectory") -> None:
        """Walks through the session once. The directories that it finds stay in memory."""
        self._places: defaultdict[bytes, list[tuple[SessionDirectory, bytes]]] = defaultdict(list)
        self.steps = 0
        """How many entries were looked at so far: what tests hold against the work to be done."""
        pending = [root]
        while pending:
            directory = pending.pop()
            for group, name in directory.linked_names():
                self._places[group].append((directory, name))
            below = directory.holders_of_links()
            self.steps += 1 + len(below)
            pending += reversed(below)

    def names(self, group: bytes) -> "Iterator[tuple[SessionDirectory, bytes]]":
        """Yields the places where a group's file still shows, and nobody has looked it up."""
        for directory, name in self._places.get(group, ()):
            self.steps += 1
            if directory.shows_base(name):
                yield directory, name
