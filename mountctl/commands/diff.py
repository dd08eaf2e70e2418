"""`mountctl diff`."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import click

from mountctl.command import Command, pass_invocation, snapshot_argument
from mountctl.invocation import Invocation
from mountctl.text import count, visible

if TYPE_CHECKING:
    from engine.storage.nodes import Entry
    from engine.storage.objects import Objects
    from engine.trees.diffing import Change
    from engine.trees.insight import LineCounts
    from mountctl.access import StoreAccess
    from mountctl.output import Output

_BAR = 40
_LINE_COLOURS = {b"+": "green", b"-": "red", b"@": "cyan"}


@click.command(
    "diff",
    cls=Command,
    example="""
    $ mountctl diff main @work
    $ mountctl diff @work --patch | git apply
    $ mountctl diff 4f1a 77c0 --stat
    """,
)
@snapshot_argument(
    "old", metavar="A", help="A snapshot: an id, the beginning of one, a ref, or @SESSION."
)
@snapshot_argument(
    "new", metavar="[B]", required=False, help="Another; without it, A is compared with its parent."
)
@click.option("--name-status", "form", flag_value="names", default=True,
              help="A letter and a path for each change (the default).")  # fmt: skip
@click.option("--stat", "form", flag_value="stat", help="Changed lines of each file.")
@click.option("--patch", "-p", "form", flag_value="patch",
              help="A patch in git's format, binary files included.")  # fmt: skip
@click.option("--renames/--no-renames", default=None,
              help="Look for files and directories that are elsewhere now (with --json by "
              "itself).")  # fmt: skip
@click.option("--copies", is_flag=True, help="Look for copies of changed files as well.")
@pass_invocation
def command(
    invocation: Invocation,
    old: str,
    new: str | None,
    form: str,
    renames: bool | None,
    copies: bool,
) -> None:
    """Show what differs between two snapshots.

    The letters: A added, D removed, M content modified, T of another type, U only permissions,
    times or attributes updated, R renamed, C copied. @SESSION is taken as it is now. A patch is
    written byte for byte into a file or a pipe; on a terminal, control characters are escaped.
    With --json the answer is an InsightDiff: docs/reference/insight-diff.md.
    """
    if copies and renames is False:
        raise click.UsageError("--copies and --no-renames exclude each other")
    output = invocation.output
    with invocation.open() as store, _trees(store, old, new) as (before, after):
        objects = store.repository.objects
        if output.json:
            output.result(_insight(objects, before, after, form, renames is not False, copies))
            return
        changes: Iterable[Change]
        limited = False
        if renames or copies:
            from engine.trees.renames import diff_with_renames

            found = diff_with_renames(objects, before, after, copies=copies)
            changes, limited = found.changes, found.limited
        else:
            changes = store.repository.diff(before, after)
        if form == "stat":
            _show_stat(output, objects, changes)
        elif form == "patch":
            _show_patch(output, objects, changes)
        else:
            from mountctl.changes import show_names, summary

            number = show_names(output, changes)
            output.note(summary(number, f"from {old} to {new}" if new else f"in {old}"))
        if limited:
            output.note("too many files were added and removed to look for all renames")


@contextmanager
def _trees(store: "StoreAccess", old: str, new: str | None) -> "Iterator[tuple[Entry, Entry]]":
    """Gives the roots to compare; a session that is named twice is frozen once."""
    with ExitStack() as stack:
        if new is None:
            after = stack.enter_context(store.tree(old))
            identifier = store.repository.resolve(old)
            if not old.startswith("@"):
                parents = store.repository.snapshot(identifier).parents
                if not parents:
                    raise click.UsageError(
                        f"{old} has no parent to compare it with: name another snapshot",
                        click.get_current_context(),
                    )
                identifier = store.repository.resolve(parents[0].hex())
            yield store.repository.snapshot(identifier).root, after
            return
        before = stack.enter_context(store.tree(old))
        yield before, before if new == old else stack.enter_context(store.tree(new))


def _insight(
    objects: "Objects", before: "Entry", after: "Entry", form: str, renames: bool, copies: bool
) -> dict[str, object]:
    from engine.patches.patch_writing import patch_lines
    from engine.trees.insight import (
        MOST_ENTRIES,
        as_json,
        entry_as_json,
        insight_entries,
        summarize,
    )
    from engine.trees.insight import InsightDiff as Insight
    from engine.trees.renames import Renamed, diff_with_renames

    if renames or copies:
        found = diff_with_renames(objects, before, after, copies=copies, limit=MOST_ENTRIES)
    else:
        from engine.trees.diffing import diff

        found = Renamed(list(diff(objects, before, after, limit=MOST_ENTRIES)), False)
    entries = list(insight_entries(objects, found.changes))
    fields = as_json(Insight(entries, summarize(entries), found.limited))
    if form == "patch":
        fields["entries"] = [
            {**entry_as_json(entry), **_patch_fields(patch_lines(objects, change))}
            for entry, change in zip(entries, found.changes, strict=True)
        ]
    return fields


def _patch_fields(lines: "Iterable[bytes]") -> dict[str, str]:
    from engine.trees.insight import named

    return named("patch", b"".join(line + b"\n" for line in lines))


def _show_patch(output: "Output", objects: "Objects", changes: "Iterable[Change]") -> None:
    from engine.patches.patch_writing import is_lost, patch_lines

    lost = 0
    for change in changes:
        lost += is_lost(change)
        for line in patch_lines(objects, change):
            if output.to_terminal:
                text = visible(line.decode("utf-8", "surrogateescape"), keep="\t")
                colour = _LINE_COLOURS.get(line[:1])
                output.line(output.style(text, colour) if colour else text)
            else:
                output.raw(line + b"\n")
    if lost:
        output.note(
            f"{count(lost, 'change')} that a patch cannot say (times, attributes, owners, fifos, "
            "directories): see --name-status"
        )


def _show_stat(output: "Output", objects: "Objects", changes: "Iterable[Change]") -> None:
    from engine.trees.insight import count_lines
    from mountctl.changes import path_text

    rows = [(path_text(change), change, count_lines(objects, change)) for change in changes
            if not path_text(change).endswith("/")]  # fmt: skip
    width = max((len(path) for path, _, _ in rows), default=0)
    counts = [(lines.added or 0, lines.removed or 0) for _, _, lines in rows]
    most = max(map(sum, counts), default=0)
    for path, change, lines in rows:
        output.line(f" {path.ljust(width)} | {_stat(output, change, lines, most)}")
    added, removed = (sum(pair[side] for pair in counts) for side in (0, 1))
    output.line(
        f" {count(len(rows), 'file')} changed, {count(added, 'insertion')}(+), "
        f"{count(removed, 'deletion')}(-)"
    )


def _stat(output: "Output", change: "Change", lines: "LineCounts", most: int) -> str:
    if lines.added is None or lines.removed is None:
        sizes = [entry.size if entry else 0 for entry in (change.old, change.new)]
        return f"Bin {sizes[0]} -> {sizes[1]} bytes"
    scale = min(1.0, _BAR / most) if most else 1.0
    plus, minus = (max(round(n * scale), 1) if n else 0 for n in (lines.added, lines.removed))
    number = str(lines.added + lines.removed).rjust(len(str(most)))
    bar = output.style("+" * plus, "green") + output.style("-" * minus, "red")
    return f"{number} {bar}".rstrip()
