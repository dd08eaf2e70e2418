"""Tree views: reading a working tree by path.

The part of a workspace that changes nothing. A path that is text gets text back, one of bytes
bytes, as in `os`. Every call sees one state of the tree; `walk`, `glob` and `open` keep to the
one that was there when they were called.
"""

import fnmatch
import io
import re
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, AnyStr, overload

import msgspec

from engine.storage import content
from engine.storage.nodes import Entry, Kind
from engine.storage.objects import Objects
from engine.trees.paths import (
    InvalidPathError,
    MissingPathError,
    NoDirectoryError,
    NoFileError,
    Path,
    joined,
    like,
    names_of,
)
from engine.workspaces.working_tree import Folder, Node, WorkingTree, Written, is_directory

BLOCK_BYTES = 1 << 20
"""How much of a file is read at a time where it is read in order."""

Listing = list


class Stat(msgspec.Struct, frozen=True):
    """What is known of a path; `size` in bytes (of a link, its target's; of a directory 0)."""

    kind: Kind
    mode: int
    size: int
    mtime_ns: int
    xattrs: tuple[tuple[bytes, bytes], ...] = ()


class TreeView:
    """Reads a working tree. Safe to use from several threads."""

    def __init__(self, objects: Objects, tree: WorkingTree) -> None:
        self._objects, self._tree = objects, tree
        self._lock = threading.Lock()  # for every look at the tree, and every change of it

    def _view(self) -> "TreeView":
        """Returns a view of the tree as it is now."""
        with self._lock:
            return TreeView(self._objects, self._tree.share())

    def _find(self, names: tuple[bytes, ...]) -> Node | None:
        with self._lock:
            tree = self._tree
            node: Node | None = tree.root
            for name in names:
                if not is_directory(node):
                    return None
                node = tree.child(node, name)
            return node

    def _get(self, path: Path) -> Node:
        names = names_of(path)
        node = self._find(names)
        if node is None:
            raise MissingPathError(joined(names))
        return node

    def _file(self, path: Path) -> Entry | Written:
        node = self._get(path)
        if isinstance(node, Folder) or node.kind != Kind.FILE:
            raise NoFileError(joined(names_of(path)))
        return node

    def exists(self, path: Path) -> bool:
        """Tells whether there is anything at a path. Raises InvalidPathError."""
        return self._find(names_of(path)) is not None

    def stat(self, path: Path) -> Stat:
        """Returns what is known of a path. Raises MissingPathError."""
        return _stat(self._get(path))

    def read(self, path: Path, offset: int = 0, size: int | None = None) -> bytes:
        """Returns a file's bytes, or up to `size` of them from `offset` on.

        Raises MissingPathError, NoFileError, MissingObjectError, CorruptObjectError.
        """
        if offset < 0 or (size is not None and size < 0):
            raise ValueError("offset and size are not negative")
        file = self._file(path)
        return _part(self._objects, file, offset, file.size if size is None else size)

    def read_text(self, path: Path, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Returns a file's text. Raises as `read`, and UnicodeDecodeError."""
        return self.read(path).decode(encoding, errors)

    def read_link(self, path: Path) -> bytes:
        """Returns the target of a symbolic link. Raises MissingPathError, InvalidPathError."""
        node = self._get(path)
        if isinstance(node, Entry) and node.kind == Kind.SYMLINK:
            assert isinstance(node.content, bytes)
            return node.content
        raise InvalidPathError(joined(names_of(path)), "is not a symbolic link")

    def open(self, path: Path) -> io.BufferedReader:
        """Opens a file for reading, as it is now whatever becomes of the path. Raises as `read`."""
        return io.BufferedReader(_FileReader(self._objects, self._file(path)), BLOCK_BYTES)

    @overload
    def list(self) -> Listing[str]: ...
    @overload
    def list(self, path: AnyStr) -> Listing[AnyStr]: ...
    def list(self, path: Any = "") -> Any:
        """Returns the names in a directory, sorted by their bytes.

        Raises MissingPathError, NoDirectoryError.
        """
        view = self._view()
        return [like(name, path) for name, _ in view._tree.children(view._directory(path))]

    @overload
    def walk(self) -> Iterator[tuple[str, Stat]]: ...
    @overload
    def walk(self, path: AnyStr) -> Iterator[tuple[AnyStr, Stat]]: ...
    def walk(self, path: Any = "") -> Any:
        """Yields (path, Stat) of all below a directory, one before what is in it, by name.

        Raises MissingPathError, NoDirectoryError.
        """
        view = self._view()
        steps = view._walk(view._directory(path), joined(names_of(path)))
        return ((like(below, path), _stat(node)) for below, node in steps)

    def glob(self, pattern: AnyStr) -> Listing[AnyStr]:
        """Returns the paths that match a pattern, sorted by their bytes.

        `*`, `?` and `[...]` match within a name, as in `fnmatch`, names that begin with a dot
        included; `**` is any number of directories, and at the end all that is below.
        """
        found: set[bytes] = set()
        view = self._view()
        view._match(view._tree.root, (), names_of(pattern), found)
        return [like(path, pattern) for path in sorted(found)]

    def _directory(self, path: Path) -> Entry | Folder:
        node = self._get(path)
        if not is_directory(node):
            raise NoDirectoryError(joined(names_of(path)))
        return node

    def _walk(self, directory: Entry | Folder, path: bytes) -> Iterator[tuple[bytes, Node]]:
        prefix = path + b"/" if path else b""
        for name, node in self._tree.children(directory):
            yield prefix + name, node
            if is_directory(node):
                yield from self._walk(node, prefix + name)

    def _match(
        self, node: Node, at: tuple[bytes, ...], parts: tuple[bytes, ...], found: set[bytes]
    ) -> None:
        if not parts:
            found.add(joined(at))
            return
        if not is_directory(node):
            return
        part, rest = parts[0], parts[1:]
        if part == b"**":
            if rest:
                self._match(node, at, rest, found)
            for name, below in self._tree.children(node):
                if not rest:
                    found.add(joined((*at, name)))
                self._match(below, (*at, name), parts, found)
        elif re.search(rb"[*?[]", part) is None:
            only = self._tree.child(node, part)
            if only is not None:
                self._match(only, (*at, part), rest, found)
        else:
            matches = _matcher(part)
            for name, below in self._tree.children(node):
                if matches(name):
                    self._match(below, (*at, name), rest, found)


class _FileReader(io.RawIOBase):
    """A file as an object to read from; the file is as it was."""

    def __init__(self, objects: Objects, file: Entry | Written) -> None:
        super().__init__()
        self._objects, self._file, self._at = objects, file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        if start + offset < 0:
            raise ValueError("before the beginning of the file")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = _part(self._objects, self._file, self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _part(objects: Objects, file: Entry | Written, offset: int, size: int) -> bytes:
    if isinstance(file, Written):
        return file.data[offset : offset + size]
    return content.read(objects, file, offset, size)


def _stat(node: Node) -> Stat:
    size = 0 if node.kind == Kind.DIRECTORY else node.size
    return Stat(Kind(node.kind), node.mode, size, node.mtime_ns, node.xattrs)


@lru_cache(maxsize=256)
def _matcher(pattern: bytes) -> Callable[[bytes], object]:
    return re.compile(fnmatch.translate(pattern.decode("latin-1")).encode("latin-1")).match
