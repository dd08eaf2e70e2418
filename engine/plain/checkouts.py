"""The checkouts of a store: made, found again, compared, switched, committed.

What `Repository.checkouts` gives; the ways to do it are in `checkout`, `local_edits` and
`switching`. A checkout is worked on by one process at a time, which holds the lease
`checkout-<id>`; programs that write in the directory need none.
"""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import msgspec

from engine.errors import EngineError, MissingObjectError
from engine.host.leases import Lease, LeaseHeldError, acquire
from engine.host.unlocking import unlocked
from engine.ids import SnapshotId, check_name
from engine.plain.checkout import check_out, check_out_file, check_target
from engine.plain.checkout_records import (
    CheckoutRecord,
    NotACheckoutError,
    forget,
    is_at,
    is_gone,
    load,
    mark_of,
    new_id,
    new_record,
    records,
    save,
)
from engine.plain.filling import CheckoutRefusedError, CheckoutReport, Rows
from engine.plain.importing import ImportResult, import_directory
from engine.plain.local_edits import Edit, local_edits
from engine.plain.stat_cache import cache_key, cache_prefix, put_rows
from engine.plain.switching import EditPolicy, Switch, SwitchReport
from engine.progress import Progress
from engine.storage.nodes import Entry, Kind
from engine.storage.snapshots import decode_snapshot, encode_snapshot, make_snapshot
from engine.storage.store import Db, Writer
from engine.trees.directory import directory_id
from engine.upkeep.roots import stored_roots

if TYPE_CHECKING:
    from engine.repository import Repository


class SwitchInterruptedError(EngineError):
    """A switch was killed, and has to be ended before anything else. `path` is the checkout."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path!r} is between two trees: a switch was interrupted")
        self.path = path


class PartialCheckoutError(EngineError):
    """A checkout shows a part of a snapshot only. `within` is where the part is."""

    def __init__(self, path: str, within: bytes) -> None:
        super().__init__(f"{path!r} shows only {os.fsdecode(within)!r} of its snapshot")
        self.path, self.within = path, within


class Checkout(msgspec.Struct, frozen=True):
    """A checkout: its directory, and what it shows. `towards` is where a killed switch led.

    `snapshot` is None for a session's tree; `base` is what that session stood on.
    """

    path: str
    snapshot: SnapshotId | None
    within: bytes
    root: Entry
    towards: SnapshotId | None = None
    interrupted: bool = False
    base: SnapshotId | None = None


class CheckoutOptions(TypedDict, total=False):
    """How a checkout is made; `snapshot` and `within` say where the tree comes from.

    Of a session's tree, which is no snapshot's, `base` is what the session stands on. One that is
    not `tracked` is a plain directory, of which the store knows nothing.
    """

    snapshot: SnapshotId | None
    base: SnapshotId | None
    within: bytes
    tracked: bool
    outside_links: bool
    set_id: bool
    progress: Progress | None


class Checkouts:
    """The checkouts of one store."""

    def __init__(self, repository: "Repository") -> None:
        self._repository = repository
        self._store, self._objects = repository.store, repository.objects

    def make(
        self,
        root: Entry,
        target: str,
        **options: Unpack[CheckoutOptions],
    ) -> CheckoutReport:
        """Makes a tree, or a single file, at `target`; see `checkout`."""
        inside = os.path.realpath(target) + os.sep
        if inside.startswith(os.path.realpath(self._repository.path) + os.sep):
            raise CheckoutRefusedError(target, "it is inside of the store")
        if root.kind != Kind.DIRECTORY:
            return check_out_file(self._objects, root, target, set_id=options.get("set_id", False))
        check_target(target)
        identifier = new_id()
        tracked = options.get("tracked", True)
        path = os.path.realpath(target)
        self._repository.commits.flush()

        def record(status: os.stat_result, marked: bool, rows: Rows) -> None:
            if not marked or not tracked:
                return
            made = new_record(
                path,
                status,
                root,
                options.get("within", b""),
                options.get("snapshot"),
                options.get("base"),
            )
            prefix = _prefix(path, root)
            pairs = [(cache_key(prefix, folder), value) for folder, value in rows]

            def change(writer: Writer) -> None:
                save(writer, identifier, made)
                put_rows(writer, pairs)

            self._store.write(change)

        with self._kept(root, options.get("snapshot")), self._lease(identifier, "making it"):
            known = False
            try:
                report = check_out(
                    self._objects, root, target, identifier=identifier, record=record,
                    tracked=tracked,
                    outside_links=options.get("outside_links", False),
                    set_id=options.get("set_id", False),
                    progress=options.get("progress"),
                )  # fmt: skip
                known = report.tracked
            finally:
                if not known:
                    self._forget(identifier)
        return report

    @contextmanager
    def _kept(self, root: Entry, snapshot: SnapshotId | None) -> Iterator[None]:
        """Keeps a tree from collection while it is made; raises MissingObjectError if it is gone.

        A snapshot's tree is whole when its record is there afterwards (see `pins`), or another
        root leads to it; of a tree without a snapshot the caller knows.
        """
        node = directory_id(root)
        pin = self._repository.pins.pin(node)
        if snapshot is not None and not self._repository.has_snapshot(snapshot):
            with self._store.read() as reader:
                if all(each.node != node for each in stored_roots(reader)):
                    raise MissingObjectError("snapshot", snapshot)
        yield
        del pin

    def _lease(self, identifier: bytes, what: str) -> Lease:
        return acquire(self._repository.path, _lease_name(identifier), what=what)

    def _forget(self, identifier: bytes) -> None:
        """Forgets a checkout, if it is known at all; the caller has its lease."""
        with self._store.read() as reader:
            record = load(reader, identifier)
        if record is not None:
            place = os.fsdecode(record.path)
            prefixes = [cache_prefix(place), cache_prefix(place, owners=True)]

            def change(writer: Writer) -> None:
                forget(writer, identifier)
                if any(other.path == record.path for _, other in records(writer)):
                    return  # one that was made in its place, whose rows they are
                for prefix in prefixes:
                    keys = writer.keys(Db.IMPORTS, prefix)
                    for key in list(takewhile(partial(_begins, prefix), keys)):
                        writer.delete(Db.IMPORTS, key)

            self._store.write(change, frees=True)
        lock = os.path.join(self._repository.path, "locks", _lease_name(identifier))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(lock)

    # Those that are there.

    def find(self, directory: str) -> Checkout:
        """Returns what is known of a checkout. Raises NotACheckoutError."""
        path, _, record = self._find(directory)
        return _public(path, record)

    def all(self) -> list[Checkout]:
        """Returns the checkouts whose directories are where they were made, or last used."""
        with self._store.read() as reader:
            known = list(records(reader))
        return [
            _public(os.fsdecode(record.path), record)
            for identifier, record in known
            if not is_gone(identifier, record)
        ]

    def _find(self, directory: str) -> tuple[str, bytes, CheckoutRecord]:
        path = os.path.realpath(directory)
        if not os.path.isdir(path):
            raise NotACheckoutError(path, "it is not a directory")
        with unlocked(path) as fd:  # else the attribute of a directory of mode 000 cannot be read
            identifier = mark_of(fd)
        with self._store.read() as reader:
            record = None if identifier is None else load(reader, identifier)
        if identifier is None or record is None:
            raise NotACheckoutError(path)
        if not is_at(record, os.fsencode(path), os.stat(path)):
            raise NotACheckoutError(
                path, f"it is a copy of the checkout {os.fsdecode(record.path)!r}"
            )
        return path, identifier, record

    @contextmanager
    def _hold(self, directory: str, what: str) -> Iterator[tuple[str, bytes, CheckoutRecord, int]]:
        """Keeps other processes away; gives path, id, record and the open directory."""
        path, identifier, _ = self._find(directory)
        with self._lease(identifier, what):
            path, identifier, record = self._find(directory)
            with unlocked(path) as fd:
                yield path, identifier, record, fd

    def status(self, directory: str) -> list[Edit]:
        """Returns the local edits by path; after a killed switch, what is as in neither tree.

        Raises NotACheckoutError, LeaseHeldError, OSError.
        """
        with self._hold(directory, "looking for edits") as (path, _, record, fd):
            edits = local_edits(self._objects, _prefix(path, record.root), fd, record.root)
            if record.towards is None:
                return edits
            prefix = _prefix(path, record.towards)
            theirs = {each.path for each in local_edits(self._objects, prefix, fd, record.towards)}
            return [edit for edit in edits if edit.path in theirs]

    def switch(
        self,
        directory: str,
        root: Entry,
        *,
        snapshot: SnapshotId | None = None,
        base: SnapshotId | None = None,
        within: bytes | None = None,
        edits: EditPolicy = "refuse",
        outside_links: bool = False,
        set_id: bool = False,
        progress: Progress | None = None,
    ) -> SwitchReport:
        """Makes a checkout show another tree, whose `within` is as before if None; see `switching`.

        Raises LocalEditsError, with nothing changed, for edits in the way, unless `edits` says to
        "keep" or to "overwrite" them; edits elsewhere stay. Raises NotACheckoutError,
        LeaseHeldError, OutsideLinkError, OSError and damage of objects.
        """
        if root.kind != Kind.DIRECTORY:
            raise NotACheckoutError(directory, "what it would become is not a directory")
        self._repository.commits.flush()
        with (
            self._kept(root, snapshot),
            self._hold(directory, "switching it") as (path, identifier, record, fd),
        ):
            olds = record.trees()
            root = msgspec.structs.replace(root, name=b"")
            job = Switch(
                self._objects, _prefix(path, root), identifier, fd, path, olds, root,
                edits=edits, outside_links=outside_links, set_id=set_id, progress=progress,
            )  # fmt: skip
            if len(olds) == 2 and root not in olds:
                # Three trees would be one too many to tell apart: first to the end of the old way.
                raise SwitchInterruptedError(path)
            job.plan()
            if len(olds) == 1 and olds[0] != root:
                record.towards, record.towards_snapshot = root, snapshot
                self._store.write(lambda writer: save(writer, identifier, record))
            job.run()
            record.root, record.snapshot, record.base = root, snapshot, base
            record.within = record.within if within is None else within
            record.towards = record.towards_snapshot = None
            record.path = os.fsencode(path)

            def change(writer: Writer) -> None:
                save(writer, identifier, record)
                for key in sorted(key for key, value in job.values.items() if value is None):
                    writer.delete(Db.IMPORTS, key)
                put_rows(writer, [(k, value) for k, value in job.values.items() if value])

            self._store.write(change)
        return job.report

    def commit(
        self,
        directory: str,
        *,
        message: str = "",
        metadata: dict[str, Any] | None = None,
        ref: str | None = None,
        progress: Progress | None = None,
    ) -> ImportResult:
        """Stores what a checkout has now as a snapshot on top of the one it shows.

        Reads only what was changed. The checkout shows the new snapshot then; if nothing was
        changed, none is made. Raises NotACheckoutError, SwitchInterruptedError for one that a
        killed switch left between two trees, InvalidNameError, LeaseHeldError and what import does.
        """
        if ref is not None:
            check_name("ref", ref)
        with (
            self._hold(directory, "committing it") as (path, identifier, record, _),
            self._repository.storing(),
        ):
            if record.towards is not None:
                raise SwitchInterruptedError(path)
            if record.within:
                raise PartialCheckoutError(path, record.within)
            before = record.snapshot or record.base

            def finish(writer: Writer, root: Entry) -> tuple[bytes, bool]:
                raw = None if before is None else writer.get(Db.SNAPSHOTS, before)
                above: tuple[SnapshotId, ...] = ()
                changed = True
                if before is not None and raw is not None:
                    above = (SnapshotId(before),)
                    changed = decode_snapshot(above[0], raw).root != root
                if changed:
                    facts = {"source": path, **(metadata or {})}
                    snapshot, data = encode_snapshot(make_snapshot(root, above, message, facts))
                    writer.put(Db.SNAPSHOTS, snapshot, data)
                else:
                    snapshot = above[0]
                if ref is not None:
                    writer.put(Db.REFS, ref.encode(), snapshot)
                record.root, record.snapshot, record.base = root, snapshot, None
                record.path = os.fsencode(path)
                save(writer, identifier, record)
                return snapshot, changed

            owners = record.root.owner is not None or self._repository.keeps_owners()
            (snapshot, changed), root, report = import_directory(
                self._store, self._objects, path, finish=finish,
                store_path=self._repository.path, checkout=True, owners=owners,
                before=record.root, progress=progress,
            )  # fmt: skip
        return ImportResult(snapshot, root, changed, report)

    def tidy(self) -> int:
        """Forgets the checkouts whose directories are gone; returns how many.

        One that is just being made, or worked on, is not gone.
        """
        with self._store.read() as reader:
            gone = [each for each, record in records(reader) if is_gone(each, record)]
        forgotten = 0
        for identifier in gone:
            with contextlib.suppress(LeaseHeldError), self._lease(identifier, "forgetting it"):
                with self._store.read() as reader:
                    record = load(reader, identifier)
                if record is not None and is_gone(identifier, record):
                    self._forget(identifier)
                    forgotten += 1
        return forgotten


def _prefix(path: str, root: Entry) -> bytes:
    """Returns what the keys of the stat cache begin with for a checkout of a tree."""
    return cache_prefix(path, owners=root.owner is not None)


def _begins(prefix: bytes, key: bytes) -> bool:
    return key.startswith(prefix)


def _lease_name(identifier: bytes) -> str:
    return f"checkout-{identifier.decode()}"


def _public(path: str, record: CheckoutRecord) -> Checkout:
    snapshot, towards, base = [
        None if each is None else SnapshotId(each)
        for each in (record.snapshot, record.towards_snapshot, record.base)
    ]
    interrupted = record.towards is not None
    return Checkout(path, snapshot, record.within, record.root, towards, interrupted, base)
