"""Working trees: a stored tree with changes in memory, shared between forks as far as equal.

A directory that nothing changed is its stored entry. One with changes is a Folder: the stored
directory that it was, and what became of names in it. Every working tree has a token; a folder
with another token is shared and is copied before it is changed, and so are those above it.
`share` gives both trees new tokens and so costs the same whatever the trees hold.

Knows nodes, not paths as users write them, and no transactions; only `workspace` calls it.
"""

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import ClassVar, TypeGuard

import msgspec

from engine.storage.content import ingest_blocks
from engine.storage.nodes import Entry, Kind, Link, Owner
from engine.storage.objects import Objects
from engine.trees.directory import Directory, directory_entry, directory_id
from engine.trees.directory_edit import edit_directory
from engine.trees.links import groups_in, linked
from engine.workspaces.committing import Batch

Xattrs = tuple[tuple[bytes, bytes], ...]

_COPIED = 32
"""Up to so many changes of a directory are copied when it is first written after a fork."""


class Written:
    """A file whose bytes are in memory. Immutable."""

    __slots__ = ("data", "mode", "mtime_ns", "user", "xattrs")

    kind: ClassVar[Kind] = Kind.FILE

    def __init__(
        self, data: bytes, mode: int, mtime_ns: int, xattrs: Xattrs = (), user: Owner | None = None
    ) -> None:
        self.data, self.mode, self.mtime_ns, self.xattrs = data, mode, mtime_ns, xattrs
        self.user = user

    @property
    def size(self) -> int:
        return len(self.data)

    def entry(self, name: bytes, batch: Batch) -> Entry:
        """Returns its entry, with its chunks and lists in `batch`."""
        content, size = ingest_blocks([self.data], batch.put_chunk, batch.put)
        return Entry(
            name, Kind.FILE, self.mode, self.mtime_ns, size, content, self.xattrs, None, None,
            self.user,
        )  # fmt: skip


class Untouched(Enum):
    """Says that nothing became of a name."""

    UNTOUCHED = 0


_UNTOUCHED = Untouched.UNTOUCHED


class Names:
    """What became of the names in a directory: a mapping that is cheap to copy.

    Newest first, layers that are shared and not changed any more; a copy of many changes
    begins a new layer. A layer is at least twice as long as the one before it, so there are few.
    """

    __slots__ = ("_shared", "_top")

    def __init__(self) -> None:
        self._top: dict[bytes, Node | None] = {}
        self._shared: tuple[dict[bytes, Node | None], ...] = ()

    def get(self, name: bytes) -> "Node | Untouched | None":
        if name in self._top:
            return self._top[name]
        for layer in self._shared:
            if name in layer:
                return layer[name]
        return _UNTOUCHED

    def set(self, name: bytes, node: "Node | None") -> None:
        self._top[name] = node

    def everything(self) -> "dict[bytes, Node | None]":
        """Returns all as one new dictionary."""
        merged: dict[bytes, Node | None] = {}
        for layer in reversed(self._shared):
            merged.update(layer)
        merged.update(self._top)
        return merged

    def copy(self) -> "Names":
        """Returns a copy; this one must not be changed any more."""
        twin = Names()
        if len(self._top) <= _COPIED:
            twin._top, twin._shared = dict(self._top), self._shared
            return twin
        layers = [self._top, *self._shared]
        while len(layers) > 1 and 2 * len(layers[0]) > len(layers[1]):
            layers[:2] = [{**layers[1], **layers[0]}]
        twin._shared = tuple(layers)
        return twin


class Folder:
    """A directory with changes. `base` is the stored one that they apply to, None for a new one.

    `owner` is the tree that may change it, `user` whose it is on the host.
    """

    __slots__ = ("base", "mode", "mtime_ns", "names", "owner", "user", "xattrs")

    kind: ClassVar[Kind] = Kind.DIRECTORY
    size: ClassVar[int] = 0

    def __init__(
        self, owner: object, base: Entry | None, mode: int, mtime_ns: int, xattrs: Xattrs,
        user: Owner | None = None,
    ) -> None:  # fmt: skip
        self.owner, self.base, self.user = owner, base, user
        self.mode, self.mtime_ns, self.xattrs = mode, mtime_ns, xattrs
        self.names = Names()


Node = Entry | Written | Folder
"""What a name stands for. An entry is stored, or on its way, with all that is below it."""


def is_directory(node: Node | None) -> TypeGuard[Entry | Folder]:
    """Tells whether a node is a directory, stored or changed."""
    return node is not None and node.kind == Kind.DIRECTORY


class WorkingTree:
    """One tree that can be changed. Not safe in several threads: who owns it sees to that."""

    __slots__ = ("_objects", "_owner", "relinked", "root")

    def __init__(self, objects: Objects, root: "Entry | Folder") -> None:
        self._objects, self.root = objects, root
        self._owner = object()
        self.relinked: frozenset[bytes] = frozenset()
        """Hard-link groups that have lost a name."""

    def share(self) -> "WorkingTree":
        """Returns a tree that is the same now; each may be changed without the other."""
        twin = WorkingTree(self._objects, self.root)
        twin.relinked = self.relinked
        self._owner = object()
        return twin

    # Reading.

    def child(self, directory: Entry | Folder, name: bytes) -> Node | None:
        """Returns what `name` stands for in a directory of this tree."""
        if isinstance(directory, Folder):
            found = directory.names.get(name)
            if found is not _UNTOUCHED:
                return found
            if directory.base is None:
                return None
            directory = directory.base
        return Directory(self._objects, directory_id(directory)).get(name)

    def children(self, directory: Entry | Folder) -> list[tuple[bytes, Node]]:
        """Returns names and what they stand for, sorted by name."""
        if isinstance(directory, Entry):
            return [(e.name, e) for e in Directory(self._objects, directory_id(directory))]
        nodes: dict[bytes, Node | None] = {}
        if directory.base is not None:
            stored = Directory(self._objects, directory_id(directory.base))
            nodes.update((entry.name, entry) for entry in stored)
        nodes.update(directory.names.everything())
        return [(name, node) for name, node in sorted(nodes.items()) if node is not None]

    def is_empty(self, directory: Entry | Folder) -> bool:
        """Tells whether a directory has no names."""
        if isinstance(directory, Entry):
            return not len(Directory(self._objects, directory_id(directory)))
        changed = directory.names.everything()
        if any(node is not None for node in changed.values()):
            return False
        base = directory.base
        return base is None or all(
            entry.name in changed for entry in Directory(self._objects, directory_id(base))
        )

    def height(self, node: Node, most: int) -> int:
        """Returns how many directories stand inside each other from `node` down.

        Stops looking beyond `most`. Reads directories that could be as deep, unlike all else here.
        """
        if not is_directory(node):
            return 0
        if isinstance(node, Entry) and node.totals is not None and node.totals.entries < most:
            return min(1 + node.totals.entries, most)
        highest = 0
        for _, below in self.children(node):
            highest = max(highest, self.height(below, most - 1))
            if highest >= most:
                break
        return 1 + highest

    # Changing.

    def own(self, path: Sequence[bytes]) -> Folder:
        """Returns the directory at `path`, which there is, to be changed by this tree alone."""
        folder = self.root = self._owned(self.root)
        for name in path:
            below = self.child(folder, name)
            if not is_directory(below):
                raise ValueError(f"{name!r} is not a directory")
            mine = self._owned(below)
            if mine is not below:
                folder.names.set(name, mine)
            folder = mine
        return folder

    def _owned(self, directory: Entry | Folder) -> Folder:
        if isinstance(directory, Entry):
            mode, mtime_ns, xattrs = directory.mode, directory.mtime_ns, directory.xattrs
            return Folder(self._owner, directory, mode, mtime_ns, xattrs, directory.owner)
        if directory.owner is self._owner:
            return directory
        mode, mtime_ns, xattrs = directory.mode, directory.mtime_ns, directory.xattrs
        folder = Folder(self._owner, directory.base, mode, mtime_ns, xattrs, directory.user)
        folder.names = directory.names.copy()
        return folder

    def new_folder(self, mode: int, mtime_ns: int) -> Folder:
        """Returns an empty directory, to be given a name."""
        return Folder(self._owner, None, mode, mtime_ns, ())

    def forget(self, node: Node | None) -> None:
        """Notes that what a name stood for is to go: its hard links lose a name."""
        if isinstance(node, Entry):
            if node.link is not None or (node.totals is not None and node.totals.links):
                self.relinked |= frozenset(groups_in(self._objects, node))
        elif isinstance(node, Folder):
            for _, entry in self._linked(node, ()):
                if entry.link is not None:
                    self.relinked |= {entry.link.group}

    def _linked(
        self, directory: Entry | Folder, path: tuple[bytes, ...]
    ) -> Iterator[tuple[tuple[bytes, ...], Entry]]:
        """Yields what is in a link group; reads directories that have some, or have changed."""
        below: dict[bytes, Node | None] = {}
        base = directory.base if isinstance(directory, Folder) else directory
        if base is not None:
            below.update((entry.name, entry) for entry in linked(self._objects, base))
        if isinstance(directory, Folder):
            below.update(directory.names.everything())
        for name, node in below.items():
            if isinstance(node, Entry) and node.link is not None:
                yield (*path, name), node
            elif isinstance(node, Folder) or (
                isinstance(node, Entry) and node.totals is not None and node.totals.links
            ):
                yield from self._linked(node, (*path, name))

    def _relink(self) -> None:
        """Sets the count of hard-link groups that have lost names; one name left is no link."""
        members: dict[bytes, list[tuple[tuple[bytes, ...], Entry]]] = {}
        for path, entry in self._linked(self.root, ()):
            if entry.link is not None and entry.link.group in self.relinked:
                members.setdefault(entry.link.group, []).append((path, entry))
        for group, places in members.items():
            link = Link(group, len(places)) if len(places) > 1 else None
            for path, entry in places:
                new = msgspec.structs.replace(entry, link=link)
                self.own(path[:-1]).names.set(path[-1], new)
        self.relinked = frozenset()

    # Storing.

    def freeze(self, batch: Batch) -> Entry:
        """Returns the tree's root as an entry; what the store may lack of it is in `batch`.

        Cost follows what was changed. The tree itself stays as it is, to a reader.
        """
        if self.relinked:
            self._relink()
        return self.root if isinstance(self.root, Entry) else self._frozen(self.root, b"", batch)

    def _frozen(self, folder: Folder, name: bytes, batch: Batch) -> Entry:
        edits: dict[bytes, Entry | None] = {}
        for key, node in folder.names.everything().items():
            if isinstance(node, Folder):
                edits[key] = self._frozen(node, key, batch)
            elif isinstance(node, Written):
                edits[key] = node.entry(key, batch)
            else:
                edits[key] = node
        mode, mtime_ns, xattrs = folder.mode, folder.mtime_ns, folder.xattrs
        if folder.base is not None:
            return edit_directory(
                self._objects, batch, folder.base, edits,
                name=name, mode=mode, mtime_ns=mtime_ns, xattrs=xattrs, owner=folder.user,
            )  # fmt: skip
        entries = [entry for _, entry in sorted(edits.items()) if entry is not None]
        return directory_entry(
            batch.put, entries, name=name, mode=mode, mtime_ns=mtime_ns, xattrs=xattrs,
            owner=folder.user,
        )  # fmt: skip
