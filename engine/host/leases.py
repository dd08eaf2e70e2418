"""Leases: who holds a thing right now, known to all processes, lost by a dead holder.

A lease is an flock on a file in the store's `locks/`, so the kernel ends it with its holder,
however that dies. The file's text says who holds it (JSON), for messages only. A child of fork()
holds none: flock(2) would let it keep its parent's, or end it.

    mount           the daemon that serves the store's sessions        exclusive
    objects         those who store objects that nothing refers to yet  shared
                    each batch of a garbage collection                   exclusive
    session-<uid>   whoever writes or reads a session's upper           exclusive
    checkout-<id>   whoever makes, compares, switches or commits one    exclusive
    store           every process that has the store's file open        shared
                    whoever puts a smaller file in its place             exclusive
    gc              garbage collection, compaction, repair              exclusive

Order: mount, then store, then session (several: by uid) or checkout, then gc, then objects; never
the other way round. `store` held alone is only tried for, by who holds `gc`.
"""

import contextlib
import fcntl
import json
import os
import random
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from engine.errors import EngineError
from engine.host.forks import ForkedError, OfOneProcess
from engine.host.own_files import StrangeFileError, open_own, own_folder


class LeaseHeldError(EngineError):
    """Somebody else holds what is needed now. `holder` is what they said of themselves."""

    def __init__(self, what: str, holder: dict[str, Any]) -> None:
        who = (
            f"process {holder['pid']} ({holder.get('what', '?')})"
            if "pid" in holder
            else "another process"
        )
        super().__init__(f"{what} is held by {who}")
        self.what, self.holder = what, holder


class Lease(OfOneProcess):
    """A held lease; ends with `release`, the `with` block, or the process that took it.

    In a child of that process it is over: `release` does nothing, all else raises ForkedError.
    """

    def __init__(self, store_path: str, name: str, fd: int) -> None:
        self._path = os.path.join(store_path, "locks", name)
        self._fd, self._pid = fd, os.getpid()
        self._owned()

    def _inherit(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)  # an flock lasts until every copy of its descriptor is closed

    def check(self) -> None:
        """Raises ForkedError in a process that only inherited it."""
        if self._pid != os.getpid():
            raise ForkedError(f"the lease {os.path.basename(self._path)!r}", self._pid)

    def describe(self, **facts: Any) -> None:
        """Writes who holds it, for others' messages; a full disk only makes these poorer."""
        self.check()
        text = json.dumps({"pid": self._pid, **facts}).encode()
        with contextlib.suppress(OSError):
            # Over what the last holder wrote: its block on the disk, given up, may not come back.
            os.pwrite(self._fd, text.ljust(os.fstat(self._fd).st_size), 0)
            os.ftruncate(self._fd, len(text))

    def fileno(self) -> int:
        """Returns its descriptor: a process that inherits it keeps the lease alive."""
        self.check()
        return self._fd

    def upgrade(self, wait: float) -> bool:
        """Makes a shared lease one held alone; False if others shared it for `wait` seconds.

        It is shared again then. In between others may have taken it to share, or alone: who
        upgrades holds another lease that all who do hold, so that nobody has had it alone.
        """
        self.check()
        until = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                fcntl.flock(self._fd, fcntl.LOCK_SH)  # what was held is lost when it fails
                if time.monotonic() >= until:
                    return False
                time.sleep(0.01)

    def downgrade(self) -> None:
        """Shares a lease that was held alone."""
        self.check()
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    def hand_on(self) -> None:
        """Leaves it to the processes that have inherited it; it ends with the last of them."""
        self.check()
        os.close(self._fd)
        self._fd = -1

    def release(self) -> None:
        """Gives it up; again is harmless."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        if self._pid == os.getpid():
            fcntl.flock(fd, fcntl.LOCK_UN)  # a program just started may have it open too
        os.close(fd)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def acquire(
    store_path: str, name: str, *, shared: bool = False, wait: float = 0.0, what: str = ""
) -> Lease:
    """Takes a lease; waits up to `wait` seconds. Raises LeaseHeldError, StrangeFileError."""
    own_folder(store_path, "locks")
    fd = _open(store_path, name, os.O_RDWR | os.O_CREAT)
    started = time.monotonic()
    while True:
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            passed = time.monotonic() - started
            if passed < wait:
                time.sleep(0.01)
                continue
            asking = _ASKING if name in _SHARED else _ASKING_ALONE
            if passed < wait + asking and not shared and _only_shared(fd):
                time.sleep(0.001 * random.uniform(0.5, 1.5))  # not in step with another
                continue
            os.close(fd)
            raise LeaseHeldError(_PLAIN.get(name, name), holder_of(store_path, name)) from None
        lease = Lease(store_path, name, fd)
        try:
            if not shared:
                lease.describe(what=what)
            elif os.fstat(fd).st_size:
                os.ftruncate(fd, 0)  # what a former holder, alone then, said of itself
        except BaseException:
            lease.release()
            raise
        return lease


def _open(store_path: str, name: str, flags: int) -> int:
    return open_own(store_path, f"locks/{name}", flags)


def _only_shared(fd: int) -> bool:
    """Tells whether those who stand in the way share: `is_held` does, for an instant."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)
    return True


_SHARED = ("objects", "store")
_ASKING, _ASKING_ALONE = 0.2, 5.0
"""Seconds after which somebody who shares a lease is no longer taken for one who only asks.

Asking takes an instant, unless who asks is kept from its processor just then; the leases that
nobody shares but to ask are worth more patience.
"""

_PLAIN = {
    "mount": "the store's mount",
    "objects": "the store's garbage collection",
    "gc": "the store's maintenance",
    "store": "the store's file",
}


def holder_of(store_path: str, name: str) -> dict[str, Any]:
    """Returns what the last holder wrote of itself; empty if nothing readable."""
    try:
        with open(_open(store_path, name, os.O_RDONLY), "rb") as file:
            facts = json.loads(file.read() or b"{}")
    except (OSError, StrangeFileError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def sharers(store_path: str, name: str) -> list[int]:
    """Returns the processes that hold a lease now, as far as the kernel tells; not this one."""
    try:
        number = os.stat(os.path.join(store_path, "locks", name)).st_ino
        with open("/proc/locks", encoding="ascii", errors="replace") as file:
            rows = [line.split() for line in file]
    except OSError:
        return []
    found = {
        int(row[4])
        for row in rows
        if len(row) > 5 and row[1] == "FLOCK" and row[5].rpartition(":")[2] == str(number)
    }
    return sorted(found - {os.getpid()})


@contextlib.contextmanager
def share_unseen(store_path: str, name: str) -> Iterator[None]:
    """Shares a lease for a moment without making or writing a file.

    Raises LeaseHeldError, StrangeFileError, FileNotFoundError where nobody ever held it.
    """
    fd = _open(store_path, name, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LeaseHeldError(_PLAIN.get(name, name), holder_of(store_path, name)) from None
        yield
    finally:
        os.close(fd)


def is_held(store_path: str, name: str) -> bool:
    """Tells whether somebody holds a lease right now. Raises StrangeFileError."""
    try:
        fd = _open(store_path, name, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
