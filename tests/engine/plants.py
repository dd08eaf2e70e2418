"""Trees that tests plant in a store from a dict of their files, and get back as such a dict.

A path has a `Leaf`: a file's bytes, a link's target, or an empty directory. Directories above a
leaf are there by themselves.
"""

import os
import stat
from pathlib import Path
from typing import NamedTuple

from engine.patches.patching import Node
from engine.storage import content
from engine.storage.content import ingest_blocks
from engine.storage.memory_store import MemoryStore
from engine.storage.nodes import Entry, Kind
from engine.storage.objects import ChunkSink, NodeBuffer, Objects
from engine.trees.directory import directory_entry, directory_id, walk


class Leaf(NamedTuple):
    """What is at a path."""

    data: bytes = b""
    mode: int = 0o644
    kind: int = Kind.FILE
    mtime_ns: int = 1


def link(target: bytes) -> Leaf:
    return Leaf(target, 0o777, Kind.SYMLINK)


EMPTY_DIRECTORY = Leaf(b"", 0o755, Kind.DIRECTORY)

Plant = dict[bytes, Leaf]


class Garden:
    """A store in memory in which trees are planted."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.objects = Objects(self.store)
        self.nodes = NodeBuffer()
        self.sink = ChunkSink(self.store)

    def plant(self, files: Plant, name: bytes = b"", mode: int = 0o755, mtime_ns: int = 1) -> Entry:
        """Stores a tree and returns its root."""
        root = self._directory(files, name, mode, mtime_ns)
        self.save()
        return root

    def save(self) -> None:
        self.sink.flush()
        self.store.write(self.nodes.flush)

    def _directory(self, files: Plant, name: bytes, mode: int, mtime_ns: int) -> Entry:
        below: dict[bytes, Plant] = {}
        entries: dict[bytes, Entry] = {}
        for path, leaf in files.items():
            first, _, rest = path.partition(b"/")
            if rest:
                below.setdefault(first, {})[rest] = leaf
            elif leaf.kind == Kind.DIRECTORY:
                below.setdefault(first, {})
            else:
                entries[first] = self.entry(first, leaf)
        for first, plant in below.items():
            assert first not in entries, first
            entries[first] = self._directory(plant, first, mode, mtime_ns)
        return directory_entry(
            self.nodes.put, [entries[each] for each in sorted(entries)],
            name=name, mode=mode, mtime_ns=mtime_ns,
        )  # fmt: skip

    def entry(self, name: bytes, leaf: Leaf) -> Entry:
        """Stores a file's content and returns its entry."""
        data: content.Content = leaf.data
        if leaf.kind == Kind.FILE:
            data, _ = ingest_blocks([leaf.data], self.sink.put, self.nodes.put)
        return Entry(name, leaf.kind, leaf.mode, leaf.mtime_ns, len(leaf.data), data)

    def harvest(self, root: Entry) -> Plant:
        """Returns the files and links of a tree, and its empty directories."""
        found: Plant = {}
        for path, entry in walk(self.objects, root):
            if entry.kind == Kind.DIRECTORY:
                assert entry.totals is not None
                if not entry.totals.entries:
                    found[path] = EMPTY_DIRECTORY
                assert directory_id(entry)
            elif entry.kind == Kind.FILE:
                data = content.read(self.objects, entry, 0, entry.size)
                found[path] = Leaf(data, entry.mode, entry.kind, entry.mtime_ns)
            else:
                assert isinstance(entry.content, bytes)
                found[path] = Leaf(entry.content, entry.mode, entry.kind, entry.mtime_ns)
        return found


def without_times(plant: Plant) -> Plant:
    return {path: leaf._replace(mtime_ns=0) for path, leaf in plant.items()}


def make_directory(target: Path, plant: Plant) -> None:
    """Makes a plant a directory on the host."""
    for path, leaf in plant.items():
        absolute = os.path.join(os.fsencode(target), path)
        os.makedirs(absolute if leaf.kind == Kind.DIRECTORY else os.path.dirname(absolute),
                    exist_ok=True)  # fmt: skip
        if leaf.kind == Kind.SYMLINK:
            os.symlink(leaf.data, absolute)
        elif leaf.kind == Kind.FILE:
            Path(os.fsdecode(absolute)).write_bytes(leaf.data)
            os.chmod(absolute, leaf.mode)


def read_directory(target: Path) -> Plant:
    """Returns the files and links in a directory on the host; of modes only the owner's x."""
    found: Plant = {}
    for above, _, _ in os.walk(os.fsencode(target)):
        for entry in os.scandir(above):
            path = os.path.relpath(entry.path, os.fsencode(target))
            if entry.is_symlink():
                found[path] = link(os.readlink(entry.path))
            elif entry.is_file():
                executable = entry.stat().st_mode & stat.S_IXUSR
                data = Path(os.fsdecode(entry.path)).read_bytes()
                found[path] = Leaf(data, 0o755 if executable else 0o644)
    return without_times(found)


class DictTree:
    """A tree for patches, strict: what may not be is an AssertionError."""

    def __init__(self, plant: Plant) -> None:
        self.files = {path: leaf for path, leaf in plant.items() if leaf.kind != Kind.DIRECTORY}
        self.directories = {path for path, leaf in plant.items() if leaf.kind == Kind.DIRECTORY}
        self.writes = 0
        for path in plant:
            self._make_above(path)

    def plant(self) -> Plant:
        above = {path.rpartition(b"/")[0] for path in [*self.files, *self.directories]}
        empty = dict.fromkeys(self.directories - above, EMPTY_DIRECTORY)
        return without_times({**self.files, **empty})

    def _make_above(self, path: bytes) -> None:
        while path := path.rpartition(b"/")[0]:
            assert path not in self.files, path
            self.directories.add(path)

    def find(self, path: bytes) -> Node | None:
        if path in self.directories:
            return Node(Kind.DIRECTORY, 0o755)
        leaf = self.files.get(path)
        return None if leaf is None else Node(leaf.kind, leaf.mode)

    def read(self, path: bytes) -> bytes:
        return self.files[path].data

    def files_below(self, path: bytes) -> list[bytes]:
        assert path in self.directories
        return [file for file in self.files if file.startswith(path + b"/")]

    def write(self, path: bytes, data: bytes, mode: int) -> None:
        self._put(path, Leaf(data, mode))

    def symlink(self, path: bytes, target: bytes) -> None:
        assert target
        self._put(path, link(target))

    def _put(self, path: bytes, leaf: Leaf) -> None:
        self.writes += 1
        assert path not in self.directories, path
        assert path not in self.files or self.files[path].kind == leaf.kind
        self._make_above(path)
        self.files[path] = leaf

    def chmod(self, path: bytes, mode: int) -> None:
        self.writes += 1
        self.files[path] = self.files[path]._replace(mode=mode)

    def rename(self, old: bytes, new: bytes) -> None:
        assert new not in self.files
        self._put(new, self.files.pop(old))

    def remove(self, path: bytes) -> None:
        self.writes += 1
        if path in self.files:
            del self.files[path]
            return
        self.directories.remove(path)
        inside = path + b"/"
        self.directories = {each for each in self.directories if not each.startswith(inside)}
        self.files = {
            each: leaf for each, leaf in self.files.items() if not each.startswith(inside)
        }

    def prune(self, path: bytes) -> None:
        while path := path.rpartition(b"/")[0]:
            inside = path + b"/"
            if any(each.startswith(inside) for each in [*self.files, *self.directories]):
                return
            self.directories.discard(path)
