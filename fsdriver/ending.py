"""Ending a mount whose daemon does not end it: asked, told, cut off, killed.

Light; for the command line. Who has the mount is whoever holds the store's lease `mount`: the
kernel says so (/proc/locks), and not a number that somebody once wrote down, which may be another
process's by now. A signal goes to a descriptor of that process, so it cannot meet another.
"""

import contextlib
import os
import select
import signal
from collections.abc import Callable, Iterator

from engine.host.leases import holder_of, is_held, sharers
from fsdriver.client import DaemonError, DaemonLostError, find_daemon, state_of
from fsdriver.launch import wait_until_ended
from fsdriver.messages import Shutdown
from fsdriver.mountpoint import FILESYSTEM, UnmountError, mounts_of, unmount

ASK_SECONDS = 3.0
"""How long a daemon is waited for that was asked to end: one that serves answers at once."""
STEP_SECONDS = 5.0
"""How long each later step is given."""
CONNECTIONS = "/sys/fs/fuse/connections"

Tell = Callable[[str], None]


def force_end(store: str, tell: Tell) -> str:
    """Ends the mount of a store by every means, the mildest first; returns where it was.

    `tell` hears of each step before it is done. What is open in the mount fails from then on;
    what was written to sessions stays. Returns an empty path if nobody has the store mounted.
    Raises UnmountError when the kernel keeps the process all the same.
    """
    path = str(holder_of(store, "mount").get("mountpoint", ""))
    if not is_held(store, "mount"):
        return ""
    with _holders(store) as (daemon, guards):
        who = f"process {daemon}" if daemon else "the mount's daemon"
        tell(f"asking {who} to end")
        if _ask(store, tell) and wait_until_ended(store, STEP_SECONDS):
            return path
        tell(f"telling {who} to end (SIGTERM)")
        for number in (signal.SIGTERM, signal.SIGCONT):  # it may be stopped
            _send(daemon, number)
        if wait_until_ended(store, STEP_SECONDS):
            return path
        _cut_off(store, tell)
        if wait_until_ended(store, ASK_SECONDS):
            return path
        tell(f"killing {who} (SIGKILL)")
        _send(daemon, signal.SIGKILL)
        for guard in guards:
            _send(guard, signal.SIGCONT)  # which lets go what waits for the daemon
        if wait_until_ended(store, STEP_SECONDS):
            return path
        for guard in guards:
            tell(f"killing its guard, process {guard} (SIGKILL)")
            _send(guard, signal.SIGKILL)
        if wait_until_ended(store, STEP_SECONDS):
            return path
        state = " in the kernel" if state_of(daemon.pid if daemon else 0) in {"D", "Z"} else ""
        raise UnmountError(path, f"{who} waits{state}, and cannot be ended")


class _Process:
    """A process, known by a descriptor."""

    def __init__(self, pid: int) -> None:
        self.pid, self.fd = pid, os.pidfd_open(pid)

    def __str__(self) -> str:
        return str(self.pid)

    def gone(self) -> bool:
        return bool(select.select([self.fd], [], [], 0)[0])


def _send(process: _Process | None, number: signal.Signals) -> None:
    if process is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process.fd, number)


@contextlib.contextmanager
def _holders(store: str) -> Iterator[tuple[_Process | None, list[_Process]]]:
    """Gives who holds the lease, and its guards; None if that is nobody whom we can see."""
    found: list[_Process] = []
    daemon = None
    try:
        for pid in sharers(store, "mount"):
            with contextlib.suppress(OSError):
                process = _Process(pid)
                found.append(process)
                # It had the lease, and is not gone: so the number is still its own.
                if pid in sharers(store, "mount") and not process.gone():
                    daemon = process
        guards = []
        for pid in _children(daemon.pid if daemon else 0):
            with contextlib.suppress(OSError):
                process = _Process(pid)
                found.append(process)
                if _is_guard_of(pid, daemon.pid if daemon else 0):
                    guards.append(process)
        yield daemon, guards
    finally:
        for process in found:
            os.close(process.fd)


def _children(pid: int) -> list[int]:
    if not pid:
        return []
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and _parent(name) == pid]


def _parent(pid: int | str) -> int:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def _is_guard_of(pid: int, daemon: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
    except OSError:
        return False
    return b"fsdriver.guard" in words and _parent(pid) == daemon


def _ask(store: str, tell: Tell) -> bool:
    """Asks the daemon to end; tells whether it will."""
    try:
        client = find_daemon(store, ASK_SECONDS)
        if client is not None:
            with client:
                client.ask(Shutdown())
    except DaemonError as error:
        tell(f"it refuses: {error}")
        return False
    except DaemonLostError as error:
        tell(str(error))
        return False
    return True


def _cut_off(store: str, tell: Tell) -> None:
    """Has the kernel end the connections of a store's mounts, and unmounts what it shows."""
    ours = mounts_of(store)
    for mount in ours:
        minor = mount.device.rpartition(":")[2]
        with contextlib.suppress(OSError):
            fd = os.open(f"{CONNECTIONS}/{minor}/abort", os.O_WRONLY | os.O_CLOEXEC)
            try:
                tell(f"ending the connection of {mount.path!r}")
                os.write(fd, b"1")
            finally:
                os.close(fd)
    for mount in reversed(ours):
        if mount.kind == FILESYSTEM:
            tell(f"unmounting {mount.path!r}, though it is in use")
            with contextlib.suppress(UnmountError):
                unmount(mount.path, lazy=True)
