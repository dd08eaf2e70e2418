"""`mountctl gc`."""

import click

from mountctl.command import SNAPSHOT, Command, pass_invocation
from mountctl.invocation import Invocation
from mountctl.output import Output
from mountctl.text import count, path_fields, quoted, short, size, visible

_MOST_ROWS = 20


@click.command(
    "gc",
    cls=Command,
    example="""
    $ mountctl snapshot rm 4f1a
    $ mountctl gc --dry-run
    $ mountctl gc --compact
    $ mountctl gc --why main:src/main.c
    """,
)
@click.option("--dry-run", is_flag=True, help="Tell what would go, and remove nothing.")
@click.option("--compact", is_flag=True, help="Then make the store's file smaller.")
@click.option(
    "--why", metavar="ID", type=SNAPSHOT,
    help="Tell what keeps an object, by its id, the beginning of one, or SNAPSHOT:PATH.",
)  # fmt: skip
@pass_invocation
def command(invocation: Invocation, dry_run: bool, compact: bool, why: str | None) -> None:
    """Remove what nothing refers to any more.

    Every snapshot keeps its tree, every session its base, and every checkout what it shows,
    whether a ref names it or not. Imports, commits and mounts go on meanwhile. The room is used
    again by the store; with --compact the disk gets it back, also a full one. What killed
    daemons of the store left mounted is unmounted.
    """
    if sum((dry_run, compact, why is not None)) > 1:
        raise click.UsageError("--dry-run, --compact and --why exclude each other")
    output = invocation.output
    if why is not None:
        _explain(invocation, why)
        return
    with invocation.open() as store:
        if not dry_run:
            from mountctl.mounts import tidy

            tidy(store.repository.path, output)
        with output.progress("collecting", "objects") as progress:
            report = store.repository.collect(dry_run=dry_run, progress=progress)
        sizes = None
        if compact:
            with output.progress("compacting"):
                sizes = store.compact()
    if output.json:
        fields = {
            "dry_run": dry_run,
            "chunks": report.chunks,
            "nodes": report.nodes,
            "bytes": report.bytes,
            "kept_chunks": report.kept_chunks,
            "kept_nodes": report.kept_nodes,
            "session_directories": report.session_directories,
            "complete": not report.ended_early,
        }
        if sizes is not None:
            fields |= {"file_bytes_before": sizes[0], "file_bytes": sizes[1]}
        output.result(fields)
    else:
        output.line(
            f"{'would remove' if dry_run else 'removed'} {count(report.chunks, 'chunk')} and "
            f"{count(report.nodes, 'node')}, {size(report.bytes)}"
        )
        output.note(
            f"kept {count(report.kept_chunks, 'chunk')} and {count(report.kept_nodes, 'node')}"
        )
        if sizes is not None:
            output.line(f"the store's file had {size(sizes[0])} and has {size(sizes[1])}")
    if report.ended_early:
        output.warning(f"not all of it: {report.ended_early}; run it again when that has ended")


def _explain(invocation: Invocation, why: str) -> None:
    output = invocation.output
    with invocation.open() as store:
        target = store.repository.object_named(why)
        found = list(store.repository.holders(target))
    if output.json:
        output.result(
            {
                "kind": target.kind,
                "id": target.identifier,
                "holders": [
                    {"kind": holder.kind, "name": holder.name, **path_fields(holder.path)}
                    for holder in found
                ],
            }
        )
        return
    output.line(f"{target.kind} {target.identifier.hex()}")
    rows: list[tuple[str, str, str]] = []
    for kind in dict.fromkeys(holder.kind for holder in found):
        alike = [holder for holder in found if holder.kind == kind]
        rows.extend(
            (kind, _name(kind, holder.name), quoted(holder.path) or ".")
            for holder in alike[:_MOST_ROWS]
        )
        if len(alike) > _MOST_ROWS:
            rows.append((kind, f"and {len(alike) - _MOST_ROWS:,} more", "-"))
    output.table(("KEPT BY", "NAME", "PATH"), rows)
    _remark(output, target.kind, bool(rows))


def _name(kind: str, name: str) -> str:
    return short(bytes.fromhex(name)) if kind in {"snapshot", "workspace"} else visible(name)


def _remark(output: Output, kind: str, held: bool) -> None:
    if kind == "snapshot":
        output.note("a snapshot stays until `mountctl snapshot rm`")
    elif not held:
        output.note("nothing keeps it: `mountctl gc` removes it")
