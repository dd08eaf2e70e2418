"""Directories: a sorted set of entries in one node, or in pages when it is large.

A directory of more than PAGED_FROM entries is a tree of pages. Where a page ends is decided
by the names alone: at level n it ends after a name whose BLAKE3 begins with PAGE_BITS * (n + 1)
zero bits, so the same set of entries always gives the same nodes whatever the order of edits,
and one changed entry rewrites one page and the indexes above it (see `directory_edit`). Reads
touch one page. (Prolly trees: Noms; here the boundary is a function of one name, as in a skip
list.)
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter

from engine.errors import CorruptObjectError
from engine.ids import NodeId, digest
from engine.storage.nodes import (
    DEEPEST,
    TALLEST,
    DirectoryNode,
    Entry,
    IndexNode,
    Kind,
    ListNode,
    Owner,
    Page,
    Totals,
    directory_node,
    index_node,
)
from engine.storage.objects import Objects, PutNode

PAGED_FROM = 256
"""A directory of more entries than this is split into pages."""

PAGE_BITS = 5
"""A page has 2 ** PAGE_BITS items on average, and the one that an item chosen at random is in
twice as many. Measured: see docs/design/0002."""

_NAME: Callable[[Entry], bytes] = attrgetter("name")
_LAST: Callable[[Page], bytes] = attrgetter("last")


class Directory:
    """A read-only view of one stored directory."""

    __slots__ = ("_node", "_objects", "identifier")

    def __init__(self, objects: Objects, identifier: NodeId) -> None:
        """Opens the directory; raises CorruptObjectError or MissingObjectError."""
        self._objects, self.identifier = objects, identifier
        self._node = open_node(objects, identifier)

    def get(self, name: bytes) -> Entry | None:
        """Returns the entry called `name`, or None."""
        found = self.place(name)
        return None if found is None else found[2]

    def place(self, name: bytes) -> tuple[NodeId, int, Entry] | None:
        """Returns the page that has the entry called `name`, the place there, and the entry."""
        node, floor, identifier = self._node, b"", self.identifier
        while isinstance(node, IndexNode):
            at = bisect_left(node.pages, name, key=_LAST)
            if at == len(node.pages):
                return None
            identifier = NodeId(node.pages[at].node)
            node, floor = open_page(self._objects, node, at, floor)
        entries = node.entries
        at = bisect_left(entries, name, key=_NAME)
        if at == len(entries) or entries[at].name != name:
            return None
        return identifier, at, entries[at]

    def __iter__(self) -> Iterator[Entry]:
        """Yields the entries by name."""
        node = self._node
        return iter(node.entries) if isinstance(node, DirectoryNode) else self.from_index(0)

    def from_index(self, start: int) -> Iterator[Entry]:
        """Yields the entries from the `start`th on, skipping pages before it unread."""
        for _, first, entries in self.pages(start):
            yield from entries[start - first :] if first < start else entries

    def pages(self, start: int = 0) -> Iterator[tuple[NodeId, int, tuple[Entry, ...]]]:
        """Yields the pages from the `start`th entry's on: id, entries before it, entries in it."""
        return self._pages(self.identifier, self._node, start, 0, b"")

    def _pages(
        self, identifier: NodeId, node: DirectoryNode | IndexNode, start: int, first: int,
        floor: bytes,
    ) -> Iterator[tuple[NodeId, int, tuple[Entry, ...]]]:  # fmt: skip
        if isinstance(node, DirectoryNode):
            yield identifier, first, node.entries
            return
        for at, page in enumerate(node.pages):
            if start < first + page.entries:
                below, above = open_page(self._objects, node, at, floor)
                yield from self._pages(NodeId(page.node), below, start, first, above)
            first += page.entries

    def outside(self, pages: set[NodeId]) -> Iterator[Entry]:
        """Yields the entries that are not in one of `pages`, which stay unread."""
        if self.identifier not in pages:
            yield from self._outside(self._node, pages)

    def _outside(
        self, node: DirectoryNode | IndexNode, pages: set[NodeId], floor: bytes = b""
    ) -> Iterator[Entry]:
        if isinstance(node, DirectoryNode):
            yield from node.entries
            return
        for at, page in enumerate(node.pages):
            if page.node not in pages:
                below, above = open_page(self._objects, node, at, floor)
                yield from self._outside(below, pages, above)

    def __len__(self) -> int:
        node = self._node
        if isinstance(node, DirectoryNode):
            return len(node.entries)
        return sum([page.entries for page in node.pages])

    def page_ids(self) -> Iterator[NodeId]:
        """Yields the ids of all the nodes that make up this directory, its own included."""
        yield self.identifier
        yield from self._page_ids(self._node)

    def _page_ids(self, node: DirectoryNode | IndexNode) -> Iterator[NodeId]:
        if isinstance(node, IndexNode):
            for at, page in enumerate(node.pages):
                yield NodeId(page.node)
                if node.level > 1:
                    yield from self._page_ids(open_page(self._objects, node, at)[0])


def shared_pages(one: Directory, other: Directory) -> set[NodeId]:
    """Returns pages of any level that two directories share; those inside of one are not named.

    Opens what they do not share only, so that the cost follows the difference.
    """
    sides = [_Pages(one), _Pages(other)]
    shared: set[NodeId] = set()
    while True:
        a, b = sides
        if a.level == b.level:
            common = a.pages.keys() & b.pages.keys()
            shared |= common
            a.leave_out(common)
            b.leave_out(common)
            if not a.level:
                return shared
        highest = max(a.level, b.level)
        for side in sides:
            if side.level == highest:
                side.descend()


class _Pages:
    """Pages of one level of a directory, each with where it is listed."""

    def __init__(self, directory: Directory) -> None:
        node = directory._node
        self._objects = directory._objects
        self.level = node.level if isinstance(node, IndexNode) else 0
        self.pages: dict[NodeId, tuple[IndexNode, int, bytes] | None] = {directory.identifier: None}
        self._root = node

    def leave_out(self, pages: Iterable[NodeId]) -> None:
        for page in pages:
            del self.pages[page]

    def descend(self) -> None:
        self.level -= 1
        below: dict[NodeId, tuple[IndexNode, int, bytes] | None] = {}
        for place in self.pages.values():
            node, floor = open_page(self._objects, *place) if place else (self._root, b"")
            if isinstance(node, IndexNode):
                below.update((NodeId(page.node), (node, at, floor))
                             for at, page in enumerate(node.pages))  # fmt: skip
        self.pages = below


def open_node(objects: Objects, identifier: NodeId) -> DirectoryNode | IndexNode:
    """Returns a directory's node, or the highest index of one in pages."""
    node = objects.node(identifier)
    if isinstance(node, ListNode):
        raise CorruptObjectError("node", identifier, "it is not a directory")
    return node


def open_page(
    objects: Objects, parent: IndexNode, at: int, floor: bytes = b""
) -> tuple[DirectoryNode | IndexNode, bytes]:
    """Returns a page of an index, checked to be what the index says.

    Every name in the index comes after `floor`; returns what every name in the page comes after.
    """
    page = parent.pages[at]
    floor = parent.pages[at - 1].last if at else floor
    identifier = NodeId(page.node)
    node = open_node(objects, identifier)
    if isinstance(node, DirectoryNode):
        entries = node.entries
        if (
            parent.level == 1
            and len(entries) == page.entries
            and entries[-1].name == page.last
            and entries[0].name > floor
        ):
            return node, floor
    elif (
        parent.level == node.level + 1
        and node.pages[-1].last == page.last
        and node.pages[0].last > floor
        and sum([page.entries for page in node.pages]) == page.entries
    ):
        return node, floor
    raise CorruptObjectError("node", identifier, "it is not the page that its index promises")


def fits_one_node(count: int) -> bool:
    """Tells whether a directory of so many entries is one node."""
    return count <= PAGED_FROM


def ends_page(name: bytes, level: int) -> bool:
    """Tells whether a page of `level` (0: of entries) ends after `name`."""
    return _ends_page(name, level)


def _ends_page(name: bytes, level: int) -> bool:
    if level == TALLEST:  # names can be sought out that would make a higher tree
        return False
    return not int.from_bytes(digest(name)[:8], "big") >> 64 - PAGE_BITS * (level + 1)


def store_directory(put: PutNode, entries: Iterable[Entry]) -> NodeId:
    """Stores a directory of entries sorted by name and returns its id."""
    everything = tuple(entries)
    if fits_one_node(len(everything)):
        return put(directory_node(everything))
    pages: list[Page] = []
    start = 0
    for at, entry in enumerate(everything, 1):
        if at == len(everything) or _ends_page(entry.name, 0):
            part = everything[start:at]
            pages.append(Page(entry.name, put(directory_node(part)), len(part)))
            start = at
    return store_pages(put, pages, 1)


def store_pages(put: PutNode, pages: Sequence[Page], level: int) -> NodeId:
    """Stores the indexes of a directory's pages from `level` up and returns the highest's id."""
    while True:
        groups: list[list[Page]] = [[]]
        for page in pages:
            groups[-1].append(page)
            if _ends_page(page.last, level):
                groups.append([])
        groups = [group for group in groups if group]
        nodes = [put(index_node(level, tuple(group))) for group in groups]
        if len(nodes) == 1:
            return nodes[0]
        pages = [index_page(group, node) for group, node in zip(groups, nodes, strict=True)]
        level += 1


def index_page(pages: Sequence[Page], node: NodeId) -> Page:
    """Returns what an index says of the index `node` that has these pages."""
    return Page(pages[-1].last, node, sum([page.entries for page in pages]))


def directory_entry(
    put: PutNode,
    entries: list[Entry],
    *,
    name: bytes,
    mode: int,
    mtime_ns: int,
    xattrs: tuple[tuple[bytes, bytes], ...] = (),
    owner: Owner | None = None,
) -> Entry:
    """Stores a directory of sorted entries and returns its own entry, sums included."""
    size, totals = sums(entries)
    node = store_directory(put, entries)
    return Entry(name, Kind.DIRECTORY, mode, mtime_ns, size, node, xattrs, None, totals, owner)


def sums(entries: Iterable[Entry]) -> tuple[int, Totals]:
    """Returns what the entry of a directory says of what is in it: the size and the totals."""
    size = below = links = owners = 0
    for entry in entries:
        below += 1
        if entry.owner is not None:
            owners += 1
        if entry.totals is not None:
            size += entry.size
            below += entry.totals.entries
            links += entry.totals.links
            owners += entry.totals.owners
            continue
        links += entry.link is not None
        if entry.kind == Kind.FILE:
            size += entry.size
    return size, Totals(below, links, owners)


def walk(
    objects: Objects, root: Entry, path: bytes = b"", depth: int = 0
) -> Iterator[tuple[bytes, Entry]]:
    """Yields (path, entry) of everything below `root`, a directory before what is in it.

    Raises CorruptObjectError for a tree deeper than DEEPEST, as forged nodes could make.
    """
    # By a stack: a generator for each directory would have every entry handed up from the deepest.
    stack = [_below(objects, root, path, depth)]
    while stack:
        prefix, entries = stack[-1]
        for entry in entries:
            child = prefix + entry.name
            yield child, entry
            if entry.kind == Kind.DIRECTORY:
                stack.append(_below(objects, entry, child, depth + len(stack)))
                break
        else:
            stack.pop()


def _below(
    objects: Objects, entry: Entry, path: bytes, depth: int
) -> tuple[bytes, Iterator[Entry]]:
    if depth > DEEPEST:
        raise CorruptObjectError("node", directory_id(entry), "the tree is too deep")
    return path + b"/" if path else b"", iter(Directory(objects, directory_id(entry)))


def directory_id(entry: Entry) -> NodeId:
    """Returns the node id of a directory's entry."""
    content = entry.content
    if entry.kind != Kind.DIRECTORY or not isinstance(content, bytes):
        raise ValueError(f"{entry.name!r} is not a directory")
    return NodeId(content)


def find(objects: Objects, root: Entry, path: bytes) -> Entry | None:
    """Returns the entry at a relative `path` below `root`; the root itself for an empty path."""
    entry = root
    for name in path.split(b"/") if path else []:
        if entry.kind != Kind.DIRECTORY:
            return None
        below = Directory(objects, directory_id(entry)).get(name)
        if below is None:
            return None
        entry = below
    return entry
