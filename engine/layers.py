"""Layers: a stack of read-only trees folded into one, as an overlay would show them.

Directories of the same path are merged, anything else of a higher layer hides what is below
it. Only directories that several layers have are read; a subtree of one layer is taken by id.
"""

from engine.directory import Directory, directory_entry, directory_id
from engine.nodes import Entry, Kind
from engine.objects import Objects, PutNode

NAMES = ("0-infrastructure", "1-global", "2-blueprint")
"""What the layers of a session are called, from the lowest up."""


def fold(objects: Objects, put: PutNode, layers: list[Entry]) -> Entry:
    """Returns the root of the merged tree; `layers` are roots, the lowest first.

    What is put is not read again: it may not be in the store yet.
    """
    top = layers[-1]
    if all(layer.content == top.content for layer in layers):
        return top
    stacks: dict[bytes, list[Entry]] = {}
    for layer in layers:
        for entry in Directory(objects, directory_id(layer)):
            below = stacks.get(entry.name)
            if below is not None and below[-1].kind == entry.kind == Kind.DIRECTORY:
                below.append(entry)
            else:
                stacks[entry.name] = [entry]
    return directory_entry(
        put,
        [fold(objects, put, stacks[name]) for name in sorted(stacks)],
        name=top.name,
        mode=top.mode,
        mtime_ns=top.mtime_ns,
        xattrs=top.xattrs,
    )
