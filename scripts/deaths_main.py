"""What a signal at the wrong moment leaves: every stage of a mount's and a run's life, every role.

`scripts/deaths [--stage S] [--role R] [--signal N]`. Each cell of the table makes a store, brings
it to a stage and holds it there, by means that can be seen from outside (a line of mountinfo, a
stopped process, a transaction that another process has open), sends one signal to one process,
lets go, and then asks for three things: the next command works in time or says what hangs and
how to end it; a command in the mount works; after `mountctl umount` nothing is left, neither a
mount nor a process. Takes some five minutes. tests/test_deaths.py runs a dozen of the cells.
"""

import argparse
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from engine.host.leases import is_held, sharers
from engine.repository import Repository
from fsdriver.mountpoint import UnmountError, mounts_of, unmount

T = TypeVar("T")

ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)
PATIENCE = 60.0
"""Seconds after which something that is to happen soon did not happen."""
NEXT = 5.0
"""Seconds in which the next command is to answer, on a machine that does nothing else."""


class Cell(NamedTuple):
    """One case: the process of a `role` gets the signal `number` at a `stage`."""

    stage: str
    role: str
    number: signal.Signals

    def __str__(self) -> str:
        return f"{self.stage}-{self.role}-{self.number.name.removeprefix('SIG')}"


class Life:
    """A store and the processes that come from commands on it; all end with it."""

    def __init__(self, home: Path) -> None:
        self.home, self.store, self.path = home, home / "store", home / "mnt"
        self.path.mkdir()
        (home / "tree").mkdir()
        (home / "tree" / "file").write_bytes(b"text\n")
        self._mark = f"AMALGAMFS_DEATHS={home}"
        self._clients: list[subprocess.Popen[bytes]] = []
        self.environment = {
            "PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home),
            "AMALGAMFS_STORE": str(self.store), "AMALGAMFS_DEATHS": str(home),
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        with Repository.create(str(self.store)) as repository:
            repository.import_directory(str(home / "tree"), ref="main")
            main = repository.resolve("main")
            repository.sessions.create("w", (None, None, main))

    def start(self, *words: str | Path) -> subprocess.Popen[bytes]:
        """Starts a command of `mountctl` in a session of its own."""
        client = subprocess.Popen(
            [sys.executable, "-P", "-m", "mountctl", *map(str, words)], env=self.environment,
            cwd=self.home, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._clients.append(client)
        return client

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Runs one to its end, which comes in time."""
        return subprocess.run(
            [sys.executable, "-P", "-m", "mountctl", *map(str, words)], env=self.environment,
            cwd=self.home, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=PATIENCE, check=False,
        )  # fmt: skip

    def processes(self, word: str = "") -> list[int]:
        """Returns the processes that came from these commands, with `word` in their command."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                ours = self._mark.encode() in Path(f"/proc/{name}/environ").read_bytes().split(
                    b"\0"
                )
                if ours and word.encode() in Path(f"/proc/{name}/cmdline").read_bytes():
                    found.append(int(name))
        return sorted(found)

    def daemon(self) -> int:
        return self.of("daemon", None)

    def of(self, role: str, client: subprocess.Popen[bytes] | None) -> int:
        """Returns the process that has a role."""
        if role == "client":
            assert client is not None
            return client.pid
        return until(lambda: next(iter(self.processes(f"fsdriver.{role}")), 0))

    def clear(self) -> None:
        """Leaves nothing behind, whatever state it is in."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for client in self._clients:
            client.kill()
            client.wait(PATIENCE)
        for mount in reversed(mounts_of(str(self.store))):
            with contextlib.suppress(UnmountError):
                unmount(mount.path, lazy=True)


def until(condition: Callable[[], T], seconds: float = PATIENCE) -> T:
    """Waits for something that no descriptor tells of, and returns it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError("it did not happen")
        time.sleep(0.002)
    return found


# The stages: each gives the client, if there is one, and is held while the block lasts.

Held = contextlib.AbstractContextManager[subprocess.Popen[bytes] | None]


@contextlib.contextmanager
def _stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def starting(life: Life) -> Iterator[subprocess.Popen[bytes] | None]:
    """The daemon has begun, and has no mount yet."""
    client = life.start("mount", life.path)
    with _stopped(life.daemon()):
        yield client


@contextlib.contextmanager
def mounting(life: Life) -> Iterator[subprocess.Popen[bytes] | None]:
    """The mount is there and nobody serves it: what is mounted inside is still to come."""
    client = life.start("mount", life.path)
    daemon = life.daemon()
    until(lambda: mounts_of(str(life.store)))
    with _stopped(daemon):
        yield client


@contextlib.contextmanager
def running(life: Life) -> Iterator[subprocess.Popen[bytes] | None]:
    """A command runs in a mount that was made for it."""
    script = "echo x > begun; exec sleep 100"
    client = life.start("run", "w", "--mode", "lazy", "--", "sh", "-c", script)
    until(lambda: list(life.home.glob("store/sessions/*/upper.*/begun")))
    yield client


@contextlib.contextmanager
def lending(life: Life) -> Iterator[subprocess.Popen[bytes] | None]:
    """A command has a session of a mount, in a checkout."""
    assert life.run("mount", life.path).returncode == 0
    script = f"echo x > {life.home}/begun; exec sleep 100"
    client = life.start("run", "w", "--mode", "full", "--", "sh", "-c", script)
    until((life.home / "begun").exists)
    yield client


@contextlib.contextmanager
def compacting(life: Life) -> Iterator[subprocess.Popen[bytes] | None]:
    """The daemon compacts, and waits for another process that has the store open."""
    assert life.run("mount", life.path).returncode == 0
    with Repository.open(str(life.store)):
        client = life.start("gc", "--compact")
        until(lambda: (life.store / "db" / "new").exists() or client.poll() is not None)
        yield client


@contextlib.contextmanager
def ending(life: Life) -> Iterator[subprocess.Popen[bytes] | None]:
    """The daemon was told to end and has a commit to end first; a client waits for both."""
    assert life.run("mount", life.path).returncode == 0
    (life.path / "sessions" / "w" / "new").write_bytes(b"new")
    with _writing(life):
        client = life.start("commit", "w")
        until(lambda: "commit of @w" in life.run("status").stdout)
        os.kill(life.daemon(), signal.SIGTERM)
        until(lambda: not mounts_of(str(life.store)))
        yield client


@contextlib.contextmanager
def _writing(life: Life) -> Iterator[None]:
    """Keeps others from writing to the store."""
    let_go, has = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        has.set()
        let_go.wait(PATIENCE)

    def write() -> None:
        with Repository.open(str(life.store)) as repository:
            repository.store.write(hold)

    thread = threading.Thread(target=write)
    thread.start()
    has.wait()
    try:
        yield
    finally:
        let_go.set()
        thread.join()


STAGES: dict[str, tuple[Callable[[Life], Held], tuple[str, ...]]] = {
    "starting": (starting, ("client", "daemon")),
    "mounting": (mounting, ("client", "daemon", "guard")),
    "running": (running, ("client", "daemon", "guard", "supervisor")),
    "lending": (lending, ("client", "daemon", "guard", "supervisor")),
    "compacting": (compacting, ("client", "daemon", "guard")),
    "ending": (ending, ("client", "daemon", "guard")),
}


def cells() -> list[Cell]:
    """Returns all cases."""
    return [
        Cell(stage, role, number)
        for (stage, (_, roles)), number in itertools.product(STAGES.items(), SIGNALS)
        for role in roles
    ]


def die(life: Life, cell: Cell) -> bool:
    """Brings a life to a stage and sends the signal; returns once its hold is gone.

    False if there was nobody to send it to any more.
    """
    hold, _ = STAGES[cell.stage]
    sent = False
    with hold(life) as client, contextlib.suppress(ProcessLookupError, TimeoutError):
        os.kill(life.of(cell.role, client), cell.number)
        sent = True
    if client is not None and cell.role == "client":
        client.wait(PATIENCE)
    return sent


def problems(life: Life, seconds: float = NEXT) -> list[str]:
    """Returns what is not as it should be after that."""
    found = []
    began = time.monotonic()
    said = life.run("status")
    took = time.monotonic() - began
    if took > seconds:
        found.append(f"status took {took:.1f} s")
    if said.returncode or ("does not answer" in said.stdout and "--force" not in said.stdout):
        found.append(f"status: {said.stdout}{said.stderr}")
    # What ends by itself has time for it; what does not is ended as the user is told to.
    with contextlib.suppress(TimeoutError):
        until(lambda: not is_held(str(life.store), "mount"), 2.0)
    if is_held(str(life.store), "mount"):
        ended = life.run("umount", "--force")
        if ended.returncode and "not mounted" not in ended.stderr:
            found.append(f"umount --force: {ended.stderr}")
    for pid in life.processes("sleep"):  # what a killed `run` left: a user's command
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    again = life.run("run", "w", "--mode", "lazy", "--", "cat", "file")
    if again.stdout != "text\n":
        found.append(f"run: {again.stdout}{again.stderr}")
    with contextlib.suppress(TimeoutError):
        until(lambda: not life.processes() and not mounts_of(str(life.store)), 10.0)
    for pid in life.processes():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
            found.append(f"process {pid} is left: {words.decode(errors='replace')}")
    found += [f"a mount is left: {mount.path}" for mount in mounts_of(str(life.store))]
    if sharers(str(life.store), "mount"):
        found.append("the lease is held")
    return found


def main() -> int:
    """Runs the cells that the command line names."""
    parser = argparse.ArgumentParser(prog="scripts/deaths", description=__doc__)
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--role", choices=["client", "daemon", "guard", "supervisor"])
    parser.add_argument("--signal", choices=[n.name.removeprefix("SIG") for n in SIGNALS])
    options = parser.parse_args()
    # A shell's background jobs ignore it, and so would all that is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    failed = 0
    for cell in cells():
        if options.stage not in {None, cell.stage} or options.role not in {None, cell.role}:
            continue
        if options.signal not in {None, cell.number.name.removeprefix("SIG")}:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="deaths-") as home:
            life = Life(Path(home))
            try:
                found = [] if die(life, cell) else ["there was nobody to send the signal to"]
                found += problems(life)
            except Exception as error:  # noqa: BLE001 - a row of the table
                found = [f"{type(error).__name__}: {error}"]
            finally:
                life.clear()
        failed += bool(found)
        print(
            f"{'FAILED' if found else 'ok':8}{cell!s:28}{time.monotonic() - began:5.1f} s",
            flush=True,
        )
        for line in found:
            print(f"        {line}", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
