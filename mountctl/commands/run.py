"""`mountctl run`."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from engine.errors import EngineError, NotFoundError
from engine.host.leases import LeaseHeldError
from engine.ids import SnapshotId
from fsdriver.client import DaemonError
from mountctl.command import COMMAND, REF, TEXT, Command, completing, pass_invocation
from mountctl.invocation import Invocation
from mountctl.moved_refs import RefBefore
from mountctl.text import lost_owners, not_kept, quoted, short

if TYPE_CHECKING:
    from engine.host.leases import Lease
    from engine.sessions.sessions import Session
    from fsdriver.choosing import Attempt
    from fsdriver.running import Ended
    from mountctl.access import StoreAccess
    from mountctl.output import Output

AUTO = "auto"


@click.command(
    "run",
    cls=Command,
    example="""
    $ mountctl run work -- make -j2
    $ mountctl run work --commit -m "tested" -- make check
    $ mountctl run main --mode full -- ./configure
    $ mountctl run work --explain -- make check
    $ mountctl run --history
    """,
)
@click.argument(
    "target", metavar="SESSION|SNAPSHOT", required=False, shell_complete=completing("grounds"),
    help="A session, as NAME or @NAME; or a snapshot, for a session that goes afterwards.",
)  # fmt: skip
@click.argument(
    "command", nargs=-1, type=COMMAND,
    metavar="-- COMMAND [ARG]...", help="The command, found as a shell finds it.",
)  # fmt: skip
@click.option(
    "--mode", type=click.Choice(["lazy", "overlay", "full", AUTO]), default=AUTO,
    help="In the mount, under the kernel's overlayfs, in a checkout; auto takes the fastest.",
)  # fmt: skip
@click.option(
    "--at", type=click.Path(exists=True, file_okay=False), metavar="DIR",
    help="Where the command sees the tree; else where the mount has it.",
)  # fmt: skip
@click.option("--explain", is_flag=True, help="Tell what each mode should take; run nothing.")
@click.option("--history", is_flag=True, help="List earlier runs: what was expected, what came.")
@click.option("--commit", is_flag=True, help="Commit afterwards, if the command succeeded.")
@click.option("--commit-always", is_flag=True, help="Commit afterwards, whatever it did.")
@click.option("--message", "-m", type=TEXT, default="", help="Say what the snapshot is.")
@click.option("--ref", metavar="NAME", type=REF, help="Make or move a ref to the snapshot.")
@pass_invocation
def command(
    invocation: Invocation,
    target: str | None,
    command: tuple[str, ...],
    mode: str,
    at: str | None,
    explain: bool,
    history: bool,
    commit: bool,
    commit_always: bool,
    message: str,
    ref: str | None,
) -> int:
    """Run a command in a session, or on a snapshot.

    lazy runs it in the mount. overlay shows it the tree by the kernel's overlayfs, and full in a
    checkout, which is removed afterwards: both to the command and what it starts, and to nobody
    else, who find the session busy meanwhile. What it changed is in the session then, whatever
    the mode. auto takes the mode that should be the fastest, by what this command took before,
    and another one where that is not possible. The tree is at the same path in all of them.

    Exits with what the command exits with, or 128 and the number of the signal that killed it.
    """
    committing = commit or commit_always
    if (message or ref) and not committing:
        raise click.UsageError("--message and --ref are for --commit")
    if explain and (history or committing):
        raise click.UsageError("--explain runs nothing: leave out --history and --commit")
    if history:
        if command or at or committing:
            raise click.UsageError("--history takes SESSION or SNAPSHOT alone")
        return _history(invocation, target)
    if target is None or not command:
        raise click.UsageError("give a SESSION or SNAPSHOT, and after `--` a COMMAND")
    inherit = _inherited()  # before anything else is open
    at = at and os.path.abspath(at)
    with invocation.open() as store:
        from fsdriver.choosing import plan
        from fsdriver.running import find_place

        repository = store.repository
        session = _named_session(store, target)
        base = repository.resolve(target) if session is None else SnapshotId(session.parent)
        root = repository.snapshot(base).root if session is None else session.root
        planned = plan(repository, base, root, command, place=find_place(repository.path))
        if explain:
            from mountctl.plans import show_plan

            show_plan(invocation.output, planned)
            return 0
        modes = planned.modes if mode == AUTO else [mode]
        with _kept(session) if session is not None else _temporary(store, base) as (used, lease):
            return _attempt(
                store, invocation.output, used, command, modes, inherit,
                at=at, lease=lease, asked=mode, target=target, estimates=planned.estimates,
                commit=(commit, commit_always, message, ref),
            )  # fmt: skip


def _named_session(store: "StoreAccess", target: str) -> "Session | None":
    try:
        return store.repository.sessions.get(target.removeprefix("@"))
    except NotFoundError:
        if target.startswith("@"):
            raise
        return None


@contextlib.contextmanager
def _kept(session: "Session") -> Iterator[tuple["Session", "Lease | None"]]:
    yield session, None


@contextlib.contextmanager
def _temporary(
    store: "StoreAccess", snapshot: SnapshotId
) -> Iterator[tuple["Session", "Lease | None"]]:
    """Makes a session for one run, and removes it and what killed runs have left."""
    sessions = store.repository.sessions
    for unused in sessions.unused():
        with contextlib.suppress(EngineError):  # what a command left running may use it yet
            store.remove(unused.name, force=True)
    session, lease = sessions.create_temporary(snapshot)
    try:
        store.refresh()
        yield session, lease
    finally:
        with lease, contextlib.suppress(LeaseHeldError, DaemonError):  # likewise
            store.remove(session.name, force=True)


def _attempt(
    store: "StoreAccess",
    output: "Output",
    session: "Session",
    command: Sequence[str],
    modes: Sequence[str],
    inherit: list[int],
    *,
    at: str | None,
    lease: "Lease | None",
    asked: str,
    target: str,
    estimates: Sequence[Any],
    commit: tuple[bool, bool, str, str | None],
) -> int:
    from fsdriver.choosing import Attempt, keep

    with Attempt(
        store.repository, session.name, modes,
        at=at, lease=-1 if lease is None else lease.fileno(),
    ) as attempt:  # fmt: skip
        with output.progress("writing files", in_bytes=True) as progress:
            attempt.prepare(command[0], progress)
        ended = _run(attempt, command, inherit, output)
    run = attempt.run
    output.warnings(run.warnings)
    facts = {
        **ended._asdict(), "mode": run.mode, "refused": [str(why) for why in attempt.refused],
        "seconds": round(attempt.seconds, 4), "session": session.name,
    }  # fmt: skip
    if ended.left:
        output.note(f"what {command[0]!r} left running goes on in @{session.name}, which is busy")
    else:
        # It would only have served the next one; the session may have been renamed, or removed.
        with contextlib.suppress(OSError, EngineError):
            keep(
                store.repository, session, command, attempt, ended,
                asked=asked, target=target, estimates=estimates,
            )  # fmt: skip
    if_succeeded, always, message, ref = commit
    if always or (if_succeeded and ended.exit_code == 0):
        facts |= _commit(store, output, session.name, message, ref)
    if output.json:
        output.last("run", facts)
    return ended.exit_code


def _run(
    attempt: "Attempt", command: Sequence[str], inherit: list[int], output: "Output"
) -> "Ended":
    from fsdriver.running import signals_held

    below = _below(attempt.run.in_mount)
    with signals_held() as mask:
        run = attempt.start(command, below=below, mask=mask, inherit=inherit)
        for why in attempt.refused:
            output.note(f"runs in {quoted(run.shown)} by {run.mode}: {why}")
        ended = run.wait_forwarding()
        attempt.close()
    _look_at(os.path.join(run.in_mount, below))
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
    before = RefBefore(store, ref)
    report = store.commit(session, message, ref)
    warnings = [*report.warnings, *([] if report.changed else not_kept(message))]
    output.warnings(warnings)
    if report.lost_owners:
        output.warning(f"{lost_owners(report.lost_owners)}; @{session} does")
    if report.changed:
        output.note(f"@{session} goes on from snapshot {short(report.snapshot)}")
    else:
        output.note(f"nothing has changed in @{session}")
    before.tell(output, report.snapshot)
    return {
        "snapshot": report.snapshot, "changed": report.changed,
        "ref": ref, "ref_was": before.target, "lost_owners": report.lost_owners,
    }  # fmt: skip


def _history(invocation: Invocation, target: str | None) -> int:
    from fsdriver.run_records import RunRecords
    from mountctl.plans import show_history

    with invocation.open() as store:
        records = RunRecords(store.repository.path).all()
    name = None if target is None else target.removeprefix("@")
    show_history(
        invocation.output,
        [each for each in records if name is None or each.target.removeprefix("@") == name],
    )
    return 0
