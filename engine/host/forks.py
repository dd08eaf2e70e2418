"""Forks: what belongs to one process, and is not its child's after fork().

A child of fork() has a copy of its parent's memory and shares its open files. So it has objects
that stand for what the kernel, or other processes, know their parent by: an flock, a slot in
LMDB's table of readers, a file that lives as long as its process, a thread. A child that used one
would act as its parent, and one that closed it would take it from its parent.

Such an object derives from `OfOneProcess`. When Python forks, and before anything else runs in the
child, `_inherit` makes the child's copy harmless: descriptors are closed without unlocking, locks
that a thread held which the child does not have are replaced, and whatever must not be used is
replaced by an `Inherited`, which refuses. So nothing has to ask for its process while it works.
"""

import contextlib
import os
import threading
import weakref
from typing import Any, NoReturn

from engine.errors import EngineError


class ForkedError(EngineError):
    """A child of fork() uses what belongs to its parent, process `pid`."""

    def __init__(self, what: str, pid: int) -> None:
        super().__init__(
            f"{what} belongs to process {pid}, which this process was forked from, "
            "and cannot be used here"
        )
        self.what, self.pid = what, pid


class Inherited:
    """Stands in a child for what only its parent may use. Every use raises ForkedError."""

    def __init__(self, what: str, pid: int) -> None:
        self.__dict__["what"], self.__dict__["pid"] = what, pid

    def __getattr__(self, name: str) -> Any:
        raise ForkedError(self.what, self.pid)

    def __enter__(self) -> NoReturn:
        raise ForkedError(self.what, self.pid)

    def __exit__(self, *_: object) -> None:
        """Ends what was begun before the fork."""


_living: "weakref.WeakSet[OfOneProcess]" = weakref.WeakSet()


class OfOneProcess:
    """Base of what belongs to the process that made it; cannot be pickled or copied."""

    def _owned(self) -> None:
        """Makes this object known; called by the process that owns it, once."""
        _living.add(self)

    def _inherit(self) -> None:
        """Makes a child's copy harmless. Called in the child, which has one thread.

        Frees nothing that the parent has: no unlocking, no removing, no telling others.
        """
        raise NotImplementedError

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} belongs to its process and cannot be pickled or copied; "
            "give the other process the store's path, and let it open the store itself"
        )


class ModuleLock(OfOneProcess):
    """A lock of a whole module; free in a child, whoever held it. One thread may nest it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owned()

    def _inherit(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _after_fork() -> None:
    for each in list(_living):
        with contextlib.suppress(OSError):  # a descriptor that somebody else has closed
            each._inherit()


os.register_at_fork(after_in_child=_after_fork)
