"""Git's trees and blobs become directories and files of the store, each object once.

A tree of git lists (mode, name, id), and the entry that this becomes depends on nothing else: git
has no times, so every entry gets TIME_NS. What is seen once is therefore kept by those three, as
the encoded entry, and a directory's node is put together from encoded entries. A new tree costs
its own list and what in it is new. What is not in memory any more is taken from the tree that
the parent commit became, by walking both side by side.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple

from engine.git.git_objects import (
    FILE_MODES,
    LFS_HEAD,
    LINK_MODE,
    MODE_ATTRIBUTE,
    MODULE_ATTRIBUTE,
    MODULE_MODE,
    TreeEntry,
    parse_tree,
)
from engine.git.git_repository import GitRepository, GitSourceError
from engine.ids import NodeId
from engine.storage.content import Content, ingest_blocks
from engine.storage.nodes import (
    DEEPEST,
    Entry,
    Kind,
    Page,
    Totals,
    check_file_name,
    directory_node,
    encode,
    head,
)
from engine.storage.objects import ChunkSink, NodeBuffer, Objects
from engine.trees.directory import Directory, directory_id, ends_page, fits_one_node, store_pages

TIME_NS = 315_619_200_000_000_000
"""The mtime of all that comes from git: 1980-01-02 UTC, the first day that is within what a ZIP
file can say in every time zone."""

MODE = 0o755
_LONGEST_LFS = 1024
_LONGEST_TARGET = 4095
_MOST_KNOWN = 400_000
_NODE_BYTES = 1000
_NAME = attrgetter("name")


class _Piece(NamedTuple):
    """An entry, encoded.

    `size` is what it adds to its directory's, `below` how many entries are in it, `height` how
    many directories stand inside each other there.
    """

    encoded: bytes
    name: bytes
    size: int
    below: int
    height: int


class _Folder(NamedTuple):
    node: NodeId
    size: int
    below: int
    height: int


class Base(NamedTuple):
    """A tree of git and the directory that it has become."""

    tree: bytes
    entry: Entry


class _Visit:
    """A tree on the way: what is in it, and what of that was not seen before."""

    __slots__ = ("base", "depth", "items", "new", "path", "tree")

    def __init__(self, tree: bytes, path: bytes, base: Base | None, depth: int) -> None:
        self.tree, self.path, self.base, self.depth = tree, path, base, depth
        self.items: list[TreeEntry] | None = None
        self.new: list[TreeEntry] = []


class GitTrees:
    """Stores trees of one repository. `sink` and `nodes` are its caller's, who may change them."""

    def __init__(self, objects: Objects, source: GitRepository) -> None:
        self._objects, self._source = objects, source
        self.nodes = NodeBuffer()
        self.sink = ChunkSink(objects.store, batch_bytes=32 << 20)
        self.read_bytes = self.blobs = 0
        self.tell: Callable[[], None] = lambda: None
        """Called for each file that is read: `read_bytes` has changed then."""
        self.modules: set[tuple[bytes, str]] = set()
        self.pointers: set[bytes] = set()
        self.left_out: dict[tuple[bytes, str], None] = {}
        self._known: dict[TreeEntry, _Piece | None] = {}
        self._before: dict[TreeEntry, _Piece | None] = {}
        self._folders: dict[bytes, _Folder] = {}
        self._heights: dict[bytes, int] = {}
        self._contents: dict[bytes, tuple[Content, int]] = {}

    def held_bytes(self) -> int:
        """Returns about how much memory holds that has not been stored."""
        return len(self.nodes.nodes) * _NODE_BYTES + self.sink.stored_bytes

    def renew(self, sink: ChunkSink) -> None:
        """Begins anew after all that was collected has been stored; forgets what is too much."""
        self.sink, self.nodes = sink, NodeBuffer()
        if len(self._known) > _MOST_KNOWN:
            self._before, self._known = self._known, {}
            self._folders, self._contents, self._heights = {}, {}, {}

    def root(self, tree: bytes, base: Base | None) -> Entry:
        """Stores a tree and returns the entry of a root. `base` is one that is like it, stored.

        Raises GitSourceError.
        """
        folder = self._folder(tree, base)
        return Entry(b"", Kind.DIRECTORY, MODE, TIME_NS, folder.size, folder.node, (), None,
                     Totals(folder.below, 0))  # fmt: skip

    def _folder(self, tree: bytes, base: Base | None) -> _Folder:
        """Stores a tree after those in it; a stack of our own, because they may be 512 deep."""
        stack = [_Visit(tree, b"", base, 0)]
        while stack:
            visit = stack[-1]
            done = self._folders.get(visit.tree)
            if done is None and visit.items is None:
                done = self._same(visit)
                if done is None:
                    below = self._look(visit)
                    if below:
                        stack += below
                        continue
            if done is None:
                done = self._store(visit)
            self._folders[visit.tree] = done
            self._check_depth(visit.path, visit.depth + done.height)
            stack.pop()
        return self._folders[tree]

    def _check_depth(self, path: bytes, depth: int) -> None:
        if depth > DEEPEST:
            why = f"{path[:200]!r}… has more than {DEEPEST} directories inside each other"
            raise GitSourceError(self._source.path, why)

    def _same(self, visit: _Visit) -> _Folder | None:
        """Returns what a tree is that its base is, too."""
        base = visit.base
        if base is None or base.tree != visit.tree or base.entry.totals is None:
            return None
        below, height = base.entry.totals.entries, self._height(visit.tree)
        return _Folder(directory_id(base.entry), base.entry.size, below, height)

    def _look(self, visit: _Visit) -> list[_Visit]:
        """Reads a tree; returns the trees in it that must be stored first."""
        known, before = self._known, self._before
        self._check_depth(visit.path, visit.depth)
        visit.items = self._entries(visit.tree)
        new = [item for item in visit.items if item not in known]
        if new and before:
            known.update((item, before[item]) for item in new if item in before)
            new = [item for item in new if item not in known]
        if new and visit.base is not None:
            bases = self._learn(visit.base)
            new = [item for item in new if item not in known]
        else:
            bases = {}
        visit.new = new
        return [
            _Visit(item[2], _join(visit.path, item[1]), bases.get(item[1]), visit.depth + 1)
            for item in new
            if int(item[0], 8) >> 12 == 0o04 and item[2] not in self._folders
        ]

    def _height(self, tree: bytes) -> int:
        """Returns how many directories stand inside each other in a tree that is stored."""
        heights = self._heights
        below: dict[bytes, list[bytes]] = {}
        stack = [tree]
        while stack:
            at = stack[-1]
            if at not in below:
                below[at] = [i for mode, _, i in self._entries(at) if int(mode, 8) >> 12 == 0o04]
            missing = [each for each in below[at] if each not in heights]
            if missing:
                stack += missing
            else:
                heights[at] = 1 + max([heights[each] for each in below[at]], default=0)
                stack.pop()
        return heights[tree]

    def _entries(self, tree: bytes) -> list[TreeEntry]:
        try:
            return parse_tree(self._source.read("tree", tree))
        except ValueError as error:
            raise GitSourceError(self._source.path, f"tree {tree.hex()}: {error}") from error

    def _store(self, visit: _Visit) -> _Folder:
        known = self._known
        for item in visit.new:
            if item not in known:  # twice in the tree
                known[item] = self._make(item, visit.path)
        found = [known[item] for item in visit.items or ()]
        pieces = [piece for piece in found if piece is not None]
        pieces.sort(key=_NAME)
        if len({piece.name for piece in pieces}) != len(pieces):
            pieces = self._once(visit.path, pieces)
        return _Folder(
            self._node(pieces),
            sum([piece.size for piece in pieces]),
            len(pieces) + sum([piece.below for piece in pieces]),
            1 + max([piece.height for piece in pieces], default=0),
        )

    def _once(self, path: bytes, pieces: list[_Piece]) -> list[_Piece]:
        kept = {piece.name: piece for piece in reversed(pieces)}
        for before, piece in pairwise(pieces):
            if before.name == piece.name:
                self._leave_out(path, piece.name, "its name is in the tree twice")
        return [kept[name] for name in sorted(kept)]

    def _learn(self, base: Base) -> dict[bytes, Base]:
        """Remembers what a stored directory has; returns the directories in it."""
        directory = Directory(self._objects, directory_id(base.entry))
        entries = {entry.name: entry for entry in directory}
        below: dict[bytes, Base] = {}
        for item in self._entries(base.tree):
            mode, name, identifier = item
            entry = entries.get(name)
            if entry is None:
                continue
            if entry.kind == Kind.DIRECTORY and mode != MODULE_MODE:
                below[name] = Base(identifier, entry)
            elif item not in self._known:
                size = entry.size if entry.kind == Kind.FILE else 0
                self._known[item] = _Piece(encode(entry), name, size, 0, 0)
        return below

    def _node(self, pieces: list[_Piece]) -> NodeId:
        if fits_one_node(len(pieces)):
            return self._put(pieces)
        pages = []
        start = 0
        for at, piece in enumerate(pieces, 1):
            if at == len(pieces) or _ends(piece.name):
                part = pieces[start:at]
                pages.append(Page(piece.name, self._put(part), len(part)))
                start = at
        return store_pages(self.nodes.put, pages, 1)

    def _put(self, pieces: list[_Piece]) -> NodeId:
        parts = [_head(len(pieces)), *[piece.encoded for piece in pieces]]
        return self.nodes.put_bytes(b"".join(parts))

    def _make(self, item: TreeEntry, path: bytes) -> _Piece | None:
        """Stores what an entry names; None if it must be left out."""
        mode, name, identifier = item
        place = _join(path, name)
        if name.lower() == b".git":
            self._leave_out(path, name, "git reserves the name")
            return None
        try:
            check_file_name(name)
        except ValueError as error:
            self._leave_out(path, name, str(error))
            return None
        number = int(mode, 8)
        kind = number >> 12
        xattrs: tuple[tuple[bytes, bytes], ...] = ()
        if mode not in {*FILE_MODES, b"40000", LINK_MODE, MODULE_MODE}:
            xattrs = ((MODE_ATTRIBUTE, mode),)
        totals = None
        content: Content
        if kind == 0o04:
            folder = self._folders[identifier]
            entry = Entry(
                name, Kind.DIRECTORY, MODE, TIME_NS, folder.size, folder.node, xattrs, None,
                Totals(folder.below, 0),
            )  # fmt: skip
            return _Piece(encode(entry), name, folder.size, folder.below, folder.height)
        if kind == 0o16:
            self.modules.add((place, identifier.hex()))
            node = self.nodes.put(directory_node(()))
            totals = Totals(0, 0)
            xattrs = (*xattrs, (MODULE_ATTRIBUTE, identifier.hex().encode()))
            entry = Entry(
                name, Kind.DIRECTORY, MODE, TIME_NS, 0, node, xattrs, None, totals
            )  # fmt: skip
            return _Piece(encode(entry), name, 0, 0, 1)
        if kind == 0o12:
            target = self._source.read("blob", identifier)
            if not 0 < len(target) <= _LONGEST_TARGET or b"\0" in target:
                self._leave_out(path, name, "no symbolic link can have such a target")
                return None
            entry = Entry(
                name, Kind.SYMLINK, 0o777, TIME_NS, len(target), target, xattrs
            )  # fmt: skip
            return _Piece(encode(entry), name, 0, 0, 0)
        if kind != 0o10:
            self._leave_out(path, name, f"its mode is {mode[:20].decode()}")
            return None
        content, size = self._content(identifier, place)
        entry = Entry(
            name, Kind.FILE, file_mode(mode), TIME_NS, size, content, xattrs
        )  # fmt: skip
        return _Piece(encode(entry), name, size, 0, 0)

    def _content(self, blob: bytes, path: bytes) -> tuple[Content, int]:
        done = self._contents.get(blob)
        if done is None:
            data = self._source.read("blob", blob)
            self.blobs += 1
            self.read_bytes += len(data)
            self.tell()
            if len(data) <= _LONGEST_LFS and data.startswith(LFS_HEAD):
                self.pointers.add(path)
            done = ingest_blocks((data,), self.sink.put, self.nodes.put)
            self._contents[blob] = done
        return done

    def _leave_out(self, path: bytes, name: bytes, why: str) -> None:
        self.left_out[_join(path, name)[:1000], why] = None


def _join(path: bytes, name: bytes) -> bytes:
    return path + b"/" + name if path else name


def file_mode(mode: bytes) -> int:
    """Returns the permission bits that a file of a mode of git's gets."""
    return FILE_MODES.get(mode) or (int(mode, 8) & 0o777)


@lru_cache(1 << 16)
def _ends(name: bytes) -> bool:
    return ends_page(name, 0)


@lru_cache(512)
def _head(count: int) -> bytes:
    return head(directory_node((_NOTHING,) * count))


_NOTHING = Entry(b"", Kind.FILE, 0, 0, 0, b"")
