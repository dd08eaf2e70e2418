"""Verify: reads every object and says which paths of which snapshots are damaged.

Chunks are unpacked and hashed once each, nodes decoded once each; a subtree found whole is not
walked again for other snapshots, a damaged one is, so that every path is named.
"""

from collections.abc import Callable, Iterator

import msgspec

from engine.auditing import audit
from engine.codec import unpack
from engine.content import chunk_ids
from engine.directory import Directory, directory_id, sums
from engine.errors import CorruptObjectError, MissingObjectError
from engine.ids import ChunkId, SnapshotId
from engine.nodes import DEEPEST, Entry, Kind, Totals
from engine.objects import Objects
from engine.sessions import decode_record
from engine.snapshots import decode_snapshot
from engine.store import Db, Store

_WRONG_SUMS = "what it says of its size and its entries is not so"

Progress = Callable[[int, int | None], None]


class Damage(msgspec.Struct, frozen=True):
    """One thing that is wrong. `where` is a snapshot's id, `@session`, or empty."""

    where: str
    path: bytes
    problem: str


class VerifyReport(msgspec.Struct):
    """What was looked at, and what is wrong with it."""

    chunks: int = 0
    nodes: int = 0
    snapshots: int = 0
    sessions: int = 0
    steps: int = 0
    bytes: int = 0
    damage: list[Damage] = []


def verify(store: Store, objects: Objects, progress: Progress | None = None) -> VerifyReport:
    """Checks the whole store; raises nothing for damage that it can name."""
    report = VerifyReport()
    tell = progress or (lambda done, total: None)
    bad, good = _check_chunks(store, report, tell)
    objects.shed()
    roots: list[tuple[str, Entry]] = []
    with store.read() as reader:
        for key, raw in reader.items(Db.SNAPSHOTS):
            report.snapshots += 1
            try:
                snapshot = decode_snapshot(SnapshotId(key), raw)
            except CorruptObjectError as error:
                report.damage.append(Damage(key.hex(), b"", str(error)))
                continue
            roots.append((key.hex(), snapshot.root))
        for key, raw in reader.items(Db.SESSIONS):
            report.sessions += 1
            name = "@" + key.decode(errors="replace")
            try:
                roots.append((name, decode_record(key, raw).root))
            except CorruptObjectError as error:
                report.damage.append(Damage(name, b"", str(error)))
        for key, raw in reader.items(Db.REFS):
            if not reader.has(Db.SNAPSHOTS, bytes(raw)):
                name = key.decode(errors="replace")
                report.damage.append(Damage("", b"", f"ref {name!r} names no snapshot"))
        audited = audit(reader)
        report.steps = audited.steps
        report.damage.extend(Damage("", b"", problem) for problem in audited.problems)
    walker = _Walker(objects, bad, good, report)
    for where, root in roots:
        report.damage.extend(
            Damage(where, path, problem) for path, problem in walker.walk(b"", root, 0)
        )
    return report


def _check_chunks(
    store: Store, report: VerifyReport, tell: Progress
) -> tuple[dict[bytes, str], set[bytes]]:
    bad: dict[bytes, str] = {}
    good: set[bytes] = set()
    with store.read() as reader:
        total = reader.count(Db.CHUNKS)
        for key, raw in reader.items(Db.CHUNKS):
            report.chunks += 1
            report.bytes += len(raw)
            try:
                unpack(ChunkId(key), raw)
                good.add(key)
            except CorruptObjectError as error:
                bad[key] = str(error)
            if report.chunks % 256 == 0:
                tell(report.chunks, total)
    return bad, good


class _Walker:
    def __init__(
        self, objects: Objects, bad: dict[bytes, str], good: set[bytes], report: VerifyReport
    ) -> None:
        self.objects, self.bad, self.good, self.report = objects, bad, good, report
        self.whole: dict[bytes, tuple[int, Totals]] = {}

    def walk(self, path: bytes, entry: Entry, depth: int) -> Iterator[tuple[bytes, str]]:
        """Yields (path, problem) for everything wrong in a directory and below."""
        identifier = directory_id(entry)
        known = self.whole.get(identifier)
        if known is not None:
            if known != (entry.size, entry.totals):
                yield path, _WRONG_SUMS
            return
        if depth > DEEPEST:
            yield path, "the tree is too deep"
            return
        found = 0
        try:
            directory = Directory(self.objects, identifier)
            pages = len(list(directory.page_ids()))
            found_sums = sums(directory)
            for below in directory:
                child = path + b"/" + below.name if path else below.name
                if below.kind == Kind.DIRECTORY:
                    problems = self.walk(child, below, depth + 1)
                else:
                    problems = self._file(child, below)
                for problem in problems:
                    found += 1
                    yield problem
        except CorruptObjectError as error:
            yield path, str(error)
            return
        if not found:
            self.whole[identifier] = found_sums
            self.report.nodes += pages
        if found_sums != (entry.size, entry.totals):
            yield path, _WRONG_SUMS

    def _file(self, path: bytes, entry: Entry) -> Iterator[tuple[bytes, str]]:
        try:
            for identifier in chunk_ids(self.objects, entry, set()):
                if identifier not in self.good:
                    missing = str(MissingObjectError("chunk", identifier))
                    yield path, self.bad.get(identifier, missing)
        except CorruptObjectError as error:
            yield path, str(error)
