"""What a suite stands on: a place to work in, processes, and the way out.

Used by the other posix modules only.
"""

import contextlib
import ctypes
import errno
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

from fsdriver.mountpoint import UnmountError, unmount
from scripts.bench_setting import PROGRAM, CannotError, clear, ignore_signals, mountctl, note

SIDES = {
    "sessions": "a session of a mount",
    "plain": "a session of a mount made with --plain",
    "run": "a session as `mountctl run` shows it, under the kernel's overlayfs",
    "disk": "a directory on the host's disk",
}
"""Where a suite can run."""

_PR_SET_CHILD_SUBREAPER = 36


class Said(NamedTuple):
    """How a command ended and what it wrote, to either stream. `status` is None: took too long."""

    status: int | None
    output: str


class Place(NamedTuple):
    """Where a suite runs. `path` is what it tests; `scratch` is a directory on the disk.

    Both are the suite's own and gone afterwards. `short` asks for the short form. `by` are the
    words before a command that shall see `path` as this side shows it.
    """

    path: str
    scratch: str
    side: str
    short: bool
    by: tuple[str, ...] = ()

    def say(self, *command: str, seconds: float = 300) -> Said:
        """Runs one program of a suite in `path`, as `say`.

        What it leaves running would keep the session from the next program: it is ended with it,
        where the program has the session for itself.
        """
        spared = set(started())
        try:
            return say(*self.by, *command, cwd=self.path, seconds=seconds)
        finally:
            if self.by:
                end(spared)


def adopt() -> None:
    """Makes what the programs of a suite leave running our own children, to be found and ended."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def started() -> dict[int, int]:
    """Returns all processes that come from this one, each with its parent."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
    ours: dict[int, int] = {}
    queue = [os.getpid()]
    while queue:
        above = queue.pop()
        below = [pid for pid, parent in parents.items() if parent == above]
        ours.update(dict.fromkeys(below, above))
        queue += below
    return ours


def end(spared: set[int]) -> None:
    """Kills what came from this process, by id, but for those that are spared."""
    for _ in range(100):
        rest = [pid for pid in started() if pid not in spared]
        if not rest:
            return
        for pid in rest:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.05)
    raise CannotError(f"these processes cannot be ended: {rest}")


def _collect(spared: int) -> None:
    """Collects the ended children that were adopted: some tests wait until they are gone."""
    for pid, parent in started().items():
        if parent == os.getpid() and pid != spared:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def say(
    *command: str, cwd: str, seconds: float = 300, environment: dict[str, str] | None = None
) -> Said:
    """Runs one program of a suite to its end, or for as long as it may take."""
    surroundings = {
        "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        "HOME": cwd,
        "TMPDIR": cwd,
        "LC_ALL": "C.UTF-8",
        "NO_COLOR": "1",
        **(environment or {}),
    }
    with tempfile.TemporaryFile() as output:
        spared = set(started())
        child = subprocess.Popen(
            command, cwd=cwd, env=surroundings, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + seconds
        handle = os.pidfd_open(child.pid)
        try:
            while not select.select([handle], [], [], 1)[0] and time.monotonic() < deadline:
                _collect(child.pid)
            status = child.poll()
        finally:
            os.close(handle)
            if child.poll() is None:
                child.kill()
                child.wait()
                end(spared)
        output.seek(0)
        return Said(status, output.read().decode(errors="replace"))


@contextlib.contextmanager
def run_directory() -> Iterator[str]:
    """Gives a directory of this run's own; nothing of it or mounted below it is left afterwards."""
    spared = set(started())
    base = os.path.realpath(tempfile.mkdtemp(prefix="afs-posix-"))
    try:
        os.chmod(base, 0o755)  # as `_folder`
        yield base
    finally:
        ignore_signals()
        leave(base, spared)


def leave(base: str, spared: set[int]) -> None:
    """Ends what was started and removes what was made. A mount is detached before its daemon ends.

    The other way round, whoever waits for the daemon could not be killed.
    """
    try:
        clear(base)
    finally:
        end(spared)


@contextlib.contextmanager
def place_on(side: str, base: str, *, short: bool) -> Iterator[tuple[Place, list[str]]]:
    """Gives a place on a side, and a list that afterwards tells what was wrong with the mount."""
    scratch = _folder(base, "scratch")
    wrong: list[str] = []
    if side == "disk":
        path = _folder(base, "disk")
        spared = set(started())
        yield Place(path, scratch, side, short), wrong
        end(spared)
        return
    store = os.path.join(base, f"store-{os.path.basename(scratch)}")
    at = _folder(base, "at")
    idle = set(started())
    mountctl(store, "init")
    mountctl(store, "import", _folder(scratch, "first"), "--ref", "main")
    mount(store, at, plain=side == "plain")
    mountctl(store, "session", "create", "posix", "main")
    spared = set(started())
    by = (PROGRAM, "--store", store, "-q", "run", "--mode", "overlay", "posix", "--")
    path = os.path.join(at, "sessions", "posix")
    yield Place(path, scratch, side, short, by if side == "run" else ()), wrong
    end(spared)
    if why := _unmount(store, at):
        wrong.append(why)
        with contextlib.suppress(UnmountError):
            unmount(at, lazy=True)
    end(idle)
    wrong += complaints(store)


def _unmount(store: str, at: str) -> str:
    """Ends a mount as a person does. Returns why that could not be done, or nothing.

    Tries for some seconds: any program that looks at all mounts makes one busy for a moment.
    """
    why = ""
    for _ in range(5):
        try:
            mountctl(store, "umount", patient=True)
        except CannotError as error:
            why = f"it cannot be unmounted: {error}"
            note(why)
            time.sleep(1)
        else:
            return ""
    return why


def _folder(base: str, name: str) -> str:
    """Makes a directory that others can enter: suites run by root do things as other users."""
    path = tempfile.mkdtemp(dir=base, prefix=f"{name}-")
    os.chmod(path, 0o755)
    return path


def mount(store: str, at: str, *, plain: bool) -> None:
    """Mounts a store as the side asks for; where root does it, for all users and all of POSIX."""
    others = ["--allow-other", "--suid", "--dev"] if os.geteuid() == 0 else []
    mountctl(store, "mount", at, *others, *(["--plain"] if plain else []), patient=True)


def complaints(store: str) -> list[str]:
    """Returns the errors that a store's daemon has logged, but for those of a full disk.

    Suites fill things up on purpose: ext4 has room for few extended attributes.
    """
    bad = ("level=error", "level=critical", "Traceback")
    with open(os.path.join(store, "log", "mount.log"), encoding="utf-8") as log:
        lines = [line.strip() for line in log if any(word in line for word in bad)]
    return [line for line in lines if f"[Errno {errno.ENOSPC}]" not in line]
