"""Changes between trees as commands show them: one line each, or fields for JSON."""

import stat
from collections.abc import Iterable
from typing import Any

from engine.storage.nodes import Entry, Kind
from engine.trees.diffing import Change, ChangeKind
from mountctl.output import Output
from mountctl.text import count, path_fields, quoted

LETTERS = {
    ChangeKind.ADDED: "A",
    ChangeKind.REMOVED: "D",
    ChangeKind.MODIFIED: "M",
    ChangeKind.TYPE: "T",
    ChangeKind.METADATA: "U",
    ChangeKind.RENAMED: "R",
    ChangeKind.COPIED: "C",
}
"""As in git, and U for what is only permissions, time or attributes (restic's letter)."""

_COLOURS = {"A": "green", "D": "red", "M": "yellow", "T": "magenta", "U": "cyan",
            "R": "blue", "C": "blue"}  # fmt: skip


def warn_of_set_id(output: Output, dropped: int) -> None:
    """Tells how many files that were written lost their set-id bits, if any did."""
    if dropped:
        output.warning(f"{count(dropped, 'file')} lost set-id bits; --set-id writes them")


def path_text(change: Change) -> str:
    """Returns a change's path, safe for a terminal; directories end in a slash.

    A rename or copy shows where from, too: `old -> new`.
    """
    entry = change.new or change.old
    slash = b"/" * (entry is not None and entry.kind == Kind.DIRECTORY)
    text = quoted((change.path or b".") + slash)
    return text if change.old_path is None else f"{quoted(change.old_path + slash)} -> {text}"


def show_names(output: Output, changes: Iterable[Change]) -> int:
    """Writes a letter and a path for each change, as they are found; returns how many."""
    number = 0
    for change in changes:
        letter = LETTERS[change.kind]
        output.line(output.style(f"{letter} {path_text(change)}", _COLOURS[letter]))
        number += 1
    return number


def summary(number: int, what: str) -> str:
    """Returns the sentence that ends a list of changes."""
    return f"{count(number, 'change')} {what}" if number else f"no change {what}"


def change_fields(change: Change) -> dict[str, Any]:
    """Returns a change for JSON."""
    return {
        **path_fields(change.path),
        "change": change.kind.value,
        "old": _entry_fields(change.old),
        "new": _entry_fields(change.new),
    }


def _entry_fields(entry: Entry | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    return {
        "kind": Kind(entry.kind).name.lower(),
        "mode": f"{stat.S_IMODE(entry.mode):04o}",
        "size": entry.size,
        "mtime_ns": entry.mtime_ns,
    }
