"""Pruning: which steps of an episode go by their rewards, and which snapshots go with them.

What goes is found from the indexes alone, so that it costs little per step and works on steps
whose records are damaged. A snapshot goes if a step that goes held it and nothing else wants it:
no ref, session, other step or episode, it is not the last import of a directory, and no snapshot
that stays came from it. Everything goes in one transaction. What can be found out before, is; if
the store has changed twice meanwhile, it is found out inside.
"""

import math
from collections.abc import Callable, Iterable

import msgspec

from engine.episodes.steps import (
    child_key,
    episode_key,
    hold_key,
    holder_in,
    is_hold,
    may_be_name,
    number_at,
    parent_in,
    reward_key,
    seal,
    step_key,
)
from engine.episodes.trajectories import next_number, read_episode, rewards
from engine.errors import NotFoundError
from engine.ids import SnapshotId
from engine.sessions.sessions import decode_record
from engine.storage.snapshots import decode_links
from engine.storage.store import Db, Reader, Store, Writer

_ATTEMPTS = 2


class Keep(msgspec.Struct, frozen=True):
    """What stays: the `best` so many, or what is not `below` a reward; see `Episodes.prune`."""

    best: int | None
    below: float | None
    unscored: bool = False

    def __post_init__(self) -> None:
        if (self.best is None) == (self.below is None):
            raise ValueError("give either how many to keep or a reward to be reached")
        if self.below is not None and math.isnan(self.below):
            raise ValueError("the reward to be reached is no number")
        if self.best is not None and self.best < 0:
            raise ValueError("give a number of steps to keep, from 0 on")


class PruneReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was removed, or with a dry run would be; `kept` is how many steps stay."""

    removed: int
    kept: int
    snapshots: tuple[SnapshotId, ...]


class _Plan(msgspec.Struct, frozen=True):
    steps: dict[int, int | None]
    """The steps that go, with their parents."""
    kept: int
    rewards: dict[int, float]
    holds: dict[int, SnapshotId]
    snapshots: tuple[SnapshotId, ...]

    def report(self) -> PruneReport:
        return PruneReport(removed=len(self.steps), kept=self.kept, snapshots=self.snapshots)


Choose = Callable[[dict[int, int | None], list[tuple[float, int]]], set[int]]
"""Returns the steps that stay, of steps with their parents and rewards, the greatest first."""


def prune(store: Store, name: str, keep: Keep, *, dry_run: bool) -> PruneReport:
    """Removes the steps that `keep` does not name, and their snapshots. Raises NotFoundError."""

    def choose(parents: dict[int, int | None], ranked: list[tuple[float, int]]) -> set[int]:
        if keep.best is not None:
            wanted = [number for _, number in ranked[: keep.best]]
        else:
            wanted = [number for reward, number in ranked if reward >= (keep.below or 0.0)]
        if not keep.unscored:
            inner = set(parents.values())
            scored = {number for _, number in ranked}
            wanted += [n for n in parents if n not in inner and n not in scored]
        return _with_ways(parents, wanted)

    return _run(store, name, choose, _forget, dry_run)


def remove(store: Store, name: str, *, dry_run: bool) -> PruneReport:
    """Removes an episode with all its steps. Raises NotFoundError."""
    return _run(store, name, lambda parents, ranked: set(), _erase, dry_run)


def _run(
    store: Store,
    name: str,
    choose: Choose,
    finish: Callable[[Writer, str, _Plan], None],
    dry_run: bool,
) -> PruneReport:
    for _ in range(_ATTEMPTS):
        before = store.transaction_id()
        with store.read() as reader:
            plan = _plan(reader, name, choose)
        if dry_run:
            return plan.report()

        def change(writer: Writer, plan: _Plan = plan, before: int = before) -> bool:
            if store.transaction_id() != before:
                return False
            finish(writer, name, plan)
            return True

        if store.write(change, frees=True):
            return plan.report()

    def at_once(writer: Writer) -> _Plan:
        plan = _plan(writer, name, choose)
        finish(writer, name, plan)
        return plan

    return store.write(at_once, frees=True).report()


def _with_ways(parents: dict[int, int | None], wanted: Iterable[int]) -> set[int]:
    """Returns steps with all that lead to them."""
    kept: set[int] = set()
    for number in wanted:
        at: int | None = number
        while at is not None and at not in kept:
            kept.add(at)
            at = parents.get(at)
    return kept


def _plan(reader: Reader, name: str, choose: Choose) -> _Plan:
    if not may_be_name(name) or not reader.has(Db.EPISODES, episode_key(name)):
        raise NotFoundError("episode", name)
    start = child_key(name, 0)[:-16]
    parents: dict[int, int | None] = {}
    for key in reader.keys(Db.EPISODES, start):
        if not key.startswith(start):
            break
        parents[number_at(key)] = parent_in(key)
    ranked = list(rewards(reader, name))
    kept = choose(parents, ranked)
    steps = {number: parent for number, parent in parents.items() if number not in kept}
    holds, others = _holds(reader, name)
    going = {number: holds[number] for number in steps if number in holds}
    candidates = set(going.values()) - others
    candidates -= {snapshot for number, snapshot in holds.items() if number not in steps}
    return _Plan(
        steps,
        len(parents) - len(steps),
        {number: reward for reward, number in ranked if number in steps},
        going,
        tuple(sorted(_unwanted(reader, candidates))),
    )


def _holds(reader: Reader, name: str) -> tuple[dict[int, SnapshotId], set[SnapshotId]]:
    """Returns what each step of the episode holds, and what is held by others and by its root."""
    mine: dict[int, SnapshotId] = {}
    others: set[SnapshotId] = set()
    for key in reader.keys(Db.EPISODES, b"\0"):
        if not is_hold(key):
            break
        snapshot, holder, number = holder_in(key)
        if holder == name and number is not None:
            mine[number] = snapshot
        else:
            others.add(snapshot)
    return mine, others


def _unwanted(reader: Reader, candidates: set[SnapshotId]) -> set[SnapshotId]:
    """Returns the candidates that nothing names and from which nothing came that stays."""
    if not candidates:
        return set()
    wanted = {bytes(raw) for _, raw in reader.items(Db.REFS)}
    wanted |= {bytes(raw) for key, raw in reader.items(Db.META) if key.startswith(b"import:")}
    for key, raw in reader.items(Db.SESSIONS):
        session = decode_record(key, raw)
        wanted |= {session.parent, *(layer for _, layer in session.layers)}
    above: dict[SnapshotId, tuple[SnapshotId, ...]] = {}
    for key, raw in reader.items(Db.SNAPSHOTS):
        identifier = SnapshotId(key)
        parents = decode_links(identifier, raw).parents
        if identifier in candidates:
            above[identifier] = parents
        else:
            wanted.update(parents)
    staying = [each for each in above if each in wanted]
    unwanted = set(above).difference(staying)
    while staying:
        for parent in above[staying.pop()]:
            if parent in unwanted:
                unwanted.remove(parent)
                staying.append(parent)
    return unwanted


def _forget(writer: Writer, name: str, plan: _Plan) -> None:
    """Removes steps, and notes that their numbers are taken."""
    if not plan.steps:
        return
    record = read_episode(writer, name)
    free = next_number(writer, name, record.first_free)
    for number, parent in plan.steps.items():
        writer.delete(Db.EPISODES, child_key(name, parent, number))
        _delete_range(writer, step_key(name, number))
        if number in plan.rewards:
            writer.delete(Db.EPISODES, reward_key(name, plan.rewards[number], number))
        if number in plan.holds:
            writer.delete(Db.EPISODES, hold_key(plan.holds[number], name, number))
    key = episode_key(name)
    record = msgspec.structs.replace(
        record, first_free=free, removed=record.removed + len(plan.steps)
    )
    writer.put(Db.EPISODES, key, seal(key, record))
    _remove_snapshots(writer, plan)


def _erase(writer: Writer, name: str, plan: _Plan) -> None:
    """Removes all that there is of an episode, readable or not."""
    _delete_range(writer, episode_key(name))
    for key in [key for key in writer.keys(Db.EPISODES, b"\0") if is_hold(key)]:
        if holder_in(key)[1] == name:
            writer.delete(Db.EPISODES, key)
    _remove_snapshots(writer, plan)


def _delete_range(writer: Writer, start: bytes) -> None:
    found = []
    for key in writer.keys(Db.EPISODES, start):
        if not key.startswith(start):
            break
        found.append(key)
    for key in found:
        writer.delete(Db.EPISODES, key)


def _remove_snapshots(writer: Writer, plan: _Plan) -> None:
    for identifier in plan.snapshots:
        writer.delete(Db.SNAPSHOTS, identifier)
