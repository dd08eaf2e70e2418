"""Refs that commands move: where they were, so that nobody has to remember it.

A command asks before its work and tells afterwards; who moves the same ref meanwhile is not seen.
"""

from typing import TYPE_CHECKING

from mountctl.text import short

if TYPE_CHECKING:
    from engine.ids import SnapshotId
    from mountctl.access import StoreAccess
    from mountctl.output import Output


class RefBefore:
    """What a ref named before a command, if there was one and it was asked to move it."""

    def __init__(self, store: "StoreAccess", name: str | None) -> None:
        self.name = name
        self.target: SnapshotId | None = None
        if name is not None:
            self.target = store.repository.refs().get(name)

    def tell(self, output: "Output", now: bytes | None) -> None:
        """Says where the ref was if that is not where it is `now`."""
        if self.target is not None and self.target != now:
            output.note(f"{self.name} was {short(self.target)}")
