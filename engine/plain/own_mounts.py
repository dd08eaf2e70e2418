"""Own mounts: which AmalgamFS mounts this process sees, and what of one a path is in.

Reads /proc/self/mountinfo and asks no mount anything. An import leaves mounts inside of its
directory out, and refuses one that holds every snapshot.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

_WHOLE, _PART = "fuse.amalgamfs", "fuse.amalgamfs.part"
_SNAPSHOTS = "snapshots"
_ESCAPES = (
    (b"\\040", b" "),
    (b"\\011", b"\t"),
    (b"\\012", b"\n"),
    (b"\\043", b"#"),
    (b"\\134", b"\\"),
)


class OwnMount(NamedTuple):
    """A mount of ours: where, its device, and which of the whole mount's paths is there."""

    path: str
    device: int
    shows: str


def own_mounts() -> Iterator[OwnMount]:
    """Yields the mounts of ours, the latest last; binds of a part of one, too."""
    with open("/proc/self/mountinfo", "rb") as lines:
        for line in lines:
            before, _, after = line.partition(b" - ")
            kind = after.split(b" ", 1)[0].decode("ascii", "replace")
            if kind not in {_WHOLE, _PART}:
                continue
            fields = before.split(b" ")
            major, minor = fields[2].split(b":")
            root, path = (_plain(field) for field in fields[3:5])
            shows = root.strip("/")
            if kind == _PART:
                shows = os.path.join(_SNAPSHOTS, shows).rstrip("/")
            yield OwnMount(path, os.makedev(int(major), int(minor)), shows)


def _plain(field: bytes) -> str:
    for escape, character in _ESCAPES:
        field = field.replace(escape, character)
    return os.fsdecode(field)


def own_devices() -> set[int]:
    """Returns the device numbers of the mounts of ours."""
    return {mount.device for mount in own_mounts()}


def place_in_mount(path: str) -> str | None:
    """Returns where in a mount of ours a real path is, empty for its root; None if elsewhere."""
    found: OwnMount | None = None
    for mount in own_mounts():
        inside = path == mount.path or path.startswith(mount.path.rstrip("/") + "/")
        if inside and (found is None or len(mount.path) >= len(found.path)):
            found = mount
    if found is None:
        return None
    return os.path.join(found.shows, path[len(found.path) :].strip("/")).strip("/")


def holds_many(place: str) -> bool:
    """Tells whether a directory of a mount holds other than one snapshot's or session's tree."""
    first, _, rest = place.partition("/")
    return not rest or first not in {_SNAPSHOTS, "sessions"}
