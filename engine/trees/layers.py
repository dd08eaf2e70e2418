"""Layers: a stack of read-only trees folded into one, as an overlay would show them.

Directories of the same path are merged, anything else of a higher layer hides what is below
it. Only directories that several layers have are read; a subtree of one layer is taken by id.
"""

from collections import Counter
from collections.abc import Iterator

import msgspec

from engine.ids import digest
from engine.storage.nodes import Entry, Kind, Link
from engine.storage.objects import Objects, PutNode
from engine.trees.directory import Directory, directory_entry, directory_id

NAMES = ("0-infrastructure", "1-global", "2-blueprint")
"""What the layers of a session are called, from the lowest up."""

Layered = tuple[int, Entry]
"""An entry and the number of its layer."""
Links = dict[tuple[int, bytes], Link | None]
"""What stands for a layer's link group instead of itself."""


def fold(objects: Objects, put: PutNode, layers: list[Entry]) -> Entry:
    """Returns the root of the merged tree; `layers` are roots, the lowest first.

    What is put is not read again: it may not be in the store yet.
    """
    stack = list(enumerate(layers))
    return _fold(objects, put, stack, _relinked(objects, stack))


def _fold(objects: Objects, put: PutNode, layers: list[Layered], links: Links) -> Entry:
    top = layers[-1][1]
    if all(layer.content == top.content for _, layer in layers) and not (links and _links(top)):
        return top
    entries = []
    for _, stack in sorted(_stacks(objects, layers).items()):
        number, entry = stack[-1]
        if entry.kind == Kind.DIRECTORY:
            entry = _fold(objects, put, stack, links)
        elif entry.link is not None and (number, entry.link.group) in links:
            entry = msgspec.structs.replace(entry, link=links[number, entry.link.group])
        entries.append(entry)
    return directory_entry(
        put, entries, name=top.name, mode=top.mode, mtime_ns=top.mtime_ns, xattrs=top.xattrs,
        owner=top.owner,
    )  # fmt: skip


def _stacks(objects: Objects, layers: list[Layered]) -> dict[bytes, list[Layered]]:
    """Returns by name what is merged there: directories, or one entry that hides the others."""
    stacks: dict[bytes, list[Layered]] = {}
    for number, layer in layers:
        for entry in Directory(objects, directory_id(layer)):
            below = stacks.get(entry.name)
            if below is not None and below[-1][1].kind == entry.kind == Kind.DIRECTORY:
                below.append((number, entry))
            else:
                stacks[entry.name] = [(number, entry)]
    return stacks


def _relinked(objects: Objects, layers: list[Layered]) -> Links:
    """Returns which link groups change: names are hidden, or two layers have the same id."""
    counts: Counter[tuple[int, bytes, int]] = Counter()
    for number, link in _visible_links(objects, layers):
        counts[number, link.group, link.count] += 1
    links: Links = {}
    taken = set()
    for (number, group, before), count in sorted(counts.items()):
        unique = group
        while unique in taken:
            unique = digest(unique)[:8]
        taken.add(unique)
        if (unique, count) != (group, before):
            links[number, group] = Link(unique, count) if count > 1 else None
    return links


def _visible_links(objects: Objects, layers: list[Layered]) -> Iterator[tuple[int, Link]]:
    if any(_links(layer) for _, layer in layers):
        for stack in _stacks(objects, layers).values():
            number, entry = stack[-1]
            if entry.kind == Kind.DIRECTORY:
                yield from _visible_links(objects, stack)
            elif entry.link is not None:
                yield number, entry.link


def _links(directory: Entry) -> int:
    return directory.totals.links if directory.totals is not None else 0
