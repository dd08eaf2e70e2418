"""`mountctl verify`."""

import click

from mountctl.command import Command, pass_invocation
from mountctl.failures import FOUND
from mountctl.invocation import Invocation
from mountctl.text import count, path_fields, quoted, size, visible


@click.command(
    "verify",
    cls=Command,
    example="""
    $ mountctl verify
    $ mountctl verify --json | jq '.damage[].path'
    """,
)
@click.pass_context
@pass_invocation
def command(invocation: Invocation, context: click.Context) -> None:
    """Read everything and name what is damaged.

    Writes one line for each damaged path of each snapshot and session, and ends with exit code
    1 if there is any. What is not named is whole.
    """
    output = invocation.output
    with invocation.open() as store, output.progress("reading chunks") as progress:
        report = store.repository.verify(progress)
    if output.json:
        output.result(
            {
                "ok": not report.damage,
                "chunks": report.chunks,
                "nodes": report.nodes,
                "snapshots": report.snapshots,
                "sessions": report.sessions,
                "steps": report.steps,
                "bytes": report.bytes,
                "damage": [
                    {"where": damage.where or None, **path_fields(damage.path),
                     "problem": damage.problem}
                    for damage in report.damage
                ],
            }
        )  # fmt: skip
    else:
        output.table(
            ("WHERE", "PATH", "PROBLEM"),
            [
                (
                    visible(where if (where := damage.where).startswith("@") else where[:12])
                    or "-",
                    quoted(damage.path) or ".",
                    visible(damage.problem),
                )
                for damage in report.damage
            ],
        )
        output.note(
            f"read {count(report.chunks, 'chunk')} and {count(report.nodes, 'node')} of "
            f"{count(report.snapshots, 'snapshot')}, {size(report.bytes)}: "
            + (f"{len(report.damage):,} damaged" if report.damage else "all whole")
        )
        if report.damage:
            output.note(
                "what is not named is whole; importing a directory that holds the same bytes "
                "with --no-cache stores again what is damaged"
            )
    if report.damage:
        context.exit(FOUND)
