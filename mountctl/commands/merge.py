"""`mountctl merge`."""

from typing import TYPE_CHECKING

import click

from mountctl.command import REF, SNAPSHOT, TEXT, Command, pass_invocation, snapshot_argument
from mountctl.failures import CONFLICTS
from mountctl.invocation import Invocation
from mountctl.moved_refs import RefBefore
from mountctl.text import count, not_kept, path_fields, quoted, short

if TYPE_CHECKING:
    from engine.merging.conflicts import Conflict
    from engine.merging.snapshot_merging import MergeReport
    from mountctl.output import Output


@click.command(
    "merge",
    cls=Command,
    example="""
    $ mountctl merge main try-1 --ref main -m "the first try"
    $ mountctl merge main try-2 --favor theirs
    $ mountctl merge main try-3 --write-conflicts --ref to-be-settled
    """,
)
@snapshot_argument("ours", help="A snapshot: an id, the beginning of one, a ref, or @SESSION.")
@snapshot_argument("theirs", help="What is merged into it.")
@click.option("--base", type=SNAPSHOT, help="Compare both with this one.")
@click.option("--ref", metavar="NAME", type=REF, help="Make or move a ref to the snapshot.")
@click.option("--message", "-m", type=TEXT, default="", help="Say what the snapshot is.")
@click.option("--favor", type=click.Choice(["ours", "theirs", "union"]),
              help="Settle conflicts with a side, or in texts with both.")  # fmt: skip
@click.option("--write-conflicts", is_flag=True,
              help="Make the snapshot all the same, with conflicts marked in it.")  # fmt: skip
@click.option("--diff3", is_flag=True, help="Mark conflicts with the base's lines too.")
@click.option("--no-ff", is_flag=True, help="Make a snapshot even if OURS has changed nothing.")
@click.option("--no-renames", is_flag=True, help="Do not follow files that were moved.")
@click.pass_context
@pass_invocation
def command(
    invocation: Invocation,
    context: click.Context,
    ours: str,
    theirs: str,
    base: str | None,
    ref: str | None,
    message: str,
    favor: str | None,
    write_conflicts: bool,
    diff3: bool,
    no_ff: bool,
    no_renames: bool,
) -> None:
    """Make one snapshot of two, with both as parents.

    Compares both with what they came from. Writes the snapshot's id. Where both changed the
    same lines, or one removed what the other changed, there are conflicts: these are listed, no
    snapshot is made, and the exit code is 12. With --write-conflicts the snapshot is made, and
    the exit code is 12 as well.
    """
    from engine.merging.text_merging import Favor, Style

    if diff3 and not write_conflicts:
        raise click.UsageError("--diff3 goes with --write-conflicts")
    output = invocation.output
    with invocation.open() as store:
        before = RefBefore(store, ref)
        report = store.repository.merge(
            store.resolve(ours), store.resolve(theirs),
            base=None if base is None else store.resolve(base), ref=ref, message=message,
            favor=None if favor is None else Favor(favor),
            style=Style.DIFF3 if diff3 else Style.MERGE, write_conflicts=write_conflicts,
            fast_forward=not no_ff, renames=not no_renames,
        )  # fmt: skip
        if report.snapshot is not None:
            store.refresh()
    warnings = _warnings(report, message)
    if output.json:
        output.result({**_fields(report, ref, before), "warnings": warnings})
    else:
        output.warnings(warnings)
        _show(output, report, ours, theirs)
        if report.snapshot is not None:
            before.tell(output, report.snapshot)
    if report.conflicts:
        context.exit(CONFLICTS)


def _fields(report: "MergeReport", ref: str | None, before: RefBefore) -> dict[str, object]:
    from engine.merging.conflicts import conflict_fields

    return {
        "outcome": report.outcome.value,
        "snapshot": report.snapshot,
        "ref": ref if report.snapshot is not None else None,
        "ref_was": before.target if report.snapshot is not None else None,
        "bases": report.bases,
        "conflicts": [conflict_fields(conflict) for conflict in report.conflicts],
        "merged_texts": [path_fields(path) for path in report.merged_texts],
    }


def _warnings(report: "MergeReport", message: str) -> list[str]:
    from engine.merging.snapshot_merging import Outcome

    warnings = []
    if report.renames_limited:
        warnings.append(
            "too many files were added and removed to find out which were moved and changed; "
            "changes to such files stay where these were"
        )
    if report.outcome in {Outcome.FAST_FORWARD, Outcome.ALREADY_MERGED}:
        warnings += not_kept(message)
    return warnings


def _show(output: "Output", report: "MergeReport", ours: str, theirs: str) -> None:
    from engine.merging.snapshot_merging import Outcome

    if report.snapshot is None:
        for conflict in report.conflicts:
            output.line(_conflict_text(output, conflict))
        output.note(
            f"{count(len(report.conflicts), 'conflict')}: no snapshot was made; "
            "--favor settles them, --write-conflicts makes a snapshot that has them marked"
        )
        return
    output.line(output.style(short(report.snapshot), "yellow"))
    if report.outcome == Outcome.FAST_FORWARD:
        output.note(f"{theirs} came from {ours}: fast forward, no snapshot was made")
    elif report.outcome == Outcome.ALREADY_MERGED:
        output.note(f"{ours} has {theirs} in it already: no snapshot was made")
    else:
        lines = f", {count(len(report.merged_texts), 'file')} by lines"
        output.note(f"merged{lines if report.merged_texts else ''}")
    if len(report.bases) > 1:
        output.note(f"they met {count(len(report.bases), 'time')}; compared with the latest")
    output.warnings(
        [f"conflict: {_conflict_text(output, conflict)}" for conflict in report.conflicts]
    )


def _conflict_text(output: "Output", conflict: "Conflict") -> str:
    text = f"{conflict.kind.value} {quoted(conflict.path)}"
    places = zip(("base", "ours", "theirs"), conflict.paths, strict=True)
    moved = [f"{side} {quoted(path)}" for side, path in places if path != conflict.path]
    return f"{text} ({', '.join(moved)})" if moved else text
