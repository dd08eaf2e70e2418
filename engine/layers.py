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
    """Returns the root of the merged tree; `layers` are roots, the lowest first."""
    merged = layers[0]
    for layer in layers[1:]:
        merged = _merge(objects, put, merged, layer)
    return merged


def _merge(objects: Objects, put: PutNode, lower: Entry, higher: Entry) -> Entry:
    if lower.content == higher.content:
        return higher
    entries = {e.name: e for e in Directory(objects, directory_id(lower))}
    for entry in Directory(objects, directory_id(higher)):
        below = entries.get(entry.name)
        if below is not None and below.kind == entry.kind == Kind.DIRECTORY:
            entries[entry.name] = _merge(objects, put, below, entry)
        else:
            entries[entry.name] = entry
    return directory_entry(
        put,
        [entries[name] for name in sorted(entries)],
        name=higher.name,
        mode=higher.mode,
        mtime_ns=higher.mtime_ns,
        xattrs=higher.xattrs,
    )
