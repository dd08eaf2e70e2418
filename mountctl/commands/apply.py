"""`mountctl apply`."""

import sys
from pathlib import Path

import click

from mountctl.command import REF, SNAPSHOT, TEXT, Command, pass_invocation
from mountctl.invocation import Invocation
from mountctl.moved_refs import RefBefore
from mountctl.text import count, not_kept, path_fields, quoted, short


@click.command(
    "apply",
    cls=Command,
    example="""
    $ mountctl apply fix.patch --on main --ref main -m "fixed"
    $ git diff --binary | mountctl apply - --on main
    """,
)
@click.argument("patch", type=click.Path(exists=True, dir_okay=False, allow_dash=True),
                help="The patch; - is a pipe.")  # fmt: skip
@click.option("--on", "snapshot", required=True, type=SNAPSHOT,
              help="What to apply it to.")  # fmt: skip
@click.option("--ref", metavar="NAME", type=REF, help="Make or move a ref to the snapshot.")
@click.option("--message", "-m", type=TEXT, default="", help="Say what the snapshot is.")
@click.option("--strip", "-p", type=click.IntRange(0, 100), metavar="N",
              help="Take so many directories from the front of the patch's paths (1, or in plain "
              "diffs what fits).")  # fmt: skip
@click.option("--fuzz", type=click.IntRange(0, 10), default=0, metavar="N", show_default=True,
              help="Let so many lines differ at the ends of a hunk's context.")  # fmt: skip
@click.option("--set-id", is_flag=True, help="Let the patch give files set-id bits.")
@pass_invocation
def command(
    invocation: Invocation,
    patch: str,
    snapshot: str,
    ref: str | None,
    message: str,
    strip: int | None,
    fuzz: int,
    set_id: bool,
) -> None:
    """Make a snapshot of another one and a patch.

    Takes unified diffs, and git's with renames, modes and binary files. All of a patch is
    applied, or nothing is made. Writes the snapshot's id. Needs no mount.
    """
    output = invocation.output
    data = sys.stdin.buffer.read() if patch == "-" else Path(patch).read_bytes()
    with invocation.open() as store:
        before = RefBefore(store, ref)
        workspace = store.repository.workspace(store.resolve(snapshot))
        report = workspace.apply(data, strip=strip, fuzz=fuzz, set_id=set_id)
        made = workspace.commit(message, ref=ref)
        store.refresh()
    warnings = [f"not in the patch: {quoted(line)}" for line in report.left_out]
    if not made.changed:
        warnings += not_kept(message)
    if output.json:
        output.result(
            {
                "snapshot": made.snapshot,
                "changed": made.changed,
                "ref": ref,
                "ref_was": before.target,
                "paths": [path_fields(path) for path in report.paths],
                "moved_hunks": report.moved_hunks,
                "warnings": warnings,
            }
        )
        return
    output.warnings(warnings)
    output.line(output.style(short(made.snapshot), "yellow"))
    if made.changed:
        output.note(f"{count(len(report.paths), 'path')} changed")
    else:
        output.note("nothing has changed: the snapshot is the one that the patch was applied to")
    before.tell(output, made.snapshot)
    if report.moved_hunks:
        output.note(f"{count(report.moved_hunks, 'hunk')} fitted elsewhere than the patch says")
