"""Owners in the store: whether it keeps them, and what a tree says of them.

A tree keeps the owners of its files if its root has one. A store that was told to keep them makes
all new trees so; without that an entry has no owner, and shows as the mounting user's. Who calls
it: what makes trees. What owners mean on the host is `engine.host.owners`.
"""

from engine.storage.nodes import Entry
from engine.storage.store import Db, Reader, Writer

KEY = b"owners"
"""The key in `meta` that says so: `1`; missing otherwise."""


def keeps_owners(reader: Reader) -> bool:
    """Returns whether trees that are made in this store keep owners unless they are told to."""
    return bytes(reader.get(Db.META, KEY) or b"") == b"1"


def keep_owners(writer: Writer) -> None:
    """Makes the store keep owners from now on; trees that are there stay as they are."""
    writer.put(Db.META, KEY, b"1")


def count_owners(root: Entry) -> int:
    """Returns how many entries of a tree have an owner, its root included; reads nothing."""
    below = root.totals.owners if root.totals is not None else 0
    return below + (root.owner is not None)
