"""Workspaces: a tree in memory for programs that try things: write, fork, commit, restore.

A workspace stands on a snapshot and loads what is touched. `fork` shares everything and costs
the same whatever there is; what is written is in memory until `commit`, and a workspace that is
dropped costs nothing. Needs no mount.

Paths are as in `paths`. Symbolic links are entries like others and never followed. Where a file
is changed that has several names (hard links), the one that was used becomes a file of its own.

Threads: any number may read and fork a workspace while one writes it; a `walk`, `glob`, `diff` or
`commit` sees the tree as it was when it began. Two that write the same workspace take turns.
Forks are independent, so each thread best has its own. See docs/concepts/workspaces.md.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from engine.errors import MissingObjectError
from engine.host.forks import OfOneProcess
from engine.ids import ChunkId, NodeId, SnapshotId, check_name
from engine.patches.patching import PatchReport, apply_patch
from engine.sessions.freezing import TooDeepError
from engine.storage.content import ingest_blocks
from engine.storage.nodes import DEEPEST, Entry, Kind, Node, Totals, directory_node, encode, node_id
from engine.storage.objects import ChunkSink, NodeBuffer, Objects
from engine.storage.snapshots import make_snapshot
from engine.trees.diffing import Change, diff
from engine.trees.directory import directory_entry, directory_id
from engine.trees.paths import (
    InvalidPathError,
    MissingPathError,
    NoDirectoryError,
    NoFileError,
    NotEmptyError,
    Path,
    PathExistsError,
    joined,
    names_of,
)
from engine.workspaces.committing import Batch
from engine.workspaces.patched_workspace import PatchedWorkspace
from engine.workspaces.pins import Pin
from engine.workspaces.tree_view import BLOCK_BYTES, TreeView
from engine.workspaces.working_tree import Folder, WorkingTree, Written, is_directory
from engine.workspaces.working_tree import Node as TreeNode

if TYPE_CHECKING:
    from engine.repository import Repository

LARGE_BYTES = 16 << 20
"""What is written in one piece and is larger goes to the store at once, as `write_stream` does."""
_EMPTY_NODE = encode(directory_node(()))
_EMPTY = Entry(b"", Kind.DIRECTORY, 0o755, 0, 0, node_id(_EMPTY_NODE), (), None, Totals(0, 0))


class Committed(msgspec.Struct, frozen=True):
    """What a commit made. Without any change `snapshot` is what the workspace stood on already."""

    snapshot: SnapshotId
    root: Entry
    changed: bool


class Workspace(TreeView, OfOneProcess):
    """A tree in memory on a snapshot; made by `Repository.workspace`."""

    def __init__(
        self,
        repository: "Repository",
        tree: WorkingTree,
        base: Entry,
        snapshot: SnapshotId | None,
        pins: tuple[Pin, ...],
        now_ns: Callable[[], int],
    ) -> None:
        super().__init__(repository.objects, tree)
        self._repository, self._base, self._snapshot = repository, base, snapshot
        self._pins = pins  # of the base first, then of what `write_stream` has stored
        self._now_ns = now_ns
        self._turn = threading.Lock()  # of who changes it; taken before _lock

    @property
    def snapshot(self) -> SnapshotId | None:
        """What it stands on: opened, committed or restored last. None for an empty tree."""
        return self._snapshot

    def is_changed(self) -> bool:
        """Tells whether there is anything that a commit would store."""
        with self._lock:
            return self._tree.root is not self._base

    # Forks, history.

    def fork(self) -> "Workspace":
        """Returns another workspace on the same tree, changes included; each goes its own way."""
        with self._lock:
            return Workspace(
                self._repository, self._tree.share(), self._base, self._snapshot,
                self._pins, self._now_ns,
            )  # fmt: skip

    def commit(
        self,
        message: str = "",
        *,
        metadata: dict[str, Any] | None = None,
        parents: tuple[SnapshotId, ...] | None = None,
        ref: str | None = None,
        durable: bool = True,
    ) -> Committed:
        """Makes a snapshot of the tree and stands on it.

        `parents` are what it stands on, unless given. Nothing changed and no `parents`: there
        is no new snapshot. `durable`: in the store, and synced, when it returns, with every
        commit before it; commits that several threads make meanwhile share one sync. Otherwise
        this process sees it at once, and others when it is written: with the next durable one,
        `Repository.flush`, `Repository.close`, or 50 ms later; a process that is killed before
        has lost it and those after it, never one before.

        Raises InvalidNameError for `ref`, ValueError for metadata that is no JSON, StoreFullError;
        the workspace keeps its changes then.
        """
        if ref is not None:
            check_name("ref", ref)
        repository = self._repository
        with self._turn:
            with self._lock:
                frozen, pins = self._tree.share(), self._pins
            batch = Batch()
            if self._snapshot is None:
                batch.put(directory_node(()))
            root = frozen.freeze(batch)
            standing = self._snapshot
            if standing is not None and root == self._base and parents is None:
                if ref is not None:
                    repository.set_ref(ref, standing)
                if durable:
                    repository.flush()
                self._moved(self._base, standing, pins)
                return Committed(standing, self._base, False)
            if parents is None:
                parents = (standing,) if standing is not None else ()
            new_pin = repository.pins.pin(directory_id(root))
            snapshot = make_snapshot(root, parents, message, metadata)
            identifier = batch.conclude(snapshot, ref, pins)
            repository.commits.submit(batch, durable=durable)
            self._moved(snapshot.root, identifier, (new_pin,))
            return Committed(identifier, snapshot.root, True)

    def _moved(self, root: Entry, snapshot: SnapshotId, pins: tuple[Pin, ...]) -> None:
        with self._lock:
            self._tree.root = root
            self._tree.relinked = frozenset()
            self._base, self._snapshot, self._pins = root, snapshot, pins

    def restore(self, snapshot: SnapshotId | str | None = None) -> None:
        """Moves to another snapshot, or back to what it stands on; changes are dropped.

        Raises NotFoundError, AmbiguousIdError, MissingObjectError; nothing is changed then.
        """
        with self._turn:
            to = self._snapshot
            if snapshot is not None:
                to = self._repository.snapshot_id(snapshot)
            base, pins = _opened(self._repository, to)
            with self._lock:
                self._tree = WorkingTree(self._objects, base)
                self._base, self._snapshot, self._pins = base, to, pins

    def changes(self) -> Iterator[Change]:
        """Yields what was changed since the snapshot it stands on, by path."""
        return self._repository.workspace(self._snapshot).diff(self)

    def diff(self, other: "Workspace | SnapshotId | str | Entry") -> Iterator[Change]:
        """Yields what differs from this tree to another, by path; stores nothing.

        Entries of files that are not committed name chunks that are nowhere yet: their bytes are
        had from the workspace.
        """
        seen = _Unstored(self._objects)
        old = self._seen(seen.batch)
        if isinstance(other, Workspace):
            new = other._seen(seen.batch)
        elif isinstance(other, Entry):
            new = other
        else:
            identifier = self._repository.snapshot_id(other)
            new = self._repository.snapshot(identifier).root
        return diff(seen, old, new)

    def _seen(self, batch: Batch) -> Entry:
        with self._lock:
            tree = self._tree.share()
        return tree.freeze(batch)

    # Writing.

    def apply(
        self, patch: bytes | str, *, strip: int | None = None, fuzz: int = 0, set_id: bool = False
    ) -> PatchReport:
        """Applies a unified diff, git's format with its binaries included: all of it or nothing.

        `strip` directories are taken from the front of each path (`patch -p`); `fuzz` lines at
        the ends of a hunk's context may differ. A patch that gives a file set-id bits is refused
        unless `set_id`. Raises PatchFormatError, PatchRefusedError,
        which names the file and the hunk that does not fit, and as `write`.
        """
        plain = patch.encode("utf-8", "surrogateescape") if isinstance(patch, str) else patch
        with self._turn:
            trial = self.fork()
            report = apply_patch(
                PatchedWorkspace(trial), plain, strip=strip, fuzz=fuzz, set_id=set_id
            )
            with self._lock:
                self._tree, self._pins = trial._tree, trial._pins
        return report

    def write(
        self, path: Path, data: bytes | str, *, mode: int | None = None, parents: bool = False
    ) -> None:
        """Makes a file of these bytes, or text in UTF-8, or replaces one.

        Of a file that is there, permission bits and attributes stay. `parents` makes the
        directories above. The bytes stay in memory until they are committed, unless they are
        more than LARGE_BYTES. Raises MissingPathError, NoDirectoryError, NoFileError.
        """
        names = names_of(path)
        plain = data.encode() if isinstance(data, str) else bytes(data)
        if len(plain) > LARGE_BYTES:
            self.write_stream(path, [plain], mode=mode, parents=parents)
            return
        with self._turn, self._lock:
            self._set_file(names, plain, mode, parents)

    def write_at(self, path: Path, offset: int, data: bytes) -> None:
        """Changes a part of a file; what lies between its end and `offset` becomes zeros.

        Raises MissingPathError, NoFileError. Costs the whole file.
        """
        names = names_of(path)
        if offset < 0:
            raise ValueError("offset is not negative")
        with self._turn:
            size = self._file(path).size
            if max(size, offset + len(data)) <= LARGE_BYTES:
                plain = self.read(path).ljust(offset, b"\0")
                with self._lock:
                    plain = plain[:offset] + data + plain[offset + len(data) :]
                    self._set_file(names, plain, None, False)
                return
            with self.open(path) as file:
                self._set_stream(names, _spliced(file, size, offset, data), None, False)

    def write_stream(
        self,
        path: Path,
        source: BinaryIO | Iterable[bytes],
        *,
        mode: int | None = None,
        parents: bool = False,
    ) -> None:
        """Makes a file of what can be read from a binary file, or of blocks of bytes.

        The bytes go to the store at once, so that memory holds a few MB of them; a workspace
        that is dropped leaves them to the next garbage collection, which waits meanwhile.
        Raises as `write`, StoreFullError, LeaseHeldError, and what reading `source` does.
        """
        names = names_of(path)
        with self._turn:
            self._set_stream(names, _blocks(source), mode, parents)

    def _set_stream(
        self, names: tuple[bytes, ...], blocks: Iterable[bytes], mode: int | None, parents: bool
    ) -> None:
        with self._lock:
            self._may_be_file(names)
        repository = self._repository
        nodes = NodeBuffer()
        with repository.storing():
            sink = ChunkSink(repository.store)
            body, size = ingest_blocks(blocks, sink.put, nodes.put)
            if not isinstance(body, bytes):
                # A tree of this file alone is pinned until a snapshot has it.
                file = Entry(b"file", Kind.FILE, 0, 0, size, body)
                tree = directory_entry(nodes.put, [file], name=b"", mode=0, mtime_ns=0)
                pin = repository.pins.pin(directory_id(tree))
                sink.flush()
                repository.store.write(nodes.flush)
        with self._lock:
            if isinstance(body, bytes):
                self._set_file(names, body, mode, parents)
            else:
                self._pins += (pin,)
                self._set_file(names, file, mode, parents)

    def mkdir(
        self, path: Path, *, mode: int = 0o755, parents: bool = False, exist_ok: bool = False
    ) -> None:
        """Makes a directory. Raises PathExistsError, MissingPathError, NoDirectoryError."""
        names = names_of(path)
        with self._turn, self._lock:
            old = self._reach(names)
            if old is not None:
                if exist_ok and is_directory(old):
                    return
                raise PathExistsError(joined(names))
            if len(names) > DEEPEST:
                raise TooDeepError(joined(names))
            above = self._parent(names, parents)
            self._name(above, names[-1], self._tree.new_folder(_checked(mode), self._now_ns()))

    def symlink(self, path: Path, target: Path, *, parents: bool = False) -> None:
        """Makes a symbolic link, to whatever. Raises PathExistsError, and as `mkdir`."""
        names = names_of(path)
        to = target if isinstance(target, bytes) else target.encode("utf-8", "surrogateescape")
        if not 0 < len(to) <= 4095 or b"\0" in to:
            raise InvalidPathError(to, "cannot be a link's target: 1 to 4095 bytes without NUL")
        with self._turn, self._lock:
            if self._reach(names) is not None:
                raise PathExistsError(joined(names))
            above = self._parent(names, parents)
            now = self._now_ns()
            self._name(above, names[-1], Entry(names[-1], Kind.SYMLINK, 0o777, now, len(to), to))

    def remove(self, path: Path, *, recursive: bool = False) -> None:
        """Removes a file, a link or an empty directory; with `recursive`, any directory.

        Raises MissingPathError, NotEmptyError.
        """
        names = names_of(path)
        with self._turn, self._lock:
            node = self._there(names)
            if is_directory(node) and not recursive and not self._tree.is_empty(node):
                raise NotEmptyError(joined(names))
            above = self._parent(names)
            self._tree.forget(node)
            self._name(above, names[-1], None)

    def rename(self, old: Path, new: Path) -> None:
        """Moves a file, a link or a directory with all that is in it.

        As rename(2): takes the place of a file or link, or of an empty directory if it is one.
        Raises MissingPathError, NoDirectoryError, NoFileError, NotEmptyError; InvalidPathError for
        a directory into itself.
        """
        source, target = names_of(old), names_of(new)
        with self._turn, self._lock:
            node, there = self._there(source), self._reach(target)
            if source == target:
                return
            if target[: len(source)] == source:
                raise InvalidPathError(joined(target), f"is inside of {joined(source)!r}")
            if is_directory(node):
                if there is not None and not is_directory(there):
                    raise NoDirectoryError(joined(target))
                if is_directory(there) and not self._tree.is_empty(there):
                    raise NotEmptyError(joined(target))
                room = DEEPEST - len(target) + 1
                if len(target) > len(source) and self._tree.height(node, room + 1) > room:
                    raise TooDeepError(joined(target))
            elif is_directory(there):
                raise NoFileError(joined(target))
            above, below = self._parent(source), self._parent(target)
            if isinstance(node, Entry):
                node = msgspec.structs.replace(node, name=target[-1])
            self._tree.forget(there)
            self._name(below, target[-1], node)
            self._name(above, source[-1], None)

    def chmod(self, path: Path, mode: int) -> None:
        """Sets the permission bits of a file or directory, the root's too.

        Raises MissingPathError, InvalidPathError for a link.
        """
        names = names_of(path)
        mode = _checked(mode)
        with self._turn, self._lock:
            node = self._reach(names)
            if node is None:
                raise MissingPathError(joined(names))
            if is_directory(node):
                self._tree.own(names).mode = mode
                return
            if node.kind == Kind.SYMLINK:
                raise InvalidPathError(joined(names), "is a symbolic link, which has no mode")
            above = self._parent(names)
            self._tree.forget(node)
            if isinstance(node, Written):
                changed: TreeNode = Written(node.data, mode, node.mtime_ns, node.xattrs, node.user)
            else:
                assert isinstance(node, Entry)
                changed = msgspec.structs.replace(node, mode=mode, link=None)
            above.names.set(names[-1], changed)

    # With both locks.

    def _reach(self, names: tuple[bytes, ...]) -> TreeNode | None:
        """Returns what is at a path; NoDirectoryError where it leads through something else."""
        tree = self._tree
        node: TreeNode | None = tree.root
        for at, name in enumerate(names):
            if node is None:
                return None
            if not is_directory(node):
                raise NoDirectoryError(joined(names[:at]))
            node = tree.child(node, name)
        return node

    def _there(self, names: tuple[bytes, ...]) -> TreeNode:
        node = self._reach(names)
        if node is None:
            raise MissingPathError(joined(names))
        if not names:
            raise InvalidPathError(b"", "is the root of the tree")
        return node

    def _may_be_file(self, names: tuple[bytes, ...]) -> TreeNode | None:
        """Returns what is at a path where a file is to be; raises if that must not become one."""
        node = self._reach(names)
        if node is not None and node.kind == Kind.SYMLINK:
            raise NoFileError(joined(names), "is a symbolic link, which is not followed")
        if node is not None and node.kind != Kind.FILE:
            raise NoFileError(joined(names))
        return node

    def _set_file(
        self, names: tuple[bytes, ...], file: bytes | Entry, mode: int | None, parents: bool
    ) -> None:
        old = self._may_be_file(names)
        mode = _checked(mode if mode is not None else 0o644 if old is None else old.mode)
        xattrs = () if old is None else old.xattrs
        user = old.owner if isinstance(old, Entry) else old.user if old is not None else None
        now = self._now_ns()
        new: TreeNode
        if isinstance(file, bytes):
            new = Written(file, mode, now, xattrs, user)
        else:
            new = msgspec.structs.replace(
                file, name=names[-1], mode=mode, mtime_ns=now, xattrs=xattrs, owner=user
            )
        if old is None:
            self._name(self._parent(names, parents), names[-1], new)
        else:
            self._tree.forget(old)
            self._tree.own(names[:-1]).names.set(names[-1], new)

    def _parent(self, names: tuple[bytes, ...], make: bool = False) -> Folder:
        """Returns the directory that a path is in, to be changed; with `make`, makes it."""
        tree = self._tree
        node: TreeNode = tree.root
        for at, name in enumerate(names[:-1]):
            assert is_directory(node)  # `_reach` was there
            below = tree.child(node, name)
            if below is None:
                if not make:
                    raise MissingPathError(joined(names[: at + 1]))
                if len(names) - 1 > DEEPEST:
                    raise TooDeepError(joined(names))
                above = tree.own(names[:at])
                for new in names[at:-1]:
                    folder = tree.new_folder(0o755, self._now_ns())
                    self._name(above, new, folder)
                    above = folder
                return above
            node = below
        return tree.own(names[:-1])

    def _name(self, directory: Folder, name: bytes, node: TreeNode | None) -> None:
        """Lets a name come or go, of which the directory's time tells."""
        directory.names.set(name, node)
        directory.mtime_ns = self._now_ns()


def open_workspace(
    repository: "Repository", snapshot: SnapshotId | None, now_ns: Callable[[], int]
) -> Workspace:
    """Opens one on a snapshot, or on an empty tree; see `Repository.workspace`."""
    base, pins = _opened(repository, snapshot)
    tree = WorkingTree(repository.objects, base)
    return Workspace(repository, tree, base, snapshot, pins, now_ns)


class _Unstored(Objects):
    """Objects of a store, and those of trees that are not stored."""

    def __init__(self, objects: Objects) -> None:
        super().__init__(objects.store)
        self._below, self.batch = objects, Batch()

    def node(self, identifier: NodeId) -> Node:
        node = self.batch.decoded.get(identifier)
        return self._below.node(identifier) if node is None else node

    def chunk(self, identifier: ChunkId) -> bytes:
        plain = self.batch.chunks.get(identifier)
        return self._below.chunk(identifier) if plain is None else plain


def _opened(repository: "Repository", snapshot: SnapshotId | None) -> tuple[Entry, tuple[Pin, ...]]:
    """Returns the root of a snapshot, or an empty one, and what keeps it from collection."""
    if snapshot is None:
        repository.objects.pending.nodes.setdefault(directory_id(_EMPTY), _EMPTY_NODE)
        return _EMPTY, ()
    root = repository.snapshot(snapshot).root
    pin = repository.pins.pin(directory_id(root))
    if not repository.has_snapshot(snapshot):  # removed before it was pinned; see `pins`
        raise MissingObjectError("snapshot", snapshot)
    return root, (pin,)


def _checked(mode: int) -> int:
    if not 0 <= mode <= 0o7777:
        raise ValueError(f"{mode:#o} are no permission bits")
    return mode


def _blocks(source: BinaryIO | Iterable[bytes]) -> Iterable[bytes]:
    read = getattr(source, "read", None)
    return source if read is None else iter(lambda: read(BLOCK_BYTES), b"")


def _spliced(file: BinaryIO, size: int, offset: int, data: bytes) -> Iterator[bytes]:
    """Yields a file's blocks with `data` at `offset`."""
    at = 0
    while at < min(offset, size):
        block = file.read(min(BLOCK_BYTES, offset - at))
        yield block
        at += len(block)
    while at < offset:
        zeros = bytes(min(BLOCK_BYTES, offset - at))
        yield zeros
        at += len(zeros)
    yield data
    file.seek(offset + len(data))
    yield from iter(lambda: file.read(BLOCK_BYTES), b"")
