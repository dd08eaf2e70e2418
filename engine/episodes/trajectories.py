"""Trajectories: the steps of episodes, appended and found again in a transaction of the caller's.

So a step can become durable together with the snapshot that it names. `episodes` offers the same
with transactions of its own. `steps` says how all of it is stored. An index is written in the
transaction of its record, and what is read through one is compared with the record.
"""

import time
from collections.abc import Iterator, Sequence

import msgspec

from engine.episodes.steps import (
    CorruptStepError,
    EpisodeRecord,
    InvalidStepError,
    NewStep,
    Seen,
    Step,
    child_key,
    decode_episode,
    decode_observation,
    decode_step,
    describe,
    episode_key,
    hold_key,
    holder_in,
    is_hold,
    make_episode,
    make_observation,
    make_step,
    may_be_name,
    number_at,
    observation_key,
    reward_in,
    reward_key,
    seal,
    step_key,
    step_of,
)
from engine.errors import NameTakenError, NotFoundError
from engine.ids import ID_BYTES, SnapshotId, check_name
from engine.storage.store import Db, Reader, Writer


class Episode(msgspec.Struct, frozen=True, kw_only=True):
    """An episode: `steps` is how many it has, `last` the number of the last one appended, or 0."""

    name: str
    root: SnapshotId | None
    time_ns: int
    metadata: dict[str, object]
    steps: int
    last: int


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """Which steps are wanted; None asks for nothing.

    `verdict` is the verdict now, `least` and `most` bound the reward now and leave out steps
    without one, `ran` stands somewhere in the words of the command, joined by spaces.
    """

    verdict: str | None = None
    least: float | None = None
    most: float | None = None
    ran: str | None = None

    def fits(self, step: Step) -> bool:
        """Tells whether a step is wanted."""
        return (
            self.verdict in {None, step.verdict}
            and (self.least is None or (step.reward is not None and step.reward >= self.least))
            and (self.most is None or (step.reward is not None and step.reward <= self.most))
            and (self.ran is None or self.ran in " ".join(step.command or ()))
        )

    def needles(self) -> tuple[bytes, bytes]:
        """Returns bytes that are in the record of the command, and of the verdict, if it fits."""
        words = (self.ran or "").split(" ")
        return max(words, key=len).encode(), (self.verdict or "").encode()


def read_episode(reader: Reader, name: str) -> EpisodeRecord:
    """Returns an episode's record. Raises NotFoundError, CorruptStepError."""
    raw = reader.get(Db.EPISODES, episode_key(name)) if may_be_name(name) else None
    if raw is None:
        raise NotFoundError("episode", name)
    return decode_episode(name, raw)


def create_episode(
    writer: Writer, name: str, root: SnapshotId | None, metadata: dict[str, object]
) -> None:
    """Makes an episode.

    Raises InvalidNameError, NameTakenError, NotFoundError for the root, InvalidStepError.
    """
    check_name("episode", name)
    key = episode_key(name)
    if writer.has(Db.EPISODES, key):
        raise NameTakenError("episode", name)
    record = make_episode(root, metadata, time.time_ns())
    if root is not None:
        _hold(writer, root, name, None)
    writer.put(Db.EPISODES, key, seal(key, record))


def _hold(writer: Writer, snapshot: SnapshotId, name: str, number: int | None) -> None:
    given: object = snapshot
    if not isinstance(given, bytes) or len(given) != ID_BYTES:
        raise InvalidStepError("snapshot", f"{snapshot!r} is no snapshot's id")
    if not writer.has(Db.SNAPSHOTS, snapshot):
        raise NotFoundError("snapshot", snapshot.hex())
    writer.put(Db.EPISODES, hold_key(snapshot, name, number), b"")


def next_number(reader: Reader, name: str, first_free: int) -> int:
    """Returns the number that the next step gets."""
    start = step_key(name, 0)[:-8]
    last = reader.last(Db.EPISODES, start + b"\xff" * 17)
    if last is None or not last.startswith(start):
        return first_free
    return max(number_at(last[: len(start) + 8]) + 1, first_free)


def append(writer: Writer, name: str, new: NewStep, time_ns: int | None = None) -> Step:
    """Appends a step. Costs the same however many there are.

    Raises NotFoundError for an episode, a parent or a snapshot that is not there, and
    InvalidStepError for what cannot be kept.
    """
    return append_all(writer, name, [new], time_ns)[0]


def append_all(
    writer: Writer, name: str, steps: Sequence[NewStep], time_ns: int | None = None
) -> list[Step]:
    """Appends steps one after the other. Raises as `append`."""
    number = next_number(writer, name, read_episode(writer, name).first_free)
    return [_append(writer, name, number + at, new, time_ns) for at, new in enumerate(steps)]


def _append(writer: Writer, name: str, number: int, new: NewStep, time_ns: int | None) -> Step:
    parent = new.parent
    if parent is not None and type(parent) is not int:
        raise InvalidStepError("parent", f"{parent!r} is no step's number")
    if parent is not None and parent < 0:
        parent += number
    if parent is not None and not (
        0 < parent < number and writer.has(Db.EPISODES, step_key(name, parent))
    ):
        raise NotFoundError("step", f"{name}/{new.parent}")
    record = make_step(new, parent, time.time_ns() if time_ns is None else time_ns)
    if new.snapshot is not None:
        _hold(writer, new.snapshot, name, number)
    key = step_key(name, number)
    data = seal(key, record)
    writer.put(Db.EPISODES, key, data)
    writer.put(Db.EPISODES, child_key(name, parent, number), b"")
    if record.reward is not None:
        writer.put(Db.EPISODES, reward_key(name, record.reward, number), b"")
    return step_of(name, number, record)


def observe(writer: Writer, name: str, number: int, seen: Seen, time_ns: int | None = None) -> Step:
    """Appends what was learned of a step; returns it as it is known now.

    Raises NotFoundError, InvalidStepError.
    """
    before = read_step(writer, name, number)
    record = make_observation(before, seen, time.time_ns() if time_ns is None else time_ns)
    key = observation_key(name, number, before.observations + 1)
    writer.put(Db.EPISODES, key, seal(key, record))
    if record.reward is not None and record.reward != before.reward:
        if before.reward is not None:
            writer.delete(Db.EPISODES, reward_key(name, before.reward, number))
        writer.put(Db.EPISODES, reward_key(name, record.reward, number), b"")
    return msgspec.structs.replace(
        before,
        reward=record.reward,
        verdict=record.verdict,
        value=record.value,
        visits=record.visits,
        metadata=record.metadata,
        observations=before.observations + 1,
    )


def read_step(reader: Reader, name: str, number: int) -> Step:
    """Returns a step as it is known now. Raises NotFoundError, CorruptStepError."""
    raw = None
    if 0 < number < 1 << 63 and may_be_name(name):
        key = step_key(name, number)
        raw = reader.get(Db.EPISODES, key)
    if raw is None:
        read_episode(reader, name)
        raise NotFoundError("step", f"{name}/{number}")
    last = reader.last(Db.EPISODES, step_key(name, number + 1))
    if last is None or len(last) != len(key) + 8 or not last.startswith(key):
        return decode_step(name, number, raw, None, 0)
    which = number_at(last)
    seen = reader.get(Db.EPISODES, last)
    assert seen is not None  # its key was read in this transaction
    observation = decode_observation(name, number, which, seen)
    return decode_step(name, number, raw, observation, which)


def steps_with(
    reader: Reader, name: str, wanted: Filter, after: int, most: int
) -> tuple[list[Step], int | None]:
    """Returns steps that fit in the order of their numbers, out of the next `most`.

    And the number to go on after, None at the end. Raises CorruptStepError.
    """
    found: list[Step] = []
    start = step_key(name, 0)[:-8]
    place, looked = len(start), 0
    command, verdict = wanted.needles()
    number, raw, last, count = 0, memoryview(b""), memoryview(b""), 0

    def take() -> None:
        known = last if count else raw
        if (command and command not in bytes(raw)) or (verdict and verdict not in bytes(known)):
            return  # cheaper than to decode it
        seen = decode_observation(name, number, count, last) if count else None
        step = decode_step(name, number, raw, seen, count)
        if wanted.fits(step):
            found.append(step)

    for key, value in reader.items(Db.EPISODES, step_key(name, after + 1)):
        if not key.startswith(start):
            break
        if len(key) == place + 8:
            if looked:
                take()
            if looked == most:
                return found, number
            number, raw, count, looked = number_at(key), value, 0, looked + 1
        else:
            last, count = value, number_at(key)
    if looked:
        take()
    return found, None


def rewards(reader: Reader, name: str, from_reward: float | None = None) -> Iterator[
    tuple[float, int]
]:  # fmt: skip
    """Yields the rewards that steps have now, the greatest first, with the steps' numbers."""
    start = reward_key(name, 0.0)[:-16]
    begin = start if from_reward is None else reward_key(name, from_reward)
    for key in reader.keys(Db.EPISODES, begin):
        if not key.startswith(start):
            return
        yield reward_in(key), number_at(key)


def child_numbers(reader: Reader, name: str, parent: int | None) -> Iterator[int]:
    """Yields the numbers of a step's children, or of the steps without a parent."""
    begin = child_key(name, parent)
    for key in reader.keys(Db.EPISODES, begin):
        if not key.startswith(begin[:-8]):
            return
        yield number_at(key)


def snapshots_held(reader: Reader) -> Iterator[SnapshotId]:
    """Yields the snapshots that steps and episodes hold, each once."""
    before: SnapshotId | None = None
    for key in reader.keys(Db.EPISODES, b"\0"):
        if not is_hold(key):
            return
        snapshot = holder_in(key)[0]
        if snapshot != before:
            before = snapshot
            yield snapshot


def holders_of(reader: Reader, snapshot: SnapshotId) -> Iterator[str]:
    """Yields, in words, the steps and episodes that hold a snapshot."""
    begin = hold_key(snapshot)
    for key in reader.keys(Db.EPISODES, begin):
        if not key.startswith(begin):
            return
        _, name, number = holder_in(key)
        yield describe(name, number)


def path_to(reader: Reader, name: str, number: int) -> list[Step]:
    """Returns the steps that lead to one. Raises NotFoundError, CorruptStepError."""
    way = [read_step(reader, name, number)]
    while (parent := way[-1].parent) is not None:
        if parent >= way[-1].number:
            raise CorruptStepError(describe(name, way[-1].number), "its parent came after it")
        way.append(read_step(reader, name, parent))
    return way[::-1]


def episode_of(reader: Reader, name: str) -> Episode:
    """Returns an episode as it is now. Raises NotFoundError, CorruptStepError."""
    record = read_episode(reader, name)
    last = next_number(reader, name, record.first_free) - 1
    root = None if record.root is None else SnapshotId(record.root)
    return Episode(
        name=name, root=root, time_ns=record.time_ns, metadata=record.metadata,
        steps=last - record.removed, last=last,
    )  # fmt: skip
