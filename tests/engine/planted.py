"""Trees of every shape for properties: what Hypothesis draws, a garden plants.

`trees()` draws functions that plant a tree in a `Garden` and return its root: nested
directories, every kind of entry, modes, times before 1970, attributes, names that are no
UTF-8, hard links, contents from empty to several chunks.
"""

from collections.abc import Callable

import msgspec
from hypothesis import strategies as st

from engine.storage.content import ingest_blocks
from engine.storage.nodes import Entry, Kind
from engine.trees.directory import directory_entry
from engine.trees.links import number_groups
from tests.engine.plants import Garden
from tests.engine.trees import noise

NAMES = [b"a", b"b", b"c", b"name with spaces", b"\xff\xfe", "ü".encode(), b"-x", b"l" * 255,
         b"new\nline", b"x=y", b"a" * 101]  # fmt: skip
names = st.sampled_from(NAMES)
modes = st.sampled_from([0o644, 0o755, 0, 0o4755, 0o7777])
times = st.sampled_from(
    [0, 1, -1, -1_500_000_001, 1_700_000_000_123_456_789, 10**9, -(10**9), 2**63 - 1, -(2**63)]
)
attributes = st.dictionaries(
    st.sampled_from([b"user.a", b"user.b=c", b"user.%3D", b"user.\xff"]),
    st.sampled_from([b"", b"v", b"\x00\xff\n", b"w" * 600]),
    max_size=2,
).map(lambda pairs: tuple(sorted(pairs.items())))
CONTENTS = [b"", b"x", b"y" * 128, b"z" * 129, b"line\n" * 500, noise(512), noise(16_385),
            noise(300_000), bytes(200_000)]  # fmt: skip
TARGETS = [b"a", b"../../etc/passwd", b"/", b"\xff", b"t" * 4095]
contents = st.integers(0, len(CONTENTS) - 1)  # Hypothesis prints what it draws
targets = st.integers(0, len(TARGETS) - 1)

leaves = st.one_of(
    st.tuples(st.just(Kind.FILE), contents, modes, times, attributes, st.integers(0, 5)),
    st.tuples(
        st.just(Kind.SYMLINK), targets, st.just(0o777), times, st.just(()), st.integers(0, 5)
    ),
    st.tuples(st.just(Kind.FIFO), st.just(0), modes, times, st.just(()), st.just(0)),
)
branches = st.recursive(
    st.dictionaries(names, leaves, max_size=4),
    lambda below: st.dictionaries(
        names, leaves | st.tuples(st.just(Kind.DIRECTORY), below, modes, times, attributes),
        max_size=4,
    ),
    max_leaves=6,
)  # fmt: skip


def trees() -> st.SearchStrategy[Callable[[Garden], Entry]]:
    """Draws trees. Files drawn alike, with the same number above 0, are names of one file."""
    roots = st.tuples(branches, modes, times, attributes)
    return roots.map(lambda root: lambda garden: _planted(garden, *root))


def _planted(garden: Garden, branch, mode, mtime_ns, xattrs) -> Entry:
    linked: dict[tuple[object, ...], list[tuple[bytes, Entry]]] = {}
    entries: dict[bytes, Entry] = {}

    def make(branch, path: bytes) -> None:
        for name, (kind, *rest) in sorted(branch.items()):
            child = path + b"/" + name if path else name
            if kind == Kind.DIRECTORY:
                make(rest[0], child)
                continue
            drawn, mode, mtime_ns, xattrs, number = rest
            data = {Kind.FILE: CONTENTS, Kind.SYMLINK: TARGETS, Kind.FIFO: [b""]}[kind][drawn]
            content, _ = (ingest_blocks([data], garden.sink.put, garden.nodes.put)
                          if kind == Kind.FILE else (data, 0))  # fmt: skip
            entry = Entry(name, kind, mode, mtime_ns, len(data), content, xattrs)
            entries[child] = entry
            if number:
                linked.setdefault((kind, *rest), []).append((child, entry))

    make(branch, b"")
    groups = [sorted(members, key=lambda m: m[0]) for members in linked.values()]
    entries.update(number_groups(sorted(groups, key=lambda members: members[0][0])))

    def close(branch, path: bytes, name: bytes, mode, mtime_ns, xattrs) -> Entry:
        found = []
        for below, (kind, *rest) in sorted(branch.items()):
            child = path + b"/" + below if path else below
            if kind == Kind.DIRECTORY:
                found.append(close(rest[0], child, below, *rest[1:]))
            else:
                found.append(msgspec.structs.replace(entries[child], name=below))
        return directory_entry(
            garden.nodes.put, found, name=name, mode=mode, mtime_ns=mtime_ns, xattrs=xattrs
        )

    root = close(branch, b"", b"", mode, mtime_ns, xattrs)
    garden.save()
    return root
