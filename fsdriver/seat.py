"""The descriptor that pyfuse3 has in the place of its device.

pyfuse3 knows it by number. What stands behind the number changes: the socket that holds the
next request while it is read, and the device that the request came from when the answer is
written, which so reaches the kernel without another hand. Answers that libfuse gives by itself,
before a handler has begun, go into the socket.

It holds because of an order: from `put` to the read, and from the end of a handler to the
writing of its answer, nothing else runs in pyfuse3's thread.
"""

import ctypes
import os

_libc = ctypes.PyDLL(None)
"""Called without letting go of the interpreter: else another thread takes it, and answers wait."""


class Seat:
    """One descriptor by its number; of one thread."""

    def __init__(self, fd: int) -> None:
        """Takes the place of `fd`, a socket's."""
        self._fd, self._socket = fd, os.dup(fd)
        self._behind, self._device = self._socket, -1
        self.unanswered = False
        """Whether the last request is to be answered, and no handler has begun with it."""

    def put(self, device: int, *, answered: bool) -> None:
        """Puts the socket there: a request is to be read from it that came from `device`."""
        self._device, self.unanswered = device, answered
        self._stand(self._socket)

    def begin(self) -> int:
        """Tells the device of the request that was just read: its handler begins."""
        self.unanswered = False
        return self._device

    def end(self, device: int) -> None:
        """Puts the device there, for the answer that is now written."""
        self._stand(device)

    def close(self) -> None:
        """Puts the socket there for good."""
        self._stand(self._socket)
        os.close(self._socket)

    def _stand(self, behind: int) -> None:
        if self._behind != behind:
            if _libc.dup3(behind, self._fd, os.O_CLOEXEC) < 0:
                os.dup2(behind, self._fd, inheritable=False)  # says why
            self._behind = behind
