"""`mountctl commit`."""

from typing import Any

import click

from mountctl.command import TEXT, Command, metadata_option, pass_invocation, session_argument
from mountctl.invocation import Invocation
from mountctl.text import short, size


@click.command(
    "commit",
    cls=Command,
    example="""
    $ mountctl commit work -m "built" --ref main
    $ mountctl commit work --meta model=m1 --meta score:=0.75
    """,
)
@session_argument()
@click.option("--message", "-m", type=TEXT, default="", help="Say what the snapshot is.")
@click.option("--ref", metavar="NAME", type=TEXT, help="Make or move a ref to the snapshot.")
@metadata_option()
@pass_invocation
def command(
    invocation: Invocation, session: str, message: str, ref: str | None, metadata: dict[str, Any]
) -> None:
    """Store what a session changed as a snapshot.

    Writes the snapshot's id; a mount shows it at once. The session goes on from it. If it has
    changed nothing, the snapshot is the one that it stands on.
    """
    output = invocation.output
    with invocation.open() as store:
        report = store.commit(session, message, ref, metadata)
    if output.json:
        output.result(
            {
                "snapshot": report.snapshot,
                "changed": report.changed,
                "session": session,
                "ref": ref,
                "new_bytes": report.new_bytes,
                "warnings": report.warnings,
            }
        )
        return
    output.warnings(report.warnings)
    output.line(output.style(short(report.snapshot), "yellow"))
    if report.changed:
        stored = f"stored {size(report.new_bytes)}; " if report.new_bytes else ""
        output.note(f"{stored}@{session} goes on from this snapshot")
    else:
        output.note(f"nothing has changed in @{session}: the snapshot is the one it stands on")
