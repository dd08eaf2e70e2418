"""Nodes: the immutable, content-addressed parts of trees, and their canonical encoding.

A node is one CBOR array (RFC 8949, core deterministic encoding: shortest integers, definite
lengths; there are no maps) stored under the BLAKE3 of those bytes:

    directory   [1, [entry, ...]]                           entries sorted by name
    index       [2, level, [[last name, node id, entries], ...]]   a directory's pages, in order
    list        [3, [ref, ...]]                             pieces of a long file
    entry       [name, kind, mode, mtime, size, content, xattrs, link, totals]
                and, in a tree that keeps owners, [..., totals, [uid, gid]]
    ref         [id, length, level]

`name` is bytes; `kind` 1 file, 2 directory, 3 symbolic link, 4 fifo; `mode` the permission
bits 0 to 0o7777; `mtime` nanoseconds since 1970 (signed 64 bits); `size` bytes: of a file its
length, of a link its target's, of a directory the sum of the files below it. `content` is
bytes (a file of up to INLINE_BYTES, a link's target, a directory's node id, empty for a fifo)
or an array of refs whose lengths add up to `size`. A ref of level 0 is a chunk, or a hole when
its id is null; of level n, a list node of refs of level n - 1. `xattrs` is an array of
[name, value] sorted by name. `link` is null or [group, count] for a file with several names:
8 bytes that its names in the tree share and nobody else, and how many they are. `totals` is
null, or for a directory [entries below it, of these with a link group] and, if it is not 0, the
number of those with an owner. An owner that is not kept is left out, never null.

Decoding is strict: whatever does not encode to the same bytes again, or breaks a rule above,
is a CorruptObjectError. A node that this store has let in is not encoded again each time it is
read: see docs/design/0002. cbor2 alone accepts trailing bytes and non-minimal integers. Who calls
it: the modules of the engine that walk trees; it knows nothing of where nodes are kept.
"""

from collections.abc import Iterator, Sequence
from enum import IntEnum
from operator import lt
from typing import Annotated, Any, NamedTuple, NewType

import cbor2
import msgspec

from engine.errors import CorruptObjectError
from engine.ids import ID_BYTES, NodeId, digest

LinkGroup = NewType("LinkGroup", bytes)

INLINE_BYTES = 128
"""A file of at most so many bytes stands in its entry."""
LONGEST_NAME = 255
DEEPEST = 512
"""How many directories may stand inside each other."""
LONGEST_REFS = 32
"""An entry with more refs than this puts them into list nodes."""
LIST_REFS = 1024
"""How many refs a list node has at most."""
TALLEST = 6
"""The highest level of a ref: 1024**6 chunks."""

_INT64 = 1 << 63
EARLIEST_NS, LATEST_NS = -_INT64, _INT64 - 1
"""The times that an entry can have."""
LARGEST_USER_ID = (1 << 32) - 2
"""The highest number of a user or group: chown(2) takes the next one to mean none."""
_DIRECTORY, _INDEX, _LIST = 1, 2, 3
_RESERVED = frozenset((b".", b".."))


class Kind(IntEnum):
    """What an entry is."""

    FILE = 1
    DIRECTORY = 2
    SYMLINK = 3
    FIFO = 4


class Ref(msgspec.Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True):
    """A piece of a file: `length` bytes in a chunk, a hole (id None), or a list node."""

    id: bytes | None
    length: int
    level: int


class Link(msgspec.Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True):
    """The hard-link group of a file: what its `count` names share."""

    group: bytes
    count: int


class Totals(msgspec.Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True):
    """What lies below a directory: entries of any kind, those in a link group, with an owner."""

    entries: int
    links: int
    owners: int = 0


_UserId = Annotated[int, msgspec.Meta(ge=0, le=LARGEST_USER_ID)]


class Owner(NamedTuple):
    """The user and group that a file belongs to, by number."""

    uid: _UserId
    gid: _UserId


class Entry(msgspec.Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True):
    """One name in a directory with all that is known of it."""

    name: bytes
    kind: int
    mode: Annotated[int, msgspec.Meta(ge=0, le=0o7777)]
    mtime_ns: Annotated[int, msgspec.Meta(ge=EARLIEST_NS, le=LATEST_NS)]
    size: Annotated[int, msgspec.Meta(ge=0, le=LATEST_NS)]
    content: bytes | tuple[Ref, ...]
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    link: Link | None = None
    totals: Totals | None = None
    owner: Owner | None = None


class Page(msgspec.Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True):
    """One page of a large directory: its last name, its node, its number of entries."""

    last: bytes
    node: bytes
    entries: int


class DirectoryNode(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A directory, or one page of a large one."""

    tag: int
    entries: tuple[Entry, ...]


class IndexNode(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """The pages of a large directory. At level 1 they are directory nodes, above it indexes."""

    tag: int
    level: int
    pages: tuple[Page, ...]


class ListNode(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Consecutive pieces of a long file."""

    tag: int
    refs: tuple[Ref, ...]


Node = DirectoryNode | IndexNode | ListNode


def directory_node(entries: tuple[Entry, ...]) -> DirectoryNode:
    """Makes a directory node of sorted entries."""
    return DirectoryNode(_DIRECTORY, entries)


def index_node(level: int, pages: tuple[Page, ...]) -> IndexNode:
    """Makes an index node."""
    return IndexNode(_INDEX, level, pages)


def list_node(refs: tuple[Ref, ...]) -> ListNode:
    """Makes a list node."""
    return ListNode(_LIST, refs)


def encode(value: msgspec.Struct) -> bytes:
    """Returns the canonical CBOR of a node or record; it has arrays, no maps of ours."""
    plain = msgspec.to_builtins(value, builtin_types=(bytes,))
    if isinstance(value, DirectoryNode):
        for entry in plain[1]:
            _leave_out_absent(entry)
    elif isinstance(value, Entry):
        _leave_out_absent(plain)
    else:  # a record
        for at, field in enumerate(value.__struct_fields__):
            if isinstance(getattr(value, field), Entry):
                _leave_out_absent(plain[at])
    return cbor2.dumps(plain, canonical=True)


def _leave_out_absent(entry: list[Any]) -> None:
    """Cuts off what an entry without an owner, or with none below it, does not say."""
    if entry[8] is not None and not entry[8][2]:
        del entry[8][2]
    if entry[9] is None:
        del entry[9]


def encode_item(item: Entry | Page) -> bytes:
    """Returns what `encode` returns, for items of which a splice needs one after the other.

    Of a page, and of an entry without any extras, several times as fast.
    """
    if isinstance(item, Page):
        name = _head(0x40, len(item.last)) + item.last
        return b"".join((b"\x83", name, b"\x58\x20", item.node, _head(0, item.entries)))
    content = item.content
    if item.xattrs or item.link is not None or item.mtime_ns < 0 or not isinstance(content, bytes):
        return encode(item)
    totals, owner = item.totals, item.owner
    return b"".join((
        b"\x89" if owner is None else b"\x8a",
        _head(0x40, len(item.name)), item.name, _head(0, item.kind), _head(0, item.mode),
        _head(0, item.mtime_ns), _head(0, item.size), _head(0x40, len(content)), content,
        b"\x80\xf6\xf6" if totals is None else b"\x80\xf6" + _encoded_totals(totals),
        b"" if owner is None else b"\x82" + _head(0, owner.uid) + _head(0, owner.gid),
    ))  # fmt: skip


def _encoded_totals(totals: Totals) -> bytes:
    below = _head(0, totals.entries) + _head(0, totals.links)
    return b"\x83" + below + _head(0, totals.owners) if totals.owners else b"\x82" + below


def head(node: DirectoryNode | IndexNode) -> bytes:
    """Returns what the encoding of a directory or index begins with, before its first item."""
    if isinstance(node, DirectoryNode):
        return b"\x82\x01" + _head(0x80, len(node.entries))
    return b"\x83\x02" + bytes((node.level,)) + _head(0x80, len(node.pages))


def _head(kind: int, value: int) -> bytes:
    """Returns the first bytes of an integer (`kind` 0), of bytes (0x40), of an array (0x80)."""
    if value < 24:
        return bytes((kind | value,))
    if value < 1 << 8:
        return bytes((kind | 24, value))
    if value < 1 << 16:
        return bytes((kind | 25,)) + value.to_bytes(2, "big")
    if value < 1 << 32:
        return bytes((kind | 26,)) + value.to_bytes(4, "big")
    return bytes((kind | 27,)) + value.to_bytes(8, "big")


def node_id(encoded: bytes) -> NodeId:
    """Returns the id of an encoded node."""
    return NodeId(digest(encoded))


def decode(identifier: NodeId, data: bytes | memoryview, *, strict: bool = True) -> Node:
    """Returns the node that `data` encodes, having checked it against its id and every rule.

    Without `strict`, all but that the encoding is canonical, which takes longer than the rest:
    for what is in a store, where only what was checked, or encoded here, comes in. Raises
    CorruptObjectError.
    """
    data = bytes(data)
    if digest(data) != identifier:
        raise CorruptObjectError("node", identifier, "its bytes do not match its id")
    try:
        plain = cbor2.loads(data)
        tag = plain[0] if isinstance(plain, list) and plain else None
        node: Node
        if tag == _DIRECTORY:
            node = msgspec.convert(plain, DirectoryNode)
        elif tag == _INDEX:
            node = msgspec.convert(plain, IndexNode)
        elif tag == _LIST:
            node = msgspec.convert(plain, ListNode)
        else:
            raise ValueError(f"it starts with {tag!r}")
        if strict and encode(node) != data:
            raise ValueError("its encoding is not canonical")
        _check(node)
    except (ValueError, TypeError, RecursionError, OverflowError, cbor2.CBORError) as error:
        raise CorruptObjectError("node", identifier, str(error)) from error
    return node


def child_ids(identifier: bytes, data: bytes | memoryview) -> tuple[set[bytes], set[bytes]]:
    """Returns the ids of the nodes and of the chunks that a node names.

    For walks that need no more: checked against the id, decoded no further, in a quarter of the
    time of `decode`. Raises CorruptObjectError.
    """
    nodes: set[bytes] = set()
    chunks: set[bytes] = set()
    try:
        plain = _plain(identifier, data)
        if plain[0] == _DIRECTORY:
            for entry in plain[1]:
                content = entry[5]
                if entry[1] == Kind.DIRECTORY:
                    nodes.add(content)
                elif type(content) is list:
                    for ref in content:
                        (nodes if ref[2] else chunks).add(ref[0])
        elif plain[0] == _INDEX:
            nodes.update(page[1] for page in plain[2])
        else:
            for ref in plain[1]:
                (nodes if ref[2] else chunks).add(ref[0])
        chunks.discard(None)  # holes
        if not all(
            type(i) is bytes and len(i) == ID_BYTES for found in (nodes, chunks) for i in found
        ):
            raise ValueError("a piece without an id")
    except (ValueError, TypeError, LookupError) as error:
        raise CorruptObjectError("node", identifier, str(error)) from error
    return nodes, chunks


def _plain(identifier: bytes, data: bytes | memoryview) -> Any:
    data = bytes(data)
    if digest(data) != identifier:
        raise CorruptObjectError("node", identifier, "its bytes do not match its id")
    try:
        plain = cbor2.loads(data)
        if not isinstance(plain, list) or plain[0] not in {_DIRECTORY, _INDEX, _LIST}:
            raise ValueError("it is no node")
    except (ValueError, TypeError, LookupError, RecursionError, cbor2.CBORError) as error:
        raise CorruptObjectError("node", identifier, str(error)) from error
    return plain


def references(
    identifier: bytes, data: bytes | memoryview
) -> Iterator[tuple[bytes, bytes, bool, int]]:
    """Yields (name, id, is it a node, length) of all that a node names.

    A page has no name, only a piece of a file has a length.

    As `child_ids`, for walks that need to know where. Raises CorruptObjectError.
    """
    try:
        plain = _plain(identifier, data)
        if plain[0] == _DIRECTORY:
            for entry in plain[1]:
                content = entry[5]
                if entry[1] == Kind.DIRECTORY:
                    yield entry[0], _checked_id(content), True, 0
                elif isinstance(content, list):
                    for ref in content:
                        if ref[0] is not None:
                            yield entry[0], _checked_id(ref[0]), ref[2] > 0, ref[1]
        elif plain[0] == _INDEX:
            for page in plain[2]:
                yield b"", _checked_id(page[1]), True, 0
        else:
            for ref in plain[1]:
                if ref[0] is not None:
                    yield b"", _checked_id(ref[0]), ref[2] > 0, ref[1]
    except (ValueError, TypeError, LookupError) as error:
        raise CorruptObjectError("node", identifier, str(error)) from error


def _checked_id(value: object) -> bytes:
    if not isinstance(value, bytes) or len(value) != ID_BYTES:
        raise ValueError("a piece without an id")
    return value


def _check(node: Node) -> None:
    if isinstance(node, DirectoryNode):
        _check_names([entry.name for entry in node.entries])
        _check_entries(node.entries)
    elif isinstance(node, IndexNode):
        if not 1 <= node.level <= TALLEST or not node.pages:
            raise ValueError("an index without pages, or of an impossible level")
        previous = b""
        for page in node.pages:
            if page.last <= previous or len(page.node) != ID_BYTES or page.entries < 1:
                raise ValueError(f"a wrong page at {page.last!r}")
            previous = page.last
    else:
        _check_refs(node.refs, LIST_REFS)


def _check_names(names: Sequence[bytes]) -> None:
    """Raises ValueError for names that cannot be those of a directory; fast where they can."""
    together = b"/".join(names)
    if (
        all(map(lt, names, names[1:]))
        and together.count(b"/") == max(len(names) - 1, 0)
        and b"\0" not in together
        and _RESERVED.isdisjoint(names)
        and (not names or (names[0] and max(map(len, names)) <= LONGEST_NAME))
    ):
        return
    previous = b""
    for name in names:
        if name <= previous:
            raise ValueError(f"names not sorted at {name!r}")
        previous = name
        check_file_name(name)


def _check_entries(entries: Sequence[Entry]) -> None:
    """Raises ValueError as `check_entry`; numbers were checked when the types were.

    Most entries are files without any extras in one piece: nothing is called for those.
    """
    for entry in entries:
        # Kind.FILE would be looked up each time, at a third of what all of this takes.
        if entry.kind == 1 and entry.link is None and entry.totals is None and not entry.xattrs:
            content = entry.content
            if isinstance(content, bytes):
                if len(content) == entry.size <= INLINE_BYTES:
                    continue
            elif len(content) == 1:
                ref = content[0]
                if (
                    not ref.level
                    and ref.length == entry.size > 0
                    and ref.id is not None
                    and len(ref.id) == ID_BYTES
                ):
                    continue
        check_entry(entry)


def check_file_name(name: bytes) -> None:
    """Raises ValueError for what cannot be a name in a directory."""
    if not name or len(name) > LONGEST_NAME or b"/" in name or b"\0" in name:
        raise ValueError(f"impossible name {name[:300]!r}")
    if name in _RESERVED:
        raise ValueError(f"reserved name {name!r}")


def check_entry(entry: Entry) -> None:
    """Raises ValueError for an entry that breaks the format's rules; not about its name."""
    content = entry.content
    if not 0 <= entry.mode <= 0o7777 or entry.size < 0:
        raise ValueError(f"impossible mode or size of {entry.name!r}")
    if not EARLIEST_NS <= entry.mtime_ns <= LATEST_NS or entry.size >= _INT64:
        raise ValueError(f"a number of {entry.name!r} exceeds 64 bits")
    if entry.kind == Kind.FILE:
        if isinstance(content, tuple):
            if len(content) > LONGEST_REFS or _check_refs(content, LONGEST_REFS) != entry.size:
                raise ValueError(f"the pieces of {entry.name!r} do not make up its size")
        elif len(content) != entry.size or entry.size > INLINE_BYTES:
            raise ValueError(f"the content of {entry.name!r} does not have its size")
    elif not isinstance(content, bytes):
        raise ValueError(f"{entry.name!r} has pieces but is no file")
    elif entry.kind == Kind.DIRECTORY:
        if len(content) != ID_BYTES:
            raise ValueError(f"{entry.name!r} has no node id")
    elif entry.kind == Kind.SYMLINK:
        if not content or b"\0" in content or len(content) != entry.size or entry.size > 4095:
            raise ValueError(f"impossible target of {entry.name!r}")
    elif entry.kind != Kind.FIFO or content or entry.size:
        raise ValueError(f"unknown kind of {entry.name!r}")
    if (entry.totals is not None) != (entry.kind == Kind.DIRECTORY):
        raise ValueError(f"totals of {entry.name!r}")
    totals = entry.totals
    if totals is not None and not (
        0 <= totals.links <= totals.entries < _INT64 and 0 <= totals.owners <= totals.entries
    ):
        raise ValueError(f"impossible totals of {entry.name!r}")
    link = entry.link
    if link is not None and (
        entry.kind == Kind.DIRECTORY or len(link.group) != 8 or not 2 <= link.count < 1 << 32
    ):
        raise ValueError(f"impossible link group of {entry.name!r}")
    if entry.xattrs:
        _check_xattrs(entry)


def _check_xattrs(entry: Entry) -> None:
    previous = b""
    for name, value in entry.xattrs:
        if name <= previous or b"\0" in name or len(name) > 255 or len(value) > 65536:
            raise ValueError(f"impossible attribute of {entry.name!r}")
        previous = name


def _check_refs(refs: tuple[Ref, ...], most: int) -> int:
    """Returns the sum of the lengths."""
    if not refs or len(refs) > most:
        raise ValueError("a list without pieces, or with too many")
    level, total = refs[0].level, 0
    for ref in refs:
        if not 0 <= ref.level <= TALLEST or ref.level != level or ref.length < 1:
            raise ValueError("a piece of impossible level or length")
        if ref.id is None:
            if level:
                raise ValueError("a hole above the chunks")
        elif len(ref.id) != ID_BYTES:
            raise ValueError("a piece without an id")
        total += ref.length
    return total
