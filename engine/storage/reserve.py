"""Room on the disk that is kept for what frees room: a file that nobody reads.

To remove something, LMDB writes a few pages anew before it lets others go. On a disk without a
free block it could not, and the store could never become smaller by its own means. So the file
`db/reserve` holds some blocks; a transaction that frees room, and finds none, gives them up and
runs again. Whoever opens the store then makes the file again once there is room.
"""

import contextlib
import os

RESERVE_BYTES = 256 << 10
"""Some sixty pages: a removal takes about a dozen."""


class Reserve:
    """The reserve of one store."""

    def __init__(self, path: str) -> None:
        self._path = path

    def keep(self) -> None:
        """Makes the reserve if there is none, and there is room. Raises nothing."""
        if os.path.lexists(self._path):
            return
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(self._path, flags, 0o600)
            try:
                os.posix_fallocate(fd, 0, RESERVE_BYTES)
            except OSError:
                os.unlink(self._path)
                raise
            finally:
                os.close(fd)

    def release(self) -> bool:
        """Gives the room up; tells whether there was any."""
        try:
            os.unlink(self._path)
        except OSError:
            return False
        return True
