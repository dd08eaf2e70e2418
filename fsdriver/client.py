"""The command line's end of the control socket. Blocks; imports neither trio nor pyfuse3."""

import errno
import os
import socket
import stat
import struct
from types import TracebackType

import msgspec

from engine.errors import EngineError
from engine.host.leases import holder_of, is_held
from fsdriver.messages import AnyReply, AnyRequest, Failed

LONGEST_LINE = 64 << 20

# Each a struct timeval: seconds, microseconds. Zero waits for ever.
_PATIENCE = struct.pack("@ll", 10, 0)
_WITHOUT_END = struct.pack("@ll", 0, 0)


class DaemonError(EngineError):
    """The daemon refused. `kind` is the class of the error there."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class DaemonLostError(EngineError):
    """The daemon holds the mount but does not answer, or went away while it was asked."""

    def __init__(self, pid: int, detail: str) -> None:
        super().__init__(f"the mount's daemon (process {pid}) does not answer: {detail}")
        self.pid = pid


class Client:
    """A connection to the daemon that serves a store."""

    def __init__(self, path: str, pid: int, timeout: float | None = None) -> None:
        """Connects. `timeout` bounds each answer, in seconds. Raises DaemonLostError."""
        self.pid = pid
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            _connect_patiently(self._socket, path)
            self._socket.settimeout(timeout)
            self.pid = self.pid or _peer(self._socket)
        except OSError as error:
            self._socket.close()
            raise DaemonLostError(pid, str(error)) from error
        self._file = self._socket.makefile("rb")

    def ask(self, request: AnyRequest) -> AnyReply:
        """Sends a request and returns the answer. Raises DaemonError, DaemonLostError."""
        try:
            self._socket.sendall(msgspec.json.encode(request) + b"\n")
            line = self._file.readline(LONGEST_LINE)
        except OSError as error:
            raise DaemonLostError(self.pid, str(error)) from error
        if not line.endswith(b"\n"):
            raise DaemonLostError(self.pid, "it closed the connection")
        reply: AnyReply = msgspec.json.decode(line, type=AnyReply)
        if isinstance(reply, Failed):
            raise DaemonError(reply.kind, reply.message)
        return reply

    def close(self) -> None:
        """Closes the connection."""
        self._file.close()
        self._socket.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _peer(sock: socket.socket) -> int:
    """Returns the process at the other end."""
    pid: int
    pid, _, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid


def find_daemon(store_path: str, timeout: float | None = None) -> Client | None:
    """Returns a connection to the daemon that has the store mounted, or None if none has.

    Raises DaemonLostError if one has and cannot be reached.
    """
    if not is_held(store_path, "mount"):
        return None
    facts = holder_of(store_path, "mount")
    # Not where the lease says, which whoever can write to the store could have lead anywhere.
    return Client(socket_path(store_path), int(facts.get("pid", 0)), timeout)


def socket_path(store_path: str) -> str:
    """Returns where a store's daemon listens."""
    return os.path.join(store_path, "locks", "control")


def connect(sock: socket.socket, path: str) -> None:
    """Connects to a Unix socket whose path may be longer than the 107 bytes that fit.

    Raises OSError, also for a symbolic link that leads to a socket.
    """
    folder = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    name = os.path.basename(path)
    try:
        if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        sock.connect(f"/proc/self/fd/{folder}/{name}")
    finally:
        os.close(folder)


def _connect_patiently(sock: socket.socket, path: str) -> None:
    """Connects, and waits up to ten seconds for room among those that wait to be let in.

    Python's own timeout makes the socket non-blocking, and then a full queue is an error at once
    (connect(2): EAGAIN), however soon the daemon would have taken the next one out of it.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _PATIENCE)
    try:
        connect(sock, path)
    except BlockingIOError as error:
        raise TimeoutError(error.errno, "too many others wait for it") from error
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _WITHOUT_END)


def bind(sock: socket.socket, path: str) -> None:
    """Binds a Unix socket likewise, readable and writable by its owner alone."""
    folder = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    before = os.umask(0o177)
    try:
        sock.bind(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
    finally:
        os.umask(before)
        os.close(folder)
