"""Pins: trees that open workspaces stand on, known to all processes, lost by a dead holder.

A snapshot may be removed, and garbage collected, while a workspace reads its tree. So each
process with workspaces keeps one file in the store's `locks/pins/`, under an flock for as long
as it lives: lines of 64 hexadecimal digits, each the node id of a root directory. A line that
is given up is written over by the next pin, and blank meanwhile.

Order, which makes it safe without a lock: who opens a tree pins its root first and then looks
whether the snapshot's record is there; a collector reads the pins inside of the write
transaction in which it removes. Then a record that the opener saw was either still there for
the collector, and its tree is kept, or was removed later. A pinned root may be missing in the
store: commits that are not written yet are pinned too, together with what they stand on.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import threading
from collections import deque
from typing import cast

from engine.host.forks import Inherited, OfOneProcess
from engine.host.own_files import open_own, own_folder
from engine.ids import NodeId
from engine.storage.store import StoreFullError

_FOLDERS = ("locks", "pins")
_LINE = 65
_BLANK = b" " * 64 + b"\n"


class Pin:
    """Keeps one root from collection for as long as it is referred to."""

    __slots__ = ("_given_up", "root")

    def __init__(self, root: NodeId, given_up: "deque[NodeId]") -> None:
        self.root, self._given_up = root, given_up

    def __del__(self) -> None:
        self._given_up.append(self.root)  # taking a lock here could wait for its own thread


class Pins(OfOneProcess):
    """The pins of one process on one store. Safe to use from several threads."""

    def __init__(self, store_path: str) -> None:
        """Touches no file before the first pin."""
        self._store_path = store_path
        self._lock = threading.Lock()
        self._given_up: deque[NodeId] = deque()
        self._held: dict[NodeId, list[int]] = {}  # root: line, how many pins
        self._free: list[int] = []
        self._lines = 0
        self._fd = -1
        self._path = ""
        self._pid = os.getpid()
        self._owned()

    def _inherit(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)  # the file stays, and ends with the process that pins
        self._lock = cast("threading.Lock", Inherited("what this pins", self._pid))

    def pin(self, root: NodeId) -> Pin:
        """Pins a root. Costs no system call if it is pinned here already.

        Raises StoreFullError, or OSError where the store's folder cannot be written.
        """
        with self._lock:
            held = self._held.get(root)
            if held is not None:
                held[1] += 1
            else:
                self._let_go()
                line = self._free[-1] if self._free else self._lines
                self._write(line, root.hex().encode() + b"\n")
                if self._free:
                    self._free.pop()
                else:
                    self._lines += 1
                self._held[root] = [line, 1]
        return Pin(root, self._given_up)

    def tidy(self) -> None:
        """Blanks what was given up and not written over yet: a collection follows."""
        with self._lock:
            self._let_go()
            for line in self._free:
                self._write(line, _BLANK)

    def _let_go(self) -> None:
        while self._given_up:
            root = self._given_up.popleft()
            held = self._held[root]
            held[1] -= 1
            if not held[1]:
                del self._held[root]
                self._free.append(held[0])

    def _write(self, line: int, text: bytes) -> None:
        try:
            if self._fd < 0:
                self._open()
            os.pwrite(self._fd, text, line * _LINE)
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise StoreFullError(self._store_path) from error
            raise

    def _open(self) -> None:
        own_folder(self._store_path, *_FOLDERS)
        while True:
            name = os.path.join(*_FOLDERS, secrets.token_hex(8))
            path = os.path.join(self._store_path, name)
            fd = open_own(self._store_path, name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # `live_pins` takes it for a dead one
                os.close(fd)
                continue
            if os.fstat(fd).st_nlink:
                self._fd, self._path = fd, path
                return
            os.close(fd)

    def close(self) -> None:
        """Gives all pins up."""
        if self._fd < 0:
            return
        with self._lock:
            if self._fd >= 0:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._path)
                os.close(self._fd)
                self._fd = -1


def live_pins(store_path: str) -> set[NodeId]:
    """Returns the roots pinned by living processes; removes the files of dead ones.

    May be called inside of a write transaction, and for a collection has to be (see above).
    """
    directory = os.path.join(store_path, *_FOLDERS)
    roots: set[NodeId] = set()
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return roots
    for name in names:
        path = os.path.join(directory, name)
        try:
            fd = open_own(store_path, os.path.join(*_FOLDERS, name), os.O_RDONLY)
        except FileNotFoundError:  # its process ended meanwhile
            continue
        try:
            if not _is_dead(fd, path):
                roots |= _roots(fd)
        finally:
            os.close(fd)
    return roots


def _is_dead(fd: int, path: str) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return True


def _roots(fd: int) -> set[NodeId]:
    roots = set()
    with open(fd, "rb", closefd=False) as file:
        for line in file:
            try:
                root = bytes.fromhex(line.decode().strip())
            except ValueError:  # it is being written: whoever pins now looks for its record later
                continue
            if len(root) == 32:
                roots.add(NodeId(root))
    return roots
