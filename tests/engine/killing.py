"""Ends what the engine does before its n-th change of the disk, or makes that change fail.

Python audits the calls that change files (sys.addaudithook), and a hook may refuse one. From
then on every further one is refused too, so no clean-up runs, as none runs after kill -9.
An LMDB transaction that is left by an exception is as far as one whose process was killed.
"""

import os
import sys
from typing import Any

EVENTS = {
    "os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.truncate",
    "os.utime", "os.chmod", "os.chown", "os.setxattr", "os.removexattr",
}  # fmt: skip


class Killed(BaseException):
    """What the engine's process would not live to see."""


class Killer:
    """Counts changes while armed, and refuses them all from the n-th on, or only that one."""

    def __init__(self) -> None:
        self.armed = False
        self.left = 0
        self.error: int | None = None
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event in EVENTS or (event == "open" and makes(arguments)):
            if not self.left and self.error is not None:
                self.armed = False
                raise OSError(self.error, os.strerror(self.error))
            if not self.left:
                raise Killed(event)
            self.left -= 1

    def arm(self, after: int, error: int | None = None) -> None:
        """Refuses what comes after so many changes; with `error`, an errno, one fails."""
        self.armed, self.left, self.error = True, after, error

    def disarm(self) -> None:
        self.armed = False


def makes(arguments: tuple[Any, ...]) -> bool:
    return isinstance(arguments[2], int) and bool(arguments[2] & os.O_CREAT)


KILLER = Killer()
"""One for all: a hook stays for as long as the process lives."""
