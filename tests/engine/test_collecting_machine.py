"""Collection step by step, with everything that stores objects in between its steps.

Imports in two halves, commits of sessions, commits that hold no lease on trees that only a pin
keeps, removals, killed collections. What the model knows stays readable and whole, the stat
cache leads to nothing that is not, and a collection that nobody disturbs leaves no garbage.
"""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from engine import Repository, SnapshotId
from engine.errors import InUseError
from engine.host.leases import LeaseHeldError, acquire
from engine.ids import digest
from engine.plain import importing
from engine.plain.importing import _Import
from engine.storage.codec import pack
from engine.storage.nodes import Entry, Kind, Ref
from engine.storage.objects import node_putter
from engine.storage.snapshots import encode_snapshot, make_snapshot
from engine.storage.store import Db, Writer
from engine.trees.directory import Directory, directory_entry, directory_id
from engine.upkeep import collecting
from engine.upkeep.collecting import Collection
from tests.engine.machines import run_machine
from tests.engine.trees import Tree, noise, of_entry

FILES = ["a", "b", "d/a", "d/b", "d/e/a", "f/a"]
SEEDS = [0, 1, 2, 3, 4, 5]
DAY = 86_400 * 10**9

number = st.integers(0, 1 << 16)


def content(seed: int) -> bytes:
    """Different content has a different size: the stat cache need not tell ticks apart."""
    return noise([10, 150, 400, 3_000, 17_000, 90_000][seed] + seed, seed)


class CollectingMachine(RuleBasedStateMachine):
    """The rules; what they choose must not hang on ids, which times change."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="afs"))
        self.source = self.home / "source"
        self.source.mkdir()
        self.repository = Repository.create(str(self.home / "store"))
        self.trees: dict[SnapshotId, Tree] = {}
        self.bases: dict[str, Tree] = {}
        self.pins: dict[int, tuple[Entry, Tree]] = {}
        self.collection: Collection | None = None
        self.importing: tuple[Any, Entry, Any] | None = None
        self.freezing: Any = None
        self.count = 0

    def teardown(self) -> None:
        self.abandon_import()
        if self.freezing is not None:
            self.finish_commit()
        self.collection = None
        self.check_quiet()
        for fd in self.pins:
            os.close(fd)
        self.repository.close()
        shutil.rmtree(self.home)

    @initialize()
    def fill(self) -> None:
        for seed, file in enumerate(FILES):
            self.write(file, seed)
        self.import_whole(True)

    # The source, whose times say nothing of when it was written.

    @rule(file=st.sampled_from(FILES), seed=st.sampled_from(SEEDS))
    def write(self, file: str, seed: int) -> None:
        path = self.source / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(seed))
        os.utime(path, ns=(seed * DAY, seed * DAY))
        self.settle()

    @rule(file=st.sampled_from(FILES))
    def delete(self, file: str) -> None:
        (self.source / file).unlink(missing_ok=True)
        self.settle()

    def settle(self) -> None:
        for directory, _, _ in os.walk(self.source, topdown=False):
            os.utime(directory, ns=(DAY, DAY))

    # Imports.

    def note(self, identifier: SnapshotId) -> None:
        root = self.repository.snapshot(identifier).root
        self.trees[identifier] = of_entry(self.repository.objects, root)

    @precondition(lambda self: self.importing is None)
    @rule(use_cache=st.booleans())
    def import_whole(self, use_cache: bool) -> None:
        self.count += 1
        result = self.repository.import_directory(
            str(self.source), use_cache=use_cache, metadata={"n": self.count}
        )
        self.note(SnapshotId(result.snapshot))

    @precondition(lambda self: self.importing is None)
    @rule()
    def begin_import(self) -> None:
        storing = self.repository.storing()
        storing.__enter__()
        job = _Import(
            self.repository.store, self.repository.objects, str(self.source),
            use_cache=True, progress=None,
        )  # fmt: skip
        self.importing = (job, job.run(), storing)

    @precondition(lambda self: self.importing is not None)
    @rule()
    def finish_import(self) -> None:
        assert self.importing is not None
        job, root, storing = self.importing
        self.count += 1
        identifier, record = encode_snapshot(make_snapshot(root, (), "", {"n": self.count}))

        def change(writer: Writer) -> None:
            job.save(writer)
            writer.put(Db.SNAPSHOTS, identifier, record)

        self.repository.store.write(change)
        storing.__exit__(None, None, None)
        self.importing = None
        self.note(identifier)

    @rule()
    def abandon_import(self) -> None:
        """One that is killed: what it stored is garbage."""
        if self.importing is not None:
            self.importing[2].__exit__(None, None, None)
            self.importing = None

    # Snapshots and refs.

    @precondition(lambda self: self.trees)
    @rule(which=number)
    def remove(self, which: int) -> None:
        identifier = list(self.trees)[which % len(self.trees)]
        try:
            self.repository.remove_snapshot(identifier)
        except InUseError:
            return
        del self.trees[identifier]

    @precondition(lambda self: self.trees)
    @rule(which=st.integers(0, 3))
    def remove_all_but(self, which: int) -> None:
        """None of what is left was imported last, often, so that the stat cache is stale."""
        for at in reversed(range(len(self.trees))):
            if at != which - 2:
                self.remove(at)

    @precondition(lambda self: self.collection is None)
    @rule(which=st.integers(0, 3), steps=st.integers(0, 4))
    def remove_and_collect(self, which: int, steps: int) -> None:
        if self.trees:
            self.remove_all_but(which)
        self.begin_collection()
        for _ in range(steps):
            if self.collection is not None:
                self.step_collection(True)
                self.nothing_is_lost()

    @precondition(lambda self: self.trees)
    @rule(which=number)
    def move_ref(self, which: int) -> None:
        self.repository.set_ref("ref", list(self.trees)[which % len(self.trees)])

    @rule()
    def remove_ref(self) -> None:
        if "ref" in self.repository.refs():
            self.repository.remove_ref("ref")

    # Sessions.

    @precondition(lambda self: self.trees and len(self.bases) < 3)
    @rule(which=number)
    def create_session(self, which: int) -> None:
        self.count += 1
        base = list(self.trees)[which % len(self.trees)]
        self.repository.sessions.create(f"s{self.count}", (None, None, base))
        self.bases[f"s{self.count}"] = self.trees[base]

    def session(self, which: int) -> str:
        return sorted(self.bases)[which % len(self.bases)]

    @precondition(lambda self: self.bases and self.freezing is None)
    @rule(which=number, name=st.sampled_from(["a", "new"]), seed=st.sampled_from(SEEDS))
    def write_session(self, which: int, name: str, seed: int) -> None:
        with self.repository.sessions.hold(self.session(which), "a test") as held:
            path = os.path.join(os.fsdecode(held.upper().root), name)
            Path(path).write_bytes(content(seed))
            os.utime(path, ns=(seed * DAY, seed * DAY))

    @precondition(lambda self: self.bases and self.freezing is None)
    @rule(which=number)
    def begin_commit(self, which: int) -> None:
        name = self.session(which)
        held = self.repository.sessions.hold(name, "a test")
        storing = self.repository.storing()
        storing.__enter__()
        freeze = held.freeze()
        freeze.prepare()
        self.freezing = (name, held, freeze, storing)

    @precondition(lambda self: self.freezing is not None)
    @rule()
    def finish_commit(self) -> None:
        name, held, freeze, storing = self.freezing
        report = held.commit(freeze, "", None, None)
        storing.__exit__(None, None, None)
        held.clean()
        held.release()
        self.freezing = None
        self.note(SnapshotId(report.snapshot))
        self.bases[name] = self.trees[SnapshotId(report.snapshot)]

    @precondition(lambda self: self.bases and self.freezing is None)
    @rule(which=number)
    def fork(self, which: int) -> None:
        self.count += 1
        name = f"s{self.count}"
        self.repository.fork(self.session(which), name)
        root = self.repository.sessions.get(name).root
        self.bases[name] = of_entry(self.repository.objects, root)

    @precondition(lambda self: self.bases and self.freezing is None)
    @rule(which=number)
    def remove_session(self, which: int) -> None:
        name = self.session(which)
        self.repository.sessions.remove(self.repository.sessions.hold(name, "a test"))
        del self.bases[name]

    # Workspaces: a pinned base, and commits of one transaction without any lease.

    @precondition(lambda self: self.trees and len(self.pins) < 2)
    @rule(which=number)
    def pin(self, which: int) -> None:
        identifier = list(self.trees)[which % len(self.trees)]
        root = self.repository.snapshot(identifier).root
        home = self.home / "store/locks/pins"
        home.mkdir(exist_ok=True)
        self.count += 1
        fd = os.open(home / str(self.count), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.write(fd, directory_id(root).hex().encode() + b"\n")
        self.pins[fd] = (root, self.trees[identifier])

    @precondition(lambda self: self.pins)
    @rule()
    def unpin(self) -> None:
        fd = list(self.pins)[-1]
        os.close(fd)
        del self.pins[fd]

    @precondition(lambda self: self.pins)
    @rule(name=st.sampled_from([b"a", b"w"]), seed=st.sampled_from(SEEDS[1:]))
    def commit_workspace(self, name: bytes, seed: int) -> None:
        self.count += 1
        root, data = self.pins[list(self.pins)[-1]][0], content(seed)[:17_000]
        ref = Ref(digest(data), len(data), 0)

        def change(writer: Writer) -> SnapshotId:
            put = node_putter(writer)
            if not writer.has(Db.CHUNKS, digest(data)):
                writer.put(Db.CHUNKS, digest(data), pack(data))
            entries = {e.name: e for e in Directory(self.repository.objects, directory_id(root))}
            new = Entry(name, Kind.FILE, 0o644, seed * DAY, len(data), (ref,))
            if name == b"w":  # in a directory of its own
                new = directory_entry(put, [new], name=name, mode=0o755, mtime_ns=DAY)
            entries[name] = new
            new = directory_entry(
                put, [entries[key] for key in sorted(entries)], name=b"", mode=0o755, mtime_ns=DAY
            )
            identifier, record = encode_snapshot(make_snapshot(new, (), "", {"n": self.count}))
            writer.put(Db.SNAPSHOTS, identifier, record)
            return identifier

        self.note(self.repository.store.write(change))

    # The collection.

    @precondition(lambda self: self.collection is None)
    @rule()
    def begin_collection(self) -> None:
        self.collection = Collection(
            self.repository.store, self.repository.path, self.repository.objects
        )
        self.collection.mark()

    @precondition(lambda self: self.collection is not None)
    @rule(prepare=st.booleans())
    def step_collection(self, prepare: bool) -> None:
        assert self.collection is not None
        if prepare and not self.collection.prepare():
            self.collection = None
            return
        try:
            with acquire(self.repository.path, "objects"):
                self.collection.remove()
        except LeaseHeldError:
            assert self.importing is not None or self.freezing is not None

    @precondition(lambda self: self.importing is None and self.freezing is None)
    @rule(which=st.integers(0, 3), gone=st.booleans(), steps=st.integers(0, 8))
    def import_into_a_batch(self, which: int, gone: bool, steps: int) -> None:
        """What is about to go comes back, and perhaps goes again, or only a pin keeps it."""
        if self.collection is None:
            self.remove_and_collect(which, steps)
        if self.collection is None or not self.collection.prepare():
            return
        before = set(self.trees)
        self.import_whole(True)
        for identifier in set(self.trees) - before if gone else ():
            self.remove(list(self.trees).index(identifier))
        self.step_collection(False)

    @precondition(lambda self: self.pins and self.importing is None and self.freezing is None)
    @rule(
        name=st.sampled_from([b"a", b"w"]), seed=st.sampled_from(SEEDS[1:]),
        steps=st.integers(0, 8), pinned=st.booleans(),
    )  # fmt: skip
    def commit_into_a_batch(self, name: bytes, seed: int, steps: int, pinned: bool) -> None:
        """The same, by one transaction without a lease; perhaps only a pin keeps it then."""
        self.commit_workspace(name, seed)
        self.remove(-1)
        self.begin_collection()
        assert self.collection is not None
        for _ in range(steps):
            if self.collection is not None:
                self.step_collection(True)
        if not self.prepared():
            return
        self.commit_workspace(name, seed)
        if pinned and len(self.pins) < 3:
            self.pin(-1)
            self.remove(-1)
        self.step_collection(False)

    def prepared(self) -> bool:
        return self.collection is not None and self.collection.prepare()

    @precondition(lambda self: self.collection is not None)
    @rule()
    def kill_collection(self) -> None:
        """One that is killed between two batches is one that never goes on."""
        self.collection = None

    @precondition(lambda self: self.importing is None and self.freezing is None)
    @rule()
    def compact(self) -> None:
        """Not within a collection: both need the lease `gc`."""
        if self.collection is None:
            self.repository.compact()

    @precondition(lambda self: self.importing is None and self.freezing is None)
    @rule()
    def check_quiet(self) -> None:
        self.collection = None
        self.repository.collect()
        report = self.repository.collect(dry_run=True)
        assert (report.chunks, report.nodes, report.rows) == (0, 0, 0)
        with self.repository.store.read() as reader:
            assert reader.count(Db.NODES) == report.kept_nodes
            assert reader.count(Db.CHUNKS) == report.kept_chunks

    @invariant()
    def nothing_is_lost(self) -> None:
        objects = self.repository.objects
        objects.shed()
        assert set(self.repository.snapshots()) == set(self.trees)
        for identifier, tree in self.trees.items():
            assert of_entry(objects, self.repository.snapshot(identifier).root) == tree
        for name, tree in self.bases.items():
            root = self.repository.sessions.get(name).root
            assert {**of_entry(objects, root), b"": None} == {**tree, b"": None}
        for root, tree in self.pins.values():
            assert of_entry(objects, root) == tree
        assert self.repository.verify().damage == []


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "FRESH_NS", -(10**18))
    monkeypatch.setattr(collecting, "BATCH_OBJECTS", 2)
    monkeypatch.setattr(collecting, "_LATE_NODES", 1)
    monkeypatch.setattr(collecting, "PAUSE_SECONDS", 0.0)


@pytest.mark.timeout(600)
def test_nothing_that_is_reachable_is_ever_lost(small_batches: None) -> None:
    run_machine(CollectingMachine, 60, 60)


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("name", [b"a", b"w"])
def test_what_comes_back_just_before_it_goes(
    small_batches: None, name: bytes, pinned: bool
) -> None:
    """At each step of a collection, where the machine comes only now and then."""
    machine = CollectingMachine()
    try:
        machine.fill()
        machine.pin(0)
        for seed in [1, 4]:
            for steps in range(8):
                machine.commit_into_a_batch(name, seed, steps, pinned)
                machine.nothing_is_lost()
                while len(machine.pins) > 1:
                    machine.unpin()
                machine.remove_all_but(2)
    finally:
        machine.teardown()
