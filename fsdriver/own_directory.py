"""A directory where a store's trees are shown while nobody has it mounted.

The same for a store and a user whenever that is possible: a build may have written down where
it was. What killed daemons have left mounted, there or elsewhere, is unmounted first.
Several runs may use it at once, each with a mount of its own there that only it sees.
Removing it would end those (since Linux 3.18), so whoever uses it shares a lock on it, and only
who has that alone removes it.
"""

import contextlib
import fcntl
import os
import stat
import tempfile

from engine.ids import digest
from fsdriver.mountpoint import clear_dead, mounts

_PREFIX = "amalgamfs-"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class OwnDirectory:
    """A directory that is ours, empty, and used by this process; `leave` it in the end."""

    def __init__(self, path: str, fd: int) -> None:
        self.path, self._fd, self._pid = path, fd, os.getpid()

    def fileno(self) -> int:
        """Returns its descriptor: a process that inherits it uses the directory, too."""
        return self._fd

    def leave(self) -> None:
        """Uses it no more, and removes it unless somebody else does."""
        if self._pid == os.getpid():  # a child of fork() shares the lock, and would take it over
            _remove(self.path, self._fd)
        self.hand_on()

    def hand_on(self) -> None:
        """Leaves it to the processes that have inherited it."""
        os.close(self._fd)


def take_own_directory(store: str) -> OwnDirectory:
    """Makes the directory for a store, or another one should that be somebody's. Raises OSError."""
    name = digest(os.fsencode(os.path.realpath(store)))[:6].hex()
    path = os.path.join(tempfile.gettempdir(), f"{_PREFIX}{os.geteuid()}-{name}")
    tidy(store)
    with contextlib.suppress(OSError):  # it is somebody else's
        for _ in range(3):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
            found = _take(path)
            if found is not None:
                return found
    path = tempfile.mkdtemp(prefix=_PREFIX)
    found = _take(path)
    if found is None:
        raise FileNotFoundError(path)
    return found


def tidy(store: str) -> list[str]:
    """Removes what killed runs and daemons of a store have left mounted; returns where that was."""
    cleared = clear_dead(store)
    for path in cleared:
        _remove_if_own(path)
    return cleared


def _remove_if_own(path: str) -> None:
    if os.path.basename(path).startswith(_PREFIX) and path.startswith(tempfile.gettempdir()):
        remove_own_directory(path)


def _take(path: str) -> OwnDirectory | None:
    """Uses a directory if it is private, empty, ours, and still there when we have it.

    One that is mounted on is asked for nothing: whoever serves that may hang.
    """
    if any(mount.path == os.path.realpath(os.path.dirname(path)) + os.sep + os.path.basename(path)
           for mount in mounts()):  # fmt: skip
        return None
    fd = os.open(path, _DIRECTORY)
    status = os.fstat(fd)
    ours = status.st_uid == os.geteuid() and not stat.S_IMODE(status.st_mode) & 0o077
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if ours and not os.listdir(fd) and os.path.samestat(os.lstat(path), status):
            return OwnDirectory(path, fd)
    except OSError:
        pass  # somebody is just removing it
    os.close(fd)
    return None


def remove_own_directory(path: str) -> None:
    """Removes such a directory, which nothing is mounted on any more, unless it is used."""
    with contextlib.suppress(OSError):
        fd = os.open(path, _DIRECTORY)
        try:
            _remove(path, fd)
        finally:
            os.close(fd)


def _remove(path: str, fd: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rmdir(path)
