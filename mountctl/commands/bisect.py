"""`mountctl bisect`."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from mountctl.command import COMMAND, Command, pass_invocation, snapshot_argument
from mountctl.failures import FOUND
from mountctl.invocation import STORE_VARIABLE, Invocation
from mountctl.text import count, short

if TYPE_CHECKING:
    from engine.episodes.bisecting import BisectResult, Verdict
    from engine.ids import SnapshotId
    from engine.repository import Repository
    from mountctl.output import Output
    from mountctl.trial import Trials

SNAPSHOT_VARIABLE = "AMALGAMFS_SNAPSHOT"
_SKIP, _LAST_BAD = 125, 127

Test = Callable[["SnapshotId"], "Verdict"]


@click.command(
    "bisect",
    cls=Command,
    example="""
    $ mountctl bisect v1 main -- make check
    $ mountctl bisect v1 main --in-mount -- grep -q TODO src/main.c
    """,
)
@snapshot_argument("good", help="A snapshot in which all is well.")
@snapshot_argument("bad", help="A snapshot in which it is not, and that came later.")
@click.argument(
    "command", nargs=-1, required=True, type=COMMAND,
    metavar="-- COMMAND [ARG]...", help="The command, found as a shell finds it.",
)  # fmt: skip
@click.option("--first-parent", is_flag=True, help="Do not look into what was merged.")
@click.option(
    "--in-mount", is_flag=True,
    help="Run it in the mount, where nothing can be written, instead of in a copy.",
)  # fmt: skip
@click.pass_context
@pass_invocation
def command(
    invocation: Invocation,
    context: click.Context,
    good: str,
    bad: str,
    command: tuple[str, ...],
    first_parent: bool,
    in_mount: bool,
) -> None:
    """Find the first bad snapshot by running a command in some.

    The command runs in each snapshot's folder and says by its exit code what it is: 0 good, 125
    not to be tested, any other up to 127 bad; what is above, and a signal, ends the search. What
    it writes goes to stderr. Writes the id of the first bad snapshot; if snapshots that cannot
    be tested stand in the way, all that may be it, and ends with exit code 1.
    """
    from engine.episodes.bisecting import Bisection
    from mountctl.trial import Trials

    output = invocation.output
    with invocation.open() as store:
        repository = store.repository
        search = Bisection(
            repository.history(), store.resolve(good), store.resolve(bad),
            first_parent=first_parent,
        )  # fmt: skip
        with Trials(command) as trials, _folders(repository, trials, in_mount) as folder:
            while (candidate := search.next()) is not None:
                left = len(search.candidates)
                output.note(f"testing {short(candidate)}, one of {count(left, 'candidate')}")
                with folder(candidate) as path:
                    verdict = _verdict(trials, path, command[0], candidate, invocation.store_path)
                output.note(f"{short(candidate)} is {_WORDS[verdict.value]}")
                search.tell(candidate, verdict)
        result = search.result()
        _show(output, repository, result)
    if result.first_bad is None:
        context.exit(FOUND)


_WORDS = {"good": "good", "bad": "bad", "skip": "skipped"}


@contextlib.contextmanager
def _folders(
    repository: "Repository", trials: "Trials", in_mount: bool
) -> Iterator[Callable[["SnapshotId"], contextlib.AbstractContextManager[str]]]:
    """Gives a function that gives the folder of a snapshot."""

    @contextlib.contextmanager
    def copied(identifier: "SnapshotId") -> Iterator[str]:
        path = trials.folder(identifier.hex())
        root = repository.snapshot(identifier).root
        repository.check_out(root, path, outside_links=True, tracked=False, progress=trials.check)
        try:
            yield path
        finally:
            trials.remove(path)

    if not in_mount:
        yield copied
        return
    from fsdriver.running import mounted

    with mounted(repository.path) as place:
        yield lambda identifier: contextlib.nullcontext(
            os.path.join(place.mountpoint, "snapshots", identifier.hex())
        )


def _verdict(
    trials: "Trials", path: str, command: str, candidate: "SnapshotId", store: str
) -> "Verdict":
    from engine.episodes.bisecting import Verdict
    from mountctl.trial import TrialAbortedError

    code = trials.run(path, {SNAPSHOT_VARIABLE: candidate.hex(), STORE_VARIABLE: store})
    if code < 0:
        raise TrialAbortedError(command, short(candidate), f"was killed by signal {-code}")
    if code > _LAST_BAD:
        raise TrialAbortedError(command, short(candidate), f"ended with exit code {code}")
    return Verdict.GOOD if not code else Verdict.SKIP if code == _SKIP else Verdict.BAD


def _show(output: "Output", repository: "Repository", result: "BisectResult") -> None:
    from mountctl.records import Names, show_snapshots

    tests = count(len(result.tested), "test")
    if result.missing:
        output.warning(
            f"{count(len(result.missing), 'snapshot')} on the way were removed; "
            "what came before them was not searched"
        )
    if output.json:
        output.result(
            {
                "first_bad": result.first_bad,
                "candidates": result.candidates,
                "tested": [
                    {"snapshot": each, "verdict": verdict.value} for each, verdict in result.tested
                ],
                "missing": result.missing,
            }
        )
    elif result.first_bad is not None:
        output.line(result.first_bad.hex())
        output.note(f"the first bad snapshot, found with {tests}")
    else:
        records = [(each, repository.snapshot(each)) for each in result.candidates]
        show_snapshots(output, Names(repository), records)
        output.note(f"the first bad snapshot is one of these; {tests}, the others were skipped")
