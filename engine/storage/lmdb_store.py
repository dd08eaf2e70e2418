"""The store on disk: one LMDB environment, the only module that imports lmdb.

Layout of a store's directory: `db/data.mdb` and `db/lock.mdb` are LMDB's; `db/reserve` is room
for what frees room (see `reserve`); the database `meta` holds `format` (the store's format,
decimal). Other modules keep `sessions/`, `locks/` and `log/` beside `db/`.

LMDB's transactions are the only atomicity mechanism: a commit is durable when it returns
(LMDB syncs the data, then writes one of two meta pages) and a process killed at any moment
leaves the last committed state. A map that is too small grows and the transaction runs again.
LMDB maps its file, so a file that was cut short would end the process with SIGBUS at the
first touch: the file is made whole with zeros when it is opened, after which what was lost
shows up as corrupt objects instead.
"""

import ctypes
import errno
import mmap
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, TypeVar, cast

import lmdb

from engine.host.forks import ForkedError, Inherited, OfOneProcess
from engine.host.leases import acquire, share_unseen, sharers
from engine.storage.free_pages import NotAsExpectedError, free_runs, punch
from engine.storage.interrupting import waiting
from engine.storage.lmdb_errors import FULL, is_no_room, translated
from engine.storage.metas import BadMetaError, read_metas
from engine.storage.ownership import check_owner
from engine.storage.reserve import Reserve
from engine.storage.store import (
    CompactionRefusedError,
    Db,
    NewerFormatError,
    NotAStoreError,
    Store,
    StoreDamagedError,
    StoreError,
    StoreExistsError,
    StoreFullError,
    StoreMemoryError,
    StoreOpenError,
    StorePermissionError,
    StorePlaceError,
    StoreReadOnlyError,
    StoreStatistics,
)
from engine.storage.structure import check

T = TypeVar("T")

FORMAT = 3
"""The format this program writes; 1 and 2 are brought up to it. 2 has the database `episodes`, 3
has owners in entries, and sessions that remember what they were made of. In 1 large directories are
cut otherwise; pages are cut anew where they change."""

LIBRARY = 0
"""LMDB 0.9: the line whose files every distribution's tools read (1.0's differ)."""

FIRST_MAP_BYTES = 64 << 30
"""Address space reserved at first; costs no memory and no disk."""

LOCK_BYTES = 64 << 10
"""The size of LMDB's lock file: 1022 readers."""

OPEN_WAIT = 30.0
"""Seconds that opening waits while another process puts a compacted file in place."""

LEAST_ROOM = 16 << 20
"""Bytes that a map has beyond the file, where the address space is limited."""

CLOSE_WAIT = 10.0
"""Seconds that closing waits for views in other threads, longer than any that comes to an end."""

_MOMENT = 0.25
"""Seconds for which a compaction keeps readers here from beginning, and others from opening."""

_PAUSE = 0.05
"""Seconds in which they can, before it tries again."""

_COPIES = 3
_LEASES = ("store", "objects", "gc", "mount")
_PARTS = {"db", "sessions", "locks", "log"}


class _Databases(dict[Db, "lmdb._Database"]):
    """The handles of the databases. In a child of fork() there are none."""

    inherited: tuple[str, int] | None = None
    """The store and its process, in a child."""

    def __missing__(self, db: Db) -> "lmdb._Database":
        if self.inherited is not None:
            raise ForkedError(*self.inherited)
        raise KeyError(db)


class _InheritedEnvironment(Inherited):
    def close(self) -> None:
        """Leaves the parent's alone."""


class _LmdbTransaction:
    __slots__ = ("_dbs", "_txn")

    def __init__(self, txn: "lmdb.Transaction[memoryview]", dbs: _Databases):
        self._txn, self._dbs = txn, dbs

    def get(self, db: Db, key: bytes) -> memoryview | None:
        return self._txn.get(key, None, self._dbs[db])

    def has(self, db: Db, key: bytes) -> bool:
        return self._txn.get(key, None, self._dbs[db]) is not None

    def items(self, db: Db, start: bytes = b"") -> Iterator[tuple[bytes, memoryview]]:
        with self._txn.cursor(self._dbs[db]) as cursor:
            if cursor.set_range(start) if start else cursor.first():
                for key, value in cursor.iternext():
                    yield bytes(key), value

    def keys(self, db: Db, start: bytes = b"") -> Iterator[bytes]:
        with self._txn.cursor(self._dbs[db]) as cursor:
            if cursor.set_range(start) if start else cursor.first():
                for key in cursor.iternext(keys=True, values=False):
                    yield bytes(key)

    def last(self, db: Db, below: bytes) -> bytes | None:
        with self._txn.cursor(self._dbs[db]) as cursor:
            found = cursor.prev() if cursor.set_range(below) else cursor.last()
            return bytes(cursor.key()) if found else None

    def count(self, db: Db) -> int:
        return self._txn.stat(self._dbs[db])["entries"]

    def number(self) -> int:
        return self._txn.id()

    def put(self, db: Db, key: bytes, value: bytes) -> None:
        self._txn.put(key, value, db=self._dbs[db])

    def put_many(self, db: Db, pairs: list[tuple[bytes, bytes]]) -> None:
        with self._txn.cursor(self._dbs[db]) as cursor:
            cursor.putmulti(pairs)

    def delete(self, db: Db, key: bytes) -> bool:
        return self._txn.delete(key, db=self._dbs[db])


class _Reads:
    """How many views a thread has open, and the transaction of the first."""

    __slots__ = ("count", "outer")

    def __init__(self) -> None:
        self.count = 0
        self.outer: lmdb.Transaction[memoryview]


class _View:
    """A view of a store, as a context. Not a generator's: every miss of a cache opens one.

    Another thread may end it: a generator that has one may be closed wherever it is.
    """

    __slots__ = ("_is_outer", "_reads", "_store", "_txn")

    def __init__(self, store: "LmdbStore") -> None:
        self._store = store

    def __enter__(self) -> _LmdbTransaction:
        store = self._store
        self._reads = store._begin_reading()
        try:
            self._txn, self._is_outer = store._begin_view(self._reads)
        except BaseException as error:
            store._end_reading(self._reads)
            if isinstance(error, lmdb.Error):
                with translated(store.path):
                    raise
            raise
        return _LmdbTransaction(self._txn, store._dbs)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        try:
            if not self._is_outer and not self._store._is_inherited:
                self._txn.abort()  # in a child it would free the parent's slot
        finally:
            self._store._end_reading(self._reads)
        if isinstance(error, lmdb.Error):
            with translated(self._store.path):
                raise error


class LmdbStore(Store, OfOneProcess):
    """One LMDB environment. A process opens a given store once.

    A child of fork() opens its own; this one raises ForkedError there, but for `close`.
    """

    _is_inherited = False

    def __init__(
        self,
        path: str,
        *,
        create: bool = False,
        map_bytes: int = FIRST_MAP_BYTES,
        trusted: bool = False,
    ):
        """Opens the store at `path`, or makes one there with `create`.

        Raises what `check_owner` does, NotAStoreError, StoreExistsError, NewerFormatError,
        StorePermissionError, StoreDamagedError or StoreFullError.
        """
        self.path = path
        self._env: lmdb.Environment
        self._dbs: _Databases
        self._gate = threading.Condition()
        self._readers = 0
        self._growing = self._closing = False
        self._writer = threading.Lock()
        self._reserve = Reserve(os.path.join(path, "db", "reserve"))
        self._thread = threading.local()
        directory = os.path.join(path, "db")
        data = self._data = os.path.join(os.path.realpath(directory), "data.mdb")
        try:
            check_owner(path, trusted=trusted)
            if create:
                _prepare(path)
            size = 0 if create and not os.path.exists(data) else os.stat(data).st_size
            _reserve_lock(os.path.join(directory, "lock.mdb"))
            self._lease = acquire(path, "store", shared=True, wait=OPEN_WAIT)
            try:
                if size:
                    _check_metas(path, data)
                self._open(max(map_bytes, 2 * size), create, readonly=not create)
                with translated(path):
                    self._check_format(create)
                    self._env.reader_check()
                self._reserve.keep()
            except BaseException:
                if "_env" in vars(self):  # else the store could not be opened here again
                    self._env.close()
                self._lease.release()
                raise
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotAStoreError(path) from error
        except PermissionError as error:
            if create and not os.path.exists(data):
                raise StorePlaceError(path, _existing(path)) from error
            raise StorePermissionError(path, str(error)) from error
        except OSError as error:
            if error.errno in FULL:
                raise StoreFullError(path) from error
            if error.errno == errno.EROFS:
                raise StoreReadOnlyError(path) from error
            raise
        except lmdb.NotFoundError as error:
            raise _without_databases(path) from error
        self._pid = os.getpid()
        self._owned()

    def _inherit(self) -> None:
        what = self._what()
        self._is_inherited = True
        self._gate, self._writer = threading.Condition(), threading.Lock()
        self._readers, self._growing = 0, False
        self._thread = threading.local()
        self._dbs.clear()
        self._dbs.inherited = what, self._pid
        # What nobody refers to any more the library forgets, and leaves its parent's table alone.
        self._env = cast("lmdb.Environment", _InheritedEnvironment(what, self._pid))

    def _what(self) -> str:
        return f"the store opened at {self.path}"

    def _open(self, map_bytes: int, create: bool, *, readonly: bool) -> None:
        """Opens LMDB's environment.

        With `readonly` nobody who writes is waited for, as the library's `open_db` does otherwise:
        it takes the writer's lock. The first write opens it anew.
        """
        with translated(self.path), nullcontext() if readonly else waiting():
            try:
                self._env = _environment(
                    self.path, map_bytes, max_readers=LOCK_BYTES // 64 - 2, mode=0o600,
                    create=create, readonly=readonly,
                )  # fmt: skip
            except lmdb.Error as error:
                if "already open in this process" in str(error):  # it has no class of its own
                    raise StoreOpenError(self.path) from error
                raise
            self._readonly = readonly
            self._make_whole(self._data)
            # What a later format lacks or adds is not looked at before its number.
            self._dbs = _Databases({Db.META: self._env.open_db(b"meta", create=create)})

    def _make_whole(self, data: str) -> None:
        info, page = self._env.info(), self._env.stat()["psize"]
        wanted = (info["last_pgno"] + 1) * page
        if os.stat(data).st_size < wanted:
            os.truncate(data, wanted)

    def _check_format(self, create: bool) -> None:
        """Opens the databases of the format; makes those that a new or older store lacks."""
        with self.read() as txn:
            raw = txn.get(Db.META, b"format")
            found = bytes(raw) if raw is not None else b"0" if create else b""
        if not found.isdigit():
            self.close()
            raise _without_databases(self.path)
        if int(found) > FORMAT:
            self.close()
            raise NewerFormatError(self.path, int(found), FORMAT)
        if create and int(found):
            self.close()
            raise StoreExistsError(self.path, "there is a store already")
        if int(found) < FORMAT:
            self.write(self._bring_up)
        self._open_databases()

    def _open_databases(self) -> None:
        for db in Db:
            if db not in self._dbs:
                self._dbs[db] = self._env.open_db(db.value.encode(), create=False)

    def _bring_up(self, txn: _LmdbTransaction) -> None:
        """Makes the databases that are missing and sets the format, at once or not at all.

        A program of the older format that has the store open goes on and sees none of it; one
        that opens it from now on refuses.
        """
        raw = txn.get(Db.META, b"format")
        if raw is not None and int(bytes(raw)) >= FORMAT:
            return  # another process has done it since we looked
        for db in Db:
            self._env.open_db(db.value.encode(), txn=txn._txn, create=True)
        txn.put(Db.META, b"format", str(FORMAT).encode())

    def _make_writable(self) -> None:
        """Opens the environment anew to write; waits for whoever is writing."""
        with self._writer, self._alone():
            if self._readonly:
                info, opened = self._env.info(), len(self._dbs)
                self._env.close()
                try:
                    self._open(info["map_size"], False, readonly=False)
                except BaseException:
                    with suppress(StoreError, OSError):  # so that it can be read on
                        self._open(info["map_size"], False, readonly=True)
                        self._open_databases()
                    raise
                if opened > 1:  # else it is of an older format, and lacks some
                    self._open_databases()

    def read(self) -> _View:
        return _View(self)

    def _mine(self) -> _Reads:
        """Returns what this thread reads."""
        try:
            reads: _Reads = self._thread.reads
        except AttributeError:
            reads = self._thread.reads = _Reads()
        return reads

    def _begin_reading(self) -> _Reads:
        """Waits until the map does not grow; counts one more view of this thread."""
        reads = self._mine()
        with self._gate:
            while self._growing and not reads.count:  # whoever holds one already is waited for
                self._gate.wait()
            self._readers += 1
            reads.count += 1
        return reads

    def _begin_view(self, reads: _Reads) -> "tuple[lmdb.Transaction[memoryview], bool]":
        """Begins a transaction, or gives this thread's outer one; tells if it is that."""
        try:
            txn = self._env.begin(buffers=True)
        except lmdb.MapResizedError:
            # The map cannot grow under this thread's own outer view, which serves here.
            if reads.count > 1:
                return reads.outer, True
            txn = self._adopt_map_and_begin()
        if reads.count == 1:
            reads.outer = txn
        return txn, False

    def _end_reading(self, reads: _Reads) -> None:
        with self._gate:
            reads.count -= 1
            self._readers -= 1
            if self._growing or self._closing:  # else nobody waits
                self._gate.notify_all()

    def _adopt_map_and_begin(self) -> "lmdb.Transaction[memoryview]":
        """Another process has grown the map: takes its size over, without other readers."""
        with self._gate:
            self._readers -= 1
            self._gate.notify_all()  # another thread may be waiting to do the same
        try:
            self._resize(0)
        finally:
            with self._gate:
                self._readers += 1
        return self._env.begin(buffers=True)

    @contextmanager
    def _alone(self, wait: float | None = None) -> Iterator[bool]:
        """Waits until no transaction is open here, and lets none begin meanwhile.

        Gives False, having kept nobody any longer, if one is open still after `wait` seconds.
        """
        with self._gate:
            while self._growing:
                self._gate.wait()
            self._growing = True
            try:
                yield self._gate.wait_for(lambda: not self._readers, wait)
            finally:
                self._growing = False
                self._gate.notify_all()

    def _resize(self, map_bytes: int) -> None:
        """Sets the map's size (0: what the file says), or less where less is enough.

        Raises StoreMemoryError before it touches the map, which LMDB would lose if it could not
        map it again.
        """
        with self._alone(), open(self._data, "rb") as file:
            now = self._env.info()["map_size"]
            size = os.fstat(file.fileno()).st_size
            wanted = map_bytes or read_metas(file.fileno()).newer.map_bytes
            for bytes_ in (wanted, now + now // 2, now + now // 4, size + LEAST_ROOM):
                if bytes_ > max(now, size) and _has_address_space(bytes_ - now):
                    self._env.set_mapsize(bytes_ if bytes_ != wanted else map_bytes)
                    return
            if not _has_address_space(wanted - now):
                raise StoreMemoryError(self.path, f"{wanted >> 20} MiB of address space")
            self._env.set_mapsize(map_bytes)

    @contextmanager
    def turn(self) -> Iterator[None]:
        if self._readonly:
            self._make_writable()
        self._writer.acquire()
        self._thread.turn = True
        try:
            try:
                with translated(self.path), waiting():
                    self._thread.begun = self._env.begin(write=True, buffers=True)
            except lmdb.MapResizedError:
                pass  # the first write sees to it
            yield
        finally:
            self.give_turn()

    def give_turn(self) -> None:
        if getattr(self._thread, "turn", False):
            begun, self._thread.begun = getattr(self._thread, "begun", None), None
            if begun is not None and not self._is_inherited:
                begun.abort()
            self._thread.turn = False
            self._writer.release()

    def _begin_writing(self) -> "lmdb.Transaction[memoryview]":
        """Begins a transaction, or gives the one that this thread's `turn` has begun."""
        begun: lmdb.Transaction[memoryview] | None = getattr(self._thread, "begun", None)
        self._thread.begun = None
        if begun is not None:
            return begun
        with waiting():
            return self._env.begin(write=True, buffers=True)

    def write(self, change: Callable[[_LmdbTransaction], T], *, frees: bool = False) -> T:
        try:
            try:
                return self._write(change)
            except StoreFullError:
                if not (frees and self._reserve.release()):
                    raise
                return self._write(change)
        except StoreFullError as error:
            facts = self.statistics()
            free = max(0, facts.file_bytes - facts.used_bytes)
            raise StoreFullError(self.path, free) from error

    def _write(self, change: Callable[[_LmdbTransaction], T]) -> T:
        if self._mine().count:
            raise RuntimeError("a write inside a read could wait for itself when the map grows")
        if self._readonly:
            self._make_writable()
        with nullcontext() if getattr(self._thread, "turn", False) else self._writer:
            while True:
                try:
                    with translated(self.path), self._begin_writing() as txn:
                        result = change(_LmdbTransaction(txn, self._dbs))
                        if self._is_inherited:  # `change` forked, and this is the child
                            raise ForkedError(self._what(), self._pid)
                        return result
                except lmdb.MapFullError:
                    self._resize(2 * self._env.info()["map_size"])
                except lmdb.MapResizedError:
                    self._resize(0)

    def transaction_id(self) -> int:
        with self._gate:
            return self._env.info()["last_txnid"]

    def statistics(self) -> StoreStatistics:
        with self.read() as txn:
            info, page = self._env.info(), self._env.stat()["psize"]
            counts = {db.value: txn.count(db) for db in Db}
            stats = [txn._txn.stat(handle) for handle in self._dbs.values()]
        pages = sum(s["branch_pages"] + s["leaf_pages"] + s["overflow_pages"] for s in stats)
        status = os.stat(os.path.join(self.path, "db", "data.mdb"))
        size = min(status.st_size, status.st_blocks * 512)  # it may have holes
        return StoreStatistics(size, pages * page, info["map_size"], counts)

    def flaws(self) -> list[str]:
        with self.read(), open(self._data, "rb") as file:  # the view keeps its pages from change
            return [str(flaw) for flaw in check(file.fileno()).flaws]

    def trim(self) -> None:
        """Unmaps the file's pages from this process; the kernel's cache keeps them.

        A page counts as this process's memory once it was read through the map, and the kernel
        maps sixteen at a time, so a large import would seem to use as much as it stored.
        """
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            ours = [line for line in maps if line.rstrip("\n").endswith(self._data)]
        libc = ctypes.CDLL(None, use_errno=True)
        for line in ours:
            start, end = (int(part, 16) for part in line.split(None, 1)[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 4)  # MADV_DONTNEED

    def compact(self, wait: float = 0.0) -> None:
        """Copies what is in use to `db/new/data.mdb`, which takes the file's place by a rename.

        The copy is of one transaction, made while others go on. The change takes a moment: readers
        here wait, no other process has the file open (the lease `store`), and the last
        transaction is still the one that was copied. Killed at any moment, one whole file has
        the name; what else there is, the next compaction removes. Without room for a copy, free
        pages are given back where they lie.
        """
        if self._mine().count:
            raise RuntimeError("a compaction inside a read would wait for itself")
        home = os.path.join(os.path.dirname(self._data), "new")
        for _ in range(_COPIES):
            copied = self.transaction_id()
            try:
                self._copy(home)
                if self._take_over(home, copied, wait):
                    return
            except StoreFullError:
                if self._give_back() is None:
                    raise
                return
            finally:
                shutil.rmtree(home, ignore_errors=True)
        raise CompactionRefusedError(self.path, "it is written to all the time")

    def _copy(self, home: str) -> None:
        shutil.rmtree(home, ignore_errors=True)
        facts = self.statistics()
        disk = os.statvfs(os.path.dirname(self._data))
        if disk.f_bavail * disk.f_frsize < facts.used_bytes * 1.05 + (1 << 20):
            raise StoreFullError(self.path)
        try:
            os.mkdir(home, 0o700)
            with self._gate:
                while self._growing:
                    self._gate.wait()
                self._readers += 1  # nobody may change the map under the copy
            try:
                with translated(self.path):
                    self._env.copy(home, compact=True)
            finally:
                with self._gate:
                    self._readers -= 1
                    self._gate.notify_all()
            path = os.path.join(home, "data.mdb")
            os.chmod(path, 0o600)
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno in FULL:
                raise StoreFullError(self.path) from error
            raise

    def _give_back(self) -> int | None:
        """Makes holes of the free pages that LMDB could write over now.

        Returns their bytes; None where the file system has no holes, or the file is not as it
        should be. No writer is let in meanwhile, in any process; readers who begin see the last
        transaction.
        """
        done = 0
        if self._readonly:
            self._make_writable()
        with self._writer, translated(self.path):
            try:
                with waiting():
                    txn = self._env.begin(write=True)
            except lmdb.MapResizedError:
                self._resize(0)
                with waiting():
                    txn = self._env.begin(write=True)
            try:
                info, main = self._env.info(), self._env.stat()
                stats = [main, *(txn.stat(handle) for handle in self._dbs.values())]
                used = sum(s["branch_pages"] + s["leaf_pages"] + s["overflow_pages"] for s in stats)
                last, page = info["last_txnid"], main["psize"]
                fd = os.open(self._data, os.O_RDWR | os.O_CLOEXEC)
                try:
                    before = min([last, *self._seen_by_readers()])
                    for run in free_runs(fd, page, last, before, used):
                        if not punch(fd, run.start * page, len(run) * page):
                            return None
                        done += len(run) * page
                finally:
                    os.close(fd)
            except NotAsExpectedError:
                return None
            finally:
                txn.abort()
        return done

    def _seen_by_readers(self) -> list[int]:
        """Returns the numbers of the transactions that somebody has a view of, in any process."""
        self._env.reader_check()
        rows = [line.split() for line in self._env.readers().splitlines()[1:]]
        return [int(row[2]) for row in rows if len(row) == 3 and row[2] != "-"]

    def _take_over(self, home: str, copied: int, wait: float) -> bool:
        """Puts a copy of transaction `copied` in place; False if there has been another.

        Who wants to open or read the store waits meanwhile: so whoever has it open or reads is
        waited for with that door shut for a moment only, again and again, up to `wait` seconds.
        """
        until = time.monotonic() + wait
        while True:
            if not self._lease.upgrade(max(0.0, until - time.monotonic())):
                who = ", ".join(f"process {pid} ({_name_of(pid)})" for pid in
                                sharers(self.path, "store")) or "another process"  # fmt: skip
                raise CompactionRefusedError(self.path, f"{who} has it open")
            # The old file's room is given back when it is closed, which takes long if it is large.
            old = os.open(self._data, os.O_RDONLY | os.O_CLOEXEC)
            try:
                done = self._put_in_place(os.path.join(home, "data.mdb"), copied)
            finally:
                self._lease.downgrade()
                os.close(old)
            if done is not None:
                return done
            if time.monotonic() >= until:
                raise CompactionRefusedError(self.path, "this process reads it all the time")
            time.sleep(_PAUSE)

    def _put_in_place(self, new: str, copied: int) -> bool | None:
        """Does so, and returns True; False if the copy is old, None if somebody here was busy."""
        if not self._writer.acquire(timeout=_MOMENT):
            return None
        try:
            done = self._exchange(new, copied)
            if done:
                # Readers go on; but nothing may be committed to the new file before its name
                # is durable, for the old one would come back after a power cut.
                _sync_directory(os.path.dirname(self._data))
            return done
        finally:
            self._writer.release()

    def _exchange(self, new: str, copied: int) -> bool | None:
        with self._alone(_MOMENT) as alone:
            if not alone:
                return None
            info = self._env.info()
            if info["last_txnid"] != copied:
                return False
            self._env.close()
            try:
                os.rename(new, self._data)
            finally:
                self._open(info["map_size"], False, readonly=self._readonly)
                self._open_databases()
            return True

    def close(self) -> None:
        with self._writer:  # another thread's transaction comes to its end
            ours = self._mine().count
            with self._gate:  # and so do their views: what they read would be gone from memory
                self._closing = True
                self._gate.wait_for(lambda: self._readers <= ours, CLOSE_WAIT)
            self._env.close()
        self._lease.release()


def _forget_environments() -> None:
    """Lets a child open what its parent has open, which the library refuses of one process.

    It knows an environment by the keys that this function gives, and a child inherits the list;
    there they now differ.
    """
    module: Any = getattr(lmdb, "_envid", None)  # without it, what it opened last stands in the way
    if module is not None:
        known, pid = module.env_keys, os.getpid()
        module.env_keys = lambda path, subdir: tuple((pid, *key) for key in known(path, subdir))


os.register_at_fork(after_in_child=_forget_environments)


def _name_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "?"


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _existing(path: str) -> str:
    """Returns the path, or the nearest directory above it that there is."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def _prepare(path: str) -> None:
    """Makes the directories of a new store; refuses a folder that holds something else."""
    if os.path.lexists(path) and not os.path.isdir(path):
        raise StoreExistsError(path, "it is not a directory")
    if os.path.isdir(path):
        strange = set(os.listdir(path)) - _PARTS
        if strange:
            raise StoreExistsError(path, f"the directory holds {min(strange)!r}")
    os.makedirs(path, mode=0o700, exist_ok=True)
    for name in sorted(_PARTS):
        # What a session holds may be more readable than its owner would want others to read.
        os.makedirs(os.path.join(path, name), mode=0o700, exist_ok=True)
    for name in _LEASES:  # so that nobody needs an inode to remove something
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(os.path.join(path, "locks", name), flags, 0o600))


@contextmanager
def look(path: str, *, trusted: bool = False) -> Iterator[_LmdbTransaction]:
    """Gives a view of a store without opening it for use: writes nothing, waits for nobody.

    For a glance by a process that has not opened it. No format is brought up and no file made
    whole or anew. LMDB's table of readers has one more entry meanwhile. Raises LeaseHeldError
    while a compacted file is put in place, what `check_owner` does, a StoreError for a store of
    another format, one that is damaged, or was never opened where it is now.
    """
    directory = os.path.join(path, "db")
    data = os.path.join(directory, "data.mdb")
    try:
        check_owner(path, trusted=trusted)
        size = os.stat(data).st_size
        os.stat(os.path.join(directory, "lock.mdb"))  # else LMDB would make it
        with share_unseen(path, "store"), translated(path):
            _check_metas(path, data)
            env = _environment(path, max(FIRST_MAP_BYTES, 2 * size), readonly=True, create=False)
            try:
                if os.stat(data).st_size < (env.info()["last_pgno"] + 1) * env.stat()["psize"]:
                    raise StoreDamagedError(path, "its file was cut short")
                dbs = _Databases({Db.META: env.open_db(b"meta", create=False)})
                with env.begin(buffers=True) as txn:
                    raw = txn.get(b"format", None, dbs[Db.META])
                    found = bytes(raw) if raw is not None else b""
                if not found.isdigit():
                    raise _without_databases(path)
                if int(found) < FORMAT:
                    raise NotAStoreError(path)
                if int(found) > FORMAT:
                    raise NewerFormatError(path, int(found), FORMAT)
                dbs.update({db: env.open_db(db.value.encode(), create=False) for db in Db})
                with env.begin(buffers=True) as txn:
                    yield _LmdbTransaction(txn, dbs)
            finally:
                env.close()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotAStoreError(path) from error
    except lmdb.NotFoundError as error:
        raise _without_databases(path) from error
    except PermissionError as error:
        raise StorePermissionError(path, str(error)) from error


def _environment(path: str, map_bytes: int, **settings: Any) -> lmdb.Environment:
    """Opens LMDB's environment, with a smaller map where the address space is too small for it."""
    directory = os.path.join(path, "db")
    data = os.path.join(directory, "data.mdb")
    least = (os.stat(data).st_size if os.path.exists(data) else 0) + LEAST_ROOM
    while True:
        try:
            return lmdb.Environment(
                directory, map_size=map_bytes, max_dbs=len(Db), readahead=False,
                lib_version=LIBRARY, **settings,
            )  # fmt: skip
        except lmdb.Error as error:
            if not is_no_room(error) or map_bytes <= least:
                raise
            map_bytes = max(map_bytes // 2, least)


def _has_address_space(size: int) -> bool:
    if size <= 0:
        return True
    try:
        mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ).close()
    except OSError:
        return False
    return True


def _without_databases(path: str) -> StoreError:
    """Returns what is wrong where a file of LMDB's lacks what every store has."""
    with open(os.path.join(path, "db", "data.mdb"), "rb") as file:
        written = read_metas(file.fileno()).newer.transaction
    if written and all(os.path.isdir(os.path.join(path, part)) for part in _PARTS):
        return StoreDamagedError(path, "a database or the number of its format is missing")
    return NotAStoreError(path)


def _check_metas(path: str, data: str) -> None:
    """Raises StoreDamagedError if the two pages that all else hangs on cannot be right.

    LMDB would fail in odd ways, or take an older state for the last one. Some 30 µs.
    """
    fd = os.open(data, os.O_RDONLY | os.O_CLOEXEC)
    try:
        read_metas(fd)
    except BadMetaError as error:
        raise StoreDamagedError(path, str(error)) from None
    finally:
        os.close(fd)


def _reserve_lock(path: str) -> None:
    """Makes LMDB's lock file, which it would make sparse and map: SIGBUS on a full disk.

    One that is there is not touched: closing it would end locks that this process has on it.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return
    try:
        os.posix_fallocate(fd, 0, LOCK_BYTES)
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(fd)
