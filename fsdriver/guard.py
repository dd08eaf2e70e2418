"""The guard: a process that lets a killed daemon's mount fail, where it would hang.

The kernel ends a connection when the last who has its device open is gone. A thread of the daemon
that gives the kernel pages, or tells it to forget a name, may wait inside of the kernel, and not
even kill -9 wakes it: it waits for the page or the directory of a request, and the request for
an answer, which the rest of the daemon, killed by then, does not give. So all of it would wait
for ever, who reads in the mount as well, and the lease be held.

The guard has the devices open, too, and the memory that requests are received in. When the thread
that serves them is gone, or says that it ends, it refuses the request that was at hand, and all
that come, until nothing is left of the daemon; then it ends, and with it the connection. It has a
session of its own, so that it is not killed with the daemon's group. See docs/design/0013.

`python -m fsdriver.guard SOCKET PID`, started by the daemon. Needs nothing of the engine.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import select
import signal
import socket
import subprocess
import sys

from fsdriver import protocol

_PR_SET_PDEATHSIG = 1
_DEATH = signal.SIGUSR1
"""Sent by the kernel when the thread is gone that started the guard, though others may wait.

A process that is gone but for a thread is its children's parent as before.
"""
_RESEND = protocol.OUT.pack(protocol.OUT.size, protocol.RESEND, 0)
"""Has the kernel (6.9 and later) send again what was taken and not answered."""
_ENDED_SECONDS = 1.0
"""How long one that has hung up may take to be gone."""


class Guard:
    """The daemon's end: of the thread that serves requests, which also calls `start`."""

    def __init__(self) -> None:
        """Starts the process."""
        self._protected: list[tuple[int, int]] = []
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Starts the process, or another one when it has ended."""
        if self._socket is not None and self._process is not None:
            self._socket.close()
            try:
                self._process.wait(_ENDED_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.returncode = 0  # nobody waits for it
        self._socket, theirs = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC
        )
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-P", "-m", "fsdriver.guard",
                    str(theirs.fileno()), str(os.getpid()),
                ],
                stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),), start_new_session=True,
            )  # fmt: skip
        for pair in self._protected:
            self._send(pair)

    def fileno(self) -> int:
        """Returns a descriptor that can be read when the process has ended."""
        return -1 if self._socket is None else self._socket.fileno()

    def protect(self, device: int, size: int) -> mmap.mmap:
        """Gives memory for the requests of a device, which is refused them if the daemon dies."""
        memory = os.memfd_create("requests", os.MFD_CLOEXEC)
        os.ftruncate(memory, size)
        self._protected.append((device, memory))
        self._send(self._protected[-1])
        return mmap.mmap(memory, size)

    def release(self, device: int) -> None:
        """Forgets a device whose mount has ended."""
        for pair in self._protected:
            if pair[0] == device:
                os.close(pair[1])
        self._protected = [pair for pair in self._protected if pair[0] != device]

    def _send(self, pair: tuple[int, int]) -> None:
        with contextlib.suppress(ConnectionError):  # it has ended, as `fileno` tells
            if self._socket is not None:
                socket.send_fds(self._socket, [b"d"], list(pair))

    def close(self) -> None:
        """Has the process refuse what still comes; it ends when this process is gone."""
        if self._socket is not None and self._process is not None:
            self._socket.close()
            self._socket = None
            with contextlib.suppress(OSError):  # one that somebody has stopped would keep all
                self._process.send_signal(signal.SIGCONT)
            self._process.returncode = 0  # it outlives us: nobody waits for it


def main(argv: list[str]) -> int:
    """Waits for the daemon's end, or its death; returns the exit status."""
    daemon = int(argv[1])
    died, tell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(tell)
    signal.signal(_DEATH, lambda *_: None)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the daemon ends it
    with contextlib.suppress(OSError):  # whom it frees wait for it, and may be in more of a hurry
        os.setpriority(os.PRIO_PROCESS, 0, min(0, os.getpriority(os.PRIO_PROCESS, 0)))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _DEATH)
    if os.getppid() != daemon:
        return 0
    if _has_died(daemon):  # before it was asked to tell
        os.write(tell, b"d")
    alive = os.pidfd_open(daemon)
    connections: list[tuple[int, mmap.mmap]] = []
    waiting = select.poll()
    with socket.socket(fileno=int(argv[0])) as sock:
        waiting.register(sock, select.POLLIN)
        waiting.register(died, select.POLLIN)
        while sock.fileno() in {fd for fd, _ in waiting.poll()}:
            message, received, *_ = socket.recv_fds(sock, 1, 2)
            if not message:
                break  # it ends by itself, unless a thread of it cannot
            device, memory = received
            connections.append((device, mmap.mmap(memory, mmap.PAGESIZE, prot=mmap.PROT_READ)))
            os.close(memory)
        _refuse_all(alive, connections)
    return 0


def _has_died(pid: int) -> bool:
    """Tells whether the first thread of a process is gone."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
        return stat.read().rpartition(")")[2].split()[0] in {"Z", "X"}


def _refuse_all(alive: int, connections: list[tuple[int, mmap.mmap]]) -> None:
    """Refuses what was at hand and what comes, until the daemon is gone altogether."""
    waiting = select.poll()
    waiting.register(alive, select.POLLIN)
    for device, inbox in connections:
        _refuse(device, inbox)
        with contextlib.suppress(OSError):
            os.write(device, _RESEND)
        os.set_blocking(device, False)
        waiting.register(device, select.POLLIN)
    room = bytearray(protocol.LARGEST_IO + protocol.HEADROOM)
    while True:
        for fd, _ in waiting.poll():
            if fd == alive:
                return
            try:
                os.readv(fd, [room])
            except OSError as error:
                if error.errno not in {errno.EAGAIN, errno.EINTR, errno.ENOENT}:
                    waiting.unregister(fd)  # ENODEV: its mount has ended
                continue
            _refuse(fd, room)


def _refuse(device: int, request: mmap.mmap | bytearray) -> None:
    """Answers a request, or one that was answered already, as the kernel does for a dead mount."""
    _, opcode, unique, *_ = protocol.IN.unpack_from(request)
    if unique and opcode not in protocol.WITHOUT_REPLY:
        with contextlib.suppress(OSError):
            os.write(device, protocol.OUT.pack(protocol.OUT.size, -errno.ENOTCONN, unique))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
