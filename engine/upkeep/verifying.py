"""Verify: reads every object and says which paths of which snapshots are damaged.

Chunks are unpacked and hashed once each, nodes decoded once each; a subtree found whole is not
walked again for other snapshots, a damaged one is, so that every path is named. What nothing
refers to is read as well, and named as such when it is damaged.
"""

import os
from collections.abc import Iterator

import msgspec

from engine.episodes.auditing import audit
from engine.errors import CorruptObjectError, MissingObjectError
from engine.git.git_links import is_link
from engine.ids import ID_BYTES, ChunkId, NodeId, SnapshotId
from engine.plain.checkout_records import checkout_ids
from engine.plain.checkout_records import load as load_checkout
from engine.plain.stat_cache import node_of_row, sums_of_row
from engine.progress import Progress, unheard
from engine.sessions.sessions import decode_record
from engine.storage.codec import unpack
from engine.storage.content import chunk_ids
from engine.storage.idset import IdSet
from engine.storage.nodes import DEEPEST, Entry, Kind, Totals, decode, encode, node_id
from engine.storage.objects import Objects
from engine.storage.snapshots import decode_snapshot
from engine.storage.store import Db, Store
from engine.trees.directory import PAGED_FROM, Directory, directory_id, store_directory, sums

_WRONG_SUMS = "what it says of its size and its entries is not so"
_WRONG_PAGES = "it is not cut into pages as a directory of these names is"
_SCAN = 4096
_DIRECTORIES_PER_TRIM = 512


class Damage(msgspec.Struct, frozen=True):
    """One thing that is wrong.

    `where` is a snapshot's id, `@session`, the path of a checkout, or empty for what no tree
    needs. `kind` and `identifier` are of the object to put right: chunk, node, snapshot, session,
    ref, checkout (its record), or row (of the stat cache); empty where putting one object right
    would not help.
    """

    where: str
    path: bytes
    problem: str
    kind: str = ""
    identifier: bytes = b""


class VerifyReport(msgspec.Struct):
    """What was looked at, and what is wrong with it."""

    chunks: int = 0
    nodes: int = 0
    snapshots: int = 0
    sessions: int = 0
    steps: int = 0
    bytes: int = 0
    unreachable: int = 0
    damage: list[Damage] = []


def verify(store: Store, progress: Progress | None = None) -> VerifyReport:
    """Checks the whole store; raises nothing for damage that it can name."""
    objects = Objects(store, strict=True)
    report = VerifyReport()
    tell = progress or unheard
    bad = _check_chunks(store, report, tell)
    roots: list[tuple[str, Entry]] = []
    with store.read() as reader:
        for key, raw in reader.items(Db.SNAPSHOTS):
            report.snapshots += 1
            try:
                snapshot = decode_snapshot(SnapshotId(key), raw)
            except CorruptObjectError as error:
                report.damage.append(Damage(key.hex(), b"", str(error), "snapshot", key))
                continue
            roots.append((key.hex(), snapshot.root))
        for key, raw in reader.items(Db.SESSIONS):
            report.sessions += 1
            name = "@" + key.decode(errors="replace")
            try:
                session = decode_record(key, raw)
            except CorruptObjectError as error:
                report.damage.append(Damage(name, b"", str(error), "session", key))
                continue
            roots.extend((name, root) for root in set(session.trees()))
            for identifier in {session.parent, *(layer for _, layer in session.layers)}:
                if not reader.has(Db.SNAPSHOTS, identifier):
                    problem = str(MissingObjectError("snapshot", identifier))
                    report.damage.append(Damage(name, b"", problem, "snapshot", identifier))
        for identifier in checkout_ids(reader):
            try:
                record = load_checkout(reader, identifier)
            except CorruptObjectError as error:
                report.damage.append(Damage("", b"", str(error), "checkout", identifier))
                continue
            trees = () if record is None else record.trees()
            roots.extend((os.fsdecode(record.path), root) for root in trees if record is not None)
        for key, raw in reader.items(Db.REFS):
            if len(raw) != ID_BYTES or not reader.has(Db.SNAPSHOTS, bytes(raw)):
                problem = f"ref {key.decode(errors='replace')!r} names no snapshot"
                missing = bytes(raw) if len(raw) == ID_BYTES else b""
                kind = "snapshot" if missing else "ref"
                report.damage.append(Damage("", b"", problem, kind, missing or key))
        audited = audit(reader)
        report.steps = audited.steps
        report.damage.extend(Damage("", b"", problem) for problem in audited.problems)
    walker = _Walker(objects, bad, report)
    for where, root in roots:
        report.damage.extend(
            msgspec.structs.replace(damage, where=where) for damage in walker.walk(root)
        )
    _check_rows(store, walker, report)
    _check_unreachable(store, walker, report)
    return report


def _check_chunks(
    store: Store, report: VerifyReport, tell: Progress
) -> dict[bytes, CorruptObjectError]:
    """Reads all chunks, in many short views of the store; returns what is wrong with which."""
    bad: dict[bytes, CorruptObjectError] = {}
    start: bytes | None = b""
    while start is not None:
        with store.read() as reader:
            total = reader.count(Db.CHUNKS)
            begin, start = start, None
            for number, (key, raw) in enumerate(reader.items(Db.CHUNKS, begin)):
                if number == _SCAN:
                    start = key
                    break
                report.chunks += 1
                report.bytes += len(raw)
                try:
                    unpack(ChunkId(key), raw)
                except CorruptObjectError as error:
                    bad[key] = error
                if report.chunks % 256 == 0:
                    tell(report.chunks, total, report.bytes)
        store.trim()
    return bad


def _check_rows(store: Store, walker: "_Walker", report: VerifyReport) -> None:
    """An import takes what a row leads to unread: it must be there and whole.

    What a tree needs as well is not named again.
    """
    with store.read() as reader:
        rows = [(key, node_of_row(raw), sums_of_row(raw)) for key, raw in reader.items(Db.IMPORTS)]
    needed, walker.seen = walker.seen, IdSet()
    for key, node, said in rows:
        if node in needed and node not in walker.whole:
            continue
        found = walker.sums_of(node) if len(node) == ID_BYTES else None
        right = found is not None and (
            is_link(key) or said == (found[0], found[1].entries)  # a link to git says no sums
        )
        if not right:
            problem = f"row {key.hex()} of the import cache leads to nothing whole"
            report.damage.append(Damage("", b"", problem, "row", key))
    walker.seen = needed


def _check_unreachable(store: Store, walker: "_Walker", report: VerifyReport) -> None:
    named = {damage.identifier for damage in report.damage}
    with store.read() as reader:
        for number, key in enumerate(reader.keys(Db.NODES)):
            if number % _SCAN == 0:
                store.trim()
            if key in walker.seen:
                continue
            report.unreachable += 1
            try:
                decode(NodeId(key), reader.get(Db.NODES, key) or b"")
            except CorruptObjectError as error:
                if key not in named:
                    report.damage.append(
                        Damage("", b"", f"unreachable: {error}", "node", key)
                    )  # fmt: skip
    report.damage.extend(
        Damage("", b"", f"unreachable: {error}", "chunk", key)
        for key, error in walker.bad.items()
        if key not in named
    )
    store.trim()


class _Walker:
    def __init__(
        self, objects: Objects, bad: dict[bytes, CorruptObjectError], report: VerifyReport
    ) -> None:
        self.objects, self.bad, self.report = objects, bad, report
        self.seen = IdSet()
        self.whole: dict[bytes, tuple[int, Totals]] = {}
        self.there = IdSet()
        self.walked = 0

    def sums_of(self, node: bytes) -> tuple[int, Totals] | None:
        """Returns what is in a directory if it is whole with all below, else None."""
        if node not in self.whole:
            for _ in self._below(b"", NodeId(node), 0):
                pass
        return self.whole.get(node)

    def walk(self, root: Entry) -> Iterator[Damage]:
        """Yields everything wrong in a tree."""
        identifier = directory_id(root)
        if identifier not in self.whole:
            yield from self._below(b"", identifier, 0)
        if self.whole.get(identifier, (root.size, root.totals)) != (root.size, root.totals):
            yield Damage("", b"", _WRONG_SUMS)

    def _below(self, path: bytes, identifier: NodeId, depth: int) -> Iterator[Damage]:
        if depth > DEEPEST:
            yield Damage("", path, "the tree is too deep")
            return
        problems = 0
        self.seen.add(identifier)
        self.walked += 1
        if self.walked % _DIRECTORIES_PER_TRIM == 0:
            self.objects.store.trim()
        try:
            directory = Directory(self.objects, identifier)
            pages = 0
            for page in directory.page_ids():
                self.seen.add(page)
                pages += 1
            found = sums(directory)
            for below in directory:
                child = path + b"/" + below.name if path else below.name
                if below.kind == Kind.DIRECTORY:
                    node = directory_id(below)
                    if node not in self.whole:
                        for damage in self._below(child, node, depth + 1):
                            problems += 1
                            yield damage
                    said = (below.size, below.totals)
                    if self.whole.get(node, said) != said:
                        problems += 1
                        yield Damage("", child, _WRONG_SUMS)
                    continue
                for damage in self._file(child, below):
                    problems += 1
                    yield damage
            if len(directory) > PAGED_FROM or pages > 1:
                at = store_directory(lambda node: node_id(encode(node)), directory)
                if at != identifier:
                    problems += 1
                    yield Damage("", path, _WRONG_PAGES)
        except CorruptObjectError as error:
            yield _damage(path, error)
            return
        if not problems:
            self.whole[identifier] = found
            self.report.nodes += pages

    def _file(self, path: bytes, entry: Entry) -> Iterator[Damage]:
        if isinstance(entry.content, bytes):
            return
        lists: set[bytes] = set()
        try:
            for identifier in chunk_ids(self.objects, entry, lists):
                error = self.bad.get(identifier)
                if error is None and self._missing(identifier):
                    error = MissingObjectError("chunk", identifier)
                if error is not None:
                    yield _damage(path, error)
        except CorruptObjectError as error:
            yield _damage(path, error)
        for node in lists:
            self.seen.add(node)

    def _missing(self, identifier: bytes) -> bool:
        if identifier in self.there:
            return False
        with self.objects.store.read() as reader:
            if not reader.has(Db.CHUNKS, identifier):
                return True
        self.there.add(identifier)
        return False


def _damage(path: bytes, error: CorruptObjectError) -> Damage:
    return Damage("", path, str(error), error.kind, error.identifier)
