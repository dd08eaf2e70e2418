"""Bisection: the first bad snapshot, found with few tests.

A `Bisection` keeps the candidates: the ancestors of what is known to be bad without those of
what is known to be good. It names the one to test next, is told the verdict, and halves them.
Any graph will do. What a test is, is its caller's business: nothing here reads a tree.

The choice is git's: of N candidates the one whose number of candidate ancestors, itself among
them, is nearest to N/2 (Git documentation, "Fighting regressions with git bisect", Couder 2009).
Found by sets of bits, one addition per candidate where nothing was merged.
"""

import math
from collections.abc import Callable, Iterable
from enum import Enum

import msgspec

from engine.errors import EngineError
from engine.ids import SnapshotId, short
from engine.trees.history import History


class Verdict(Enum):
    """What a test says of a snapshot; `SKIP` that it cannot be tested."""

    GOOD = "good"
    BAD = "bad"
    SKIP = "skip"


class BisectRefusedError(EngineError):
    """What is said to be good and bad does not allow a search. `why` is a whole sentence."""

    def __init__(self, why: str) -> None:
        super().__init__(f"cannot bisect: {why}")
        self.why = why


class BisectResult(msgspec.Struct, frozen=True):
    """What came of a bisection.

    `first_bad` is None if skipped snapshots stand in the way: it is one of `candidates`, each
    before its parents. Otherwise `candidates` is `first_bad` alone. `missing` are removed parents
    where the search had to stop: what was before them is not known.
    """

    first_bad: SnapshotId | None
    candidates: tuple[SnapshotId, ...]
    tested: tuple[tuple[SnapshotId, Verdict], ...]
    missing: tuple[SnapshotId, ...] = ()


Test = Callable[[SnapshotId], Verdict]


class Bisection:
    """A search that is told one verdict at a time."""

    def __init__(
        self, history: History, good: SnapshotId, bad: SnapshotId, *, first_parent: bool = False
    ) -> None:
        """Begins a search. Raises BisectRefusedError if `bad` is an ancestor of `good`.

        With `first_parent`, what was merged into the line that leads to `bad` is not looked into.
        """
        if history.links(good) is None or history.links(bad) is None:
            raise BisectRefusedError("one of the two snapshots is not in the store")
        if history.is_ancestor(bad, good):
            same = "are the same" if good == bad else "are the wrong way round: good came from bad"
            raise BisectRefusedError(f"good and bad {same}")
        self._history, self._first_parent = history, first_parent
        self.bad = bad
        self.tested: dict[SnapshotId, Verdict] = {}
        self._skips = 0
        known_good = set(history.ancestors(good))
        self._order = [
            each
            for each in history.ancestors(bad, first_only=first_parent)
            if each not in known_good
        ]
        self._missing = tuple(sorted(self._removed()))
        # Good need not be an ancestor of bad. Where they parted must be good then, or what is
        # searched for, from good to bad, did not happen on the way (git asks the same).
        bases = history.merge_bases(good, bad)
        self._bases = [each for each in bases if each != good]

    def _removed(self) -> set[SnapshotId]:
        """Returns the parents of candidates that are not there."""
        gone = set()
        for each in self._order:
            links = self._history.links(each)
            parents = links.parents if links is not None else ()
            followed = parents[:1] if self._first_parent else parents
            gone |= {parent for parent in followed if self._history.links(parent) is None}
        return gone

    @property
    def candidates(self) -> tuple[SnapshotId, ...]:
        """What may be the first bad snapshot, each before its parents; `bad` is the first."""
        return tuple(self._order)

    def next(self) -> SnapshotId | None:
        """Returns the snapshot to test; None when no test can tell more."""
        if self._bases:
            return self._bases[0]
        open_ones = [each for each in self._order[1:] if each not in self.tested]
        if not open_ones:
            return None
        weights = _weights(self._history, self._order, first_only=self._first_parent)
        total = len(self._order)
        rank = {each: -min(weights[each], total - weights[each]) for each in open_ones}
        open_ones.sort(key=rank.__getitem__)  # stable: of equals the later in history
        return open_ones[int(len(open_ones) * _away(self._skips))]

    def tell(self, tested: SnapshotId, verdict: Verdict) -> None:
        """Takes a verdict on what `next` named. Raises BisectRefusedError."""
        if tested in self._bases:
            self._bases.remove(tested)
            if verdict is Verdict.BAD:
                raise BisectRefusedError(
                    f"{short(tested)}, which good and bad both came from, is bad already; "
                    "so it was repaired on the way to good, not broken on the way to bad"
                )
        self.tested[tested] = verdict
        if verdict is Verdict.SKIP:
            self._skips += 1
            return
        self._skips = 0
        above = set(self._history.ancestors(tested, first_only=self._first_parent))
        if verdict is Verdict.GOOD:
            self._order = [each for each in self._order if each not in above]
        elif tested in self._order:
            self.bad = tested
            self._order = [each for each in self._order if each in above]

    def result(self) -> BisectResult:
        """Returns what is known once `next` has returned None."""
        first = self.bad if len(self._order) == 1 else None
        return BisectResult(
            first,
            self.candidates,
            tuple(self.tested.items()),
            self._missing,
        )


def bisect(
    history: History,
    good: SnapshotId,
    bad: SnapshotId,
    test: Test,
    *,
    first_parent: bool = False,
) -> BisectResult:
    """Returns the first bad snapshot between `good` and `bad`, which are not tested themselves.

    Right if every snapshot that came from a bad one is bad. About log2 of the candidates are
    tested, each once. Raises BisectRefusedError, and what `test` raises.
    """
    search = Bisection(history, good, bad, first_parent=first_parent)
    while (candidate := search.next()) is not None:
        search.tell(candidate, test(candidate))
    return search.result()


def _away(skips: int) -> float:
    """Returns how far down the ranking to look after skips in a row, from 0 to below 1.

    What cannot be tested lies together, so the next best after a skip is likely to be skipped as
    well. Git looks elsewhere by a random number to the power of 1.5; this takes van der Corput's
    sequence, which spreads as well and is the same every time.
    """
    place, weight = 0.0, 0.5
    while skips:
        place += weight * (skips & 1)
        skips, weight = skips >> 1, weight / 2
    return math.pow(place, 1.5)


def _weights(
    history: History, order: Iterable[SnapshotId], *, first_only: bool
) -> dict[SnapshotId, int]:
    """Returns how many of the candidates each came from, itself among them.

    `order` has each before its parents. A set is an integer with a bit per candidate, and lives
    until the last child has taken it.
    """
    upwards = list(order)[::-1]
    inside = {each: at for at, each in enumerate(upwards)}
    above = {
        each: [p for p in history.parents(each, first_only=first_only) if p in inside]
        for each in upwards
    }
    weights: dict[SnapshotId, int] = {}
    if all(len(parents) < 2 for parents in above.values()):
        for each in upwards:
            weights[each] = 1 + sum(weights[parent] for parent in above[each])
        return weights
    waiting = dict.fromkeys(upwards, 0)
    for parents in above.values():
        for parent in parents:
            waiting[parent] += 1
    sets: dict[SnapshotId, int] = {}
    for each in upwards:
        bits = 1 << inside[each]
        for parent in above[each]:
            bits |= sets[parent]
            waiting[parent] -= 1
            if not waiting[parent]:
                del sets[parent]
        weights[each] = bits.bit_count()
        if waiting[each]:
            sets[each] = bits
    return weights
