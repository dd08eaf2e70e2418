"""`mountctl checkout`."""

import os
from typing import Any

import click

from engine.errors import NotFoundError
from engine.ids import SnapshotId
from engine.plain.checkouts import Checkout
from engine.plain.local_edits import Edit
from engine.storage.nodes import Entry, Kind
from engine.trees.directory import find
from mountctl.access import StoreAccess
from mountctl.changes import LETTERS, warn_of_set_id
from mountctl.command import Command, pass_invocation
from mountctl.invocation import Invocation
from mountctl.text import count, path_fields, quoted, short, size


@click.command(
    "checkout",
    cls=Command,
    example="""
    $ mountctl checkout main /tmp/lua
    $ mountctl checkout @work /tmp/work
    $ mountctl checkout main:src/lib /tmp/lib
    $ mountctl checkout --switch built /tmp/lua
    $ mountctl checkout --status /tmp/lua
    $ mountctl checkout --list
    """,
)
@click.argument(
    "snapshot", metavar="SNAPSHOT[:PATH]", required=False,
    help="An id, the beginning of one, a ref, or @SESSION; all of it, or what is at PATH in it.",
)  # fmt: skip
@click.argument(
    "directory", metavar="DIR", type=click.Path(), required=False,
    help="A new or empty directory, or with --switch and --status a checkout.",
)  # fmt: skip
@click.option("--switch", is_flag=True, help="Make the checkout DIR show another snapshot.")
@click.option("--status", is_flag=True, help="List what was changed in the checkout DIR.")
@click.option("--list", "listing", is_flag=True, help="List the checkouts of the store.")
@click.option("--keep", is_flag=True, help="With --switch: leave edits that are in the way.")
@click.option("--force", is_flag=True, help="With --switch: overwrite edits in the way.")
@click.option("--outside-links", is_flag=True, help="Make links that lead out of the tree, too.")
@click.option("--set-id", is_flag=True, help="Write set-id bits, too, where the files are root's.")
@pass_invocation
def command(
    invocation: Invocation,
    snapshot: str | None,
    directory: str | None,
    switch: bool,
    status: bool,
    listing: bool,
    keep: bool,
    force: bool,
    outside_links: bool,
    set_id: bool,
) -> None:
    """Write a snapshot out as a real directory.

    DIR appears when all of it is written, or not at all. A tree with a symbolic link that
    leads out of it is refused unless you allow it. @SESSION is written as it is now. Written by
    root, files lose set-user-ID and set-group-ID bits unless you ask for them.

    --switch changes an existing checkout to another snapshot and touches only what differs;
    if that would overwrite what you have edited, it changes nothing and lists it. A switch that
    was killed is ended by the same command. --status lists all edits; `mountctl commit --from
    DIR` stores them. --list lists the checkouts that are still where they were made.
    """
    if sum((switch, status, listing)) > 1:
        raise click.UsageError("--switch, --status and --list exclude each other")
    if status and (snapshot is None or directory is not None):
        raise click.UsageError("--status takes DIR alone")
    if listing and snapshot is not None:
        raise click.UsageError("--list takes no arguments")
    if (keep or force) and (not switch or (keep and force)):
        raise click.UsageError("--keep or --force goes with --switch")
    if outside_links and (status or listing):
        raise click.UsageError("--outside-links is for what writes a tree")
    if not status and not listing and directory is None:
        raise click.UsageError("give SNAPSHOT and DIR")
    with invocation.open() as store:
        if snapshot is None:
            _list(invocation, store)
        elif directory is None:
            _status(invocation, store, snapshot)
        elif switch:
            edits = "keep" if keep else "overwrite" if force else "refuse"
            _switch(invocation, store, snapshot, directory, edits, outside_links, set_id)
        else:
            _make(invocation, store, snapshot, directory, outside_links, set_id)


def _split(text: str) -> tuple[str, bytes]:
    name, _, within = text.partition(":")
    return name, os.fsencode(within).strip(b"/")


def _within(store: StoreAccess, root: Entry, within: bytes, text: str) -> Entry:
    entry = find(store.repository.objects, root, within)
    if entry is None:
        raise NotFoundError("path in a snapshot", text)
    return entry


def _origin(store: StoreAccess, name: str) -> tuple[SnapshotId | None, SnapshotId | None]:
    """Returns the snapshot whose tree it is, and what the session stands on whose tree it is."""
    found = store.repository.resolve(name)
    return (None, found) if name.startswith("@") else (found, None)


def _make(
    invocation: Invocation, store: StoreAccess, text: str, directory: str, outside_links: bool,
    set_id: bool,
) -> None:  # fmt: skip
    output = invocation.output
    name, within = _split(text)
    with (
        store.tree(name) as root,
        output.progress("writing files", in_bytes=True) as progress,
    ):
        snapshot, base = _origin(store, name)
        report = store.repository.check_out(
            _within(store, root, within, text), directory, snapshot=snapshot, base=base,
            within=within, outside_links=outside_links, set_id=set_id, progress=progress,
        )  # fmt: skip
    path = os.path.abspath(directory)
    if output.json:
        output.result(
            {
                "directory": path,
                "entries": report.entries,
                "bytes": report.bytes,
                "tracked": report.tracked,
                "set_id_dropped": report.set_id_dropped,
            }
        )
        return
    output.line(quoted(path))
    warn_of_set_id(output, report.set_id_dropped)
    output.note(f"wrote {count(report.entries, 'entry')}, {size(report.bytes)}")
    if not report.tracked and os.path.isdir(path):
        output.warning("the disk has no extended attributes: it cannot be switched or committed")


def _switch(
    invocation: Invocation, store: StoreAccess, text: str, directory: str, edits: Any,
    outside_links: bool, set_id: bool,
) -> None:  # fmt: skip
    output, checkouts = invocation.output, store.repository.checkouts
    name, colon, path = text.partition(":")
    within = os.fsencode(path).strip(b"/") if colon else checkouts.find(directory).within
    with (
        store.tree(name) as root,
        output.progress("writing files", in_bytes=True) as progress,
    ):
        entry = _within(store, root, within, f"{name}:{os.fsdecode(within)}")
        if entry.kind != Kind.DIRECTORY:
            raise click.UsageError("a checkout of a directory can only become one of a directory")
        snapshot, base = _origin(store, name)
        report = checkouts.switch(
            directory, entry, snapshot=snapshot, base=base, within=within, edits=edits,
            outside_links=outside_links, set_id=set_id, progress=progress,
        )  # fmt: skip
    if output.json:
        output.result(
            {
                **_fields(checkouts.find(directory)),
                "written": report.written,
                "removed": report.removed,
                "bytes": report.bytes,
                "kept": [_edit_fields(edit) for edit in report.kept],
                "set_id_dropped": report.set_id_dropped,
                "overwritten": [_edit_fields(edit) for edit in report.overwritten],
            }
        )
        return
    warn_of_set_id(output, report.set_id_dropped)
    for edit in report.kept:
        output.line(f"{LETTERS[edit.kind]} {quoted(edit.path or b'.')}")
    output.note(
        f"wrote {count(report.written, 'entry')}, {size(report.bytes)}; "
        f"removed {count(report.removed, 'entry')}"
        + (f"; kept {count(len(report.kept), 'edit')}" if report.kept else "")
        + (f"; overwrote {count(len(report.overwritten), 'edit')}" if report.overwritten else "")
    )


def _status(invocation: Invocation, store: StoreAccess, directory: str) -> None:
    output, checkouts = invocation.output, store.repository.checkouts
    known = checkouts.find(directory)
    edits = checkouts.status(directory)
    if output.json:
        output.result({**_fields(known), "edits": [_edit_fields(edit) for edit in edits]})
        return
    for edit in edits:
        output.line(f"{LETTERS[edit.kind]} {quoted(edit.path or b'.')}")
    if known.interrupted:
        output.warning("a switch was interrupted: give the same `checkout --switch` again")
    output.note(f"{count(len(edits), 'edit')} since {_shown(known)}")


def _shown(known: Checkout) -> str:
    if known.snapshot is not None:
        return short(known.snapshot)
    return "a session's tree" + (f" on {short(known.base)}" if known.base is not None else "")


def _list(invocation: Invocation, store: StoreAccess) -> None:
    output, found = invocation.output, store.repository.checkouts.all()
    if output.json:
        output.result([_fields(known) for known in found])
        return
    output.table(
        ("DIRECTORY", "SHOWS", "PATH"),
        [(quoted(known.path), _shown(known), quoted(known.within) or ".") for known in found],
    )
    if not found:
        output.note("there are none: `mountctl checkout SNAPSHOT DIR` makes one")


def _fields(known: Checkout) -> dict[str, Any]:
    return {
        "directory": known.path,
        "snapshot": known.snapshot,
        "base": known.base,
        "within": os.fsdecode(known.within),
        "interrupted": known.interrupted,
    }


def _edit_fields(edit: Edit) -> dict[str, str]:
    return {**path_fields(edit.path), "change": edit.kind.value}
