"""Directory edits: a stored directory with some of its entries changed.

Gives the nodes that `store_directory` would give for the full set of entries, and makes only
those that the edits touch: a page, the index above it, and so on up. A page whose last name
goes is joined with the next one; one with a new name that ends pages is cut. At every level
this is the same problem, items under ascending keys that are cut after certain keys, so what
becomes of the pages of one level is an edit of the next.

A changed node is spliced rather than encoded where few of its items change: its encoding is a
head and its items' encodings one after the other, so an item is found by its encoding.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import cast

from engine.errors import CorruptObjectError
from engine.ids import NodeId
from engine.storage.nodes import (
    DirectoryNode,
    Entry,
    IndexNode,
    Kind,
    Owner,
    Page,
    Totals,
    directory_node,
    encode_item,
    head,
    index_node,
)
from engine.storage.objects import NodeBuffer, Objects
from engine.trees.directory import (
    Directory,
    directory_id,
    ends_page,
    fits_one_node,
    index_page,
    open_node,
    open_page,
    store_directory,
    store_pages,
    sums,
)

Edits = Mapping[bytes, Entry | None]
"""What becomes of names: None removes one."""

_Item = Entry | Page
_ENTRY_KEY: Callable[[_Item], bytes] = attrgetter("name")
_PAGE_KEY: Callable[[_Item], bytes] = attrgetter("last")
_Changes = Mapping[bytes, _Item | None]
_Branch = DirectoryNode | IndexNode
_Path = list[tuple[IndexNode, int, bytes]]
"""From the root down: an index, the number of a page in it, what its names come after."""

_MOST_SPLICED = 8
"""A node is spliced if no more items change, and no more than a quarter of it."""


def edit_directory(
    objects: Objects,
    nodes: NodeBuffer,
    base: Entry,
    edits: Edits,
    *,
    name: bytes,
    mode: int,
    mtime_ns: int,
    xattrs: tuple[tuple[bytes, bytes], ...] = (),
    owner: Owner | None = None,
) -> Entry:
    """Returns the entry of the directory `base` with `edits`, under another name and attributes.

    New nodes are put into `nodes`; what the edits touch of `base` is read from `objects`. Names
    to be removed that are not there are ignored. The sums are those of `base` with the
    difference. Raises MissingObjectError or CorruptObjectError.
    """
    identifier = directory_id(base)
    old: list[Entry] = []
    node = _edited(objects, nodes, identifier, edits, old) if edits else identifier
    lost_size, lost = sums(old)
    new_size, new = sums(entry for entry in edits.values() if entry is not None)
    before = base.totals or Totals(0, 0)
    size = base.size - lost_size + new_size
    totals = Totals(
        before.entries - lost.entries + new.entries,
        before.links - lost.links + new.links,
        before.owners - lost.owners + new.owners,
    )
    if size < 0 or not (0 <= totals.links <= totals.entries >= totals.owners >= 0):
        raise CorruptObjectError("node", identifier, "its sums are less than what is in it")
    return Entry(name, Kind.DIRECTORY, mode, mtime_ns, size, node, xattrs, None, totals, owner)


def _edited(
    objects: Objects, nodes: NodeBuffer, identifier: NodeId, edits: Edits, old: list[Entry]
) -> NodeId:
    """Returns the id of the edited directory; adds to `old` what the edits replace."""
    node = open_node(objects, identifier)
    if len(edits) == 1:
        ((name, entry),) = edits.items()
        changed = entry and _replaced(objects, nodes, (identifier, node), name, entry, old)
        if changed:
            return changed
    entries: list[_Item]
    if isinstance(node, IndexNode):
        directory = Directory(objects, identifier)
        removed = sum(entry is None for entry in edits.values())
        if not removed or not fits_one_node(len(directory) - removed):
            return _PagedEdit(objects, nodes, identifier, node).apply(edits, old)
        entries = list(directory)
        replaced = _apply(entries, edits)
        if not fits_one_node(len(entries)):
            return _PagedEdit(objects, nodes, identifier, node).apply(edits, old)
    else:
        entries = list(node.entries)
        replaced = _apply(entries, edits)
        if fits_one_node(len(entries)):
            old += cast(list[Entry], replaced)
            return _put_changed(objects, nodes, _node(0, entries), (identifier, node), edits)
    old += cast(list[Entry], replaced)
    return store_directory(nodes.put, cast(list[Entry], entries))


def _replaced(
    objects: Objects,
    nodes: NodeBuffer,
    source: tuple[NodeId, _Branch],
    name: bytes,
    entry: Entry,
    old: list[Entry],
    *,
    above: IndexNode | None = None,
    floor: bytes = b"",
) -> NodeId | None:
    """Returns the id of a directory, or a page of `above`, with an entry in another's place.

    What a search loop does again and again, in half the time of `_PagedEdit`. None, and nothing
    is put, where there is no such name, or a page is to be cut, as in directories of format 1.
    """
    identifier, node = source
    before: tuple[_Item, ...]
    if isinstance(node, IndexNode):
        before = pages = node.pages
        at = bisect_left(pages, name, key=_PAGE_KEY)
        if at == len(pages) or (len(pages) == 1 and node.level > 1):
            return None
        page = pages[at]
        if at < len(pages) - 1 and ends_page(page.last, node.level):
            return None
        below, floor = open_page(objects, node, at, floor)
        lower = NodeId(page.node), below
        changed = _replaced(objects, nodes, lower, name, entry, old, above=node, floor=floor)
        if changed is None:
            return None
        new: _Item = Page(page.last, changed, page.entries)
    else:
        before = entries = node.entries
        at = bisect_left(entries, name, key=_ENTRY_KEY)
        if at == len(entries) or entries[at].name != name:
            return None
        if above is None and not fits_one_node(len(entries)):
            return None
        if above is not None and at < len(entries) - 1 and ends_page(name, 0):
            return None
        old.append(entries[at])
        new = entry
    level = node.level if isinstance(node, IndexNode) else 0
    result = _node(level, [*before[:at], new, *before[at + 1 :]])
    data = objects.encoded(identifier)
    found = encode_item(before[at])
    start = data.find(found)
    if start < 0 or data.find(found, start + 1) >= 0:  # see `_spliced`
        return nodes.put(result)
    data = b"".join((data[:start], encode_item(new), data[start + len(found) :]))
    return nodes.put_encoded(result, data)


class _PagedEdit:
    """One edit of a directory in pages, that stays one in pages."""

    def __init__(
        self, objects: Objects, nodes: NodeBuffer, identifier: NodeId, root: IndexNode
    ) -> None:
        self._objects, self._nodes = objects, nodes
        self._identifier, self._root = identifier, root
        self._made: dict[NodeId, _Branch] = {}

    def apply(self, edits: Edits, old: list[Entry]) -> NodeId:
        changes: _Changes = edits
        for level in range(self._root.level):
            replaced: list[_Item] = []
            changes = self._level(level, changes, replaced)
            if not level:
                old += cast(list[Entry], replaced)
        return self._top(changes)

    def _level(self, level: int, changes: _Changes, old: list[_Item]) -> _Changes:
        """Makes the nodes of one level anew; returns what that changes in the level above."""
        above: dict[bytes, _Item | None] = {}
        names = sorted(changes)
        at = 0
        while at < len(names):
            path = self._path(level, names[at])
            carried: list[_Item] = []  # of a page that lost its end: it goes on in the next
            while True:
                parent, number, floor = path[-1]
                page = parent.pages[number]
                node, _ = open_page(self._objects, parent, number, floor)
                is_last = all(n == len(index.pages) - 1 for index, n, _ in path)
                stop = len(names) if is_last else bisect_right(names, page.last, at)
                mine = {name: changes[name] for name in names[at:stop]}
                at = stop
                items = _items(node)
                old += _apply(items, mine)
                above[page.last] = None
                ends = _ends(level, mine)
                if not is_last or ends_page(page.last, level):
                    ends.add(page.last)
                groups = _cut(carried + items if carried else items, ends)
                whole = len(groups) == 1 and not carried
                carried = groups.pop() if _is_open(groups, ends) and not is_last else []
                for group in groups:
                    source = (NodeId(page.node), node) if whole else None
                    made = self._put(level, group, source, mine)
                    above[made.last] = made
                if not carried:
                    break
                path = self._next(path)
        return above

    def _path(self, level: int, name: bytes) -> _Path:
        """Returns the way to the node of a level that `name` belongs in."""
        node, floor = self._root, b""
        path: _Path = []
        while True:
            number = bisect_left(node.pages, name, key=_PAGE_KEY)
            number = min(number, len(node.pages) - 1)
            path.append((node, number, floor))
            if node.level == level + 1:
                return path
            below, floor = open_page(self._objects, node, number, floor)
            node = cast(IndexNode, below)

    def _next(self, path: _Path) -> _Path:
        """Returns the way to the next node of the same level; there is one."""
        depth = len(path)
        path = list(path)
        while path[-1][1] == len(path[-1][0].pages) - 1:
            path.pop()
        node, number, floor = path.pop()
        path.append((node, number + 1, floor))
        while len(path) < depth:
            node, number, floor = path[-1]
            below, floor = open_page(self._objects, node, number, floor)
            path.append((cast(IndexNode, below), 0, floor))
        return path

    def _top(self, changes: _Changes) -> NodeId:
        """Returns the id of the whole, which may have become higher or lower."""
        level = self._root.level
        items = _items(self._root)
        _apply(items, changes)
        groups = _cut(items, _ends(level, changes))
        source = (self._identifier, self._root)
        if len(groups) == 1 and (len(items) > 1 or level == 1):
            return NodeId(self._put(level, items, source, changes).node)
        if len(groups) > 1:
            pages = [self._put(level, group, None, {}) for group in groups]
            return store_pages(self._nodes.put, pages, level + 1)
        identifier = NodeId(cast(Page, items[0]).node)
        while True:  # an index of a single page is not the highest one, except the lowest
            node = self._made.get(identifier) or open_node(self._objects, identifier)
            if isinstance(node, DirectoryNode) or node.level == 1 or len(node.pages) > 1:
                return identifier
            identifier = NodeId(node.pages[0].node)

    def _put(
        self,
        level: int,
        items: list[_Item],
        source: tuple[NodeId, _Branch] | None,
        changes: _Changes,
    ) -> Page:
        node = _node(level, items)
        if source is None:
            identifier = self._nodes.put(node)
        else:
            identifier = _put_changed(self._objects, self._nodes, node, source, changes)
        self._made[identifier] = node
        if isinstance(node, IndexNode):
            return index_page(node.pages, identifier)
        return Page(node.entries[-1].name, identifier, len(node.entries))


def _node(level: int, items: list[_Item]) -> _Branch:
    if level:
        return index_node(level, cast(tuple[Page, ...], tuple(items)))
    return directory_node(cast(tuple[Entry, ...], tuple(items)))


def _items(node: _Branch) -> list[_Item]:
    return list(node.entries if isinstance(node, DirectoryNode) else node.pages)


def _key(item: _Item) -> bytes:
    return item.name if isinstance(item, Entry) else item.last


def _keys(items: Sequence[_Item]) -> Callable[[_Item], bytes]:
    """Returns what gives the key of one of `items`, as fast as that can be."""
    return _ENTRY_KEY if items and isinstance(items[0], Entry) else _PAGE_KEY


def _apply(items: list[_Item], changes: _Changes) -> list[_Item]:
    """Changes a sorted list of items; returns those that were replaced or removed."""
    old = []
    for key in sorted(changes):
        new = changes[key]
        at = bisect_left(items, key, key=_keys(items))
        if at < len(items) and _key(items[at]) == key:
            old.append(items[at])
            items[at : at + 1] = [] if new is None else [new]
        elif new is not None:
            items.insert(at, new)
    return old


def _ends(level: int, changes: _Changes) -> set[bytes]:
    """Returns which of the new keys end a page."""
    return {key for key, new in changes.items() if new is not None and ends_page(key, level)}


def _cut(items: list[_Item], ends: set[bytes]) -> list[list[_Item]]:
    if items and ends <= {_key(items[-1])}:  # nearly always
        return [items]
    groups: list[list[_Item]] = [[]]
    for item in items:
        groups[-1].append(item)
        if _key(item) in ends:
            groups.append([])
    return [group for group in groups if group]


def _is_open(groups: list[list[_Item]], ends: set[bytes]) -> bool:
    return bool(groups) and _key(groups[-1][-1]) not in ends


def _put_changed(
    objects: Objects,
    nodes: NodeBuffer,
    node: _Branch,
    source: tuple[NodeId, _Branch],
    changes: _Changes,
) -> NodeId:
    """Puts the node that `source` becomes by `changes`."""
    identifier, old = source
    if len(changes) <= min(_MOST_SPLICED, len(_items(old)) // 4):
        data = _spliced(objects.encoded(identifier), node, old, changes)
        if data is not None:
            return nodes.put_encoded(node, data)
    return nodes.put(node)


def _spliced(data: bytes, node: _Branch, old: _Branch, changes: _Changes) -> bytes | None:
    """Returns the encoding of `node` made from that of `old`; None if that is not possible.

    An item's encoding may also stand inside of another item, as the content of a file: one
    that is found twice is not taken to be found.
    """
    items = _items(old)
    at = len(head(old))
    parts = [head(node)]
    for key in sorted(changes):
        new = changes[key]
        number = bisect_left(items, key, key=_keys(items))
        start, length = len(data), 0
        if number < len(items):
            found = encode_item(items[number])
            start = data.find(found, at)
            if start < 0 or data.find(found, start + 1) >= 0:
                return None
            length = len(found) if _key(items[number]) == key else 0
        parts.append(data[at:start])
        if new is not None:
            parts.append(encode_item(new))
        at = start + length
    parts.append(data[at:])
    return b"".join(parts)
