"""Steps of an episode: what a record holds, and the keys that records and indexes stand under.

All in the database `episodes`. NAME is the episode's name, which has no zero byte; N, P and Q are
8 bytes, big-endian: the number of a step, that of its parent, that of an observation.

    NAME 00              the episode
    NAME 00 s N          a step
    NAME 00 s N Q        an observation of it, Q from 1
    NAME 00 c P N        index: step N is a child of P; P is all ones if it has no parent
    NAME 00 r R N        index: step N's reward now; R is its order, the greatest first
    00 SNAPSHOT NAME 00 N    index: step N holds that snapshot; without N: it is the root

The value of an index is empty. That of a record is 8 bytes, the beginning of the BLAKE3 of key
and encoding, then the encoding, a canonical CBOR array:

    episode      [1, root or null, time, metadata, first number free, steps removed]
    step         [1, parent or null, action, snapshot or null, summary, reward or null,
                  verdict or null, [word, ...] or null, time, metadata]
    observation  [1, time, reward or null, verdict or null, value or null, visits or null, metadata]

An observation says all that is known of its step from then on, so the last one is enough.
R is the 64 bits of the IEEE number; inverted if it is positive, but for the sign bit.
Decoding is strict. Steps and observations are never changed; the episode's two numbers change
when steps are removed, so that no number is given twice.
"""

import math
import struct
from typing import Any

import cbor2
import msgspec

from engine.errors import CorruptObjectError, EngineError
from engine.ids import ID_BYTES, SnapshotId, digest
from engine.storage.nodes import encode
from engine.storage.snapshots import check_json, plain_json

_VERSION = 1
_SUM_BYTES = 8
_NUMBER = struct.Struct(">Q")
_FLOAT = struct.Struct(">d")
_SIGN = 1 << 63
_ALL = (1 << 64) - 1
_MOST = _ALL - 1
"""The greatest number of a step; all ones stand for none."""


class InvalidStepError(EngineError):
    """What was to be kept of a step cannot be. `field` is the part, `why` what is wrong."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"a step's {field} cannot be kept: {why}")
        self.field, self.why = field, why


class CorruptStepError(CorruptObjectError):
    """The record of an episode, a step or an observation is not what was stored."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__("step", b"", why)
        self.args = (f"{what} is corrupt: {why}",)
        self.what = what


class NewStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step to be appended. All but `parent`, `snapshot`, `reward`, `verdict` is kept as it is.

    `parent` is a step's number, None for a first step, or below zero so many steps before this
    one: -1 is the step that was appended last. `action`, `summary` and `metadata` are any JSON;
    `command` is what was run, word by word.
    """

    parent: int | None = None
    action: Any = None
    snapshot: SnapshotId | None = None
    summary: Any = None
    reward: float | None = None
    verdict: str | None = None
    command: tuple[str, ...] | None = None
    metadata: dict[str, Any] = {}


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What was learned of a step later; None, and keys not in `metadata`, leave what was known."""

    reward: float | None = None
    verdict: str | None = None
    value: float | None = None
    visits: int | None = None
    metadata: dict[str, Any] = {}


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """A step as it is known now.

    `reward`, `verdict`, `value`, `visits` and `metadata` are those of the last observation, and
    `observations` is how many there were; the rest is as it was appended. `time_ns` since 1970.
    """

    episode: str
    number: int
    parent: int | None
    action: Any
    snapshot: SnapshotId | None
    summary: Any
    reward: float | None
    verdict: str | None
    command: tuple[str, ...] | None
    time_ns: int
    metadata: dict[str, Any]
    value: float | None = None
    visits: int | None = None
    observations: int = 0


class Observation(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """All that was known of a step at a time."""

    version: int
    time_ns: int
    reward: float | None
    verdict: str | None
    value: float | None
    visits: int | None
    metadata: dict[str, Any]


class EpisodeRecord(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """An episode's own record."""

    version: int
    root: bytes | None
    time_ns: int
    metadata: dict[str, Any]
    first_free: int
    removed: int


class StepRecord(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A step as it is stored; number and episode are in its key."""

    version: int
    parent: int | None
    action: Any
    snapshot: bytes | None
    summary: Any
    reward: float | None
    verdict: str | None
    command: tuple[str, ...] | None
    time_ns: int
    metadata: dict[str, Any]


# Keys.


def episode_key(name: str) -> bytes:
    """Returns the key of an episode, with which those of its steps begin."""
    return name.encode("utf-8", "surrogateescape") + b"\0"


def step_key(name: str, number: int) -> bytes:
    """Returns the key of a step; its observations follow it."""
    return episode_key(name) + b"s" + _NUMBER.pack(number)


def observation_key(name: str, number: int, which: int) -> bytes:
    """Returns the key of a step's observation."""
    return step_key(name, number) + _NUMBER.pack(which)


def child_key(name: str, parent: int | None, number: int = 0) -> bytes:
    """Returns the key of the index of children, where those of a parent begin."""
    above = _ALL if parent is None else parent
    return episode_key(name) + b"c" + _NUMBER.pack(above) + _NUMBER.pack(number)


def reward_key(name: str, reward: float, number: int = 0) -> bytes:
    """Returns the key of the index of rewards, where steps of that reward begin."""
    (bits,) = _NUMBER.unpack(_FLOAT.pack(reward + 0.0))  # -0.0 + 0.0 is 0.0
    order = bits if bits & _SIGN else bits ^ (_ALL ^ _SIGN)
    return episode_key(name) + b"r" + _NUMBER.pack(order) + _NUMBER.pack(number)


def hold_key(snapshot: bytes, name: str = "", number: int | None = None) -> bytes:
    """Returns the key of the index of held snapshots; without a name, where it begins."""
    if not name:
        return b"\0" + snapshot
    tail = b"" if number is None else _NUMBER.pack(number)
    return b"\0" + snapshot + episode_key(name) + tail


def number_at(key: bytes, place: int = -8) -> int:
    """Returns the number that stands in a key at a place from its end."""
    end = place + 8
    (number,) = _NUMBER.unpack(key[place : end or None])
    return int(number)


def parent_in(key: bytes) -> int | None:
    """Returns the parent that a key of the index of children has."""
    parent = number_at(key, -16)
    return None if parent == _ALL else parent


def reward_in(key: bytes) -> float:
    """Returns the reward that a key of the index of rewards has."""
    order = number_at(key, -16)
    bits = order if order & _SIGN else order ^ (_ALL ^ _SIGN)
    (reward,) = _FLOAT.unpack(_NUMBER.pack(bits))
    return float(reward)


def holder_in(key: bytes) -> tuple[SnapshotId, str, int | None]:
    """Returns the snapshot, the episode and the step, None for the root, of a held snapshot."""
    snapshot, rest = key[1 : 1 + ID_BYTES], key[1 + ID_BYTES :]
    name, _, tail = rest.partition(b"\0")
    return SnapshotId(snapshot), name.decode("utf-8", "replace"), number_at(key) if tail else None


def may_be_name(name: str) -> bool:
    """Tells whether a key can be made of a name that the user gave."""
    return 0 < len(name) <= 200 and name.isascii() and name.isprintable()


def is_hold(key: bytes) -> bool:
    """Tells whether a key is of the index of held snapshots: no name begins with its byte."""
    return key[:1] == b"\0"


# Records.


def is_sealed(key: bytes, raw: bytes | memoryview) -> bool:
    """Tells whether a value is one that was stored under its key."""
    return digest(key + bytes(raw[_SUM_BYTES:]))[:_SUM_BYTES] == raw[:_SUM_BYTES]


def seal(key: bytes, record: msgspec.Struct) -> bytes:
    """Returns the value under which a record is stored."""
    data = encode(record)
    return digest(key + data)[:_SUM_BYTES] + data


def _open(key: bytes, raw: bytes | memoryview, what: str) -> bytes:
    data = bytes(raw)
    if digest(key + data[_SUM_BYTES:])[:_SUM_BYTES] != data[:_SUM_BYTES]:
        raise CorruptStepError(what, "its bytes are not those that were stored")
    return data[_SUM_BYTES:]


_Record = EpisodeRecord | StepRecord | Observation


def _decode(key: bytes, raw: bytes | memoryview, kind: type[_Record], what: str) -> _Record:
    data = _open(key, raw, what)
    try:
        record = msgspec.convert(cbor2.loads(data), kind)
        if encode(record) != data or record.version != _VERSION:
            raise ValueError("its encoding is not canonical, or of another version")
        check_json(record.metadata, "metadata")
        if isinstance(record, StepRecord):
            check_json(record.action, "action")
            check_json(record.summary, "summary")
            _check_id(record.snapshot)
            _check_finite(record.reward)
        elif isinstance(record, Observation):
            _check_finite(record.reward)
            _check_finite(record.value)
        else:
            _check_id(record.root)
    except (ValueError, TypeError, RecursionError, OverflowError, cbor2.CBORError) as error:
        raise CorruptStepError(what, str(error)) from error
    return record


def _check_id(identifier: bytes | None) -> None:
    if identifier is not None and len(identifier) != ID_BYTES:
        raise ValueError("a snapshot without an id")


def _check_finite(number: float | None) -> None:
    if number is not None and not math.isfinite(number):
        raise ValueError(f"the number {number}")


def decode_episode(name: str, raw: bytes | memoryview) -> EpisodeRecord:
    """Returns an episode's record. Raises CorruptStepError."""
    record = _decode(episode_key(name), raw, EpisodeRecord, f"episode {name!r}")
    assert isinstance(record, EpisodeRecord)
    return record


def decode_observation(name: str, number: int, which: int, raw: bytes | memoryview) -> Observation:
    """Returns an observation. Raises CorruptStepError."""
    what = f"observation {which} of {describe(name, number)}"
    record = _decode(observation_key(name, number, which), raw, Observation, what)
    assert isinstance(record, Observation)
    return record


def decode_step(
    name: str, number: int, raw: bytes | memoryview, last: Observation | None, count: int
) -> Step:
    """Returns a step with what its last observation, of so many, says. Raises CorruptStepError."""
    record = _decode(step_key(name, number), raw, StepRecord, describe(name, number))
    assert isinstance(record, StepRecord)
    return step_of(name, number, record, last, count)


def step_of(
    name: str, number: int, record: StepRecord, last: Observation | None = None, count: int = 0
) -> Step:
    """Returns the step of a record, with what its last observation, of so many, says."""
    known: StepRecord | Observation = record if last is None else last
    return Step(
        episode=name,
        number=number,
        parent=record.parent,
        action=record.action,
        snapshot=None if record.snapshot is None else SnapshotId(record.snapshot),
        summary=record.summary,
        reward=known.reward,
        verdict=known.verdict,
        command=record.command,
        time_ns=record.time_ns,
        metadata=known.metadata,
        value=None if last is None else last.value,
        visits=None if last is None else last.visits,
        observations=count,
    )


def describe(name: str, number: int | None) -> str:
    """Returns a step, or the root of an episode, in words."""
    return f"the root of episode {name!r}" if number is None else f"step {number} of {name!r}"


def make_episode(root: bytes | None, metadata: dict[str, Any], time_ns: int) -> EpisodeRecord:
    """Returns the record of a new episode. Raises InvalidStepError."""
    return EpisodeRecord(_VERSION, root, time_ns, checked_object("metadata", metadata), 1, 0)


def make_step(new: NewStep, parent: int | None, time_ns: int) -> StepRecord:
    """Returns the record of a new step. Raises InvalidStepError."""
    return StepRecord(
        _VERSION,
        parent,
        checked_json("action", new.action),
        new.snapshot,
        checked_json("summary", new.summary),
        checked_number("reward", new.reward),
        checked_text("verdict", new.verdict),
        checked_words(new.command),
        time_ns,
        checked_object("metadata", new.metadata),
    )


def make_observation(before: Step, seen: Seen, time_ns: int) -> Observation:
    """Returns what is known of a step after something was seen. Raises InvalidStepError."""
    reward, value = checked_number("reward", seen.reward), checked_number("value", seen.value)
    verdict, visits = checked_text("verdict", seen.verdict), seen.visits
    if visits is not None and (type(visits) is not int or not 0 <= visits <= _ALL >> 1):
        raise InvalidStepError("visits", "give a whole number from 0 on")
    return Observation(
        _VERSION,
        time_ns,
        before.reward if reward is None else reward,
        before.verdict if verdict is None else verdict,
        before.value if value is None else value,
        before.visits if visits is None else visits,
        before.metadata | checked_object("metadata", seen.metadata),
    )


def checked_json(field: str, value: Any) -> Any:
    """Returns a value that JSON has, its text made UTF-8. Raises InvalidStepError."""
    try:
        check_json(value, field)
        return plain_json(value)
    except (ValueError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        why = "it is nested too deeply" if deep else str(error)
        raise InvalidStepError(field, why) from error


def checked_object(field: str, value: Any) -> dict[str, Any]:
    """Returns a JSON object. Raises InvalidStepError."""
    if not isinstance(value, dict):
        raise InvalidStepError(field, "give an object, names with values")
    found: dict[str, Any] = checked_json(field, value)
    return found


def checked_number(field: str, value: Any) -> float | None:
    """Returns a finite number. Raises InvalidStepError."""
    if value is None:
        return None
    try:
        number = float(value) + 0.0
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidStepError(field, f"{value!r} is no number") from error
    if isinstance(value, str | bytes) or not math.isfinite(number):
        raise InvalidStepError(field, f"{value!r} is no finite number")
    return number


def checked_text(field: str, value: Any) -> str | None:
    """Returns text as UTF-8. Raises InvalidStepError."""
    if value is not None and not isinstance(value, str):
        raise InvalidStepError(field, "give a text")
    text: str | None = plain_json(value)
    return text


def checked_words(value: Any) -> tuple[str, ...] | None:
    """Returns the words of a command. Raises InvalidStepError."""
    if value is None:
        return None
    words = isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)
    if not words:
        raise InvalidStepError("command", "give its words, each a text")
    return tuple(plain_json(word) for word in value)
