"""Uncommitted changes: what would be lost with a session, and the refusal to throw it away.

`Repository.remove_session` and `reset_session` ask here, and so does a mount's daemon, which knows
what programs have written a moment ago.
"""

from itertools import islice

from engine.errors import EngineError
from engine.storage.nodes import Entry
from engine.storage.objects import Objects
from engine.trees.diffing import diff

NAMED = 3
"""How many of the changed paths a refusal names."""


class UncommittedChangesError(EngineError):
    """A session has changes that no snapshot has. `count` are there, `paths` the first of them."""

    def __init__(self, name: str, count: int, paths: list[bytes]) -> None:
        shown = ", ".join(repr(path.decode("utf-8", "backslashreplace")) for path in paths)
        more = ", …" if count > len(paths) else ""
        changes = "1 uncommitted change" if count == 1 else f"{count:,} uncommitted changes"
        super().__init__(f"session {name!r} has {changes}: {shown}{more}")
        self.name, self.count, self.paths = name, count, paths


def refuse_changes(objects: Objects, name: str, base: Entry, root: Entry) -> None:
    """Raises UncommittedChangesError if a session that stands on `base` shows another tree."""
    if base == root:
        return
    changes = diff(objects, base, root)
    first = [change.path for change in islice(changes, NAMED)]
    if first:
        raise UncommittedChangesError(name, len(first) + sum(1 for _ in changes), first)
