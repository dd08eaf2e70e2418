"""Makes the golden vectors: what other programs must get from the same input.

Run it from the project's directory to write vectors.json again, which is right only when the
format's version changes: `python -m tests.engine.make_vectors`.
"""

import json
from pathlib import Path
from typing import Any

from engine.episodes.steps import (
    NewStep,
    Seen,
    Step,
    child_key,
    episode_key,
    hold_key,
    make_episode,
    make_observation,
    make_step,
    observation_key,
    reward_key,
    seal,
    step_key,
)
from engine.ids import SnapshotId, digest
from engine.storage.chunking import cut
from engine.storage.codec import pack
from engine.storage.nodes import (
    Entry,
    Kind,
    Link,
    Owner,
    Page,
    Ref,
    Totals,
    directory_node,
    encode,
    index_node,
    list_node,
    node_id,
)
from engine.storage.objects import NodeBuffer
from engine.storage.snapshots import Snapshot, encode_snapshot
from engine.trees.directory import store_directory

VECTORS = Path(__file__).with_name("vectors.json")


def words(size: int, seed: int) -> bytes:
    """Returns `size` bytes of the generator that `vectors.json` describes."""
    state, made = seed, bytearray()
    for _ in range(size // 4):
        state = (state * 1664525 + 1013904223) % 2**32
        made += (state ^ state >> 16).to_bytes(4, "little")
    return bytes(made)


def numbered(count: int) -> list[Entry]:
    """Returns the empty files that the vector of a large directory has."""
    return [Entry(b"%05d" % n, Kind.FILE, 0o644, n, 0, b"") for n in range(count)]


def entries() -> tuple[Entry, ...]:
    """Returns one entry of every kind, with everything that an entry can have."""
    chunk, link, nothing = digest(b"chunk"), Link(b"8 bytes.", 2), Totals(0, 0)
    attributes = ((b"user.a", b""), (b"user.b", b"\x00\xff"))
    pieces = (Ref(chunk, 70_000, 0), Ref(None, 1 << 40, 0), Ref(chunk, 70_000, 0))
    lists = (Ref(digest(b"list"), 2_500_000, 1),)
    empty = node_id(encode(directory_node(())))
    return (
        Entry(b"\x01", Kind.FILE, 0, -1, 0, b""),
        Entry(b"directory", Kind.DIRECTORY, 0o1755, 10**18, 0, empty, attributes, None, nothing),
        Entry(b"fifo", Kind.FIFO, 0o600, 0, 0, b""),
        Entry(b"inline", Kind.FILE, 0o644, 1_600_000_000_123_456_789, 5, b"hello", attributes),
        Entry(b"link-1", Kind.FILE, 0o4755, 1, 5, b"hello", (), link),
        Entry(b"link-2", Kind.FILE, 0o4755, 1, 5, b"hello", (), link),
        Entry(b"lists", Kind.FILE, 0o644, 0, 2_500_000, lists),
        Entry(b"pieces", Kind.FILE, 0o7777, -(2**63), (1 << 40) + 140_000, pieces),
        Entry(b"symlink", Kind.SYMLINK, 0o777, 2**63 - 1, 6, b"../\xff\n "),
    )  # fmt: skip


def owned() -> tuple[Entry, ...]:
    """Returns entries with and without owners."""
    empty, totals = node_id(encode(directory_node(()))), Totals(4, 2, 3)
    return (
        Entry(b"d", Kind.DIRECTORY, 0o755, 1, 5, empty, (), None, totals, Owner(1000, 1000)),
        Entry(b"f", Kind.FILE, 0o4755, 1, 0, b"", (), None, None, Owner(0, 4_294_967_294)),
        Entry(b"n", Kind.FILE, 0o644, 1, 0, b""),
    )  # fmt: skip


def _node(node: Any) -> dict[str, str]:
    encoded = encode(node)
    return {"encoding": encoded.hex(), "id": node_id(encoded).hex()}


def make() -> dict[str, Any]:
    """Returns all vectors, ready for JSON."""
    data = words(1 << 20, 1)
    large = NodeBuffer()
    large_id = store_directory(large.put, numbered(5_000))
    chunk, empty = digest(b"chunk"), node_id(encode(directory_node(())))
    root = Entry(b"", Kind.DIRECTORY, 0o755, 7, 0, empty, (), None, Totals(0, 0))
    facts = {"b": [1, -1, None, True, 0.5], "aa": {"ü": "text"}}
    snapshot = Snapshot(1, root, (digest(b"parent"),), 1_700_000_000_000_000_000, "first", facts)
    identifier, record = encode_snapshot(snapshot)
    return {
        "digest": {
            "of the empty string": digest(b"").hex(),
            "of 'AmalgamFS'": digest(b"AmalgamFS").hex(),
        },
        "chunks": {
            "generator": "x(0) = seed; x(n) = (1664525 x(n-1) + 1013904223) mod 2^32; the data"
            " are x(1), x(2), ..., each xor itself shifted right by 16, 4 bytes little-endian",
            "seed": 1,
            "bytes": len(data),
            "digest": digest(data).hex(),
            "lengths": " ".join(map(str, cut(data, last=True))),
            "lengths of as many zeros": " ".join(map(str, cut(bytes(len(data)), last=True))),
            "stored raw, of 'abc'": pack(b"abc").hex(),
        },
        "empty directory": _node(directory_node(())),
        "directory with every kind of entry": {
            "entries": "an empty file from before 1970; a directory with attributes; a fifo; a file"
            " of 5 bytes with attributes; a file with two names; a file of one list; a file of"
            " chunk, hole, chunk; a link",
            **_node(directory_node(entries())),
        },
        "directory with owners": {
            "entries": "a directory of 1000:1000, in which 3 of 4 entries have an owner and 2 a"
            " link; a file of 0:4294967294; a file whose owner is not kept",
            **_node(directory_node(owned())),
        },
        "list of two chunks and a hole": _node(
            list_node((Ref(chunk, 262_144, 0), Ref(None, 1 << 32, 0), Ref(chunk, 1, 0)))
        ),
        "index of level 1": _node(index_node(1, (Page(b"m", chunk, 300), Page(b"z", empty, 2)))),
        "directory of 5000 entries": {
            "entries": "empty files 00000 to 04999, mode 0644; their times are their numbers",
            "id": large_id.hex(),
            "nodes": len(large.nodes),
        },
        "snapshot": {
            "root": "the empty directory, mode 0755, time 7",
            "metadata": facts,
            "encoding": record.hex(),
            "id": identifier.hex(),
        },
        "episode": _episode(),
    }


def _episode() -> dict[str, Any]:
    """Returns all rows of an episode of one step that was observed once."""
    episode = make_episode(digest(b"root"), {"seed": 7}, 1_700_000_000_000_000_000)
    new = NewStep(
        action={"edit": "a.c"}, snapshot=SnapshotId(digest(b"snapshot")), summary=[1, None],
        reward=-0.5, verdict="fail", command=("make", "check"), metadata={"model": "m"},
    )  # fmt: skip
    step = make_step(new, None, 1_700_000_000_000_000_001)
    before = Step(
        episode="e", number=1, parent=None, action=new.action, snapshot=new.snapshot,
        summary=new.summary, reward=new.reward, verdict=new.verdict, command=new.command,
        time_ns=step.time_ns, metadata=new.metadata,
    )  # fmt: skip
    seen = Seen(reward=0.75, value=0.5, visits=3, metadata={"late": True})
    observation = make_observation(before, seen, 1_700_000_000_000_000_002)
    rows = {
        "episode": (key := episode_key("e"), seal(key, episode)),
        "step 1": (key := step_key("e", 1), seal(key, step)),
        "observation 1": (key := observation_key("e", 1, 1), seal(key, observation)),
        "child of none": (child_key("e", None, 1), b""),
        "reward now": (reward_key("e", 0.75, 1), b""),
        "snapshot of the step": (hold_key(digest(b"snapshot"), "e", 1), b""),
        "root": (hold_key(digest(b"root"), "e"), b""),
    }
    return {
        "said": "action {edit: a.c}, summary [1, null], reward -0.5, verdict fail, command make"
        " check, metadata {model: m}; observed reward 0.75, value 0.5, 3 visits, {late: true}",
        "rows": {what: {"key": k.hex(), "value": v.hex()} for what, (k, v) in rows.items()},
        "order of rewards": {
            str(reward): reward_key("e", reward)[3:11].hex()
            for reward in (1e308, 1.0, 0.0, -0.0, -1.0, -1e308)
        },
    }


if __name__ == "__main__":
    VECTORS.write_text(json.dumps(make(), indent=1, ensure_ascii=False) + "\n")
