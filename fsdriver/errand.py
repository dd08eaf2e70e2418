"""The errand: a process that asks a mount for something, so that who sends it need not.

A path that leads into a mount is a request to the mount's daemon, and a request may wait for
ever: where the daemon has been stopped, or is who asks. A thread that waits so keeps its whole
process, and not even kill -9 ends it once the daemon has taken the request. So nobody here asks
a mount that may not answer: they send an errand, wait for it as long as they like, and leave it.
It has nothing open of the mount, and ends with the mount's connection.

`python -I -S errand.py mount|umount|statvfs ...`: one call of the system; the exit status is the
errno, 0 for done. Needs nothing but the standard library, and takes 20 ms.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

PATIENCE = 10.0
"""Seconds in which a daemon that serves has answered an errand, also on a busy machine."""

_MNT_DETACH = 2
_KILLED_SECONDS = 0.2
_PIECE = 65536


class Errand:
    """A process that was sent. Whoever sent it waits, or waits for `fileno`, then asks `done`."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        pass_fds: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Starts it. Raises OSError."""
        said = os.memfd_create("said", os.MFD_CLOEXEC)
        try:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                pass_fds=tuple(pass_fds), env=env, cwd="/",
            )  # fmt: skip
        except BaseException:
            os.close(said)
            raise
        self._said = said
        self._ended = os.pidfd_open(self._process.pid)

    def fileno(self) -> int:
        """Returns a descriptor that can be read once the process has ended."""
        return self._ended

    def wait(self, seconds: float = PATIENCE) -> bool:
        """Waits until it has ended; False if it has not after `seconds`."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def done(self) -> tuple[int, str]:
        """Returns the exit status of a process that has ended, and what it said."""
        return self._process.wait(), os.pread(self._said, _PIECE, 0).decode(errors="replace")

    def leave(self) -> None:
        """Kills it if need be, and waits no longer than an instant: it may wait in the kernel."""
        if self._process.poll() is None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_KILLED_SECONDS)
            if self._process.returncode is None:
                self._process.returncode = -signal.SIGKILL  # nobody waits for it
        os.close(self._ended)
        os.close(self._said)

    def __enter__(self) -> "Errand":
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()


def call(*words: str) -> list[str]:
    """Returns the command of an errand: what `main` takes."""
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), *words]


def main(argv: list[str]) -> int:
    """Does one errand; returns an errno, or 0."""
    name, *words = argv
    libc = ctypes.CDLL(None, use_errno=True)
    if name == "mount":
        source, where, kind, flags, data = words
        texts = [os.fsencode(text) for text in (source, where, kind)]
        failed = libc.mount(*texts, ctypes.c_ulong(int(flags)), os.fsencode(data))
    elif name == "umount":
        where, how = words
        failed = libc.umount2(os.fsencode(where), _MNT_DETACH if how == "lazy" else 0)
    else:
        try:
            os.statvfs(words[0])
        except OSError as error:
            return error.errno or 1
        return 0
    return ctypes.get_errno() if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
