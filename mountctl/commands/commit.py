"""`mountctl commit`."""

import os
from typing import Any

import click

from mountctl.command import REF, TEXT, Command, metadata_option, pass_invocation, session_argument
from mountctl.invocation import Invocation
from mountctl.moved_refs import RefBefore
from mountctl.text import count, lost_owners, not_kept, short, size


@click.command(
    "commit",
    cls=Command,
    example="""
    $ mountctl commit work -m "built" --ref main
    $ mountctl commit --from ~/src/lua -m "edited by hand"
    $ mountctl commit work --meta model=m1 --meta score:=0.75
    """,
)
@session_argument(required=False)
@click.option("--from", "directory", metavar="DIR", type=click.Path(), help="Commit a checkout.")
@click.option("--message", "-m", type=TEXT, default="", help="Say what the snapshot is.")
@click.option("--ref", metavar="NAME", type=REF, help="Make or move a ref to the snapshot.")
@metadata_option()
@pass_invocation
def command(
    invocation: Invocation,
    session: str | None,
    directory: str | None,
    message: str,
    ref: str | None,
    metadata: dict[str, Any] | None,
) -> None:
    """Store what a session changed as a snapshot.

    Writes the snapshot's id; a mount shows it at once. The session goes on from it. If it has
    changed nothing, the snapshot is the one that it stands on. With --from the same is done for
    a directory that `mountctl checkout` has made.
    """
    output = invocation.output
    if (session is None) == (directory is None):
        raise click.UsageError("give SESSION or --from DIR")
    if directory is not None:
        _commit_checkout(invocation, directory, message, ref, metadata)
        return
    assert session is not None
    with invocation.open() as store:
        before = RefBefore(store, ref)
        report = store.commit(session, message, ref, metadata)
    warnings = [*report.warnings, *([] if report.changed else not_kept(message, metadata))]
    if output.json:
        output.result(
            {
                "snapshot": report.snapshot,
                "changed": report.changed,
                "session": session,
                "ref": ref,
                "ref_was": before.target,
                "new_bytes": report.new_bytes,
                "warnings": warnings,
                "lost": report.lost,
                "lost_owners": report.lost_owners,
            }
        )
        return
    output.warnings(warnings)
    if report.lost_owners:
        output.warning(f"{lost_owners(report.lost_owners)}; @{session} does")
    output.line(output.style(short(report.snapshot), "yellow"))
    if report.changed:
        stored = f"stored {size(report.new_bytes)}; " if report.new_bytes else ""
        output.note(f"{stored}@{session} goes on from this snapshot")
    else:
        output.note(f"nothing has changed in @{session}: the snapshot is the one it stands on")
    before.tell(output, report.snapshot)


def _commit_checkout(
    invocation: Invocation, directory: str, message: str, ref: str | None,
    metadata: dict[str, Any] | None,
) -> None:  # fmt: skip
    output = invocation.output
    with invocation.open() as store:
        before = RefBefore(store, ref)
        with output.progress("reading files") as progress:
            result = store.repository.checkouts.commit(
                directory, message=message, metadata=metadata, ref=ref, progress=progress
            )
        store.refresh()
    warnings = [*result.report.warnings, *([] if result.changed else not_kept(message, metadata))]
    if output.json:
        output.result(
            {
                "snapshot": result.snapshot,
                "changed": result.changed,
                "directory": os.path.realpath(directory),
                "ref": ref,
                "ref_was": before.target,
                "new_bytes": result.report.new_bytes,
                "warnings": warnings,
                "lost": result.report.lost,
                "lost_owners": result.report.lost_owners,
            }
        )
        return
    output.warnings(warnings)
    if result.report.lost_owners:
        output.warning(lost_owners(result.report.lost_owners))
    output.line(output.style(short(result.snapshot), "yellow"))
    read = count(result.report.read_files, "file")
    if result.changed:
        output.note(f"read {read}, stored {size(result.report.new_bytes)}")
    else:
        output.note("nothing has changed: the snapshot is the one that the directory shows")
    before.tell(output, result.snapshot)
