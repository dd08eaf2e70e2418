"""The audit of episodes: every record can be read, and every index says what the records say.

A part of `verifying`. Reads all of the database `episodes` once, in the order of its keys.
"""

from collections import Counter
from collections.abc import Iterator

import msgspec

from engine.episodes.steps import (
    Observation,
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
    number_at,
    reward_key,
    step_key,
)
from engine.errors import CorruptObjectError
from engine.storage.store import Db, Reader


class Audit(msgspec.Struct):
    """How many steps were read, and what is wrong, a sentence each."""

    steps: int = 0
    problems: list[str] = []


def audit(reader: Reader) -> Audit:
    """Reads all episodes; raises nothing for damage that it can name."""
    result = Audit(problems=[])
    holds: Counter[str] = Counter()
    for key in reader.keys(Db.EPISODES, b"\0"):
        if not is_hold(key):
            break
        holds[holder_in(key)[1]] += 1
    for name in episode_names(reader):
        episode = EpisodeAudit(reader, name)
        result.problems.extend(episode.problems(holds.pop(name, 0)))
        result.steps += len(episode.numbers)
    result.problems.extend(f"episode {name!r} is gone, but holds snapshots" for name in holds)
    return result


def episode_names(reader: Reader) -> Iterator[str]:
    """Yields the names of all episodes that have a row."""
    begin = b"\x01"
    while (key := next(reader.keys(Db.EPISODES, begin), b"")) != b"":
        raw_name = key.partition(b"\0")[0]
        yield raw_name.decode("utf-8", "backslashreplace")
        begin = raw_name + b"\x01"


class EpisodeAudit:
    """One episode; after `problems`, `rows` are the keys that its indexes should have.

    `readable` is False if that is not known. `numbers` are those of its steps.
    """

    def __init__(self, reader: Reader, name: str) -> None:
        self.reader, self.name = reader, name
        self.rows: set[bytes] = set()
        self.numbers: set[int] = set()
        self.readable = True
        self.removed = 0
        self.expected: Counter[str] = Counter()
        self.found: Counter[str] = Counter()

    def problems(self, holds: int) -> Iterator[str]:
        raw = self.reader.get(Db.EPISODES, episode_key(self.name))
        record = None
        try:
            if raw is None:
                self.readable = False
                yield f"episode {self.name!r} has no record"
            else:
                record = decode_episode(self.name, raw)
                self.removed = record.removed
                yield from self._held(record.root, None)
        except CorruptObjectError as error:
            self.readable = False
            yield str(error)
        whole = True
        for problem in self._steps():
            whole = False
            yield problem
        self.found["held snapshots"] = holds
        if not whole or record is None:
            return  # what the indexes should say is not known
        for index in sorted(self.expected.keys() | self.found.keys()):
            if self.expected[index] != self.found[index]:
                yield (
                    f"the index of {index} of episode {self.name!r} has {self.found[index]} "
                    f"rows instead of {self.expected[index]}"
                )

    def _held(self, snapshot: bytes | None, number: int | None) -> Iterator[str]:
        if snapshot is None:
            return
        self.expected["held snapshots"] += 1
        if not self.reader.has(Db.SNAPSHOTS, snapshot):
            yield f"{describe(self.name, number)} names snapshot {snapshot.hex()}, which is gone"
        key = hold_key(snapshot, self.name, number)
        self.rows.add(key)
        if not self.reader.has(Db.EPISODES, key):
            yield f"{describe(self.name, number)} does not hold its snapshot"

    def _steps(self) -> Iterator[str]:
        prefix = episode_key(self.name)
        waiting: tuple[int, bytes] | None = None
        seen: Observation | None = None
        count = 0
        for key, raw in self.reader.items(Db.EPISODES, prefix):
            if not key.startswith(prefix):
                break
            kind, length = key[len(prefix) : len(prefix) + 1], len(key) - len(prefix)
            if kind == b"s" and length == 9:
                if waiting is not None:
                    yield from self._step(*waiting, seen, count)
                waiting, seen, count = (number_at(key), bytes(raw)), None, 0
            elif kind == b"s" and length == 17:
                number, which = number_at(key, -16), number_at(key)
                if waiting is None or waiting[0] != number or which != count + 1:
                    self.readable = False
                    yield f"{describe(self.name, number)} lacks what observation {which} is of"
                    continue
                try:
                    seen, count = decode_observation(self.name, number, which, raw), which
                except CorruptObjectError as error:
                    self.readable = False
                    yield str(error)
            elif kind in b"cr" and length == 17:
                self.found["children" if kind == b"c" else "rewards"] += 1
            elif length:
                self.readable = False
                yield f"episode {self.name!r} has a row that is of no kind"
        if waiting is not None:
            yield from self._step(*waiting, seen, count)

    def _step(self, number: int, raw: bytes, seen: Observation | None, count: int) -> Iterator[str]:
        self.numbers.add(number)
        try:
            step = decode_step(self.name, number, raw, seen, count)
        except CorruptObjectError as error:
            self.readable = False
            yield str(error)
            return
        yield from self._held(step.snapshot, number)
        yield from self._indexed(step)

    def _indexed(self, step: Step) -> Iterator[str]:
        what = describe(self.name, step.number)
        above = step.parent
        self.expected["children"] += 1
        key = child_key(self.name, above, step.number)
        self.rows.add(key)
        if not self.reader.has(Db.EPISODES, key):
            yield f"{what} is not in the index of children"
        if above is not None and not self.reader.has(Db.EPISODES, step_key(self.name, above)):
            self.readable = False
            yield f"{what} went on from step {above}, which is gone"
        if step.reward is not None:
            self.expected["rewards"] += 1
            key = reward_key(self.name, step.reward, step.number)
            self.rows.add(key)
            if not self.reader.has(Db.EPISODES, key):
                yield f"{what} is not in the index of rewards"
