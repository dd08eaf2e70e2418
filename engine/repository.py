"""The repository: a store with everything that can be done to it. The engine's front door.

Where a snapshot is asked for, its full id, a unique prefix of at least four digits, the name
of a ref, or `@session` is accepted; `@session` means what that session shows now. Reads see
one state; what changes the store is durable when it returns.
"""

import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Unpack

from engine.checkout import CheckoutReport
from engine.checkouts import CheckoutOptions, Checkouts
from engine.collecting import CollectReport, collect
from engine.committing import CommitQueue
from engine.diffing import Change, diff
from engine.episodes import Episodes
from engine.errors import AmbiguousIdError, InUseError, MissingObjectError, NotFoundError
from engine.history import History, StoredLinks
from engine.ids import SnapshotId, check_name, digest, is_full_id, is_id_prefix
from engine.importing import ImportResult, ImportSourceError, Progress, import_directory
from engine.insight import InsightDiff, InsightOptions, insight
from engine.leases import Lease, acquire
from engine.lmdb_store import LmdbStore
from engine.nodes import Entry
from engine.objects import Objects
from engine.pins import Pins
from engine.sessions import CommitReport, HeldSession, Session, Sessions, decode_record
from engine.snapshot_merging import MergeOptions, MergeReport, merge_snapshots
from engine.snapshots import Snapshot, decode_snapshot, encode_snapshot, make_snapshot
from engine.store import Db, Reader, Store, Writer
from engine.trajectories import holders_of
from engine.upper import Upper
from engine.verifying import VerifyReport, verify
from engine.workspace import Workspace, open_workspace

GC_WAIT = 30.0
"""Seconds that a write waits for a garbage collection to end, or the other way round."""


@contextmanager
def _storing(path: str) -> Iterator[Lease]:
    with acquire(path, "objects", shared=True, wait=GC_WAIT) as lease:
        yield lease


def _end(commits: CommitQueue, pins: Pins, pid: int) -> None:
    if os.getpid() == pid:  # not in a child that was forked meanwhile
        try:
            commits.close()
        finally:
            pins.close()


class Repository:
    """A store opened for use. One per store and process; safe in several threads."""

    def __init__(self, path: str, store: Store) -> None:
        self.path = path
        self.store = store
        self.objects = Objects(store)
        self.episodes = Episodes(store)
        self.pins = Pins(path)
        self.checkouts = Checkouts(self)
        self.commits = CommitQueue(self.objects, partial(_storing, path))
        self._sessions = Sessions(store, self.objects, path)
        # Also when the interpreter ends, or nobody refers to it any more.
        self._end = weakref.finalize(self, _end, self.commits, self.pins, os.getpid())

    @classmethod
    def create(cls, path: str) -> "Repository":
        """Makes an empty store at `path`. Raises StoreExistsError and what `open` raises."""
        path = os.path.abspath(path)
        return cls(path, LmdbStore(path, create=True))

    @classmethod
    def open(cls, path: str) -> "Repository":
        """Opens the store at `path`. Raises a StoreError."""
        path = os.path.abspath(path)
        return cls(path, LmdbStore(path))

    def close(self) -> None:
        """Writes the commits that wait and closes the store. Raises StoreFullError."""
        try:
            self._end()
        finally:
            self.store.close()

    def flush(self) -> None:
        """Writes the commits of workspaces that wait; durable when it returns."""
        self.commits.flush()

    @property
    def sessions(self) -> Sessions:
        """The sessions of the store."""
        self.commits.flush()
        return self._sessions

    def __enter__(self) -> "Repository":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Names.

    def resolve(self, name: str) -> SnapshotId:
        """Returns the snapshot that `name` means; `@session` is that session's parent here.

        A ref wins over a prefix. Raises NotFoundError, AmbiguousIdError.
        """
        if is_full_id(name) and SnapshotId(bytes.fromhex(name)) in self.objects.pending.snapshots:
            return SnapshotId(bytes.fromhex(name))
        self.commits.flush()
        with self.store.read() as reader:
            return self._resolve(reader, name)

    def _resolve(self, reader: Reader, name: str) -> SnapshotId:
        if name.startswith("@"):
            return SnapshotId(self.sessions.get(name[1:]).parent)
        key = name.encode("utf-8", "surrogateescape")
        if is_full_id(name):
            if reader.has(Db.SNAPSHOTS, bytes.fromhex(name)):
                return SnapshotId(bytes.fromhex(name))
            raise NotFoundError("snapshot", name)
        raw = reader.get(Db.REFS, key) if 0 < len(key) <= 255 else None
        if raw is not None:
            return SnapshotId(bytes(raw))
        if not is_id_prefix(name):
            raise NotFoundError("snapshot or ref", name)
        start = bytes.fromhex(name + "0" * (len(name) % 2))
        found = []
        for identifier in reader.keys(Db.SNAPSHOTS, start):
            if not identifier.hex().startswith(name):
                break
            found.append(identifier)
        if not found:
            raise NotFoundError("snapshot or ref", name)
        if len(found) > 1:
            raise AmbiguousIdError(name, [identifier.hex() for identifier in found])
        return SnapshotId(found[0])

    @contextmanager
    def tree(self, name: str) -> Iterator[Entry]:
        """Gives the root of what `name` means; an `@session` is frozen for the while.

        Raises what `resolve` does, and LeaseHeldError for a session that somebody holds.
        """
        if not name.startswith("@"):
            yield self.snapshot(self.resolve(name)).root
            return
        with self.sessions.hold(name[1:], "reading it") as held, self.storing():
            yield self.frozen(held)

    def frozen(self, held: HeldSession) -> Entry:
        """Returns the root of a held session's present tree, stored; inside `storing` only."""
        freeze = held.freeze()
        freeze.prepare()
        root = held.peek_root(freeze)
        self.store.write(freeze.save)
        return root

    @contextmanager
    def storing(self) -> Iterator[Lease]:
        """Keeps garbage collection away while objects are stored that nothing refers to yet."""
        with _storing(self.path) as lease:
            yield lease

    # Workspaces.

    def workspace(
        self,
        snapshot: SnapshotId | str | None = None,
        *,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> Workspace:
        """Opens a workspace on a snapshot, or on an empty tree, in memory; loads nothing.

        `now_ns` tells the time that changed entries get: a constant makes equal trees of equal
        contents. Raises NotFoundError, AmbiguousIdError, MissingObjectError.
        """
        identifier = None if snapshot is None else self.snapshot_id(snapshot)
        return open_workspace(self, identifier, now_ns)

    def snapshot_id(self, snapshot: SnapshotId | str) -> SnapshotId:
        """Returns an id as it is, and what a name or a prefix means; see `resolve`."""
        return self.resolve(snapshot) if isinstance(snapshot, str) else snapshot

    # Snapshots and refs.

    def snapshot(self, identifier: SnapshotId) -> Snapshot:
        """Returns a record. Raises MissingObjectError or CorruptObjectError."""
        return self.objects.snapshot(identifier)

    def snapshots(self) -> list[SnapshotId]:
        """Returns the ids of all snapshots, in the order of their bytes."""
        self.commits.flush()
        with self.store.read() as reader:
            return [SnapshotId(key) for key in reader.keys(Db.SNAPSHOTS)]

    def has_snapshot(self, identifier: SnapshotId) -> bool:
        """Tells whether there is such a snapshot."""
        if identifier in self.objects.pending.snapshots:
            return True
        with self.store.read() as reader:
            return reader.has(Db.SNAPSHOTS, identifier)

    def history(self) -> History:
        """Returns the graph of snapshots as it is from now on; for one question or a few."""
        return History(StoredLinks(self.objects))

    def log(self, start: SnapshotId) -> Iterator[tuple[SnapshotId, Snapshot]]:
        """Yields a snapshot and its ancestors, latest first, each once.

        Removed ones are left out; their children say so by their ids. Raises MissingObjectError.
        """
        self.snapshot(start)
        return self._records(self.history().latest_first(start))

    def graph_log(
        self, history: History, *starts: SnapshotId
    ) -> Iterator[tuple[SnapshotId, Snapshot]]:
        """Yields snapshots and their ancestors, each once and before all of its parents."""
        return self._records(history.ancestors(*starts))

    def _records(self, identifiers: Iterable[SnapshotId]) -> Iterator[tuple[SnapshotId, Snapshot]]:
        for identifier in identifiers:
            try:
                yield identifier, self.snapshot(identifier)
            except MissingObjectError:
                continue  # removed since the walk began

    def remove_snapshot(self, identifier: SnapshotId) -> None:
        """Removes a record; its objects go with the next collection.

        Raises InUseError while a ref names it, a session stands on it or a step holds it.
        """

        self.commits.flush()

        def change(writer: Writer) -> None:
            for key, raw in writer.items(Db.REFS):
                if bytes(raw) == identifier:
                    raise InUseError(f"snapshot {identifier.hex()[:12]}", f"ref {key.decode()!r}")
            for session in self._sessions_in(writer):
                if identifier in {session.parent, *(layer for _, layer in session.layers)}:
                    raise InUseError(
                        f"snapshot {identifier.hex()[:12]}", f"session {session.name!r}"
                    )
            for holder in holders_of(writer, identifier):
                raise InUseError(f"snapshot {identifier.hex()[:12]}", holder)
            if not writer.delete(Db.SNAPSHOTS, identifier):
                raise NotFoundError("snapshot", identifier.hex())

        self.store.write(change)

    def _sessions_in(self, reader: Reader) -> Iterator[Session]:
        for key, raw in reader.items(Db.SESSIONS):
            yield decode_record(key, raw)

    def refs(self) -> dict[str, SnapshotId]:
        """Returns all refs by name."""
        self.commits.flush()
        with self.store.read() as reader:
            return {
                key.decode("utf-8", "replace"): SnapshotId(bytes(raw))
                for key, raw in reader.items(Db.REFS)
            }

    def set_ref(self, name: str, target: SnapshotId) -> None:
        """Makes or moves a ref. Raises InvalidNameError, NotFoundError."""
        check_name("ref", name)
        self.commits.flush()

        def change(writer: Writer) -> None:
            if not writer.has(Db.SNAPSHOTS, target):
                raise NotFoundError("snapshot", target.hex())
            writer.put(Db.REFS, name.encode(), target)

        self.store.write(change)

    def remove_ref(self, name: str) -> None:
        """Removes a ref, not the snapshot. Raises NotFoundError."""
        self.commits.flush()

        def change(writer: Writer) -> None:
            if not writer.delete(Db.REFS, name.encode("utf-8", "surrogateescape") or b"-"):
                raise NotFoundError("ref", name)

        self.store.write(change)

    # The large operations.

    def import_directory(
        self,
        source: str,
        *,
        ref: str | None = None,
        message: str = "",
        parents: tuple[SnapshotId, ...] = (),
        metadata: dict[str, Any] | None = None,
        use_cache: bool = True,
        progress: Progress | None = None,
    ) -> ImportResult:
        """Imports a directory as a snapshot.

        Without `parents`, the parent is what `ref` names, else the last import of the same
        directory. If the tree is that one's, no snapshot is made and its id is returned.
        """
        if ref is not None:
            check_name("ref", ref)
        if not source:
            raise ImportSourceError(source, "it names nothing")
        self.commits.flush()
        source = os.path.realpath(source)  # the directory itself may be given by a link to it
        mark = b"import:" + digest(os.fsencode(source))

        def finish(writer: Writer, root: Entry) -> tuple[bytes, bool]:
            above = parents
            if not above:
                known = writer.get(Db.REFS, ref.encode()) if ref is not None else None
                if known is None:
                    known = writer.get(Db.META, mark)
                if known is not None and writer.has(Db.SNAPSHOTS, bytes(known)):
                    above = (SnapshotId(bytes(known)),)
            if not parents and above and self._root_in(writer, above[0]) == root:
                identifier, changed = above[0], False
            else:
                facts = {"source": os.fsdecode(os.fsencode(source)), **(metadata or {})}
                identifier, record = encode_snapshot(make_snapshot(root, above, message, facts))
                writer.put(Db.SNAPSHOTS, identifier, record)
                changed = True
            writer.put(Db.META, mark, identifier)
            if ref is not None:
                writer.put(Db.REFS, ref.encode(), identifier)
            return identifier, changed

        with self.storing():
            (identifier, changed), root, report = import_directory(
                self.store, self.objects, source, finish=finish, store_path=self.path,
                use_cache=use_cache, progress=progress,
            )  # fmt: skip
        return ImportResult(identifier, root, changed, report)

    def _root_in(self, reader: Reader, identifier: SnapshotId) -> Entry | None:
        raw = reader.get(Db.SNAPSHOTS, identifier)
        return None if raw is None else decode_snapshot(identifier, raw).root

    def commit(
        self,
        name: str,
        *,
        message: str = "",
        metadata: dict[str, Any] | None = None,
        ref: str | None = None,
    ) -> CommitReport:
        """Commits a session that no mount holds. Raises NotFoundError, LeaseHeldError."""
        if ref is not None:
            check_name("ref", ref)
        with self.sessions.hold(name, "committing it") as held, self.storing():
            freeze = held.freeze()
            freeze.prepare()
            report = held.commit(freeze, message, metadata, ref)
            held.clean()
        return report

    def hand_over(self, held: HeldSession) -> Upper:
        """Gets a held session ready for the kernel's overlayfs; `HeldSession.take_back` ends it.

        Returns the upper to mount. One that overlayfs would show otherwise is folded first.
        """
        if held.upper().is_foreign():
            with self.storing():
                freeze = held.freeze()
                freeze.prepare()
                held.fold(freeze)
            held.clean()
        held.upper().hand_over()
        return held.upper()

    def fork(self, name: str, new_name: str) -> Session:
        """Forks a session that no mount holds. Raises as `commit`, and NameTakenError."""
        check_name("session", new_name)
        with self.sessions.hold(name, "forking it") as held, self.storing():
            freeze = held.freeze()
            freeze.prepare()
            return held.fork(freeze, new_name)

    def diff(self, old: Entry, new: Entry) -> Iterator[Change]:
        """Yields what differs between two trees, by path."""
        return diff(self.objects, old, new)

    def insight(self, old: Entry, new: Entry, **options: Unpack[InsightOptions]) -> InsightDiff:
        """Returns what differs with sizes, lines, bytes and renames; see `insight.insight`."""
        return insight(self.objects, old, new, **options)

    def merge(
        self, ours: SnapshotId, theirs: SnapshotId, **options: Unpack[MergeOptions]
    ) -> MergeReport:
        """Merges two snapshots into one with both as parents; see `snapshot_merging`."""
        return merge_snapshots(self, ours, theirs, **options)

    def check_out(
        self, root: Entry, target: str, **options: Unpack[CheckoutOptions]
    ) -> CheckoutReport:
        """Makes a tree at `target`; see `checkouts`."""
        return self.checkouts.make(root, target, **options)

    def collect(self, *, dry_run: bool = False) -> CollectReport:
        """Removes what nothing refers to. Raises LeaseHeldError while objects are stored."""
        self.commits.flush()
        self.pins.tidy()
        with acquire(self.path, "objects", wait=GC_WAIT, what="collecting garbage"):
            if not dry_run:
                self.checkouts.tidy()
            report = collect(self.store, self.objects, dry_run=dry_run)
            if not dry_run:
                report.session_directories = self.sessions.sweep()
        return report

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Checks every object."""
        self.commits.flush()
        return verify(self.store, self.objects, progress)
