"""What a command will take in each mode: in the mount, under overlayfs, in a full checkout.

Pure arithmetic. A run takes what the command takes by itself on a plain disk (its own time),
and what the mode adds. What it adds is linear in the tree (a checkout is written and removed)
and in the work: what the command asks of the tree and does to it. The factors are a machine's
`Costs`, measured by `calibration`; the work and the own time are those of earlier runs of the
same command (`run_records`). The difference between what a run took and what was added is its
own time *in that mode*, so a mode that was tried corrects the model's error for it, and one
that was not is judged by the least own time of the others.

The least-cost choice among measured alternatives is that of a query planner (Selinger et al.,
Access Path Selection in a Relational Database Management System, 1979).
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median

import msgspec

LAZY, OVERLAY, FULL = "lazy", "overlay", "full"
"""The pyfuse3 mount; the kernel's overlayfs over the mounted snapshot; a full checkout."""
MODES = (LAZY, OVERLAY, FULL)

LATEST = 5
"""Of how many of the last runs in a mode the median own time is taken."""

FIRST_READS, FIRST_WRITES = 1.0, 0.05
"""What share of its tree a command that never ran is taken to read, and to write anew."""


class Tree(msgspec.Struct, frozen=True):
    """The size of a tree: entries of any kind, and bytes of all files."""

    entries: int
    bytes: int


class Work(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a command asks of its tree, and does to it.

    `asked` are requests for what the kernel has not seen yet: in a mount messages that came to
    its daemon, or were spared by giving ahead, in a checkout files that were read. `made` are new
    entries, `rewritten` files of the base that were changed, `removed` names of the base that are
    gone. `read` and `written` are bytes.
    """

    asked: int = 0
    read: int = 0
    made: int = 0
    rewritten: int = 0
    written: int = 0
    removed: int = 0


class ModeCosts(msgspec.Struct, frozen=True):
    """What a mode adds, in seconds: once, per entry and byte of the tree, per piece of work."""

    start: float
    entry: float = 0.0
    byte: float = 0.0
    asked: float = 0.0
    read: float = 0.0
    made: float = 0.0
    rewritten: float = 0.0
    written: float = 0.0
    removed: float = 0.0


class Costs(msgspec.Struct, frozen=True):
    """What the modes add on one machine; `mount` is what making and ending a mount takes."""

    mount: float
    modes: dict[str, ModeCosts]
    machine: str = ""
    """Where they were measured; empty for those that were measured elsewhere."""
    measured_ns: int = 0


ELSEWHERE = Costs(
    0.2,
    {
        LAZY: ModeCosts(
            0.025,
            asked=1e-4,
            read=1.25e-9,
            made=3.7e-4,
            rewritten=1.5e-3,
            written=1.3e-9,
            removed=1e-4,
        ),
        OVERLAY: ModeCosts(
            0.03, asked=1e-4, read=1.5e-9, rewritten=1.4e-3, written=2e-11, removed=8e-6
        ),
        FULL: ModeCosts(0.06, entry=4e-4, byte=6e-10, made=4e-5, rewritten=4e-5, written=8e-10),
    },
)
"""For a machine that was never calibrated: medians of some calibrations of one with two cores."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a run in a mode took, in seconds from its first step to its last, and did.

    `mount` names the mount in which it ran, empty for a checkout; `fresh` tells whether that was
    made for it. `moved` is how often it renamed a directory that its tree had from the start, None
    where nobody could see that: overlayfs refuses it, and a checkout is not watched.
    """

    mode: str
    seconds: float
    tree: Tree
    work: Work
    mount: str = ""
    fresh: bool = False
    moved: int | None = None


class Estimate(msgspec.Struct, frozen=True):
    """What a run in a mode should take. `own` is None where no earlier run tells.

    `seconds` is then what the mode adds. `runs` is how many runs in this very mode it rests on.
    """

    mode: str
    seconds: float
    own: float | None
    added: dict[str, float]
    """Seconds that the mode adds, by what costs them."""
    runs: int = 0


def added(costs: Costs, mode: str, tree: Tree, work: Work, *, mounted: bool) -> dict[str, float]:
    """Returns what a mode adds, in seconds, by what costs them; nothing that is zero."""
    factors = costs.modes[mode]
    parts = {"start": factors.start}
    if mode != FULL and not mounted:
        parts["mount"] = costs.mount
    parts["tree"] = factors.entry * tree.entries + factors.byte * tree.bytes
    parts["reading"] = factors.asked * work.asked + factors.read * work.read
    parts["writing"] = (
        factors.made * work.made
        + factors.rewritten * work.rewritten
        + factors.written * work.written
        + factors.removed * work.removed
    )
    return {name: seconds for name, seconds in parts.items() if seconds}


def estimate(
    costs: Costs, tree: Tree, earlier: Sequence[Outcome], *, mount: str, modes: Iterable[str]
) -> list[Estimate]:
    """Returns an estimate for each of `modes`, the fastest first.

    `earlier` are runs of the same command, the latest last; `mount` names the mount that there
    is, empty if there is none.
    """
    own = _own(costs, earlier)
    found = []
    for mode in modes:
        work = _expected(mode, tree, earlier, mount)
        parts = added(costs, mode, tree, work, mounted=bool(mount))
        times = own.get(mode, [])
        guess = median(times) if times else min(map(median, own.values())) if own else None
        found.append(Estimate(mode, sum(parts.values()) + (guess or 0.0), guess, parts, len(times)))
    return sorted(found, key=lambda each: each.seconds)


def _own(costs: Costs, earlier: Sequence[Outcome]) -> Mapping[str, list[float]]:
    """Returns the own times of the latest runs by mode, in seconds."""
    own: dict[str, list[float]] = {}
    for run in earlier:
        parts = added(costs, run.mode, run.tree, run.work, mounted=not run.fresh)
        own.setdefault(run.mode, []).append(max(0.0, run.seconds - sum(parts.values())))
    return {mode: times[-LATEST:] for mode, times in own.items()}


def _expected(mode: str, tree: Tree, earlier: Sequence[Outcome], mount: str) -> Work:
    """Returns the work to be expected in a mode.

    That of the last run; but the kernel does not ask again for what it has. It has what overlayfs
    showed, which is of the snapshot; what a session in the mount showed is that session's, so
    there the last run in the mount tells how much is asked.
    """
    if not earlier:
        return Work(
            asked=int(tree.entries * FIRST_READS),
            read=int(tree.bytes * FIRST_READS),
            made=int(tree.entries * FIRST_WRITES),
            written=int(tree.bytes * FIRST_WRITES),
        )
    asked = max(run.work.asked for run in earlier)
    read = max(run.work.read for run in earlier)
    here = [run.work for run in earlier if mount and run.mount == mount and run.mode == mode]
    if here and mode == LAZY:
        asked, read = here[-1].asked, here[-1].read
    elif here:
        asked = read = 0
    return msgspec.structs.replace(earlier[-1].work, asked=asked, read=read)
