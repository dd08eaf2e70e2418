"""Export to git: snapshots with their graph become commits of a repository, then branches.

Objects are written first and a branch last, so a branch never names what is not all there. The
work tree and the index are left alone. A snapshot that came from a commit becomes the same
commit again; what is in the repository already is not written, nor read here.

What git cannot say is left out and counted in the report: empty directories, extended
attributes, fifos, permission bits but the owner's x, that names are one file, and times.
"""

import io
import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypedDict

import msgspec

from engine.errors import InvalidNameError, MissingObjectError
from engine.git import git_links
from engine.git.git_objects import (
    FILE_MODES,
    LINK_MODE,
    MODE_ATTRIBUTE,
    MODULE_ATTRIBUTE,
    MODULE_MODE,
    TREE_MODE,
    Commit,
    TreeEntry,
    commit_id,
    format_commit,
    format_tree,
    from_record,
    parse_commit,
    parse_tree,
)
from engine.git.git_refs import known_ref
from engine.git.git_repository import HEADS, GitRefusedError, GitRepository, check_names
from engine.git.git_trees import TIME_NS, file_mode
from engine.ids import SnapshotId
from engine.progress import Progress, unheard
from engine.storage import content
from engine.storage.nodes import Entry, Kind
from engine.storage.objects import Objects
from engine.storage.snapshots import Snapshot, make_snapshot
from engine.trees.directory import Directory, directory_id

if TYPE_CHECKING:
    from engine.repository import Repository


_WHOLE_BYTES = 8 << 20
"""A file longer than this is handed over in pieces."""
_EXAMPLES = 20
_COMMIT = re.compile(rb"[0-9a-f]{40}")


class Loss(msgspec.Struct):
    """What git cannot say of one kind: how often, and the first paths."""

    count: int = 0
    paths: list[bytes] = []


class GitExport(msgspec.Struct):
    """What an export to git did.

    `branches` are git's full names with what they name now; `commits` were written, with
    `objects` trees and blobs; `known` were there. `others` are snapshots that came from a commit
    and became another one. `lost` says by kind what git cannot say. `warnings` name ancestors
    that have been removed.
    """

    branches: dict[str, str] = {}
    commits: int = 0
    known: int = 0
    objects: int = 0
    others: list[SnapshotId] = []
    lost: dict[str, Loss] = {}
    warnings: list[str] = []


class ToExport(msgspec.Struct, frozen=True):
    """What a branch shall be: a snapshot, and a tree on top of it that is none yet.

    `ref` is the one here that named it: an annotated tag that it came with is written again.
    """

    branch: str
    snapshot: SnapshotId
    ref: str = ""
    root: Entry | None = None
    message: str = ""


class GitExportOptions(TypedDict, total=False):
    """What `export_git` takes besides the repository and the branches."""

    author: str | None
    force: bool
    progress: Progress | None


class _Tree(msgspec.Struct, frozen=True):
    """A directory here and the tree of git's that it is."""

    entry: Entry
    tree: bytes


def export_git(
    repository: "Repository",
    path: str,
    wanted: list[ToExport],
    *,
    author: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> GitExport:
    """Writes snapshots and all that they came from to the git repository at `path`.

    Makes a bare one if there is none. A name that begins with `refs/` is taken as it is, others
    are branches. `author`, as `Name <address>`, is that of snapshots that did not come from git,
    else git's configuration tells it. A branch is moved forward only, unless `force`, and all of
    them or, where one may not be moved, none. Raises GitMissingError, GitSourceError,
    GitRefusedError, CorruptObjectError.
    """
    repository.flush()
    wanted = _once(path, wanted)
    target = GitRepository.make(path)
    author = author if author is not None else target.author()
    if author is not None and (not author.strip() or any(c in author for c in "\n\0")):
        raise InvalidNameError("author", author, "give it as `Name <address>`")
    job = _GitExport(repository, target, author, progress)
    with repository.storing():
        return job.run(wanted, force)


class _GitExport:
    def __init__(
        self,
        repository: "Repository",
        target: GitRepository,
        author: str | None,
        progress: Progress | None,
    ) -> None:
        self.repository, self.target, self.author = repository, target, author
        self.progress = progress or unheard
        self.report = GitExport()
        self.trees = GitTreeWriter(repository.objects, target, self.report)
        self.done: dict[SnapshotId, bytes] = {}
        self.roots: dict[SnapshotId, _Tree] = {}
        self.rows: list[tuple[bytes, bytes]] = []

    def tell(self, done: int, total: int) -> None:
        self.trees.tell = lambda: self.progress(done, total, self.trees.written_bytes)
        self.trees.tell()

    def run(self, wanted: list[ToExport], force: bool) -> GitExport:
        self.target.check_names(full_name(each.branch) for each in wanted)
        order = self._order([each.snapshot for each in wanted])
        for at, identifier in enumerate(order):
            self.tell(at, len(order))
            self._snapshot(identifier)
        moves = []
        for each in wanted:
            commit = self.done[each.snapshot]
            if each.root is not None:
                commit = self._on_top(each.snapshot, each.root, each.message)
            name = full_name(each.branch)
            aim = self._tag(each, commit) if each.root is None else None
            aim = commit if aim is None else aim
            self.target.check_ref(name, aim, force=force)
            moves.append((name, aim, self.target.target(name)))
        rows = self.rows
        self.repository.store.write(lambda writer: git_links.put(writer, rows))
        self.target.set_refs([move for move in moves if move[1] != move[2]])
        self.report.branches = {name: aim.hex() for name, aim, _ in moves}
        self.tell(len(order), len(order))
        return self.report

    def _tag(self, wanted: ToExport, commit: bytes) -> bytes | None:
        """Writes the tag object that a ref came with, if that names this commit."""
        if not wanted.ref:
            return None
        with self.repository.store.read() as reader:
            known = known_ref(reader, wanted.ref)
        if known is None or known.tag is None or known.snapshot != wanted.snapshot:
            return None
        if not known.tag.startswith(b"object %s\ntype commit\n" % commit.hex().encode()):
            return None
        return self.target.write("tag", known.tag)

    # Commits.

    def _order(self, tips: list[SnapshotId]) -> list[SnapshotId]:
        """Returns the snapshots to write, each after its parents; fills in those that are there."""
        order: list[SnapshotId] = []
        seen: set[SnapshotId] = set()
        stack = [(tip, False) for tip in reversed(tips)]
        while stack:
            identifier, is_left = stack.pop()
            if is_left:
                order.append(identifier)
                continue
            if identifier in seen:
                continue
            seen.add(identifier)
            try:
                record = self.repository.snapshot(identifier)
            except MissingObjectError:
                if identifier in tips:
                    raise
                continue  # removed; its children say so
            commit = self._commit_there(identifier, record)
            if commit is not None:
                self.done[identifier] = commit
                self.report.known += 1
                continue
            stack.append((identifier, True))
            stack += [(SnapshotId(parent), False) for parent in reversed(record.parents)]
        return order

    def _commit_there(self, identifier: SnapshotId, record: Snapshot) -> bytes | None:
        """Returns the commit of a snapshot that the repository has already.

        What a snapshot says of itself counts only if an import of this store says the same.
        """
        with self.repository.store.read() as reader:
            commit = git_links.commit_of(reader, identifier)
            if commit is None:
                commit = commit_id(record.metadata)
                known = None if commit is None else git_links.snapshot_of(reader, commit)
                if known is None or known.snapshot != identifier:
                    return None
        return commit if commit is not None and self.target.has(commit) else None

    def _snapshot(self, identifier: SnapshotId) -> None:
        record = self.repository.snapshot(identifier)
        lost_before = self._losses()
        tree = self._tree(record.root, record)
        parents = self._parents(identifier, record)
        same = False
        made = from_record(record.message, record.metadata, tree, parents)
        if made is not None:
            data, same = made
            if not same:
                self.report.others.append(identifier)
        else:
            data = self._new_commit(
                tree, parents, record.time_ns, record.message or f"snapshot {identifier.hex()[:12]}"
            )
        commit = self.target.write("commit", data)
        self.report.commits += 1
        self.done[identifier] = commit
        self.roots[identifier] = _Tree(record.root, tree)
        self.rows.append(git_links.exported(commit, identifier, record.root))
        if lost_before == self._losses() and not same:
            # Imported again, it is what it was, not another snapshot beside it.
            cut = len(parents) != len(record.parents)
            self.rows.append(git_links.imported(commit, identifier, record.root, cut))

    def _losses(self) -> int:
        return sum(loss.count for kind, loss in self.report.lost.items() if kind != "time")

    def _parents(self, identifier: SnapshotId, record: Snapshot) -> tuple[bytes, ...]:
        """Returns the parents' commits; those that the import had left out, if they are there."""
        fields = record.metadata.get("git")
        kept = fields.get("parents") if isinstance(fields, dict) else None
        if isinstance(kept, list):
            try:
                return tuple(bytes.fromhex(each) for each in kept)
            except (TypeError, ValueError):
                pass
        parents = []
        for parent in record.parents:
            commit = self.done.get(SnapshotId(parent))
            if commit is None:
                self.report.warnings.append(
                    f"snapshot {identifier.hex()[:12]} came from {parent.hex()[:12]}, "
                    "which has been removed: its commit has one parent less"
                )
            else:
                parents.append(commit)
        return tuple(parents)

    def _new_commit(
        self, tree: bytes, parents: tuple[bytes, ...], time_ns: int, message: str
    ) -> bytes:
        if self.author is None:
            why = "nobody is named as the author of what did not come from git"
            raise GitRefusedError(self.target.path, why)
        who = f"{self.author} {max(0, time_ns // 1_000_000_000)} +0000".encode()
        text = message.replace("\0", "\\0")
        text = text if text.endswith("\n") else text + "\n"
        return format_commit(Commit(tree, parents, who, who, (), text.encode()))

    def _on_top(self, parent: SnapshotId, root: Entry, message: str) -> bytes:
        record = make_snapshot(root, (parent,), message)
        tree = self._tree(root, record)
        if self._tree_of(parent).tree == tree:
            return self.done[parent]
        data = self._new_commit(tree, (self.done[parent],), time.time_ns(), message)
        self.report.commits += 1
        return self.target.write("commit", data)

    # Trees.

    def _tree(self, root: Entry, record: Snapshot) -> bytes:
        base = None
        if record.parents and SnapshotId(record.parents[0]) in self.done:
            base = self._tree_of(SnapshotId(record.parents[0]))
        return self.trees.write(root, base)

    def _tree_of(self, identifier: SnapshotId) -> _Tree:
        if identifier not in self.roots:
            data = self.target.read("commit", self.done[identifier])
            root = self.repository.snapshot(identifier).root
            self.roots[identifier] = _Tree(root, parse_commit(data).tree)
        return self.roots[identifier]


def _once(path: str, wanted: list[ToExport]) -> list[ToExport]:
    """Returns what is wanted, each once; raises GitRefusedError for two that have one name."""
    found: dict[str, ToExport] = {}
    for each in wanted:
        name = full_name(each.branch)
        other = found.setdefault(name, each)
        if (other.snapshot, other.root) != (each.snapshot, each.root):
            who = " and ".join(
                wish.ref or f"snapshot {wish.snapshot.hex()[:12]}" for wish in (other, each)
            )
            raise GitRefusedError(path, f"{who} would both be {name!r} there")
    check_names(path, found)
    return list(found.values())


def full_name(branch: str) -> str:
    """Returns git's whole name of a branch, or of what has one already."""
    return branch if branch.startswith("refs/") else HEADS + branch


class GitTreeWriter:
    """Writes directories as git's trees; what a base has is taken from there by its id."""

    def __init__(self, objects: Objects, target: GitRepository, report: GitExport) -> None:
        self._objects, self._target, self._report = objects, target, report
        self.written_bytes = 0
        self.tell: Callable[[], None] = lambda: None
        """Called for each file that is written: `written_bytes` has changed then."""
        self._trees: dict[bytes, bytes | None] = {}
        self._blobs: dict[content.Content, bytes] = {}

    def write(self, root: Entry, base: _Tree | None) -> bytes:
        """Writes a root and returns its tree; that of a root without anything is git's empty."""
        tree = self._directory(root, b"", base)
        return self._put("tree", b"") if tree is None else tree

    def _directory(self, entry: Entry, path: bytes, base: _Tree | None) -> bytes | None:
        """Returns the tree of a directory; None if it has nothing that git knows."""
        identifier = directory_id(entry)
        if base is not None and directory_id(base.entry) == identifier:
            return base.tree
        if identifier in self._trees:
            return self._trees[identifier]
        old, old_items = self._base(base)
        items: list[TreeEntry] = []
        for below in Directory(self._objects, identifier):
            place = path + b"/" + below.name if path else below.name
            before, item = old.get(below.name), old_items.get(below.name)
            if item is not None and before is not None and _is_like(before, below):
                items.append(item)
            elif below.name.lower() == b".git":
                self._lose("name that git reserves", place)
            elif below.kind == Kind.DIRECTORY and not _is_module(below):
                # In this function, so that 512 directories are as many calls inside each other.
                mode = self._attributes(below, place)
                tree = self._directory(below, place, _tree_below(before, item))
                if tree is None:
                    self._lose("empty directory", place)
                else:
                    items.append((_mode(mode, 0o04) or TREE_MODE, below.name, tree))
            else:
                made = self._entry(below, place)
                if made is not None:
                    items.append(made)
        tree = self._put("tree", format_tree(items)) if items else None
        self._trees[identifier] = tree
        return tree

    def _base(self, base: _Tree | None) -> tuple[dict[bytes, Entry], dict[bytes, TreeEntry]]:
        if base is None:
            return {}, {}
        entries = Directory(self._objects, directory_id(base.entry))
        items = parse_tree(self._target.read("tree", base.tree))
        return {entry.name: entry for entry in entries}, {item[1]: item for item in items}

    def _attributes(self, entry: Entry, path: bytes) -> bytes | None:
        """Counts what git has no word for; returns the mode that an import has kept."""
        xattrs = dict(entry.xattrs)
        mode = xattrs.pop(MODE_ATTRIBUTE, None)
        if _is_module(entry):
            del xattrs[MODULE_ATTRIBUTE]
        if xattrs:
            self._lose("extended attribute", path)
        if entry.mtime_ns != TIME_NS:
            self._lose("time", path)
        if entry.link is not None:
            self._lose("hard link", path)
        if entry.owner is not None:
            self._lose("owner", path)
        return mode

    def _entry(self, entry: Entry, path: bytes) -> TreeEntry | None:
        mode = self._attributes(entry, path)
        if entry.kind == Kind.DIRECTORY:
            commit = bytes.fromhex(dict(entry.xattrs)[MODULE_ATTRIBUTE].decode())
            return _mode(mode, 0o16) or MODULE_MODE, entry.name, commit
        if entry.kind == Kind.SYMLINK and isinstance(entry.content, bytes):
            blob = self._put("blob", entry.content)
            return _mode(mode, 0o12) or LINK_MODE, entry.name, blob
        if entry.kind != Kind.FILE:
            self._lose("fifo", path)
            return None
        kept = _mode(mode, 0o10)
        if kept is None or file_mode(kept) != entry.mode:
            kept = b"100755" if entry.mode & 0o100 else b"100644"
            if entry.mode != FILE_MODES[kept]:
                self._lose("permission bits", path)
        return kept, entry.name, self._blob(entry)

    def _blob(self, entry: Entry) -> bytes:
        done = self._blobs.get(entry.content)
        if done is None:
            if entry.size > _WHOLE_BYTES:
                done = self._target.write_stream(_Reading(self._objects, entry), entry.size)
                self._report.objects += 1
            else:
                done = self._put("blob", content.read(self._objects, entry, 0, entry.size))
            self._blobs[entry.content] = done
            self.written_bytes += entry.size
            self.tell()
        return done

    def _put(self, kind: str, data: bytes) -> bytes:
        self._report.objects += 1
        return self._target.write(kind, data)

    def _lose(self, kind: str, path: bytes) -> None:
        loss = self._report.lost.setdefault(kind, Loss())
        loss.count += 1
        if len(loss.paths) < _EXAMPLES:
            loss.paths.append(path)


def _is_like(before: Entry, entry: Entry) -> bool:
    """Tells whether git would see no difference, and there is nothing to be said of it."""
    return before == entry or (
        entry.kind == before.kind == Kind.FILE
        and entry.content == before.content
        and entry.mode == before.mode
        and entry.xattrs == before.xattrs
        and entry.link is None
        and entry.owner is None
    )


def _is_module(entry: Entry) -> bool:
    """Tells whether a directory stands for a submodule: one with something in it does not."""
    value = dict(entry.xattrs).get(MODULE_ATTRIBUTE)
    return (
        value is not None
        and _COMMIT.fullmatch(value) is not None
        and entry.totals is not None
        and not entry.totals.entries
    )


def _tree_below(before: Entry | None, item: TreeEntry | None) -> _Tree | None:
    """Returns what the base has under a name, if that is a directory on both sides."""
    if before is None or item is None or before.kind != Kind.DIRECTORY:
        return None
    return _Tree(before, item[2]) if int(item[0], 8) >> 12 == 0o04 else None


def _mode(mode: bytes | None, kind: int) -> bytes | None:
    """Returns the mode that an attribute says, if it is one of that kind."""
    if mode is None or not mode.isdigit() or len(mode) > 8 or set(mode) & set(b"89"):
        return None
    return mode if int(mode, 8) >> 12 == kind else None


class _Reading(io.RawIOBase):
    """A file's content, read piece by piece."""

    def __init__(self, objects: Objects, entry: Entry) -> None:
        self._pieces: Iterator[memoryview] = content.stream(objects, entry, 0, entry.size)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        into = memoryview(buffer)  # type: ignore[arg-type]  # what RawIOBase promises
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = piece
        count = min(len(into), len(self._rest))
        into[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def read(self, size: int = -1) -> bytes:
        return super().read(size) or b""
