"""A tree put together in memory by paths, in any order, as archives list it; then stored.

What a later member of an archive says of a path holds. With layers, as OCI images have them, a
whiteout removes what lower layers have and leaves what its own layer says. Nothing is ever
resolved: a path leads through directories of the draft only, so no link can lead out of it.
Contents are in the store already; memory holds an entry for each path.
"""

import os

import msgspec

from engine.errors import EngineError
from engine.storage.nodes import DEEPEST, Entry, Owner, check_file_name
from engine.storage.objects import NodeBuffer
from engine.trees.directory import directory_entry
from engine.trees.links import number_groups

Xattrs = tuple[tuple[bytes, bytes], ...]


class ArchiveRefusedError(EngineError):
    """An archive holds something that cannot be in a tree. `path` names the member."""

    def __init__(self, path: bytes, why: str) -> None:
        name = os.fsdecode(path[:300]) + ("…" if len(path) > 300 else "")
        super().__init__(f"the archive's member {name!r} {why}")
        self.path, self.why = path, why


class _Leaf:
    """A file that is no directory; its names share it."""

    __slots__ = ("entry", "layer", "names")

    def __init__(self, entry: Entry, layer: int) -> None:
        self.entry, self.layer = entry, layer
        self.names = 0


class _Folder:
    __slots__ = ("layer", "mode", "mtime_ns", "names", "owner", "xattrs")

    def __init__(self, layer: int) -> None:
        self.names: dict[bytes, _Leaf | _Folder] = {}
        self.mode, self.mtime_ns, self.layer = 0o755, 0, layer
        self.xattrs: Xattrs = ()
        self.owner: Owner | None = None


def parts_of(path: bytes) -> list[bytes]:
    """Returns the names of a member's path. Raises ArchiveRefusedError for a hostile one."""
    if path.startswith(b"/"):
        raise ArchiveRefusedError(path, "has an absolute name")
    parts = [part for part in path.split(b"/") if part not in {b"", b"."}]
    for part in parts:
        if part == b"..":
            raise ArchiveRefusedError(path, "leads out of the tree by `..`")
        try:
            check_file_name(part)
        except ValueError as error:
            raise ArchiveRefusedError(path, f"cannot be: {error}") from error
    return parts


class Draft:
    """The tree. Paths are checked; a directory that no member names has mode 0755 and time 0."""

    def __init__(self) -> None:
        self.layer = 0
        self.layered = False
        self.default_owner: Owner | None = None
        """Whose the directories are that no member names."""
        self._root = _Folder(0)

    def put_directory(
        self, path: bytes, mode: int, mtime_ns: int, xattrs: Xattrs, owner: Owner | None = None
    ) -> None:
        """Makes a directory, or gives one other attributes."""
        parts = parts_of(path)
        folder = self._root
        if parts:
            above = self._above(path, parts)
            found = above.names.get(parts[-1])
            if not isinstance(found, _Folder):
                self._drop(found)
                found = above.names[parts[-1]] = _Folder(self.layer)
            folder = found
        if len(parts) > DEEPEST:
            raise ArchiveRefusedError(path, f"is deeper than {DEEPEST} directories")
        folder.mode, folder.mtime_ns, folder.xattrs = mode, mtime_ns, xattrs
        folder.owner = owner
        folder.layer = self.layer

    def put(self, path: bytes, entry: Entry) -> None:
        """Puts an entry that is no directory; its name and link are not looked at."""
        self._put(path, _Leaf(entry, self.layer))

    def link(self, path: bytes, target: bytes) -> None:
        """Makes another name of a file that came before."""
        parts = parts_of(target)
        leaf: _Leaf | _Folder | None = self._root
        for part in parts:
            leaf = leaf.names.get(part) if isinstance(leaf, _Folder) else None
        if not isinstance(leaf, _Leaf):
            what = "a directory" if leaf is not None else "nothing that came before it"
            raise ArchiveRefusedError(path, f"is a hard link to {what}: {os.fsdecode(target)!r}")
        if parts != parts_of(path):
            leaf.layer = self.layer
            self._put(path, leaf)

    def _put(self, path: bytes, leaf: _Leaf) -> None:
        parts = parts_of(path)
        if not parts:
            raise ArchiveRefusedError(path, "would take the place of the tree itself")
        above = self._above(path, parts)
        found = above.names.get(parts[-1])
        if isinstance(found, _Folder):
            if self.layered:
                self._drop_older(found)
            if found.names:
                raise ArchiveRefusedError(path, "would take the place of a directory with files")
        self._drop(found)
        leaf.names += 1
        above.names[parts[-1]] = leaf

    def _above(self, path: bytes, parts: list[bytes]) -> _Folder:
        """Returns the directory that a path is in, made if it is not there."""
        if len(parts) > DEEPEST + 1:
            raise ArchiveRefusedError(path, f"is deeper than {DEEPEST} directories")
        folder = self._root
        for part in parts[:-1]:
            folder.layer = self.layer
            below = folder.names.get(part)
            if below is None:
                below = folder.names[part] = _Folder(self.layer)
            elif isinstance(below, _Leaf):
                if not self.layered or below.layer == self.layer:
                    raise ArchiveRefusedError(path, "leads through a file or link")
                self._drop(below)
                below = folder.names[part] = _Folder(self.layer)
            folder = below
        folder.layer = self.layer
        return folder

    def remove(self, path: bytes) -> None:
        """Removes what lower layers have at a path, if anything: a whiteout."""
        parts = parts_of(path)
        if not parts:
            raise ArchiveRefusedError(path, "removes the tree itself")
        folder = self._find(parts[:-1])
        found = folder.names.get(parts[-1]) if folder is not None else None
        if folder is None or found is None:
            return
        if found.layer < self.layer:
            self._drop(found)
            del folder.names[parts[-1]]
        elif isinstance(found, _Folder):
            self._drop_older(found)

    def clear(self, path: bytes) -> None:
        """Removes all that lower layers have in a directory: an opaque whiteout."""
        folder = self._find(parts_of(path))
        if folder is not None:
            self._drop_older(folder)

    def _find(self, parts: list[bytes]) -> _Folder | None:
        folder = self._root
        for part in parts:
            below = folder.names.get(part)
            if not isinstance(below, _Folder):
                return None
            folder = below
        return folder

    def _drop_older(self, folder: _Folder) -> None:
        for name, found in list(folder.names.items()):
            if found.layer < self.layer:
                self._drop(found)
                del folder.names[name]
            elif isinstance(found, _Folder):
                self._drop_older(found)

    def _drop(self, found: _Leaf | _Folder | None) -> None:
        if isinstance(found, _Leaf):
            found.names -= 1
        elif found is not None:
            for below in found.names.values():
                self._drop(below)

    def build(self, nodes: NodeBuffer) -> Entry:
        """Returns the root, its nodes put into `nodes`."""
        groups: dict[int, list[tuple[tuple[_Folder, bytes, bytes], Entry]]] = {}
        for folder, path, name, leaf in self._leaves(self._root, b""):
            if leaf.names > 1:
                entry = msgspec.structs.replace(leaf.entry, name=name)
                groups.setdefault(id(leaf), []).append(((folder, path, name), entry))
        ordered = [sorted(members, key=lambda m: m[0][1]) for members in groups.values()]
        ordered.sort(key=lambda members: members[0][0][1])
        linked = {(id(folder), name): entry for (folder, _, name), entry in number_groups(ordered)}
        return self._close(self._root, b"", nodes, linked)

    def _leaves(self, folder: _Folder, path: bytes) -> "list[tuple[_Folder, bytes, bytes, _Leaf]]":
        found = []
        stack = [(folder, path)]
        while stack:
            folder, path = stack.pop()
            for name, below in folder.names.items():
                child = path + b"/" + name if path else name
                if isinstance(below, _Folder):
                    stack.append((below, child))
                elif below.names > 1:
                    found.append((folder, child, name, below))
        return found

    def _close(
        self, folder: _Folder, name: bytes, nodes: NodeBuffer,
        linked: dict[tuple[int, bytes], Entry],
    ) -> Entry:  # fmt: skip
        entries = []
        for below, found in sorted(folder.names.items()):
            if isinstance(found, _Folder):
                entries.append(self._close(found, below, nodes, linked))
            else:
                entry = linked.get((id(folder), below)) if linked else None
                entries.append(entry or msgspec.structs.replace(found.entry, name=below, link=None))
        return directory_entry(
            nodes.put, entries, name=name, mode=folder.mode, mtime_ns=folder.mtime_ns,
            xattrs=folder.xattrs, owner=folder.owner or self.default_owner,
        )  # fmt: skip
