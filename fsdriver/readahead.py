"""Reading ahead: what will be asked for next is put into the kernel's page cache unasked.

Who reads a directory's files one after the other, as grep and tar do, pays a request and its
answer for each; who reads a large file pays one for every 128 KiB. When two files of a
directory, or two pieces of a large file, were asked for in order, a thread takes what follows
out of the store and gives it to the kernel (FUSE_NOTIFY_STORE), while the thread that answers
requests answers them. Only what never changes is read ahead. What goes wrong is left to the
request that will come instead.

The kernel does not ask for what it was given, so nobody would know how far the reader of a large
file has come. Therefore the first page of every UNIT is left out: the request for it tells, and
what is ahead of the reader is doubled then, up to AHEAD.
"""

import contextlib
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import islice
from time import monotonic

import msgspec

from engine import EngineError
from engine.mounted.inodes import Inode

FILES = 32
"""How many files ahead of the reader are given."""
SMALL = 256 << 10
"""Up to so many bytes a file is given whole."""
UNIT, PIECE, PAGE = 4 << 20, 1 << 20, 4096
AHEAD = 32 << 20
"""How far ahead of the reader a large file is given at most, in bytes, in pieces of PIECE."""
APART = 512 << 10
"""How many bytes the thread keeps from a reader who has caught up: the kernel reads ahead, too."""
RECENT = 0.1
"""Seconds after which who read in order is thought to have ended."""
REMEMBERED = 100_000
"""How many files at most are known to have been given, or to be next in some order."""
END_SECONDS = 1.0

Store = Callable[[int, int, list[memoryview]], None]
"""Gives the kernel bytes: inode, offset, data in pieces."""


class ReadAheadStatistics(msgspec.Struct, frozen=True):
    """How often something was given to the kernel, and how many bytes; how much is still to be.

    `waiting` counts files and ranges, with the one at hand.
    """

    given: int
    bytes: int
    waiting: int


class _Course:
    """How far the reader of a large file has come, and what is ahead of it."""

    __slots__ = ("ahead", "given", "last")

    def __init__(self) -> None:
        self.last = self.given = self.ahead = 0


class ReadAhead:
    """Follows the readers of one mount. `read` and `listed` are called by the serving thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._queue: queue.SimpleQueue[tuple[Inode, int, int] | None] = queue.SimpleQueue()
        self._waiting: set[int] = set()
        self._given: set[int] = set()
        self._expected: set[int] = set()
        self._courses: OrderedDict[int, _Course] = OrderedDict()
        self._active = 0.0
        self._closed = threading.Event()
        self._count = self._bytes = self._asked = self._done = 0
        self._thread: threading.Thread | None = None

    def read(self, inode: Inode, offset: int, size: int) -> None:
        """Notes that a part of a file was asked for, and reads ahead if that was in order."""
        length = inode.unchanging()
        if length > SMALL:
            self._follow(inode, offset, size, length)
        elif length and not offset:
            self._given.discard(inode.ino)
            self._waiting.discard(inode.ino)
            in_order = inode.ino in self._expected
            self._expected.discard(inode.ino)
            following = list(islice(inode.followers(), FILES + 1))
            if in_order:
                self._give(following)
            elif following:
                self._expect(following[0])

    def listed(self, files: Iterable[Inode]) -> None:
        """Notes that a directory was listed: who reads in order will begin with its first files."""
        if monotonic() - self._active < RECENT:
            self._give(list(islice(files, FILES + 1)))

    def _give(self, files: list[Inode]) -> None:
        self._active = monotonic()
        for inode in files[:FILES]:
            if inode.ino not in self._given and inode.ino not in self._waiting:
                length = inode.unchanging()
                if 0 < length <= SMALL:
                    self._waiting.add(inode.ino)
                    self._put((inode, 0, length))
        if files:
            # The kernel does not ask for what it was given: whichever it asks for is in order.
            for inode in files:
                self._expect(inode)

    def _expect(self, inode: Inode) -> None:
        if len(self._expected) > REMEMBERED:
            self._expected.clear()
        self._expected.add(inode.ino)

    def _follow(self, inode: Inode, offset: int, size: int, length: int) -> None:
        course = self._courses.pop(inode.ino, None)
        if course is None or not course.last <= offset <= max(course.last, course.given):
            course = _Course()
        elif offset:
            course.ahead = min(max(2 * course.ahead, UNIT), AHEAD)
            start = max(course.given, _up(offset + size, PAGE) + APART)
            end = min(_up(offset + course.ahead, UNIT), length)
            if start < end:
                course.given = end
                self._put((inode, start, end))
        course.last = offset + size
        self._courses[inode.ino] = course
        if len(self._courses) > FILES:
            self._courses.popitem(last=False)

    def _put(self, part: tuple[Inode, int, int]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        self._asked += 1
        self._queue.put(part)

    def _work(self) -> None:
        while (part := self._queue.get()) is not None and not self._closed.is_set():
            inode, offset, end = part
            with contextlib.suppress(OSError, EngineError):
                if offset:
                    self._give_range(inode, offset, end)
                elif inode.ino in self._waiting:  # else asked for meanwhile
                    self._waiting.discard(inode.ino)
                    if len(self._given) > REMEMBERED:
                        self._given.clear()
                    self._given.add(inode.ino)
                    self._store_range(inode, 0, [memoryview(inode.read(0, end))])
            self._done += 1

    def _give_range(self, inode: Inode, at: int, end: int) -> None:
        """Gives a part of a large file, as far as the reader is not there already."""
        while at < end and not self._closed.is_set():
            course = self._courses.get(inode.ino)
            if course is not None and course.last + APART > at:
                at = _up(course.last + APART, PAGE)
                if at >= end:
                    return
            if at % UNIT == 0:
                at += PAGE
            stop = min(at - at % PIECE + PIECE, end)
            with contextlib.closing(inode.stream(at, stop)) as stream:
                self._store_range(inode, at, list(stream))
            at = stop

    def _store_range(self, inode: Inode, offset: int, data: list[memoryview]) -> None:
        if not self._closed.is_set():
            self._store(inode.ino, offset, data)
            self._count += 1
            self._bytes += sum(map(len, data))

    def close(self) -> None:
        """Ends the thread; nothing is given to the kernel any more.

        It may hang in the kernel, at a page for a request that nobody answers any more: the end of
        the mount frees it, and then it does nothing else.
        """
        self._closed.set()
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(END_SECONDS)

    def statistics(self) -> ReadAheadStatistics:
        """Returns what was given, and is to be."""
        return ReadAheadStatistics(self._count, self._bytes, self._asked - self._done)


def _up(offset: int, unit: int) -> int:
    """Returns the next multiple of a power of two."""
    return (offset + unit - 1) & -unit
