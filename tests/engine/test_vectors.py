"""The golden vectors: the format does not change by accident."""

import json

import pytest

from engine.episodes.steps import decode_episode, decode_observation, decode_step, holder_in
from engine.ids import ChunkId, NodeId, SnapshotId, digest
from engine.storage import chunking
from engine.storage.chunking import LARGEST_CHUNK, cut
from engine.storage.codec import pack, unpack
from engine.storage.nodes import DirectoryNode, decode, directory_node, encode
from engine.storage.snapshots import decode_snapshot, encode_snapshot
from tests.engine.make_vectors import VECTORS, entries, make, words

KNOWN = json.loads(VECTORS.read_text())


def test_the_vectors_are_what_the_program_makes():
    assert make() == KNOWN


@pytest.mark.parametrize("name", [name for name in KNOWN if "encoding" in KNOWN[name]])
def test_an_encoding_decodes_and_encodes_to_itself(name: str):
    data, identifier = bytes.fromhex(KNOWN[name]["encoding"]), bytes.fromhex(KNOWN[name]["id"])
    assert digest(data) == identifier
    if name == "snapshot":
        snapshot = decode_snapshot(SnapshotId(identifier), data)
        assert encode_snapshot(snapshot) == (identifier, data)
        assert snapshot.metadata == KNOWN[name]["metadata"]
    else:
        assert encode(decode(NodeId(identifier), data)) == data


def test_the_rows_of_an_episode_are_read():
    rows = {what: (bytes.fromhex(row["key"]), bytes.fromhex(row["value"]))
            for what, row in KNOWN["episode"]["rows"].items()}  # fmt: skip
    observation = decode_observation("e", 1, 1, rows["observation 1"][1])
    step = decode_step("e", 1, rows["step 1"][1], observation, 1)
    assert decode_episode("e", rows["episode"][1]).root == digest(b"root")
    assert (step.reward, step.verdict, step.value, step.visits) == (0.75, "fail", 0.5, 3)
    assert step.metadata == {"model": "m", "late": True}
    assert step.command == ("make", "check")
    assert holder_in(rows["root"][0]) == (digest(b"root"), "e", None)
    assert holder_in(rows["snapshot of the step"][0]) == (digest(b"snapshot"), "e", 1)


def test_every_kind_of_entry_survives():
    encoded = encode(directory_node(entries()))
    node = decode(NodeId(digest(encoded)), encoded)
    assert isinstance(node, DirectoryNode)
    assert node.entries == entries()


def test_a_chunk_of_either_codec_is_read():
    # zstd's output may change between its versions, so what is golden is what can be read.
    plain = b"AmalgamFS " * 20
    frame = bytes.fromhex("28b52ffd20c88d000050416d616c67616d4653200100bb520509")
    identifier = ChunkId(digest(plain))
    assert bytes(unpack(identifier, memoryview(b"\x01" + frame))) == plain
    assert bytes(unpack(identifier, memoryview(b"\x00" + plain))) == plain
    assert bytes(unpack(identifier, memoryview(pack(plain)))) == plain


@pytest.mark.parametrize("window", [LARGEST_CHUNK, LARGEST_CHUNK + 1, 300_001, 700_000])
def test_where_a_file_is_cut_does_not_depend_on_the_windows(window: int):
    data = words(1 << 20, 1)
    lengths: list[int] = []
    rest, at = b"", 0
    while at < len(data) or rest:
        rest, at = rest + data[at : at + window], at + window
        for length in cut(rest, last=at >= len(data)):
            lengths.append(length)
            rest = rest[length:]
        if at < len(data):
            assert len(rest) < LARGEST_CHUNK
    assert " ".join(map(str, lengths)) == KNOWN["chunks"]["lengths"]


def test_the_chunker_in_python_cuts_as_the_compiled_one(monkeypatch: pytest.MonkeyPatch):
    data = words(200_000, 2)
    quick = list(cut(data, last=True))
    monkeypatch.setattr(chunking, "compiled", lambda: False)
    chunking._chunker.cache_clear()
    slow = list(cut(data, last=True))
    chunking._chunker.cache_clear()
    assert slow == quick
    assert sum(slow) == len(data)


@pytest.mark.parametrize("size", [0, 1, 16_384])
def test_a_short_file_is_one_chunk(size: int):
    assert list(cut(bytes(size), last=True)) == ([size] if size else [])
