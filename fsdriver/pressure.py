"""Memory pressure: notices that programs wait for memory, and gives back what this one can miss.

The kernel says how long programs have waited for memory (PSI, `some` and its `total` in µs: the
kernel's Documentation/accounting/psi.rst), for the whole machine and, with version 2 of control
groups, for the daemon's own group. A kernel without it is one that never says so.
"""

import contextlib
import ctypes
import gc
import os
import re
from time import monotonic_ns

WAITING = 0.05
"""The share of the time since the last look in which somebody waited that counts as pressure."""

_SYSTEM = "/proc/pressure/memory"
_SOME = re.compile(rb"^some .*\btotal=(\d+)", re.MULTILINE)


def sources() -> list[str]:
    """Returns the files in which the kernel tells of the memory that this process lives in."""
    found = [_SYSTEM]
    with contextlib.suppress(OSError), open("/proc/self/cgroup", encoding="utf-8") as file:
        for line in file:
            number, _, path = line.rstrip("\n").split(":", 2)
            if number == "0":
                found.append(f"/sys/fs/cgroup{path.rstrip('/')}/memory.pressure")
    return [path for path in found if os.access(path, os.R_OK)]


class Pressure:
    """Follows the kernel's word on memory in some files."""

    def __init__(self, paths: list[str]) -> None:
        self._waited = {path: _waited_us(path) for path in paths}
        self._looked_ns = monotonic_ns()

    def is_high(self) -> bool:
        """Tells whether there was pressure since the last time it was asked."""
        passed_us = max((monotonic_ns() - self._looked_ns) // 1000, 1)
        before, self._waited = self._waited, {path: _waited_us(path) for path in self._waited}
        self._looked_ns = monotonic_ns()
        return any(now - before[path] > WAITING * passed_us for path, now in self._waited.items())


def _waited_us(path: str) -> int:
    try:
        with open(path, "rb") as file:
            found = _SOME.search(file.read())
    except OSError:
        return 0
    return int(found[1]) if found else 0


def give_back() -> None:
    """Frees what only cycles keep, and gives free memory back to the kernel as far as that goes.

    Python gives back a mebibyte when nothing in it is used, the C library every page.
    """
    gc.collect()
    with contextlib.suppress(AttributeError):  # not in every C library
        ctypes.CDLL(None).malloc_trim(0)
