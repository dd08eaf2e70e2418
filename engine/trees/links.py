"""Hard links inside a tree: which names share a file.

A group's 8-byte id is the beginning of the BLAKE3 of what its entries have in common, with a
number that keeps two different groups alike in everything apart. So it depends on the tree
alone, not on inode numbers: importing a checkout gives the same ids.
"""

from collections.abc import Iterable, Iterator, Set
from typing import TypeVar

import msgspec

from engine.ids import digest
from engine.storage.nodes import Entry, Link, encode
from engine.storage.objects import Objects
from engine.trees.directory import Directory, directory_id

Place = TypeVar("Place")


def number_groups(
    groups: Iterable[list[tuple[Place, Entry]]], taken: Set[bytes] = frozenset()
) -> Iterable[tuple[Place, Entry]]:
    """Yields each member with its link group set, for groups in the order of their first names.

    A group is the members found inside the tree; those with a single one are no links. `taken`
    are the ids of groups that the tree has besides: a copy with all its attributes (`cp -a`)
    would get the id of what it was copied from.
    """
    seen: dict[bytes, int] = {}
    for members in groups:
        if len(members) < 2:
            for place, entry in members:
                yield place, msgspec.structs.replace(entry, link=None)
            continue
        common = msgspec.structs.replace(members[0][1], name=b"", link=None, owner=None)
        base = digest(encode(common))
        number = seen.get(base, 0)
        while (group := digest(base + number.to_bytes(8, "big"))[:8]) in taken:
            number += 1
        seen[base] = number + 1
        link = Link(group, len(members))
        for place, entry in members:
            yield place, msgspec.structs.replace(entry, link=link)


def linked(objects: Objects, directory: Entry) -> Iterator[Entry]:
    """Yields the entries of a directory that are in a link group, or have such below them."""
    if directory.totals is not None and directory.totals.links:
        for entry in Directory(objects, directory_id(directory)):
            if entry.link is not None or (entry.totals is not None and entry.totals.links):
                yield entry


def groups_in(objects: Objects, entry: Entry) -> Iterator[bytes]:
    """Yields the link groups of an entry and all below it; reads what holds some, no more."""
    if entry.link is not None:
        yield entry.link.group
    for below in linked(objects, entry):
        yield from groups_in(objects, below)
