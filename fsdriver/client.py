"""The command line's end of the control socket. Blocks; imports neither trio nor pyfuse3."""

import errno
import os
import select
import socket
import stat
import struct
import time
from types import TracebackType

import msgspec

from engine.errors import EngineError
from engine.host.leases import holder_of, is_held, sharers
from fsdriver.messages import AnyReply, AnyRequest, Failed, GetStatus

LONGEST_LINE = 64 << 20

STARTING = "starting"
"""The `stage` of a daemon, in the text of its lease, until it serves."""

LOOK_SECONDS = 2.0
"""How often, while an answer is waited for, it is looked whether the daemon lives and serves."""
STILL_SECONDS = 60.0
"""How long it may stand still meanwhile, as it does for a disk that others keep busy."""
STOPPED_SECONDS = 5.0
"""How long it may have been stopped (SIGSTOP), or be a process that has ended but for a thread."""

# Each a struct timeval: seconds, microseconds. Zero waits for ever.
_PATIENCE = struct.pack("@ll", 10, 0)
_WITHOUT_END = struct.pack("@ll", 0, 0)


class DaemonError(EngineError):
    """The daemon refused. `kind` is the class of the error there."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class DaemonLostError(EngineError):
    """The daemon holds the mount but does not answer, or went away while it was asked.

    Not raised for one that is busy with something else: that answers.
    """

    def __init__(self, pid: int, detail: str) -> None:
        detail = _STATES.get(state_of(pid), detail)
        super().__init__(f"the mount's daemon (process {pid}) does not answer: {detail}")
        self.pid = pid


_STATES = {
    "T": "it is stopped",
    "Z": "it was killed, and a thread of it waits in the kernel",
    "D": "it waits in the kernel, for a disk or for a mount",
}
"""What it says of a daemon that it is in such a state."""


def state_of(pid: int) -> str:
    """Returns the state of a process's first thread as a letter (proc(5)); empty if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""


class Client:
    """A connection to the daemon that serves a store."""

    def __init__(self, path: str, pid: int, timeout: float | None = None) -> None:
        """Connects. Raises DaemonLostError.

        `timeout` bounds each answer, in seconds. Without, an answer is waited for as long as the
        daemon does anything: every `LOOK_SECONDS` it is asked beside whether it does.
        """
        self.pid, self._path, self._timeout = pid, path, timeout
        self._received = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            _connect_patiently(self._socket, path, timeout)
            self._socket.settimeout(timeout)
            self.pid = self.pid or _peer(self._socket)
        except OSError as error:
            self._socket.close()
            raise DaemonLostError(pid, str(error)) from error

    def ask(self, request: AnyRequest) -> AnyReply:
        """Sends a request and returns the answer. Raises DaemonError, DaemonLostError."""
        try:
            self._socket.sendall(msgspec.json.encode(request) + b"\n")
            line = self._read_line()
        except OSError as error:
            raise DaemonLostError(self.pid, str(error)) from error
        reply: AnyReply = msgspec.json.decode(line, type=AnyReply)
        if isinstance(reply, Failed):
            raise DaemonError(reply.kind, reply.message)
        return reply

    def _read_line(self) -> bytes:
        patience = _Patience(self._path, self.pid) if self._timeout is None else None
        waiting = select.poll()
        waiting.register(self._socket, select.POLLIN)
        while (end := self._received.find(b"\n")) < 0:
            if patience is not None and not waiting.poll(LOOK_SECONDS * 1000):
                patience.look()
                continue
            part = self._socket.recv(1 << 20)
            if not part or len(self._received) > LONGEST_LINE:
                raise DaemonLostError(self.pid, "it closed the connection")
            self._received += part
        line = bytes(self._received[: end + 1])
        del self._received[: end + 1]
        return line

    def close(self) -> None:
        """Closes the connection."""
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


class _Patience:
    """How long a daemon is waited for that has been asked for something."""

    def __init__(self, path: str, pid: int) -> None:
        self._path, self._pid, self._alive = path, pid, time.monotonic()

    def look(self) -> None:
        """Looks whether it is alive. Raises DaemonLostError when it was not for too long."""
        try:
            with Client(self._path, self._pid, LOOK_SECONDS) as beside:
                beside.ask(GetStatus())
            self._alive = time.monotonic()
        except DaemonLostError:
            silent = time.monotonic() - self._alive
            stopped = state_of(self._pid) in {"T", "Z", ""}
            if silent > (STOPPED_SECONDS if stopped else STILL_SECONDS):
                raise


def find_daemon(store_path: str, timeout: float | None = None) -> Client | None:
    """Returns a connection to the daemon that has the store mounted, or None if none has.

    `timeout` is as of `Client`. Raises DaemonLostError if one has and cannot be reached.
    """
    if not is_held(store_path, "mount"):
        return None
    facts = holder_of(store_path, "mount")
    pid = int(facts.get("pid", 0)) or next(iter(sharers(store_path, "mount")), 0)
    # Not where the lease says, which whoever can write to the store could have lead anywhere.
    return Client(socket_path(store_path), pid, timeout)


def is_starting(store_path: str) -> bool:
    """Tells whether a daemon has begun and does not serve yet."""
    facts = holder_of(store_path, "mount")
    return facts.get("stage") == STARTING and is_held(store_path, "mount")


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


def _connect_patiently(sock: socket.socket, path: str, timeout: float | None) -> None:
    """Connects, and waits up to ten seconds for room among those that wait to be let in.

    Python's own timeout makes the socket non-blocking, and then a full queue is an error at once
    (connect(2): EAGAIN), however soon the daemon would have taken the next one out of it.
    """
    patience = _PATIENCE
    if timeout is not None:
        patience = min(patience, struct.pack("@ll", int(timeout), int(timeout % 1 * 1e6)))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
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
