"""An archive that several processes make: each makes parts, one puts them together in order.

Python runs one thread at a time, and making small members is mostly Python; so large trees are
given to processes, which `tar_worker` is. They start while this one makes the first parts alone,
and whatever they cannot make, or do not because they are killed, this one makes: the bytes are the
same with any number of them, and so are the errors. None outlives the export.
"""

import mmap
import os
import select
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import IO

import msgspec

from engine.archives.tar_parts import Large, Members, Part, extents, members, parts
from engine.archives.tar_worker import ASKED, MADE, SLOT_BYTES, Left, needs_parent
from engine.archives.tar_writing import TarReport, TarWriter, opening, padding, read_ahead
from engine.progress import Progress
from engine.storage import content
from engine.storage.nodes import Entry
from engine.storage.objects import Objects

FEW_ENTRIES, FEW_BYTES = 8_192, 256 << 20
"""A tree of no more than this is made alone: starting others would take longer."""
MOST_WORKERS = 4
"""One process puts together no more than so many make."""
_PATIENCE = 1.0
"""Seconds that a worker has to end by itself, before it is killed."""
_AHEAD = 64
"""How many things are known that come next in the archive."""
_SLOTS = 3
"""How many parts a worker has: one that it is at, and what comes before and after it."""
_START = "import sys; sys.path[:] = sys.argv[3:]; from engine.archives.tar_worker import main; " \
         "main(sys.argv[1], sys.argv[2])"  # fmt: skip


def workers_for(root: Entry) -> int:
    """Returns how many processes pay for a tree; 0 for a small one, or on one core."""
    cores = len(os.sched_getaffinity(0))
    entries = root.totals.entries if root.totals else 0
    if cores == 1 or (entries <= FEW_ENTRIES and root.size <= FEW_BYTES):
        return 0
    return min(cores, MOST_WORKERS)


class Literal(msgspec.Struct, frozen=True):
    """Bytes that are known: a header, zeros."""

    data: bytes
    entries: int = 0


Job = Members | Part | Large | Literal
"""What comes next in an archive. A Large is made here: see `needs_parent`."""


def write_tree(
    objects: Objects,
    root: Entry,
    out: IO[bytes],
    crew: "Crew",
    *,
    set_id: bool = False,
    progress: Progress | None = None,
) -> TarReport:
    """Writes all of a tree and the end, as `write_tar` does; see `everything`."""
    total = root.totals.entries + 1 if root.totals else None

    def tell() -> None:
        if progress is not None:
            progress(writer.report.entries, total, writer.report.bytes)

    writer = TarWriter(objects, out, tell, set_id=set_id)
    writer.add(b".", root)
    for job, ticket in _assigned(jobs(objects, root), crew):
        if ticket is None or not crew.take(ticket, writer):
            make_here(objects, job, writer, tell)
        tell()
    writer.end()
    return writer.report


def jobs(objects: Objects, root: Entry) -> Iterator[Job]:
    """Yields all that is below a tree's root, in the archive's order."""
    for part in parts(objects, root):
        if isinstance(part, Members) or needs_parent(part.entry):
            yield part
            continue
        head, pieces = opening(objects, part.path, part.entry)
        yield Literal(head, 1)
        for start, size in pieces:
            yield from extents(objects, part.entry, start, start + size)
            yield Literal(padding(size))


def _assigned(coming: Iterator[Job], crew: "Crew") -> Iterator[tuple[Job, "Ticket | None"]]:
    """Yields jobs in their order, each given to somebody if anybody is free, some ahead."""
    waiting: deque[tuple[Job, Ticket | None]] = deque()
    job = next(coming, None)
    while job is not None or waiting:
        while job is not None and len(waiting) < _AHEAD:
            ticket = None
            if isinstance(job, Part):
                ticket = crew.give(job)
                if ticket is None:
                    break
            waiting.append((job, ticket))
            job = next(coming, None)
        if waiting:
            yield waiting.popleft()
        elif job is not None:
            yield job, None
            job = next(coming, None)


def make_here(objects: Objects, job: Job, writer: TarWriter, tell: Callable[[], None]) -> None:
    """Makes a part in this process. Raises what `TarWriter.add` does."""
    if isinstance(job, Literal):
        writer.write(job.data)
        writer.report.entries += job.entries
    elif isinstance(job, Large):
        writer.add(job.path, job.entry)
    elif isinstance(job, Members):
        for path, entry, data in read_ahead(objects, members(objects, job.runs)):
            writer.add(path, entry, data)
            tell()
    else:
        with objects.chunks() as chunk:
            for piece in job.pieces:
                for view in content.part_of(*piece, chunk):
                    writer.write(view)


class Ticket:
    """A part that was given to a worker, and the slot that it is made in."""

    __slots__ = ("answer", "slot", "worker")

    def __init__(self, worker: "_Worker", slot: int) -> None:
        self.worker, self.slot = worker, slot
        self.answer: tuple[bool, int, int, int] | None = None


class _Worker:
    """One process, and the memory that is shared with it. Raises OSError if it cannot start."""

    def __init__(self, store: str) -> None:
        memory = os.memfd_create("tar")
        self.connection, theirs = socket.socketpair()
        try:
            os.ftruncate(memory, _SLOTS * SLOT_BYTES)
            self.memory = memoryview(mmap.mmap(memory, 0))
            # Its own group: what is typed at the terminal is for this process to answer.
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _START, store, str(memory), *sys.path],
                stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                pass_fds=(memory,), process_group=0,
            )  # fmt: skip
        except BaseException:
            self.connection.close()
            raise
        finally:
            theirs.close()
            os.close(memory)
        self.free = list(range(_SLOTS))
        self.asked: deque[Ticket] = deque()
        self.ready = False
        self.gone = False

    def is_ready(self) -> bool:
        if not self.ready and not self.gone and select.select([self.connection], [], [], 0)[0]:
            self.ready = self._receive() is not None
        return self.ready and not self.gone

    def give(self, part: Part) -> Ticket | None:
        data = msgspec.msgpack.encode(part)
        if len(data) > SLOT_BYTES:
            return None
        ticket = Ticket(self, self.free.pop())
        at = ticket.slot * SLOT_BYTES
        self.memory[at : at + len(data)] = data
        try:
            self.connection.sendall(ASKED.pack(ticket.slot, len(data)))
        except OSError:
            self.gone = True
        self.asked.append(ticket)
        return ticket

    def wait(self, ticket: Ticket) -> tuple[bool, int, int, int]:
        while ticket.answer is None:
            answer = None if self.gone else self._receive()
            self.asked.popleft().answer = answer or (False, 0, 0, 0)
        return ticket.answer

    def _receive(self) -> tuple[bool, int, int, int] | None:
        try:
            data = self.connection.recv(MADE.size, socket.MSG_WAITALL)
        except OSError:
            data = b""
        self.gone = len(data) < MADE.size
        return None if self.gone else MADE.unpack(data)


class Crew:
    """Processes that make parts; a context manager at whose end there are none."""

    def __init__(self, store: str, workers: int) -> None:
        """Each opens the store at `store`. `made` counts the parts that they have made."""
        self._store, self._wanted = store, workers
        self._workers: list[_Worker] = []
        self._pid = os.getpid()
        self.made = 0

    @property
    def pids(self) -> list[int]:
        """The processes that were started."""
        return [worker.process.pid for worker in self._workers]

    def wait_ready(self) -> None:
        """Waits until each of them can take a part, or is gone; nobody needs to."""
        for worker in self._workers:
            select.select([worker.connection], [], [])
            worker.is_ready()

    def __enter__(self) -> "Crew":
        try:
            for _ in range(self._wanted):
                self._workers.append(_Worker(self._store))
        except OSError:
            pass  # no more processes or memory to be had: those that there are, or nobody
        except BaseException:
            self._end(idle=False)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end(idle=kind is None)

    def _end(self, *, idle: bool) -> None:
        if os.getpid() != self._pid:  # the workers are those of the process that this one left
            for worker in self._workers:
                worker.connection.close()
            return
        for worker in self._workers:
            worker.connection.close()  # it ends then, with what it is at
            if idle:
                worker.process.kill()
        for worker in self._workers:
            try:
                # Killed in the middle it would leave its view of the store, and no page that is
                # seen there is used again until somebody opens the store.
                worker.process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()

    def give(self, part: Part) -> Ticket | None:
        """Gives a part to whoever has the least to do; None if nobody can take one now."""
        free = [each for each in self._workers if each.free and each.is_ready()]
        return max(free, key=lambda each: len(each.free)).give(part) if free else None

    def take(self, ticket: Ticket, writer: TarWriter) -> bool:
        """Waits for a part and writes it; False, and nothing is written, if it was not made."""
        worker = ticket.worker
        made, size, entries, rest = worker.wait(ticket)
        if made:
            at = ticket.slot * SLOT_BYTES
            end = at + size
            left = _left(worker.memory[end : end + rest]) if rest else []
            put(writer, worker.memory[at:end], entries, left)
            self.made += 1
        worker.free.append(ticket.slot)
        return made


def put(writer: TarWriter, data: memoryview, entries: int, left: list[Left]) -> None:
    """Writes what `tar_worker.make` has made, and what it left, each in its place."""
    done = 0
    for member in left:
        writer.write(data[done : member.at])
        writer.add(member.path, member.entry)
        done = member.at
    writer.write(data[done:])
    writer.report.entries += entries


_left = msgspec.msgpack.Decoder(list[Left]).decode
