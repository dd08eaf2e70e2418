"""Archives that several processes make: the same bytes as one makes, whatever happens to them."""

import io
import os
import select
import signal
from pathlib import Path
from typing import IO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import ChunkId, Repository, SnapshotId
from engine.archives import tar_parts
from engine.archives.tar_crew import Crew, jobs, make_here, put, workers_for, write_tree
from engine.archives.tar_parts import Extent, Members
from engine.archives.tar_worker import Slot, SlotFullError, make
from engine.archives.tar_writing import TarWriter, everything, write_tar
from engine.errors import CorruptObjectError
from engine.ids import digest
from engine.storage.nodes import Entry, Kind, Ref, Totals
from engine.storage.objects import NodeBuffer
from engine.storage.store import Db
from engine.trees.directory import directory_entry
from tests.engine.planted import trees
from tests.engine.plants import Garden, Leaf
from tests.engine.test_tar import planted_sparse, tarred
from tests.engine.test_verifying import change, flip
from tests.engine.trees import age, noise

many = settings(
    max_examples=80, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip


def in_parts(garden: Garden, root: Entry, slot_bytes: int = 4 << 20) -> bytes:
    """Makes each part as a worker does, and what does not fit as the process that has them."""
    out = io.BytesIO()
    writer = TarWriter(garden.objects, out, set_id=True)
    writer.add(b".", root)
    for job in jobs(garden.objects, root):
        slot = Slot(memoryview(bytearray(slot_bytes)))
        try:
            if not isinstance(job, Members | Extent):
                raise SlotFullError("not for workers")
            entries, left = make(garden.objects, job, slot)
        except SlotFullError:
            make_here(garden.objects, job, writer, lambda: None)
        else:
            put(writer, slot._view[: slot.at], entries, left)
    writer.end()
    assert writer.report.bytes == len(out.getvalue())
    assert writer.report.entries == 1 + (root.totals.entries if root.totals else 0)
    return out.getvalue()


@given(trees(), st.integers(1, 40), st.sampled_from([128, 700, 5_000, 1 << 20]))
@many
def test_parts_are_what_one_process_makes(
    monkeypatch: pytest.MonkeyPatch, tree, entries: int, size: int
):
    monkeypatch.setattr(tar_parts, "MOST_ENTRIES", entries)
    monkeypatch.setattr(tar_parts, "MOST_BYTES", size)
    monkeypatch.setattr(tar_parts, "LARGE", size)
    garden = Garden()
    root = tree(garden)
    assert in_parts(garden, root) == tarred(garden, root)
    assert in_parts(garden, root, slot_bytes=5_000) == tarred(garden, root)


@given(
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 5)), max_size=6),
    st.integers(0, 1 << 20), st.sampled_from([128, 4_096, 1 << 20]),
)  # fmt: skip
@many
def test_holes_in_parts(monkeypatch: pytest.MonkeyPatch, drawn, tail: int, large: int):
    monkeypatch.setattr(tar_parts, "LARGE", large)
    garden = Garden()
    root = planted_sparse(garden, drawn or [(0, 0)], tail)
    assert in_parts(garden, root) == tarred(garden, root)


def test_a_large_directory_is_cut(monkeypatch: pytest.MonkeyPatch):
    garden = Garden()
    root = garden.plant({b"d/%05d" % number: Leaf(b"x") for number in range(2_000)})
    found = [job for job in jobs(garden.objects, root) if isinstance(job, Members)]
    assert len(found) == 4
    assert in_parts(garden, root) == tarred(garden, root)


def test_directories_that_say_too_little():
    garden = Garden()
    root = garden.plant({b"d/%05d" % number: Leaf(noise(9_000)) for number in range(600)})
    inner = next(iter(everything_below(garden, root)))
    forged = Entry(
        inner.name, Kind.DIRECTORY, inner.mode, inner.mtime_ns, 1, inner.content,
        totals=Totals(1, 0),
    )  # fmt: skip
    root = directory_entry(garden.nodes.put, [forged], name=b"", mode=0o755, mtime_ns=1)
    garden.save()
    (part,) = jobs(garden.objects, root)
    assert isinstance(part, Members)
    slot = Slot(memoryview(bytearray(4 << 20)))
    with pytest.raises(SlotFullError):
        make(garden.objects, part, slot)
    out = io.BytesIO()
    writer = TarWriter(garden.objects, out, set_id=True)
    make_here(garden.objects, part, writer, lambda: None)
    assert writer.report.entries == 601


def everything_below(garden: Garden, root: Entry) -> list[Entry]:
    return [entry for path, entry in everything(garden.objects, root) if path != b"."]


def test_a_piece_that_is_not_as_long_as_it_should_be():
    garden = Garden()
    ref = Ref(garden.sink.put(noise(10_000)), 10_001, 0)
    garden.save()
    part = Extent(((ref, 0, 10_001),))
    with pytest.raises(CorruptObjectError):
        make(garden.objects, part, Slot(memoryview(bytearray(1 << 20))))


# Processes.


@pytest.fixture
def root(repository: Repository, tmp_path: Path) -> Entry:
    """A tree of many files, some with names elsewhere, one of them large, one with holes."""
    tree = tmp_path / "tree"
    for number in range(1_500):
        path = tree / f"{number % 40:02d}" / f"{number:04d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise(number * 7, number))
    os.link(tree / "00" / "0000", tree / "39" / "linked")
    os.link(tree / "20" / "0020", tree / "01" / "linked")
    (tree / "05" / "large").write_bytes(noise(5_000_000))
    os.link(tree / "05" / "large", tree / "05" / "large again")
    (tree / "06" / "large").write_bytes(noise(3_000_001, 7))
    with (tree / "07" / "holes").open("wb") as file:
        for at in (0, 3 << 20, 9 << 20):
            file.seek(at)
            file.write(noise(200_000, at))
        file.truncate(10 << 20)
    os.setxattr(tree / "07" / "0007", b"user.a", b"b")
    age(tree)
    made = repository.import_directory(str(tree)).snapshot
    return repository.snapshot(SnapshotId(made)).root


def alone(repository: Repository, root: Entry) -> bytes:
    out = io.BytesIO()
    write_tar(repository.objects, everything(repository.objects, root), out)
    return out.getvalue()


class Stream(io.BytesIO):
    """Calls something when it has so many bytes."""

    def __init__(self, after: int, call) -> None:
        super().__init__()
        self.after, self.call = after, call

    def write(self, data, /) -> int:
        count = super().write(data)
        if self.call is not None and self.tell() >= self.after:
            call, self.call = self.call, None
            call()
        return count


def together(repository: Repository, root: Entry, out: IO[bytes], crew: Crew) -> None:
    crew.wait_ready()
    report = write_tree(repository.objects, root, out, crew)
    assert report.bytes == out.tell()


def ended(handles: list[int]) -> bool:
    """Waits until processes have ended, by their descriptors."""
    for handle in handles:
        if not select.select([handle], [], [], 30)[0]:
            return False
        os.close(handle)
    return True


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_processes_make_the_same(repository: Repository, root: Entry, workers: int):
    out = io.BytesIO()
    with Crew(repository.path, workers) as crew:
        handles = [os.pidfd_open(pid) for pid in crew.pids]
        together(repository, root, out, crew)
        assert (crew.made > 10) == (workers > 0)
    assert ended(handles)
    assert out.getvalue() == alone(repository, root)


@pytest.mark.parametrize("after", [0, 1, 4_000_000])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_a_killed_worker_changes_nothing(
    repository: Repository, root: Entry, after: int, all_of_them: bool
):
    with Crew(repository.path, 2) as crew:
        pids = crew.pids if all_of_them else crew.pids[:1]
        handles = [os.pidfd_open(pid) for pid in pids]

        def kill() -> None:
            for handle in handles:
                signal.pidfd_send_signal(handle, signal.SIGKILL)

        if not after:
            kill()
        out = Stream(after, kill if after else None)
        together(repository, root, out, crew)
    assert ended(handles)
    assert out.getvalue() == alone(repository, root)


def test_what_is_damaged_is_the_same_error(repository: Repository, root: Entry):
    with repository.store.read() as reader:
        key = max(reader.keys(Db.CHUNKS))
    change(repository, Db.CHUNKS, key, flip)
    with pytest.raises(CorruptObjectError) as expected:
        alone(repository, root)
    handles: list[int] = []

    def fail() -> None:
        with Crew(repository.path, 2) as crew:
            handles.extend(os.pidfd_open(pid) for pid in crew.pids)
            together(repository, root, io.BytesIO(), crew)

    with pytest.raises(CorruptObjectError) as found:
        fail()
    assert str(found.value) == str(expected.value)
    assert ended(handles)


def test_an_error_of_the_stream_ends_all(repository: Repository, root: Entry):
    def full() -> None:
        raise OSError(28, "No space left on device")

    handles: list[int] = []

    def fail() -> None:
        with Crew(repository.path, 2) as crew:
            handles.extend(os.pidfd_open(pid) for pid in crew.pids)
            together(repository, root, Stream(3_000_000, full), crew)

    with pytest.raises(OSError, match="No space"):
        fail()
    assert ended(handles)


def test_objects_that_are_not_stored_yet(repository: Repository):
    """A process sees its own commits before they are in the store; the others do not."""
    nodes, pending = NodeBuffer(), repository.objects.pending
    files = []
    for number in range(700):
        data = noise(10_000, number)
        identifier = ChunkId(digest(data))
        pending.chunks[identifier] = data
        pieces = (Ref(identifier, len(data), 0),)
        files.append(Entry(b"%03d" % number, Kind.FILE, 0o644, 1, len(data), pieces))
    tree = directory_entry(nodes.put, files, name=b"", mode=0o755, mtime_ns=1)
    pending.nodes.update(nodes.nodes)
    out = io.BytesIO()
    with Crew(repository.path, 2) as crew:
        together(repository, tree, out, crew)
        assert crew.made == 0
    assert out.getvalue() == alone(repository, tree)


def test_who_cannot_start_any_works_alone(
    repository: Repository, root: Entry, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.executable", "/nonexistent")
    out = io.BytesIO()
    with Crew(repository.path, 2) as crew:
        assert crew.pids == []
        together(repository, root, out, crew)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with Crew(repository.path, 2) as crew:
        out = io.BytesIO()
        together(repository, root, out, crew)
        assert crew.made == 0
    assert out.getvalue() == alone(repository, root)


def test_small_trees_start_nobody(root: Entry):
    assert workers_for(root) == 0
    large = Entry(b"", Kind.DIRECTORY, 0o755, 0, 1 << 40, bytes(32), totals=Totals(5, 0))
    assert workers_for(large) == (0 if len(os.sched_getaffinity(0)) == 1 else
                                  min(len(os.sched_getaffinity(0)), 4))  # fmt: skip
