"""Mounts from the outside: starting a daemon, ending one, clearing up after a killed one."""

import os
import sys
from typing import NamedTuple, NoReturn

from engine.errors import EngineError
from engine.host.leases import holder_of, is_held
from engine.repository import Repository
from fsdriver import mountpoint as places
from fsdriver.client import DaemonError, DaemonLostError, find_daemon, is_starting
from fsdriver.ending import force_end
from fsdriver.launch import daemon_command, launch, wait_until_ended, why_no_log
from fsdriver.messages import GetStatus, Shutdown, Status
from fsdriver.own_directory import tidy as clear_left
from mountctl.output import Output

END_SECONDS = 30.0
"""How long a daemon that was asked to end may take."""
ANSWER_SECONDS = 3.0
"""Within this time a daemon that serves has said that it does, whatever else it is busy with."""


class AlreadyMountedError(EngineError):
    """The store is mounted; a store has one mount at a time."""

    def __init__(self, store: str, mountpoint: str, pid: int) -> None:
        where = f"mounted on {mountpoint!r}" if mountpoint else "being mounted"
        super().__init__(f"the store at {store!r} is {where} already (process {pid})")
        self.store, self.mountpoint, self.pid = store, mountpoint, pid


class NotMountedError(EngineError):
    """There is no mount of ours where one is to be ended."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is not mounted")


class Service(NamedTuple):
    """How a mount is to be served."""

    allow_other: bool
    suid: bool
    dev: bool
    plain: bool
    gc_every: float
    gc_below: float


class Prepared(NamedTuple):
    """A store and a directory that were found good for a mount."""

    store: str
    mountpoint: str


def prepare(store: str, mountpoint: str, output: Output, *, trusted: bool) -> Prepared:
    """Checks all that can be checked before a daemon starts, and removes dead mounts.

    Raises what `Repository.open` does, AlreadyMountedError, MountPointError.
    """
    Repository.open(store, trusted=trusted, to_read=True).close()
    if is_held(store, "mount"):
        where = ""
        if not is_starting(store):
            find_alive(store)
            where = _place_of(store)
        raise AlreadyMountedError(store, where, holder_of(store, "mount").get("pid", 0))
    tidy(store, output)
    _clear(mountpoint, output)
    return Prepared(store, places.check(mountpoint, store))


def find_alive(store: str) -> Status | None:
    """Returns what the store's daemon says of itself, or None if it has none.

    Raises DaemonLostError if it does not answer.
    """
    client = find_daemon(store, ANSWER_SECONDS)
    if client is None:
        return None
    with client:
        reply = client.ask(GetStatus())
    assert isinstance(reply, Status)
    return reply


def tidy(store: str, output: Output) -> list[str]:
    """Removes what killed daemons of a store have left mounted; returns where that was."""
    cleared = clear_left(store)
    for path in cleared:
        output.note(f"removed the dead mount on {path!r}; its daemon was killed")
    return cleared


def _clear(path: str, output: Output) -> bool:
    """Removes the dead mount of another store; tells whether there was one."""
    mount = places.our_mount(path)
    if mount is None or not places.is_dead(path):
        return False
    places.unmount(path, lazy=True)
    output.note(f"removed the dead mount on {path!r}; its daemon was killed")
    return True


def start(prepared: Prepared, service: Service, log: str | None, output: Output) -> int:
    """Starts a daemon in the background and returns its process id once it serves."""
    why = why_no_log(prepared.store, log)
    if why:
        output.warning(f"there is no log for now: {why}")
    return launch(prepared.store, prepared.mountpoint, log=log, **service._asdict())


def become_daemon(prepared: Prepared, service: Service, log: str | None) -> NoReturn:
    """Turns this process into the daemon, with this terminal as its log unless `log` is given.

    A fresh interpreter in the same process: signals reach it directly, and trio and pyfuse3
    need not be loaded here.
    """
    command = daemon_command(prepared.store, prepared.mountpoint, **service._asdict())
    if log is not None:
        why_no_log(prepared.store, log)
        command += ["--log", log]
    sys.stdout.flush()
    os.execv(sys.executable, command)


def end(store: str, mountpoint: str | None, output: Output, *, force: bool = False) -> str:
    """Ends the store's mount, or the one on `mountpoint`, and returns where it was.

    With `force` whatever uses it, and whether or not its daemon answers; see `force_end`.
    Raises NotMountedError, UnmountError, DaemonLostError.
    """
    if mountpoint is not None:
        mount = places.our_mount(mountpoint)
        if mount is None:
            raise NotMountedError(repr(os.path.abspath(mountpoint)))
        served = [s for s in (store, mount.source) if _place_of(s) == mount.path]
        if not served:  # a second way into a mount, or what is left of one
            places.unmount(mount.path, lazy=force or places.is_dead(mount.path))
            return mount.path
        store = served[0]
    path = _place_of(store)
    if force:
        ended = force_end(store, output.note)
        cleared = tidy(store, output)
        if not ended and not cleared:
            raise NotMountedError(f"the store at {store!r}")
        return ended or cleared[0]
    find_alive(store)  # one that serves says so at once, and has time for the rest then
    client = find_daemon(store, END_SECONDS)
    if client is None:
        cleared = tidy(store, output)
        if cleared:
            return path if path in cleared else cleared[0]
        raise NotMountedError(f"the store at {store!r}")
    with client:
        try:
            client.ask(Shutdown())
        except DaemonError as error:
            if error.kind == "UnmountRefusedError":
                raise places.UnmountRefusedError(path, _reason(str(error))) from error
            if error.kind not in {"UnmountError", "InUseError"}:
                raise
            why = _why(path) if error.kind == "UnmountError" else str(error)
            raise places.UnmountError(path, why) from error
        except DaemonLostError:
            pass  # it may have ended before it could say so: what counts is that it ends
    if not wait_until_ended(store, END_SECONDS):
        raise places.UnmountError(
            path, f"its daemon has not ended after {END_SECONDS:.0f} seconds; --force ends it"
        )  # fmt: skip
    return path


def _place_of(store: str) -> str:
    """Returns where a store is or was mounted last; empty if that is not known."""
    told = str(holder_of(store, "mount").get("mountpoint", ""))
    if not told and is_held(store, "mount"):  # a full disk has no room for it
        ours = [m.path for m in places.mounts() if (m.kind, m.source) == (places.FILESYSTEM, store)]
        return ours[-1] if ours else ""
    return told


def _reason(message: str) -> str:
    """Returns what an error of `mountpoint` says without where it was."""
    return message.partition("': ")[2] or message


def _why(path: str) -> str:
    names = [f"{name} ({pid})" for pid, name in users_of(path)]
    if not names:
        return "it is in use"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"it is in use by {', '.join(names[:5])}{more}"


def users_of(path: str) -> list[tuple[int, str]]:
    """Returns the processes, of those that this user may look into, that use files below `path`.

    Reads links in /proc only, so it asks nothing of the mount.
    """
    found = []
    for pid in os.listdir("/proc"):
        if not pid.isdigit() or int(pid) == os.getpid():
            continue
        links = _links(f"/proc/{pid}")
        if any(link == path or link.startswith(path + "/") for link in links):
            try:
                with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                    found.append((int(pid), file.read().strip()))
            except OSError:
                continue  # it has ended
    return found


def _links(process: str) -> list[str]:
    """Returns what a process has as its directories, program and open files."""
    try:
        names = ["cwd", "root", "exe", *(f"fd/{fd}" for fd in os.listdir(f"{process}/fd"))]
    except OSError:
        names = ["cwd", "root", "exe"]
    links = []
    for name in names:
        try:
            links.append(os.readlink(f"{process}/{name}"))
        except OSError:
            continue
    return links
