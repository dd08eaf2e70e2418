"""`mountctl gc`."""

import click

from mountctl.command import Command, pass_invocation
from mountctl.invocation import Invocation
from mountctl.text import count, size


@click.command(
    "gc",
    cls=Command,
    example="""
    $ mountctl snapshot rm 4f1a
    $ mountctl gc --dry-run
    $ mountctl gc
    """,
)
@click.option("--dry-run", is_flag=True, help="Tell what would go, and remove nothing.")
@pass_invocation
def command(invocation: Invocation, dry_run: bool) -> None:
    """Remove what nothing refers to any more.

    Every snapshot keeps its tree, and every session its base, whether a ref names it or not.
    The room is used again by the store; its file does not become smaller.
    """
    output = invocation.output
    with invocation.open() as store:
        report = store.repository.collect(dry_run=dry_run)
    if output.json:
        output.result(
            {
                "dry_run": dry_run,
                "chunks": report.chunks,
                "nodes": report.nodes,
                "bytes": report.bytes,
                "kept_chunks": report.kept_chunks,
                "kept_nodes": report.kept_nodes,
                "session_directories": report.session_directories,
            }
        )
        return
    output.line(
        f"{'would remove' if dry_run else 'removed'} {count(report.chunks, 'chunk')} and "
        f"{count(report.nodes, 'node')}, {size(report.bytes)}"
    )
    output.note(f"kept {count(report.kept_chunks, 'chunk')} and {count(report.kept_nodes, 'node')}")
