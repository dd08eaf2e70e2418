"""`mountctl run`."""

import os
from typing import TYPE_CHECKING, Any

import click

from mountctl.command import TEXT, Command, pass_invocation, session_argument
from mountctl.invocation import Invocation
from mountctl.text import quoted, short

if TYPE_CHECKING:
    from fsdriver.running import Ended, Run
    from mountctl.access import StoreAccess
    from mountctl.output import Output


@click.command(
    "run",
    cls=Command,
    example="""
    $ mountctl run work -- make -j2
    $ mountctl run work --commit -m "tested" -- make check
    """,
)
@session_argument()
@click.argument(
    "command", nargs=-1, required=True, type=click.UNPROCESSED,
    metavar="-- COMMAND [ARG]...", help="The command, found as a shell finds it.",
)  # fmt: skip
@click.option("--overlay", is_flag=True, help="Fail where the kernel's overlayfs is not possible.")
@click.option("--lazy", is_flag=True, help="Run in the mount, without the kernel's overlayfs.")
@click.option(
    "--at", type=click.Path(exists=True, file_okay=False), metavar="DIR",
    help="Where the command sees the tree; else where the mount has it.",
)  # fmt: skip
@click.option("--commit", is_flag=True, help="Commit afterwards, if the command succeeded.")
@click.option("--commit-always", is_flag=True, help="Commit afterwards, whatever it did.")
@click.option("--message", "-m", type=TEXT, default="", help="Say what the snapshot is.")
@click.option("--ref", metavar="NAME", type=TEXT, help="Make or move a ref to the snapshot.")
@pass_invocation
def command(
    invocation: Invocation,
    session: str,
    command: tuple[str, ...],
    overlay: bool,
    lazy: bool,
    at: str | None,
    commit: bool,
    commit_always: bool,
    message: str,
    ref: str | None,
) -> int:
    """Run a command in a session under the kernel's overlayfs.

    The kernel's overlayfs shows the tree to the command and what it starts, and to nobody else,
    who find the session busy meanwhile. Where that is not possible the command runs in the mount.
    Exits with what the command exits with, or 128 and the number of the signal that killed it.
    """
    from fsdriver import running

    committing = commit or commit_always
    if overlay and lazy:
        raise click.UsageError("--overlay and --lazy exclude each other")
    if lazy and at is not None:
        raise click.UsageError("--at needs overlayfs, which --lazy excludes")
    if (message or ref) and not committing:
        raise click.UsageError("--message and --ref are for --commit")
    way = running.LAZY if lazy else running.OVERLAY if overlay or at else running.AUTO
    output = invocation.output
    inherit = _inherited()  # before anything else is open
    with invocation.open() as store:
        with (
            running.mounted(store.repository.path) as place,
            running.Run(
                store.repository, session, place, way=way, at=at and os.path.abspath(at)
            ) as run,
        ):
            ended = _run(run, command, inherit, output)
        facts = {**ended._asdict(), "way": run.way, "reason": run.reason, "session": session}
        if ended.left:
            output.note(f"what {command[0]!r} left running goes on in @{session}, which is busy")
        if commit_always or (commit and ended.exit_code == 0):
            facts |= _commit(store, output, session, message, ref)
        if output.json:
            output.last("run", facts)
    return ended.exit_code


def _run(run: "Run", command: tuple[str, ...], inherit: list[int], output: "Output") -> "Ended":
    from fsdriver.running import signals_held

    below = _below(run.shown)
    run.prepare(command[0])
    with signals_held() as mask:
        run.start(command, below=below, mask=mask, inherit=inherit)
        if run.reason:
            output.note(f"runs in {quoted(run.shown)} without overlayfs: {run.reason}")
        ended = run.wait_forwarding()
        run.close()
    _look_at(os.path.join(run.shown, below))
    return ended


def _inherited() -> list[int]:
    """Returns the descriptors, besides the first three, that the command is to have as we do."""
    found = []
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            if descriptor > 2 and os.get_inheritable(descriptor):
                found.append(descriptor)
        except OSError:
            continue  # it was that of the listing
    return found


def _below(shown: str) -> str:
    """Returns where in the session's tree this process stands; empty if elsewhere."""
    try:
        here = os.getcwd()
    except OSError:
        return ""
    return here[len(shown) + 1 :] if here.startswith(shown + os.sep) else ""


def _look_at(path: str) -> None:
    """Makes the kernel know a directory by its name again, for the shell that stands in it."""
    try:
        os.stat(path)
    except OSError:
        pass


def _commit(
    store: "StoreAccess", output: "Output", session: str, message: str, ref: str | None
) -> dict[str, Any]:
    report = store.commit(session, message, ref)
    output.warnings(report.warnings)
    if report.changed:
        output.note(f"@{session} goes on from snapshot {short(report.snapshot)}")
    else:
        output.note(f"nothing has changed in @{session}")
    return {"snapshot": report.snapshot, "changed": report.changed}
