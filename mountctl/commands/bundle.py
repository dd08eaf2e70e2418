"""`mountctl bundle`."""

from typing import TYPE_CHECKING

import click

from mountctl.command import SNAPSHOT, Group, pass_invocation
from mountctl.invocation import Invocation
from mountctl.streams import opened, refuse_terminal, written
from mountctl.text import count, short, size, visible

if TYPE_CHECKING:
    from engine.ids import SnapshotId
    from mountctl.access import StoreAccess


@click.group(
    "bundle",
    cls=Group,
    example="""
    $ mountctl bundle create lua.flpkg main
    $ mountctl bundle apply lua.flpkg
    $ mountctl bundle create - | ssh other mountctl bundle apply -
    """,
)
def command() -> None:
    """Snapshots as one file, whole or what another store lacks.

    A bundle (.flpkg) carries snapshots with all that they are made of, as the store keeps it.
    """


def _ids_in(path: str) -> list[str]:
    """Returns the ids that a file lists: one a line, or as `--json` of a command has them."""
    import json

    with opened(path) as stream:
        text = stream.read().decode("utf-8", "replace")
    if not text.lstrip().startswith("["):
        return text.split()
    try:
        listed = json.loads(text)
        return [str(each["snapshot"]) for each in listed]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise click.UsageError(f"{path} is no list of snapshots") from None


def _had(store: "StoreAccess", names: tuple[str, ...], path: str | None) -> "list[SnapshotId]":
    """Returns the snapshots that the receiver has, of those that are here too."""
    from engine.errors import NotFoundError

    have = [store.resolve(name) for name in names]
    for name in _ids_in(path) if path is not None else ():
        try:
            have.append(store.repository.resolve(name))
        except NotFoundError:
            continue  # the receiver has more than this store
    return have


_FILE = click.argument("file", metavar="FILE", type=click.Path(), help="The bundle; - is a pipe.")


@command.command(
    "create",
    example="""
    $ mountctl bundle create lua.flpkg main
    $ mountctl bundle create new.flpkg @work --have main
    $ ssh other mountctl snapshot list --json > theirs
    $ mountctl bundle create - --have-file theirs | ssh other mountctl bundle apply -
    """,
)
@_FILE
@click.argument(
    "snapshots", nargs=-1, type=SNAPSHOT, metavar="[SNAPSHOT]...",
    help="What to carry; else all snapshots. @SESSION is what it stands on.",
)  # fmt: skip
@click.option(
    "--have", type=SNAPSHOT, multiple=True,
    help="Leave out what this one is made of: the receiver has it. Repeatable.",
)  # fmt: skip
@click.option(
    "--have-file", metavar="FILE", type=click.Path(),
    help="The same for all ids in a file: one a line, or `snapshot list --json`.",
)  # fmt: skip
@click.option("--history", is_flag=True, help="Carry what SNAPSHOT came from, too.")
@pass_invocation
def create(
    invocation: Invocation,
    file: str,
    snapshots: tuple[str, ...],
    have: tuple[str, ...],
    have_file: str | None,
    history: bool,
) -> None:
    """Write snapshots to a file or a pipe.

    The refs that name them go along. FILE appears when all of it is written, or not at all.
    """
    refuse_terminal(file)
    output = invocation.output
    with invocation.open() as store:
        wanted = [store.resolve(name) for name in snapshots] if snapshots else None
        base = _had(store, have, have_file)
        with written(file) as out, output.progress("writing", "objects") as progress:
            report = store.repository.create_bundle(
                out, wanted, have=base, history=history, progress=progress
            )
    if output.json:
        fields = {
            "snapshots": report.snapshots, "have": report.have, "refs": report.refs,
            "chunks": report.chunks, "nodes": report.nodes, "bytes": report.bytes,
        }  # fmt: skip
        if file == "-":
            output.last("bundle", fields)
        else:
            output.result(fields)
        return
    output.note(
        f"{count(len(report.snapshots), 'snapshot')}, {count(report.chunks, 'chunk')}, "
        f"{count(report.nodes, 'node')}: {size(report.bytes)}"
    )


@command.command("inspect", example="$ mountctl bundle inspect lua.flpkg")
@_FILE
@pass_invocation
def inspect(invocation: Invocation, file: str) -> None:
    """Show what a bundle carries, and check that it is sound; needs no store."""
    from engine.archives.bundle_inspecting import inspect_bundle

    output = invocation.output
    with opened(file) as stream, output.progress("reading", "objects") as progress:
        found = inspect_bundle(stream, progress)
    refs: dict[bytes, list[str]] = {}
    for name, target in found.manifest.refs:
        refs.setdefault(target, []).append(name)
    if output.json:
        output.result(
            {
                "snapshots": [
                    {
                        "snapshot": identifier, "refs": refs.get(identifier, []),
                        "parents": record.parents, "time_ns": record.time_ns,
                        "entries": record.root.totals.entries if record.root.totals else 0,
                        "bytes": record.root.size, "message": record.message,
                        "metadata": record.metadata,
                    }
                    for identifier, record in found.snapshots.items()
                ],
                "have": found.manifest.have,
                "refs": dict(found.manifest.refs),
                "chunks": found.manifest.counts.chunks,
                "nodes": found.manifest.counts.nodes,
                "bytes": found.bytes,
            }
        )  # fmt: skip
        return
    output.table(
        ("SNAPSHOT", "ENTRIES", "SIZE", "REFS", "MESSAGE"),
        [
            (
                output.style(short(identifier), "yellow"),
                f"{record.root.totals.entries if record.root.totals else 0:,}",
                size(record.root.size),
                output.style(" ".join(refs.get(identifier, [])), "green"),
                visible(record.message.partition("\n")[0][:60]),
            )
            for identifier, record in found.snapshots.items()
        ],
    )
    counts = found.manifest.counts
    output.note(
        f"{count(counts.snapshots, 'snapshot')}, {count(counts.chunks, 'chunk')}, "
        f"{count(counts.nodes, 'node')}: {size(found.bytes)}"
    )
    if found.manifest.have:
        names = " ".join(short(each) for each in found.manifest.have[:8])
        output.note(f"builds on {count(len(found.manifest.have), 'snapshot')}: {names}")


@command.command(
    "apply",
    example="""
    $ mountctl bundle apply lua.flpkg
    $ ssh other mountctl bundle create - main | mountctl bundle apply -
    """,
)
@_FILE
@click.option("--no-refs", is_flag=True, help="Make no refs.")
@click.option("--move-refs", is_flag=True, help="Move refs that name another snapshot here.")
@click.option("--set-id", is_flag=True, help="Take files with set-id bits, too.")
@pass_invocation
def apply(invocation: Invocation, file: str, no_refs: bool, move_refs: bool, set_id: bool) -> None:
    """Store what a bundle carries.

    Writes the ids of its snapshots. Each object is checked as it comes; snapshots and refs
    appear together when all is there, or not at all. What has come of a bundle that was cut
    short is kept until the next `gc`, so that applying it again goes on from there. A ref that
    names another snapshot here is left, with a warning. A bundle with a file that has a
    set-user-ID or set-group-ID bit is refused unless you ask for it.
    """
    if no_refs and move_refs:
        raise click.UsageError("--no-refs and --move-refs exclude each other")
    output = invocation.output
    with invocation.open() as store:
        with opened(file) as stream, output.progress("storing", "objects") as progress:
            report = store.repository.apply_bundle(
                stream, take_refs=not no_refs, move_refs=move_refs, set_id=set_id,
                progress=progress,
            )  # fmt: skip
        store.refresh()
    if output.json:
        output.result(
            {
                "snapshots": report.snapshots,
                "new_snapshots": report.new_snapshots,
                "refs": report.refs,
                "kept_refs": report.kept_refs,
                "new_chunks": report.new_chunks,
                "new_nodes": report.new_nodes,
                "known_objects": report.known_objects,
                "new_bytes": report.new_bytes,
                "bytes": report.bytes,
            }
        )
        return
    for name, target in report.kept_refs.items():
        output.warning(
            f"ref {name} names another snapshot here and was left; "
            f"`mountctl ref set {name} {short(target)}` moves it"
        )
    for identifier in report.snapshots:
        output.line(output.style(short(identifier), "yellow"))
    output.note(
        f"{count(len(report.new_snapshots), 'new snapshot')}; stored "
        f"{size(report.new_bytes)} of {size(report.bytes)}"
    )
