"""Import from git: commits become snapshots with their graph; branches and tags become refs.

A snapshot depends on its commit alone, so the same commit is the same snapshot in every store,
and an import that was interrupted, or runs again, goes on where it was. Commits are stored parents
first, in transactions of bounded size that hold their trees too; the refs come last, in one.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypedDict

import msgspec

from engine.git import git_links
from engine.git.git_objects import GIT, Commit, parse_commit, time_of, to_record
from engine.git.git_refs import KnownRef, known_ref, local_names, remember_ref
from engine.git.git_repository import GitRef, GitRepository, GitSourceError
from engine.git.git_trees import Base, GitTrees
from engine.ids import SnapshotId
from engine.progress import Progress, unheard
from engine.storage.objects import ChunkSink
from engine.storage.snapshots import encode_snapshot, make_snapshot
from engine.storage.store import Db, Writer

if TYPE_CHECKING:
    from engine.repository import Repository


_BATCH_COMMITS = 4096
_BATCH_BYTES = 16 << 20
_MOST_READ = 20_000
"""Commits kept in memory between the look at the graph and the import; others are read twice."""


class GitImport(msgspec.Struct):
    """What an import from git did.

    `refs` are those that name a commit of git's now, `kept` those that were left as they are,
    with the reason. `other_refs` counts what is neither a branch nor a tag, by where it is, and
    was not looked at. `cut` are commits without some parent, which a shallow repository lacks.
    `submodules` are (path, commit). `warnings` name what git has and no tree can have here, and
    refs of git's that have no ref here.
    """

    commits: int = 0
    known: int = 0
    blobs: int = 0
    read_bytes: int = 0
    new_bytes: int = 0
    refs: dict[str, SnapshotId] = {}
    kept: dict[str, str] = {}
    other_refs: dict[str, int] = {}
    cut: int = 0
    submodules: list[tuple[bytes, str]] = []
    lfs_pointers: list[bytes] = []
    warnings: list[str] = []


class GitImportOptions(TypedDict, total=False):
    """What `import_git` takes besides the repository and the revisions."""

    prefix: str
    force: bool
    progress: Progress | None


def import_git(
    repository: "Repository",
    path: str,
    revisions: Iterable[str] = (),
    *,
    prefix: str = "",
    force: bool = False,
    progress: Progress | None = None,
) -> GitImport:
    """Imports commits of the git repository at `path`; durable when it returns.

    `revisions` are as git has them: `main`, `v1..main`, `^v1`; without any, all branches and
    tags. Refs that somebody else has set are moved forward only, unless `force`. Raises
    GitMissingError, GitSourceError, StoreFullError; what was stored until then stays.
    """
    source = GitRepository(path)
    repository.flush()
    with repository.storing():
        return _GitImport(repository, source, progress).run(list(revisions), prefix, force)


class _GitImport:
    def __init__(
        self, repository: "Repository", source: GitRepository, progress: Progress | None
    ) -> None:
        self.repository, self.source = repository, source
        self.store = repository.store
        self.progress = progress or unheard
        self.report = GitImport()
        self.trees = GitTrees(repository.objects, source)
        self.snapshots: list[tuple[bytes, bytes]] = []
        self.rows: list[tuple[bytes, bytes]] = []
        self.done: dict[bytes, git_links.KnownCommit] = {}
        self.hidden: set[bytes] = set()
        self.read: dict[bytes, tuple[bytes, Commit]] = {}
        self.bases: dict[bytes, Base | None] = {}

    def tell(self, done: int, total: int) -> None:
        self.trees.tell = lambda: self.progress(done, total, self.trees.read_bytes)
        self.trees.tell()

    def run(self, revisions: list[str], prefix: str, force: bool) -> GitImport:
        refs, tips = self._tips(revisions)
        order = self._order(tips)
        for at, identifier in enumerate(order):
            self.tell(at, len(order))
            self._commit(identifier)
            if len(self.rows) >= _BATCH_COMMITS or self.trees.held_bytes() > _BATCH_BYTES:
                self._flush()
        self._flush()
        self.tell(len(order), len(order))
        self._set_refs(refs, prefix, force)
        report, trees = self.report, self.trees
        report.commits = len(order)
        report.blobs, report.read_bytes = trees.blobs, trees.read_bytes
        report.submodules = sorted(trees.modules)
        report.lfs_pointers = sorted(trees.pointers)
        report.warnings += [
            f"left out {path.decode('utf-8', 'backslashreplace')!r}: {why}"
            for path, why in trees.left_out
        ]
        return report

    # What to import.

    def _tips(self, revisions: list[str]) -> tuple[list[GitRef], list[bytes]]:
        if not revisions:
            refs, others = self.source.refs()
            self.report.other_refs = self.source.other_refs()
            self.report.warnings += [f"left out {name}: it means no commit" for name in others]
            return refs, [ref.commit for ref in refs]
        wanted: list[tuple[bytes, GitRef | None]] = []
        for text in revisions:
            if text.startswith("^"):
                self._hide(text[1:])
                continue
            since, dots, until = text.rpartition("..")
            if since.endswith(".") or until.startswith("."):
                why = f"{text!r} has three dots; give A..B, or the commits to leave out as ^A"
                raise GitSourceError(self.source.path, why)
            if dots:
                self._hide(since or "HEAD")
            wanted.append(self.source.revision(until or "HEAD"))
        refs = [ref for _, ref in wanted if ref is not None]
        return refs, [commit for commit, _ in wanted]

    def _hide(self, revision: str) -> None:
        self.hidden.update(self.source.ancestors(self.source.revision(revision)[0]))

    def _order(self, tips: list[bytes]) -> list[bytes]:
        """Returns the commits to import, each after its parents."""
        may_be_cut = bool(self.hidden) or self.source.is_shallow
        order: list[bytes] = []
        seen: dict[bytes, bool] = {}
        for tip in tips:
            stack = [(tip, False)]
            while stack:
                identifier, is_left = stack.pop()
                if is_left:
                    order.append(identifier)
                    continue
                if identifier in seen:
                    continue
                seen[identifier] = True
                known = self._known(identifier)
                if known is not None and (may_be_cut or not known.cut):
                    self.report.known += 1
                    continue
                self.done.pop(identifier, None)
                if identifier in self.hidden and identifier not in tips:
                    continue
                if len(order) % 1000 == 0:
                    self.progress(len(order), None)
                stack.append((identifier, True))
                found = self._read(identifier)
                if len(self.read) < _MOST_READ:
                    self.read[identifier] = found
                parents = found[1].parents
                if self.source.is_shallow and not all(map(self.source.has, parents)):
                    self.report.cut += 1
                # The first parent is looked at first, so that a line of history is in order.
                stack += [(p, False) for p in reversed(parents) if self._is_wanted(p)]
        return order

    def _is_wanted(self, parent: bytes) -> bool:
        if parent in self.hidden:
            self._known(parent)
            return False
        return not self.source.is_shallow or self.source.has(parent)

    def _known(self, commit: bytes) -> git_links.KnownCommit | None:
        found = self.done.get(commit)
        if found is None:
            with self.store.read() as reader:
                found = git_links.snapshot_of(reader, commit)
            if found is not None:
                self.done[commit] = found
        return found

    def _read(self, identifier: bytes) -> tuple[bytes, Commit]:
        data = self.source.read("commit", identifier)
        try:
            return data, parse_commit(data)
        except ValueError as error:
            why = f"commit {identifier.hex()}: {error}"
            raise GitSourceError(self.source.path, why) from error

    # One commit.

    def _commit(self, identifier: bytes) -> None:
        if identifier in self.read:
            data, commit = self.read.pop(identifier)
        else:
            data, commit = self._read(identifier)
        parents = [self.done.get(parent) for parent in commit.parents]
        there = tuple(dict.fromkeys(known.snapshot for known in parents if known is not None))
        message, fields = to_record(identifier, data, commit)
        is_cut = any(known is None or known.cut for known in parents)
        if len(there) != len(commit.parents):
            fields["parents"] = [parent.hex() for parent in commit.parents]
        base = self.bases[identifier] = self._base(commit)
        root = self.trees.root(commit.tree, base)
        record = make_snapshot(root, there, message, {GIT: fields}, time_ns=time_of(commit))
        snapshot, encoded = encode_snapshot(record)
        self.done[identifier] = git_links.KnownCommit(snapshot, is_cut)
        self.snapshots.append((snapshot, encoded))
        self.rows.append(git_links.imported(identifier, snapshot, root, is_cut))

    def _base(self, commit: Commit) -> Base | None:
        """Returns the tree of the nearest ancestor that is stored, for what is not in memory.

        What came between the two is of this batch, and so in memory.
        """
        for parent in commit.parents:
            if parent in self.bases:
                return self.bases[parent]
            known = self.done.get(parent)
            if known is not None:
                record = self.repository.snapshot(known.snapshot)
                base = Base(self._read(parent)[1].tree, record.root)
                self.bases[parent] = base
                return base
        return None

    def _flush(self) -> None:
        """Stores what has gathered; a commit is there with all that it names, or not at all."""
        if not self.rows:
            return
        trees, snapshots, rows = self.trees, sorted(self.snapshots), self.rows

        def change(writer: Writer) -> None:
            trees.sink.flush_into(writer)
            trees.nodes.flush(writer)
            writer.put_many(Db.SNAPSHOTS, snapshots)
            git_links.put(writer, rows)

        self.store.write(change)
        self.store.trim()
        self.report.new_bytes += trees.sink.stored_bytes
        self.snapshots, self.rows, self.bases = [], [], {}
        trees.renew(ChunkSink(self.store, batch_bytes=32 << 20))

    # Refs.

    def _set_refs(self, refs: list[GitRef], prefix: str, force: bool) -> None:
        by_name = {ref.name: ref for ref in refs}
        names, refused = local_names(list(by_name), prefix)
        self.report.warnings += [f"no ref for {why}" for why in refused]
        targets = {names[n]: (by_name[n], self.done[by_name[n].commit].snapshot) for n in names}
        before = self.repository.refs()
        history = self.repository.history()
        for local, (_, target) in list(targets.items()):
            now = before.get(local)
            if now is None or now == target or force:
                continue
            with self.store.read() as reader:
                known = known_ref(reader, local)
                is_there = reader.has(Db.SNAPSHOTS, now)
            if known is not None and known.snapshot == now and known.path == self.source.path:
                continue
            if not is_there or not history.is_ancestor(now, target):
                self.report.kept[local] = "it names what did not come from there"
                del targets[local]

        def change(writer: Writer) -> dict[str, SnapshotId]:
            done = {}
            for local, (ref, target) in targets.items():
                raw = writer.get(Db.REFS, local.encode())
                if (None if raw is None else bytes(raw)) != before.get(local):
                    continue
                writer.put(Db.REFS, local.encode(), target)
                known = KnownRef(self.source.path, ref.name, target, ref.tag)
                remember_ref(writer, local, known)
                done[local] = target
            return done

        self.report.refs = self.store.write(change)
        for local in targets.keys() - self.report.refs.keys():
            self.report.kept[local] = "it was moved by somebody else meanwhile"
