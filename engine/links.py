"""Hard links inside a tree: which names share a file.

A group's 8-byte id is the beginning of the BLAKE3 of what its entries have in common, with a
number that keeps two different groups alike in everything apart. So it depends on the tree
alone, not on inode numbers: importing a checkout gives the same ids.
"""

from collections.abc import Iterable
from typing import TypeVar

import msgspec

from engine.ids import digest
from engine.nodes import Entry, Link, encode

Place = TypeVar("Place")


def number_groups(
    groups: Iterable[list[tuple[Place, Entry]]],
) -> Iterable[tuple[Place, Entry]]:
    """Yields each member with its link group set, for groups in the order of their first names.

    A group is the members found inside the tree; those with a single one are no links.
    """
    seen: dict[bytes, int] = {}
    for members in groups:
        if len(members) < 2:
            for place, entry in members:
                yield place, msgspec.structs.replace(entry, link=None)
            continue
        common = msgspec.structs.replace(members[0][1], name=b"", link=None)
        base = digest(encode(common))
        number = seen.get(base, 0)
        seen[base] = number + 1
        link = Link(digest(base + number.to_bytes(8, "big"))[:8], len(members))
        for place, entry in members:
            yield place, msgspec.structs.replace(entry, link=link)
