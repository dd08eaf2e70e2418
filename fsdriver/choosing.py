"""Runs a command in the mode that should be the fastest, and keeps what that took.

`plan` estimates each mode by `cost_model` from
earlier runs of the same command (`run_records`) and the machine's costs (`calibration`). An
`Attempt` takes the first mode that is possible, and tells afterwards what the run took and did.

The kernel's overlayfs refuses to rename a directory of the base (EXDEV), which the other modes do.
So a plan has `overlay` only for a command that was seen to rename none: see `Moves`.
"""

import contextlib
import errno
import time
from collections.abc import Iterable, Sequence
from enum import Enum
from itertools import islice

import msgspec

from engine.errors import EngineError, NotFoundError
from engine.ids import SnapshotId
from engine.progress import Progress
from engine.repository import Repository
from engine.sessions.sessions import Session
from engine.sessions.upper_work import UpperWork, work_between, work_since
from engine.storage.nodes import Entry
from fsdriver import messages
from fsdriver.client import DaemonLostError, find_daemon
from fsdriver.cost_model import (
    FULL,
    LAZY,
    MODES,
    OVERLAY,
    Costs,
    Estimate,
    Outcome,
    Tree,
    Work,
    estimate,
)
from fsdriver.launch import LaunchError
from fsdriver.run_records import ENOUGH, RunRecord, RunRecords, key_of, shown
from fsdriver.running import Ended, ModeRefusedError, Place, Run, find_place, mounted

GENERATIONS = 1000
"""How many ancestors of a tree count as the same tree for the runs of a command."""

_GIVEN, _MOVED = "given", "moved"
_ASKING = ("LOOKUP", "READ", "READDIR", "READDIRPLUS", "READLINK", _GIVEN)
_MAKING = ("CREATE", "MKDIR", "MKNOD", "SYMLINK", "LINK")
_REMOVING = ("UNLINK", "RMDIR")


class Moves(Enum):
    """Whether a command renames directories of its base, as its runs in the mount have shown."""

    NONE = "none"
    """A run that ended with exit code 0 renamed none, and no run renamed any."""
    SOME = "some"
    UNKNOWN = "unknown"
    """No run in the mount has ended with exit code 0, and none has renamed any."""


def moves_of(runs: Iterable[RunRecord]) -> Moves:
    """Returns what runs of one command say about its renames of directories."""
    seen = Moves.UNKNOWN
    for run in runs:
        if run.outcome.moved:
            return Moves.SOME
        if run.outcome.moved == 0 and run.exit_code == 0:
            seen = Moves.NONE
    return seen


class Plan(msgspec.Struct, frozen=True):
    """What each mode should take, the fastest first, and what that rests on."""

    estimates: list[Estimate]
    earlier: list[RunRecord]
    costs: Costs
    tree: Tree
    mounted: bool
    moves: Moves = Moves.NONE

    @property
    def modes(self) -> list[str]:
        """The modes in the order in which they are to be tried.

        Without `overlay` if the command may rename a directory of the base.
        """
        found = [each.mode for each in self.estimates]
        if self.moves is not Moves.NONE and len(found) > 1:
            found = [mode for mode in found if mode != OVERLAY]
        return found


def tree_size(root: Entry) -> Tree:
    """Returns the size of a tree without reading it."""
    return Tree(root.totals.entries if root.totals is not None else 0, root.size)


def plan(
    repository: Repository,
    base: SnapshotId,
    root: Entry,
    command: Sequence[str],
    *,
    place: Place | None,
    modes: Iterable[str] = MODES,
) -> Plan:
    """Estimates what a command takes in each of `modes`, in a tree that came from `base`.

    `root` is the tree, or what it was before a session changed it. Raises OSError.
    """
    records = RunRecords(repository.path)
    ancestors = repository.history().ancestors(base)
    same = records.like(command, islice(ancestors, GENERATIONS))
    earlier = same[-ENOUGH:]
    costs, tree = records.costs(), tree_size(root)
    estimates = estimate(
        costs, tree, [each.outcome for each in earlier],
        mount="" if place is None else place.name or "new", modes=modes,
    )  # fmt: skip
    return Plan(estimates, earlier, costs, tree, place is not None, moves_of(same))


class Attempt:
    """A command in the first of several modes that is possible; use it in a `with` statement."""

    def __init__(
        self,
        repository: Repository,
        session: str,
        modes: Sequence[str],
        *,
        at: str | None = None,
        lease: int = -1,
    ) -> None:
        """Gets ready; see `Run`."""
        self._repository, self._session, self._left = repository, session, list(modes)
        self._at, self._lease = at, lease
        self._stack = contextlib.ExitStack()
        self._place: Place | None = None
        self._run: Run | None = None
        self._began = self.began_ns = 0
        self._before: dict[str, int] = {}
        self._root: Entry | None = None
        self._closed = False
        self._after: dict[str, int] = {}
        self.refused: list[EngineError] = []
        """Why the modes before were not possible."""
        self.seconds = 0.0

    def __enter__(self) -> "Attempt":
        self._began, self.began_ns = time.monotonic_ns(), time.time_ns()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def run(self) -> Run:
        """The run in the mode that was taken."""
        assert self._run is not None, "prepare it first"
        return self._run

    def prepare(self, name: str, progress: Progress | None = None) -> Run:
        """Takes the first mode in which a program `name` can be run; raises as `Run.prepare`.

        What the last one raises is raised; LaunchError if there is no mount and can be none.
        `progress` hears of the bytes of a checkout.
        """
        while True:
            mode = self._left.pop(0)
            try:
                if self._place is None:
                    self._place = self._find(mode)
                self._run = Run(
                    self._repository, self._session, mode, self._place,
                    at=self._at, lease=self._lease, progress=progress,
                )  # fmt: skip
                self._before = self._counts()
                self._run.prepare(name)
                self._root = self._repository.sessions.get(self._session).root
                return self._run
            except LaunchError as error:  # so there is no mount for another mode either
                self._left = [mode for mode in self._left if mode == FULL]
                self._refuse(error)
            except ModeRefusedError as error:
                self._refuse(error)
            except OSError as error:
                if error.errno not in {errno.ENOSPC, errno.EDQUOT} or mode != FULL:
                    raise
                self._refuse(ModeRefusedError(FULL, "the store's disk has no room for it"))

    def _find(self, mode: str) -> Place | None:
        """Returns the mount; a checkout needs none, but if there is one, shows its tree there."""
        if mode == FULL:
            return find_place(self._repository.path)
        return self._stack.enter_context(mounted(self._repository.path))

    def _refuse(self, error: EngineError) -> None:
        if not self._left:
            raise error
        self.refused.append(error)

    def start(
        self,
        command: Sequence[str],
        *,
        below: str = "",
        mask: Sequence[int] | None = None,
        inherit: Sequence[int] = (),
    ) -> Run:
        """Starts the command, in another mode should it turn out to be refused.

        Raises NotFoundError if the session was removed meanwhile.
        """
        while True:
            if self._run is None:
                self.prepare(command[0])
            run = self.run
            try:
                run.start(command, below=below, mask=mask, inherit=inherit)
                return run
            except FileNotFoundError:
                self._repository.sessions.get(self._session)  # raises if it was removed meanwhile
                raise
            except ModeRefusedError as error:
                self._run = None
                run.close()
                self._refuse(error)

    def close(self) -> None:
        """Ends the run, and the mount if it was made for it; again is harmless."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._run is not None:
                self._run.close()
        finally:
            self._after = self._counts()
            self._stack.close()
            if self._run is not None and self._place is not None and self._place.late:
                self._run.warnings += (
                    "the mount of this run does not end: `mountctl umount --force` ends it",
                )
            self.seconds = (time.monotonic_ns() - self._began) / 1e9

    # What it took and did.

    def _counts(self) -> dict[str, int]:
        """Returns how many messages of each kind came to the mount so far.

        And how often it gave what nobody had asked for yet: it would have been asked.
        """
        if self._run is None or self._run.mode == FULL or self._place is None:
            return {}
        try:
            client = find_daemon(self._repository.path)
            if client is None:
                return {}
            with client:
                reply = client.ask(messages.GetStatistics())
        except DaemonLostError:
            return {}
        assert isinstance(reply, messages.Statistics)
        try:
            uid = self._repository.sessions.get(self._session).uid
        except NotFoundError:
            return {}  # it was removed meanwhile: nothing is kept of the run
        return {
            **reply.groups["messages"],
            _GIVEN: reply.groups["ahead"].get("given", 0),
            _MOVED: reply.groups["moved"].get(uid, 0),
        }

    def outcome(self) -> Outcome:
        """Returns what the run took and did, once it is closed. Raises OSError."""
        run, objects = self.run, self._repository.objects
        session = self._repository.sessions.get(self._session)
        assert self._root is not None
        if run.mode == FULL:
            done = work_between(objects, self._root, session.root)
        else:
            upper = self._repository.sessions.upper(session)
            done = work_since(objects, upper, session.root, self.began_ns)
        place = self._place if run.mode != FULL else None
        return Outcome(
            mode=run.mode, seconds=self.seconds, tree=tree_size(session.root),
            work=self._work(run, done), mount=place.name if place is not None else "",
            fresh=place is not None and not place.name,
            moved=self._came([_MOVED]) if run.mode == LAZY and self._after else None,
        )  # fmt: skip

    def _work(self, run: Run, done: UpperWork) -> Work:
        if run.mode == FULL:
            asked = run.reads.files if run.reads is not None else 0
            read = run.reads.bytes if run.reads is not None else 0
            return Work(asked, read, done.made, done.rewritten, done.written, done.removed)
        made, removed = done.made, done.removed
        if run.mode == LAZY:  # what came and went again is known here
            made = max(made, self._came(_MAKING))
            removed = max(removed, self._came(_REMOVING))
        asked = self._came(_ASKING)
        return Work(
            max(0, asked - made) if run.mode == LAZY else asked, 0,
            made, done.rewritten, done.written, removed,
        )  # fmt: skip

    def _came(self, kinds: Iterable[str]) -> int:
        return sum(self._after.get(kind, 0) - self._before.get(kind, 0) for kind in kinds)


def keep(
    repository: Repository,
    session: Session,
    command: Sequence[str],
    attempt: Attempt,
    ended: Ended,
    *,
    asked: str,
    target: str,
    estimates: Iterable[Estimate] = (),
) -> RunRecord:
    """Keeps what a run took and did, for the next. Raises OSError."""
    record = RunRecord(
        started_ns=attempt.began_ns, key=key_of(command), command=shown(command),
        base=session.parent.hex(), target=target, outcome=attempt.outcome(),
        exit_code=ended.exit_code, asked=asked,
        estimates={each.mode: each.seconds for each in estimates},
    )  # fmt: skip
    RunRecords(repository.path).add(record)
    return record
