"""`mountctl verify`."""

from typing import TYPE_CHECKING

import click

from mountctl.command import DIRECTORY, Command, pass_invocation
from mountctl.failures import DAMAGED
from mountctl.invocation import Invocation
from mountctl.output import Output
from mountctl.text import count, path_fields, quoted, size, visible

if TYPE_CHECKING:
    from engine.upkeep.salvaging import Salvage


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
    9 if there is any. What is not named is whole. With --repair, what is damaged afterwards;
    the frame of a damaged file is made anew from its pages, and the damaged file kept.
    """
    from engine.upkeep.inspecting import repair_store, verify_store

    if source is not None and not repair:
        raise click.UsageError("--from goes with --repair")
    output = invocation.output
    repaired = dropped = 0
    salvaged: Salvage | None = None
    path = invocation.store_path
    trusted = invocation.trusts(path)
    with output.progress("reading", "chunks") as progress:
        if repair:
            trusts_source = source is not None and invocation.trusts(source)
            done, salvaged = repair_store(
                path, source, progress, trusted=trusted, trusts_source=trusts_source
            )
            report, repaired, dropped = done.left, done.repaired, done.dropped
        else:
            report = verify_store(path, progress, trusted=trusted)
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
                "salvaged": None if salvaged is None else _fields(salvaged),
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
        if salvaged is not None:
            _tell(output, salvaged)
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
    if report.damage or (salvaged is not None and salvaged.lost):
        context.exit(DAMAGED)


def _fields(salvaged: "Salvage") -> dict[str, object]:
    """Returns what was salvaged, for --json."""
    return {
        "flaws": salvaged.flaws, "kept": salvaged.kept, "lost": salvaged.lost,
        "taken": salvaged.taken, "older": salvaged.older, "uppers": salvaged.uppers,
    }  # fmt: skip


def _tell(output: Output, salvaged: "Salvage") -> None:
    for flaw in salvaged.flaws:
        output.note(f"the store's file was damaged: {flaw}")
    output.note(f"the store's file was made anew; the damaged one is {salvaged.kept}")
    for name, number in salvaged.taken.items():
        output.note(f"{count(number, 'entry')} of {name!r} came from the other store")
    for name, number in salvaged.older.items():
        output.warning(
            f"{count(number, 'entry')} of {name!r} may be older than the last change of the store"
        )
    for name, number in salvaged.lost.items():
        output.warning(f"lost {count(number, 'entry')} or more of {name!r}")
    for path in salvaged.uppers:
        output.warning(f"what a session wrote whose record is lost is in {path}")


_OBJECTS = {"chunk", "node", "snapshot"}
