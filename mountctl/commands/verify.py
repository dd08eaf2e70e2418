"""`mountctl verify`."""

import click

from mountctl.command import DIRECTORY, Command, pass_invocation
from mountctl.failures import FOUND
from mountctl.invocation import Invocation
from mountctl.text import count, path_fields, quoted, size, visible


@click.command(
    "verify",
    cls=Command,
    example="""
    $ mountctl verify
    $ mountctl verify --json | jq '.damage[].path'
    $ mountctl verify --repair --from /backup/store
    $ mountctl verify --repair --from ~/src/lua
    """,
)
@click.option("--repair", is_flag=True, help="Put right what can be; drop damage nobody needs.")
@click.option(
    "--from", "source", type=DIRECTORY, metavar="DIR",
    help="Where the bytes still are: another store, or a directory that was imported.",
)  # fmt: skip
@click.pass_context
@pass_invocation
def command(
    invocation: Invocation, context: click.Context, repair: bool, source: str | None
) -> None:
    """Read everything and name what is damaged.

    Writes one line for each damaged path of each snapshot and session, and ends with exit code
    1 if there is any. What is not named is whole. With --repair, what is damaged afterwards.
    """
    if source is not None and not repair:
        raise click.UsageError("--from goes with --repair")
    output = invocation.output
    repaired = dropped = 0
    with invocation.open() as store, output.progress("reading", "chunks") as progress:
        if repair:
            trusted = source is not None and invocation.trusts(source)
            done = store.repository.repair(source, progress, trusted=trusted)
            report, repaired, dropped = done.left, done.repaired, done.dropped
        else:
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
                "repaired": repaired,
                "dropped": dropped,
                "damage": [
                    {"where": damage.where or None, **path_fields(damage.path),
                     "problem": damage.problem, "kind": damage.kind or None,
                     "id": damage.identifier if damage.kind in _OBJECTS else None}
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
        if repair:
            output.note(f"repaired {count(repaired, 'object')}, dropped {dropped:,}")
        output.note(
            f"read {count(report.chunks, 'chunk')} and {count(report.nodes, 'node')} of "
            f"{count(report.snapshots, 'snapshot')}, {size(report.bytes)}: "
            + (f"{len(report.damage):,} damaged" if report.damage else "all whole")
        )
        if report.damage:
            output.note(
                "what is not named is whole; `mountctl verify --repair --from DIR` takes what is "
                "missing from another store, or from a directory that holds the same bytes"
            )
    if report.damage:
        context.exit(FOUND)


_OBJECTS = {"chunk", "node", "snapshot"}
