"""Losses: what a way into or out of a store does not keep of a file that it does keep.

Each is a warning that names the path, and counts under its kind in the report, which `--json`
shows as `lost`. Files that are left out altogether (devices, sockets) are warnings only.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable

SET_ID, TIME, ATTRIBUTES, CAPABILITIES, ACLS = (
    "set_id", "time", "attributes", "capabilities", "acls",
)  # fmt: skip

_WHAT = {
    SET_ID: "its set-id bits were dropped: whoever writes it out would be another owner",
    TIME: "its time is beyond the years 1677 to 2262, and was set to the nearest",
    ATTRIBUTES: "extended attributes that a tree cannot keep were left out: {}",
    CAPABILITIES: "its file capabilities were left out",
    ACLS: "its access control list was left out",
}
_NAMES = {
    b"security.capability": CAPABILITIES,
    b"system.posix_acl_access": ACLS,
    b"system.posix_acl_default": ACLS,
}


class Losses:
    """What was lost, noted by any thread."""

    def __init__(self) -> None:
        self._found: list[tuple[bytes, str, str]] = []

    def note(self, path: bytes, kind: str, detail: str = "") -> None:
        """Notes a loss at a path."""
        self._found.append((path, kind, detail))

    def note_attributes(self, path: bytes, names: Iterable[bytes]) -> None:
        """Notes the extended attributes of a file that are not kept, by their names."""
        other = []
        for name in names:
            kind = _NAMES.get(name)
            if kind is None:
                other.append(os.fsdecode(name))
            else:
                self.note(path, kind)
        if other:
            self.note(path, ATTRIBUTES, ", ".join(sorted(other)))

    def counts(self) -> dict[str, int]:
        """Returns how many files lost what, by kind."""
        return dict(Counter(kind for kind, _ in sorted({(k, path) for path, k, _ in self._found})))

    def warnings(self, name: Callable[[bytes], str] = os.fsdecode) -> list[str]:
        """Returns a line for each, in the order of the paths; `name` gives a path its name."""
        return [
            f"{name(path)!r}: {_WHAT[kind].format(detail)}"
            for path, kind, detail in sorted(set(self._found))
        ]


def is_lost(name: bytes) -> bool:
    """Tells whether somebody would miss an extended attribute that a tree does not keep.

    What a security module has set (`security.selinux`) is the machine's, not the file's.
    """
    if name.startswith(b"security."):
        return name == b"security.capability"
    return not name.startswith(b"user.amalgam.")
