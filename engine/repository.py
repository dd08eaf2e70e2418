"""The repository: a store with everything that can be done to it. The engine's front door.

Where a snapshot is asked for, its full id, a unique prefix of at least four digits, the name
of a ref, or `@session` is accepted; `@session` means what that session shows now. Reads see
one state; what changes the store is durable when it returns.
"""

import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import IO, Any, Unpack

import msgspec

from engine.archives.bundle_applying import ApplyReport, apply_bundle
from engine.archives.bundle_creating import BundleReport, create_bundle
from engine.archives.oci_reading import read_image
from engine.archives.oci_writing import OciReport, State, write_image
from engine.archives.tar_crew import Crew, workers_for, write_tree
from engine.archives.tar_reading import TarReader
from engine.archives.tar_writing import TarReport, everything, write_tar
from engine.episodes.episodes import Episodes
from engine.episodes.reindexing import reindex
from engine.episodes.trajectories import holders_of
from engine.errors import AmbiguousIdError, InUseError, MissingObjectError, NotFoundError
from engine.git.git_export import GitExport, GitExportOptions, ToExport, export_git
from engine.git.git_import import GitImport, GitImportOptions, import_git
from engine.git.git_refs import known_ref
from engine.host.forks import OfOneProcess
from engine.host.leases import Lease, LeaseHeldError, acquire
from engine.ids import SnapshotId, check_name, digest, is_full_id, is_id_prefix
from engine.merging.snapshot_merging import MergeOptions, MergeReport, merge_snapshots
from engine.plain.checkouts import CheckoutOptions, Checkouts
from engine.plain.filling import CheckoutReport
from engine.plain.importing import ImportResult, ImportSourceError, import_directory
from engine.progress import Progress
from engine.sessions.changes import refuse_changes
from engine.sessions.sessions import CommitReport, HeldSession, Session, Sessions, decode_record
from engine.sessions.upper import Upper
from engine.storage.codec import (
    name_compression,
    parse_compression,
    read_compression,
    write_compression,
)
from engine.storage.lmdb_store import LmdbStore
from engine.storage.nodes import Entry
from engine.storage.objects import ChunkSink, NodeBuffer, Objects
from engine.storage.owners import keep_owners, keeps_owners
from engine.storage.snapshots import Snapshot, decode_snapshot, encode_snapshot, make_snapshot
from engine.storage.store import Db, Reader, Store, StoreDamagedError, Writer
from engine.trees.diffing import Change, diff
from engine.trees.history import History, StoredLinks
from engine.trees.insight import InsightDiff, InsightOptions, insight
from engine.trees.layers import fold
from engine.upkeep.collecting import PAUSE_SECONDS, Collection, CollectReport
from engine.upkeep.holders import Holder, Target, find_object, holders, object_at
from engine.upkeep.repairing import (
    RepairReport,
    Source,
    Wanted,
    drop_unneeded,
    from_directory,
    from_store,
    put_back,
    restore_records,
    restore_refs,
    wanted_of,
)
from engine.upkeep.salvaging import verify_pages
from engine.upkeep.usage import Usage, measure
from engine.upkeep.verifying import VerifyReport, verify
from engine.workspaces.committing import CommitQueue
from engine.workspaces.group_commit import GroupCommit
from engine.workspaces.pins import Pins
from engine.workspaces.workspace import Workspace, open_workspace

GC_WAIT = 30.0
"""Seconds that a write waits for a batch of a collection to end, or the other way round."""
COMPACT_WAIT = 5.0
"""Seconds that a compaction waits for other processes to close the store."""
COLLECTED = b"collected"
"""The key in `meta` of the time at which a collection last came to its end, decimal ns."""


class CompactReport(msgspec.Struct, frozen=True):
    """The size of the store's file before and after."""

    bytes_before: int
    bytes_after: int


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


class Repository(OfOneProcess):
    """A store opened for use. One per store and process; safe in several threads.

    A child of fork() opens its own: there everything but `close` raises ForkedError.
    """

    def __init__(self, path: str, store: Store) -> None:
        self.path = path
        self.store = store
        self.objects = Objects(store)
        self.pins = Pins(path)
        group = GroupCommit(store, path)
        self.commits = CommitQueue(self.objects, partial(_storing, path), group)
        self.episodes = Episodes(store, self.commits.flush)
        self._sessions = Sessions(store, self.objects, path)
        # Also when the interpreter ends, or nobody refers to it any more.
        self._end = weakref.finalize(self, _end, self.commits, self.pins, os.getpid())

    @classmethod
    def create(cls, path: str, *, trusted: bool = False) -> "Repository":
        """Makes an empty store at `path`. Raises StoreExistsError and what `open` raises."""
        path = os.path.abspath(path)
        return cls(path, LmdbStore(path, create=True, trusted=trusted))

    @classmethod
    def open(cls, path: str, *, trusted: bool = False, to_read: bool = False) -> "Repository":
        """Opens the store at `path`. Raises a StoreError, StrangeFileError.

        One that belongs to another user is opened only if who can write there is `trusted`. Opened
        `to_read`, it waits for no process that writes; the first write does, and waits for views
        in other threads, too.
        """
        path = os.path.abspath(path)
        return cls(path, LmdbStore(path, trusted=trusted, to_read=to_read))

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

        self.store.write(change, frees=True)

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

        self.store.write(change, frees=True)

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
        set_id: bool = False,
        owners: bool | None = None,
        progress: Progress | None = None,
    ) -> ImportResult:
        """Imports a directory as a snapshot, with `owners` if the store keeps them or it is said.

        Set-id bits stay on the user's own files; with `owners` or `set_id` on all.

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
                use_cache=use_cache, set_id=set_id, owners=self._owners(owners), progress=progress,
            )  # fmt: skip
        return ImportResult(identifier, root, changed, report)

    def _owners(self, said: bool | None) -> bool:
        return self.keeps_owners() if said is None else said

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

    def remove_session(self, name: str, *, force: bool = False) -> None:
        """Removes a session that no mount holds, with what it changed since its last commit.

        Raises UncommittedChangesError if it changed something, unless `force`; NotFoundError,
        LeaseHeldError.
        """
        with self.sessions.hold(name, "removing it", recover=not force) as held:
            if not force:
                self._refuse_changes(held)
            self.sessions.remove(held)

    def reset_session(
        self,
        name: str,
        to: SnapshotId | None = None,
        *,
        factory: bool = False,
        paths: Sequence[bytes] = (),
        force: bool = False,
    ) -> Session:
        """Makes a session that no mount holds its last commit again, or another snapshot.

        With `factory` what it was made of, or only `paths` of that. Raises as `remove_session`;
        `paths` throw nothing else away, and are not asked about.
        """
        recover = not force or bool(paths)
        with self.sessions.hold(name, "resetting it", recover=recover) as held, self.storing():
            if paths:
                freeze = held.freeze()
                freeze.prepare()
                session = held.restore(freeze, paths)
            else:
                if not force:
                    self._refuse_changes(held)
                session = held.reset_to_factory() if factory else held.reset(to)
            held.clean()
        return session

    def _refuse_changes(self, held: HeldSession) -> None:
        with self.storing():
            base = self.sessions.stands_on(held.session)
            refuse_changes(self.objects, held.session.name, base, self.frozen(held))

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

    def import_git(
        self, path: str, revisions: Iterable[str] = (), **options: Unpack[GitImportOptions]
    ) -> GitImport:
        """Imports commits of a git repository as snapshots; see `git_import`."""
        return import_git(self, path, revisions, **options)

    def git_names(self) -> dict[str, str]:
        """Returns the refs that an import from git has set, with git's full names for them."""
        with self.store.read() as reader:
            known = {ref: known_ref(reader, ref) for ref in self.refs()}
        return {ref: each.name for ref, each in known.items() if each is not None}

    def export_git(
        self, path: str, wanted: list[ToExport], **options: Unpack[GitExportOptions]
    ) -> GitExport:
        """Writes snapshots to a git repository as commits; see `git_export`."""
        return export_git(self, path, wanted, **options)

    @property
    def checkouts(self) -> Checkouts:
        """The plain directories that were made of this store, and are to be switched."""
        return Checkouts(self)

    def check_out(
        self, root: Entry, target: str, **options: Unpack[CheckoutOptions]
    ) -> CheckoutReport:
        """Makes a tree at `target`; see `checkouts`."""
        return self.checkouts.make(root, target, **options)

    # Interchange.

    def import_tar(
        self,
        stream: IO[bytes],
        *,
        ref: str | None = None,
        message: str = "",
        parents: tuple[SnapshotId, ...] = (),
        metadata: dict[str, Any] | None = None,
        set_id: bool = False,
        owners: bool | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> ImportResult:
        """Imports a tar archive from a stream, compressed or not, as a snapshot.

        Set-id bits are kept with `set_id` only; see `engine.host.set_id`.

        Without `parents`, the parent is what `ref` names; if the tree is that one's, no snapshot
        is made. `progress` is told bytes of the archive. Raises ArchiveDamagedError,
        ArchiveRefusedError; nothing can be seen then.
        """
        return self._import_archive(
            lambda reader: reader.read(stream, progress), False, ref, message, parents, metadata,
            set_id, self._owners(owners),
        )  # fmt: skip

    def _import_archive(
        self,
        read: Callable[[TarReader], None],
        layered: bool,
        ref: str | None,
        message: str,
        parents: tuple[SnapshotId, ...],
        metadata: dict[str, Any] | None,
        set_id: bool,
        owners: bool,
    ) -> ImportResult:
        if ref is not None:
            check_name("ref", ref)
        self.commits.flush()
        with self.storing():
            sink, nodes = ChunkSink(self.store), NodeBuffer()
            reader = TarReader(sink, nodes, layered=layered, set_id=set_id, owners=owners)
            read(reader)
            root = reader.draft.build(nodes)
            sink.flush()

            def finish(writer: Writer) -> tuple[bytes, bool]:
                nodes.flush(writer)
                above = parents
                if not above and ref is not None:
                    known = writer.get(Db.REFS, ref.encode())
                    above = () if known is None else (SnapshotId(bytes(known)),)
                if not parents and above and self._root_in(writer, above[0]) == root:
                    identifier, changed = above[0], False
                else:
                    made = make_snapshot(root, above, message, metadata)
                    identifier, record = encode_snapshot(made)
                    writer.put(Db.SNAPSHOTS, identifier, record)
                    changed = True
                if ref is not None:
                    writer.put(Db.REFS, ref.encode(), identifier)
                return identifier, changed

            identifier, changed = self.store.write(finish)
        reader.report.files = root.totals.entries if root.totals else 0
        reader.report.new_bytes = sink.stored_bytes
        reader.report.lost_owners = reader.lost_owners()
        reader.report.warnings = reader.warnings()
        return ImportResult(identifier, root, changed, reader.report)

    def import_oci(
        self,
        path: str,
        *,
        image: str | None = None,
        ref: str | None = None,
        message: str = "",
        parents: tuple[SnapshotId, ...] = (),
        metadata: dict[str, Any] | None = None,
        set_id: bool = False,
        owners: bool | None = None,
        progress: Progress | None = None,
    ) -> ImportResult:
        """Imports an image of an OCI layout, its layers merged, as a snapshot.

        As `import_tar`; also raises ImageRefusedError and ImageDamagedError.
        """

        def read(reader: TarReader) -> None:
            read_image(path, reader, image=image, progress=progress)

        return self._import_archive(
            read, True, ref, message, parents, metadata, set_id, self._owners(owners)
        )

    def layers_of(self, name: str) -> list[State]:
        """Returns the trees that the layers of `@session` make, each with those below it.

        None for what is no session. Stores the folded ones; inside `storing` only.
        """
        if not name.startswith("@"):
            return []
        session = self.sessions.get(name[1:])
        roots = [self.snapshot(SnapshotId(layer)).root for _, layer in session.layers]
        states: list[State] = []
        for at, (label, _) in enumerate(session.layers, 1):
            nodes = NodeBuffer()
            states.append((label, fold(self.objects, nodes.put, roots[:at])))
            self.store.write(nodes.flush)
        return [*states, ("commits", self.sessions.stands_on(session))]

    def export_oci(
        self,
        layers: list[State],
        root: Entry,
        target: str,
        *,
        image: str = "latest",
        architecture: str = "amd64",
        set_id: bool = False,
        progress: Progress | None = None,
    ) -> OciReport:
        """Makes an OCI layout at `target`: a layer for each state of `layers`, and for `root`.

        States that equal the one before make no layer; set-id bits are written with `set_id` only.
        See `oci_writing`.
        """
        states: list[State] = []
        for label, state in [*layers, ("session" if layers else "snapshot", root)]:
            if not states or states[-1][1] != state:
                states.append((label, state))
        return write_image(
            self.objects, states, target,
            image=image, architecture=architecture, set_id=set_id, progress=progress,
        )  # fmt: skip

    def export_tar(
        self, root: Entry, out: IO[bytes], *, set_id: bool = False,
        progress: Progress | None = None,
    ) -> TarReport:  # fmt: skip
        """Writes a tree as a tar archive, uncompressed; the same bytes for the same tree.

        Set-id bits are written with `set_id` only, for the archive gives every file to root. With
        other processes where that is faster; see `tar_crew`.
        """
        if workers := workers_for(root):
            with Crew(self.path, workers) as crew:
                return write_tree(self.objects, root, out, crew, set_id=set_id, progress=progress)
        total = root.totals.entries + 1 if root.totals else None
        members = everything(self.objects, root)
        return write_tar(self.objects, members, out, total=total, set_id=set_id, progress=progress)

    def create_bundle(
        self,
        out: IO[bytes],
        snapshots: Iterable[SnapshotId] | None = None,
        *,
        have: Iterable[SnapshotId] = (),
        history: bool = False,
        progress: Progress | None = None,
    ) -> BundleReport:
        """Writes snapshots, by default all, as a bundle; with the refs that name them.

        `have` are snapshots that the receiver has: what they are made of is left out. With
        `history`, their ancestors go along, up to those of `have`. See `bundle_creating`.
        """
        self.commits.flush()
        base = tuple(have)
        with self.storing():
            wanted = tuple(self.snapshots() if snapshots is None else snapshots)
            if history:
                graph = self.history()
                known = {each for each, _ in self.graph_log(graph, *base)} if base else set()
                above = (each for each, _ in self.graph_log(graph, *wanted))
                wanted = tuple(each for each in above if each not in known)
            return create_bundle(
                self.objects, out, wanted, have=base, refs=self.refs(), progress=progress
            )

    def apply_bundle(
        self,
        stream: IO[bytes],
        *,
        take_refs: bool = True,
        move_refs: bool = False,
        set_id: bool = False,
        progress: Progress | None = None,
    ) -> ApplyReport:
        """Takes in what a bundle carries, all or nothing visible; see `bundle_applying`."""
        self.commits.flush()
        with self.storing():
            return apply_bundle(
                self.store, self.objects, stream,
                take_refs=take_refs, move_refs=move_refs, set_id=set_id, progress=progress,
            )  # fmt: skip

    def collect(self, *, dry_run: bool = False, progress: Progress | None = None) -> CollectReport:
        """Removes what nothing refers to, in batches, while others store and commit.

        Raises LeaseHeldError while another collection runs, CorruptObjectError or
        StoreDamagedError when the store is damaged. Where somebody stores objects for longer
        than GC_WAIT, it ends early, and the report says so.
        """
        what = "collecting garbage"
        self._check_frame()
        self.commits.flush()
        self.pins.tidy()
        if not dry_run:
            self.checkouts.tidy()
            self.sessions.remove_unused()
        with acquire(self.path, "gc", what=what):
            collection = Collection(self.store, self.path, self.objects)
            collection.mark(progress)
            if dry_run:
                return collection.survey()
            report = collection.report
            try:
                while collection.prepare():
                    with acquire(self.path, "objects", wait=GC_WAIT, what=what):
                        collection.remove()
                    if progress is not None:
                        progress(report.nodes + report.chunks, None, report.bytes)
                    time.sleep(PAUSE_SECONDS)
                with acquire(self.path, "objects", wait=GC_WAIT, what=what):
                    report.session_directories = self.sessions.sweep()
            except LeaseHeldError:
                report.ended_early = f"somebody has been storing objects for {GC_WAIT:.0f} seconds"
            else:
                stamp = str(time.time_ns()).encode()
                self.store.write(lambda writer: writer.put(Db.META, COLLECTED, stamp), frees=True)
        return report

    def object_named(self, name: str) -> Target:
        """Returns the object that a text means: an id or its beginning, or SNAPSHOT:PATH.

        Raises NotFoundError, AmbiguousIdError.
        """
        self.commits.flush()
        snapshot, colon, path = name.partition(":")
        if colon:
            root = self.snapshot(self.resolve(snapshot)).root
            return object_at(self.objects, root, os.fsencode(path).strip(b"/"))
        with self.store.read() as reader:
            return find_object(reader, name)

    def holders(self, target: Target) -> Iterator[Holder]:
        """Yields what keeps an object from being collected. A snapshot's record stays anyway."""
        self.commits.flush()
        self.pins.tidy()
        return holders(self.store, self.path, target)

    def usage(
        self, snapshots: Iterable[SnapshotId] = (), progress: Progress | None = None
    ) -> Usage:
        """Counts bytes: of the store, each root's own, and all of the given snapshots."""
        self.commits.flush()
        self.pins.tidy()
        return measure(self.store, self.path, snapshots, progress)

    def keeps_owners(self) -> bool:
        """Returns whether new trees say whose files are, unless a call says otherwise."""
        with self.store.read() as reader:
            return keeps_owners(reader)

    def keep_owners(self) -> None:
        """Makes new trees say whose files are; trees that are there stay as they are."""
        self.store.write(keep_owners)

    def compression(self) -> int:
        """Returns the level that new chunks are packed with; 0 for not at all."""
        with self.store.read() as reader:
            return read_compression(reader)

    def set_compression(self, level: int) -> None:
        """Sets the level for new chunks, 0 to 19; those that are there stay as they are."""
        parse_compression(name_compression(level))
        self.store.write(lambda writer: write_compression(writer, level))

    def collected_ns(self) -> int:
        """Returns when a collection last came to its end, in ns since 1970; 0 if none has."""
        with self.store.read() as reader:
            raw = reader.get(Db.META, COLLECTED)
            return int(bytes(raw)) if raw is not None and bytes(raw).isdigit() else 0

    def compact(self, wait: float = COMPACT_WAIT) -> CompactReport:
        """Makes the store's file as small as what is in it, and so gives room back to the disk.

        Raises CompactionRefusedError while another process has the store open for longer than
        `wait` seconds, StoreFullError without room for a copy, LeaseHeldError, StoreDamagedError.
        """
        self._check_frame()
        before = self.store.statistics()
        with acquire(self.path, "gc", what="compacting"):
            self.store.compact(wait)
        return CompactReport(before.file_bytes, self.store.statistics().file_bytes)

    def _check_frame(self) -> None:
        """Raises StoreDamagedError if LMDB should not be let loose on all of the file."""
        flaws = self.store.flaws()
        if flaws:
            raise StoreDamagedError(self.path, flaws[0])

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Checks the frame of the store's file, and every object."""
        self.commits.flush()
        flaws = self.store.flaws()
        return verify_pages(self.path, flaws, progress) if flaws else verify(self.store, progress)

    def repair(
        self,
        source: str | None = None,
        progress: Progress | None = None,
        *,
        trusted: bool = False,
    ) -> RepairReport:
        """Puts right what can be: from another store, or a directory that holds the bytes.

        A whole object under a key with flipped bits is put under its own id, whatever the source.
        Damaged objects that no tree needs are removed, and rows of the stat cache that lead to
        nothing whole. The report says what is damaged afterwards. `trusted` is said of a store
        that is the source, as in `open`. Raises LeaseHeldError during a collection,
        StoreDamagedError if the file's own frame is damaged (`repair_store` can mend that), and
        what opening or reading the source raises.
        """
        self._check_frame()
        what = "repairing"
        with acquire(self.path, "gc", what=what), ExitStack() as stack:
            take: Source | None = None
            other: Store | None = None
            if source is not None and os.path.isdir(os.path.join(source, "db")):
                opened = LmdbStore(os.path.abspath(source), trusted=trusted)
                other = stack.enter_context(closing(opened))
                take = from_store(self.store, other)
            elif source is not None:
                take = from_directory(self.store, self.objects, source, self.path, progress)
            report = self.verify(progress)
            dropped = 0
            repaired = put_back(self.store, report.damage) if report.damage else 0
            if repaired:
                self.objects.shed()
                report = self.verify(progress)
            if other is not None and (records := restore_records(self.store, other)):
                repaired += records
                report = self.verify(progress)
            if any(damage.kind == "" for damage in report.damage) and (
                found := reindex(self.store)
            ):
                repaired += found
                report = self.verify(progress)
            asked: Wanted = {}
            while take is not None and (wanted := wanted_of(report.damage)) != asked:
                asked = wanted  # what was out of sight behind it shows up the next time
                taken = take(wanted) if any(wanted.values()) else 0
                if not taken:
                    break
                self.objects.shed()
                repaired += taken
                report = self.verify(progress)
            if other is not None and (found := restore_refs(self.store, other)):
                repaired += found
                report = self.verify(progress)
            if any(not damage.where for damage in report.damage):
                with acquire(self.path, "objects", wait=GC_WAIT, what=what):
                    dropped = drop_unneeded(self.store, report.damage)
                self.objects.shed()
                report = self.verify(progress)
        return RepairReport(repaired, dropped, report)
