"""Group commits: what several processes commit at the same time becomes one transaction.

A durable transaction costs a sync however little is in it, and one process writes at a time. So
whoever commits while another does so leaves what it commits in a file, and whose turn it is
takes along what is there. Files in the store's `locks/commits/`:

    turn            flock held alone by whoever commits; taken before LMDB's own lock
    <random>        what a process has posted; under an flock for as long as the process lives:
                    8 bytes   number of its last post that is in the store; its leader writes it
                    8         number of its post, 0 if there is none
                    4, 32     the post's length; BLAKE3 of number and post
                    POST_AT   the post, a MessagePack array; see `Post`. Numbers little-endian
    <random>.wake   a FIFO of that process: a byte says that its post is done, or the turn free

Rules. A post is taken inside of a write transaction, and only while its process lives: then so do
its pins (see `pins`), and what it builds on was not collected. It is written to the store as a
whole; twice does no harm, as it has objects under their ids and nothing else: who sets a ref takes
a turn. A process that is killed leaves a post that nobody takes. One that is killed in
its turn has committed or not; those who wait look for themselves after WAIT seconds at most.
"""

import contextlib
import fcntl
import os
import secrets
import select
import struct
from collections.abc import Callable, Iterator

import msgspec

from engine.host.forks import OfOneProcess
from engine.host.own_files import StrangeFileError, open_own, open_pipe, own_folder
from engine.ids import ChunkId, NodeId, SnapshotId, digest
from engine.storage.objects import NodeBuffer
from engine.storage.store import Db, Store, StoreFullError, Writer

WAIT = 0.02
"""Seconds after which a process looks whose turn it is if nobody says so."""
LONGEST_POST = 256 << 10
"""Who commits more waits for a turn of its own."""
POST_AT = 64
_FOLDERS = ("locks", "commits")
_HEAD = struct.Struct("<QI32s")
_DONE = struct.Struct("<Q")
_WAKE = ".wake"


class Post(msgspec.Struct, array_like=True, frozen=True):
    """What a process adds to the store; `lacking` are chunks that it needs and has found there."""

    chunks: dict[ChunkId, bytes]
    lacking: list[ChunkId]
    nodes: dict[NodeId, bytes]
    snapshots: dict[SnapshotId, bytes]

    def store(self, writer: Writer) -> bool:
        """Stores it; False, and nothing is stored, if a chunk that it needs has gone."""
        if not all(writer.has(Db.CHUNKS, chunk) for chunk in self.lacking):
            return False
        new = [pair for pair in self.chunks.items() if not writer.has(Db.CHUNKS, pair[0])]
        writer.put_many(Db.CHUNKS, sorted(new))
        NodeBuffer(self.nodes).flush(writer)
        for identifier, record in self.snapshots.items():
            writer.put(Db.SNAPSHOTS, identifier, record)
        return True


class GroupCommit(OfOneProcess):
    """One process's part in it. Used by one thread at a time."""

    def __init__(self, store: Store, store_path: str) -> None:
        """Touches no file before the first commit."""
        self._store, self.store_path = store, store_path
        self._directory = os.path.join(store_path, *_FOLDERS)
        self._turn = -1
        self._mine: _Mine | None = None
        self._others: dict[str, _Other] = {}
        self._owned()

    def _inherit(self) -> None:
        turn, self._turn = self._turn, -1
        mine, self._mine = self._mine, None
        others, self._others = self._others, {}
        if turn >= 0:
            os.close(turn)
        if mine is not None:
            mine.let_go()
        for other in others.values():
            other.close()

    def commit(self, change: Callable[[Writer], None], post: Callable[[], Post | None]) -> None:
        """Makes `change` in a transaction of its own or, by what `post` gives, in another's.

        Durable when it returns. `post` is asked for if somebody else has the turn; None: only
        `change` will do. Raises what the store raises; nothing is stored then.
        """
        if self._take(wait=False):
            self._lead(change)
            return
        number = self._post(post())
        mine = self._mine
        if mine is None or not number:
            self._take(wait=True)
            self._lead(change)
            return
        try:
            while not mine.is_done(number):
                if self._take(wait=False):
                    if mine.is_done(number):
                        self._let_go()
                    else:
                        mine.withdraw()
                        self._lead(change)
                    return
                mine.wait()
        except BaseException:
            mine.withdraw()
            raise

    def close(self) -> None:
        """Removes this process's files."""
        if self._mine is not None:
            self._mine.close()
            self._mine = None
        for other in self._others.values():
            other.close()
        self._others = {}
        if self._turn >= 0:
            os.close(self._turn)
            self._turn = -1

    def _take(self, *, wait: bool) -> bool:
        if self._turn < 0:
            own_folder(self.store_path, *_FOLDERS)
            self._turn = _open(self.store_path, "turn", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._turn, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    def _let_go(self) -> None:
        fcntl.flock(self._turn, fcntl.LOCK_UN)

    def _post(self, post: Post | None) -> int:
        """Returns the number of what is posted now, 0 if that is nothing."""
        data = b"" if post is None else msgspec.msgpack.encode(post)
        if not 0 < len(data) <= LONGEST_POST:
            return 0
        try:
            if self._mine is None:
                self._mine = _Mine(self.store_path)
            return self._mine.post(data)
        except OSError:  # a full disk: the store will say so, if it is full for that as well
            return 0

    def _lead(self, change: Callable[[Writer], None]) -> None:
        """Commits with what others have posted. Has the turn, and lets it go."""
        taken: list[tuple[_Other, int]] = []
        others: list[_Other] = []
        try:
            others = list(self._living())

            def together(writer: Writer) -> None:
                taken.clear()
                change(writer)
                for other in others:
                    found = other.posted()
                    if found is not None:
                        taken.append((other, found[0]))
                        if not found[1].store(writer):
                            taken.pop()

            try:
                self._store.write(together)
            except StoreFullError:  # alone there may be room
                if not taken:
                    raise
                taken.clear()
                self._store.write(change)
            for other, number in taken:
                other.settle(number)
        finally:
            self._let_go()
            # Who posts from now on finds the turn free; all others hear of it.
            done = {other for other, _ in taken}
            for other in others:
                if other in done or other.is_waiting():
                    other.wake()

    def _living(self) -> Iterator["_Other"]:
        names = set(os.listdir(self._directory))
        for name in [name for name in self._others if name not in names]:
            self._others.pop(name).close()
        for name in names:
            if name == "turn" or name.endswith(_WAKE):
                continue
            if self._mine is not None and name == self._mine.name:
                continue
            other = self._others.get(name)
            if other is None:
                # It comes or goes right now, or is no process's.
                with contextlib.suppress(OSError, StrangeFileError):
                    other = self._others[name] = _Other(self.store_path, name)
            if other is not None:
                yield other


class _Mine:
    """The files of this process."""

    def __init__(self, store_path: str) -> None:
        self._last = 0
        while True:
            self.name = secrets.token_hex(8)
            self._path = os.path.join(store_path, *_FOLDERS, self.name)
            self._fd = _open(store_path, self.name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # somebody takes it for a dead one's
                os.close(self._fd)
                continue
            if os.fstat(self._fd).st_nlink:
                break
            os.close(self._fd)
        try:
            os.pwrite(self._fd, bytes(POST_AT), 0)
            os.mkfifo(self._path + _WAKE, 0o600)
            self._fifo = open_pipe(self._path + _WAKE)
        except OSError:
            _remove(self._path)
            os.close(self._fd)
            raise
        self._poll = select.poll()
        self._poll.register(self._fifo, select.POLLIN)

    def post(self, data: bytes) -> int:
        self._last += 1
        number = _DONE.pack(self._last)
        os.pwrite(self._fd, data, POST_AT)
        head = _HEAD.pack(self._last, len(data), digest(number + data))
        os.pwrite(self._fd, head, _DONE.size)
        return self._last

    def withdraw(self) -> None:
        os.pwrite(self._fd, bytes(_HEAD.size), _DONE.size)

    def is_done(self, number: int) -> bool:
        return os.pread(self._fd, _DONE.size, 0) == _DONE.pack(number)

    def wait(self) -> None:
        if self._poll.poll(WAIT * 1000):
            with contextlib.suppress(BlockingIOError):
                os.read(self._fifo, 4096)

    def close(self) -> None:
        _remove(self._path)
        self.let_go()

    def let_go(self) -> None:
        os.close(self._fd)
        os.close(self._fifo)


class _Other:
    """The files of another process."""

    def __init__(self, store_path: str, name: str) -> None:
        self._path = os.path.join(store_path, *_FOLDERS, name)
        self._fd = _open(store_path, name, os.O_RDWR)
        try:
            self._fifo = open_pipe(self._path + _WAKE)
        except OSError:
            self._is_dead()  # was killed between the two, as it came or went
            os.close(self._fd)
            raise

    def is_waiting(self) -> bool:
        """Tells whether there is a post that is not done, as far as its head says."""
        head = os.pread(self._fd, _DONE.size + _HEAD.size, 0)
        if len(head) < _DONE.size + _HEAD.size:
            return False
        number = _HEAD.unpack_from(head, _DONE.size)[0]
        return bool(number) and _DONE.unpack_from(head)[0] != number

    def posted(self) -> tuple[int, Post] | None:
        """Returns its post that is to be stored, if it lives and has one; removes a dead one."""
        if self._is_dead() or not self.is_waiting():
            return None
        number, length, checksum = _HEAD.unpack(os.pread(self._fd, _HEAD.size, _DONE.size))
        data = os.pread(self._fd, min(length, LONGEST_POST), POST_AT)
        if len(data) != length or digest(_DONE.pack(number) + data) != checksum:
            return None
        try:
            post = msgspec.msgpack.decode(data, type=Post)
        except msgspec.MsgspecError:  # of another version of this program
            return None
        return number, post

    def _is_dead(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        _remove(self._path)
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return True

    def settle(self, number: int) -> None:
        os.pwrite(self._fd, _DONE.pack(number), 0)

    def wake(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._fifo, b"\0")

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._fifo)


def _open(store_path: str, name: str, flags: int) -> int:
    return open_own(store_path, os.path.join(*_FOLDERS, name), flags)


def _remove(path: str) -> None:
    for each in (path + _WAKE, path):  # where the second is missing, `_Other` finds out
        with contextlib.suppress(FileNotFoundError):
            os.unlink(each)
