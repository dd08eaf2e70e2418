"""Ctrl-C while a transaction waits for the turn to write, which another process has.

LMDB waits for its lock in C and goes on waiting after a signal, so a handler in Python would run
only once the turn comes. A program that would rather end says so by `end_at_once`. A store is
whole whenever its process ends; a library must not end the process of others, so this is not on
by itself.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_asked = False


def end_at_once() -> None:
    """Has SIGINT end this process, as by its default, while it waits for the turn to write."""
    global _asked  # noqa: PLW0603 - as signal handlers are, of the process
    _asked = True


@contextmanager
def waiting() -> Iterator[None]:
    """Encloses what waits in C for the turn to write.

    A handler of the program's own stays: it has to do something first.
    """
    if (
        not _asked
        or threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
