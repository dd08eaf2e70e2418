"""Runs a command in a session: under the kernel's overlayfs, in the FUSE mount as anybody may,
or in a full checkout that nobody needs a mount for.

Light; imports neither trio nor pyfuse3. A `Run` gets the session from the mount's daemon, holds
it while the command and all that came from it lives, and lets the daemon have it again. What
the command sees, who tells whom, and who outlives whom is in `supervisor`; which of the modes
will be the fastest, in `choosing`.
"""

import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from engine.errors import EngineError, InUseError
from engine.host.leases import is_held
from engine.mounted.vfs import base_path
from engine.progress import Progress
from engine.repository import Repository
from engine.sessions.session_tree import SessionTree, TreeReads
from engine.sessions.sessions import HeldSession
from fsdriver import messages
from fsdriver.client import DaemonError, DaemonLostError, find_daemon, is_starting, state_of
from fsdriver.cost_model import FULL, LAZY, OVERLAY
from fsdriver.launch import START_SECONDS, launch, wait_until_ended
from fsdriver.own_directory import OwnDirectory, take_own_directory
from fsdriver.supervisor import FORWARDED, WATCHED, Job

TAKE_SECONDS = 2.0
"""How long the session that the daemon lets go may stay somebody else's."""
END_SECONDS = 30.0
"""How long the end of a mount that nobody needs any more is waited for."""
ANSWER_SECONDS = 5.0
"""How long the daemon may take to say where the mount is, once it serves."""
BEGIN_SECONDS = 120.0
"""How long a command may take to begin: a disk that others keep busy has taken 30 seconds."""
HEED_SECONDS = 2.0
"""After which a signal that came before the command had begun ends the waiting for it."""
KILLED_SECONDS = 10.0
"""How long a command that was killed may take to be gone; later it counts as left running."""


_ENDING = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM}

_CANNOT = {
    OVERLAY: "overlayfs cannot show the session",
    LAZY: "the mount cannot show the session there",
    FULL: "there can be no checkout of the session",
}


class ModeRefusedError(EngineError):
    """A session cannot be run in that mode. `why` is half a sentence."""

    def __init__(self, mode: str, why: str) -> None:
        super().__init__(f"{_CANNOT[mode]}: {why}")
        self.mode, self.why = mode, why


class CommandMissingError(EngineError):
    """There is no such program."""

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no program {name!r}")
        self.name = name


class CommandRefusedError(EngineError):
    """The program cannot be executed."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"cannot execute {name!r}: {why}")
        self.name, self.why = name, why


class SupervisorLostError(EngineError):
    """The process between this one and the command was killed, and the command with it."""

    def __init__(self) -> None:
        super().__init__("the process that watched the command was killed")


class StartAbandonedError(EngineError):
    """A command did not begin, and was waited for no longer."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the command was given up: {why}")


class Ended(NamedTuple):
    """How a command ended. `left` tells whether processes that it started go on."""

    exit_code: int
    """As a shell has it: 128 and the signal's number for one that was killed."""
    signal: int | None
    left: bool


class Place:
    """Where the store is mounted; `life` keeps the mount, -1 where it does not depend on it."""

    def __init__(self, mountpoint: str, name: str, life: int = -1) -> None:
        self.mountpoint, self.name, self.life = mountpoint, name, life
        """`name` is one that no other mount ever has."""
        self.needed = False
        """Whether what a command left running still needs the mount."""
        self.late = False
        """Whether a mount that nobody needs any more had not ended when it was waited for."""


def find_place(store: str) -> Place | None:
    """Returns the store's mount, if it has one. Raises DaemonLostError.

    One that is just being mounted is waited for.
    """
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            client = find_daemon(store, ANSWER_SECONDS)
            if client is None:
                return None
            with client:
                reply = client.ask(messages.GetStatus())
            assert isinstance(reply, messages.Status)
            if not is_starting(store) or time.monotonic() > until:
                return Place(reply.mountpoint, f"{reply.pid}-{reply.started_ns}")
            time.sleep(0.02)  # it may end yet: whoever started it may be gone
        except DaemonLostError as error:
            stopped = state_of(error.pid) in {"T", "Z"}
            if stopped or not is_starting(store) or time.monotonic() > until:
                if not is_held(store, "mount"):
                    return None  # it has just ended
                raise
            time.sleep(0.05)


@contextlib.contextmanager
def mounted(store: str) -> Iterator[Place]:
    """Gives the store's mount, or makes one in a temporary directory for as long as it is needed.

    That is until this block, and all who have inherited `life`, have ended. Raises
    DaemonLostError, LaunchError.
    """
    place = find_place(store)
    if place is not None:
        yield place
        return
    directory = take_own_directory(store)
    theirs, life = os.pipe()
    try:
        launch(store, directory.path, life=theirs)
    except BaseException:
        os.close(life)
        directory.leave()
        raise
    finally:
        os.close(theirs)
    place = Place(directory.path, "", life)
    try:
        yield place
    finally:
        os.close(life)
        if place.needed:
            directory.hand_on()  # the daemon removes it
        else:
            place.late = not wait_until_ended(store, END_SECONDS)
            directory.leave()


class Run:
    """One command in one session, in one mode. Use it in a `with` statement."""

    def __init__(
        self,
        repository: Repository,
        session: str,
        mode: str,
        place: Place | None = None,
        *,
        at: str | None = None,
        lease: int = -1,
        progress: Progress | None = None,
    ) -> None:
        """Gets ready. The modes LAZY and OVERLAY need a `place`.

        `at` is where the command shall see the tree; else it is where the mount has it, or would
        have it. What the command leaves running keeps `lease`, a descriptor. `progress` hears of
        the bytes of a checkout.
        """
        self._repository, self._session, self._place = repository, session, place
        self.mode, self.at = mode, at
        self.warnings: tuple[str, ...] = ()
        self.reads: TreeReads | None = None
        """What was read in a full checkout, once the run is closed."""
        self._lease, self._progress = lease, progress
        self._held: HeldSession | None = None
        self._tree: SessionTree | None = None
        self._cover: OwnDirectory | None = None
        self._bare = False
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._ended: Ended | None = None
        self._said = b""
        self._tell = self._life = self._command = -1

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def shown(self) -> str:
        """Where the command sees the session's tree; of a checkout known once it has started."""
        if self.at is not None:
            return self.at
        if self._bare and self._tree is not None:
            return self._tree.path
        return self.in_mount

    @property
    def in_mount(self) -> str:
        """Where the mount shows the session's tree, or would."""
        mountpoint = ""
        if self._place is not None:
            mountpoint = self._place.mountpoint
        elif self._cover is not None:
            mountpoint = self._cover.path
        return os.path.join(mountpoint, "sessions", self._session)

    def start(
        self,
        command: Sequence[str],
        *,
        below: str = "",
        mask: Sequence[int] | None = None,
        inherit: Sequence[int] = (),
    ) -> int:
        """Starts the command and returns its process id.

        Its directory is `below` in the session's tree, if there is one, else the tree's own. It
        begins with the signals of `mask` blocked, else those that the calling thread has, and
        inherits the descriptors `inherit` besides the first three. Raises NotFoundError,
        LeaseHeldError, ModeRefusedError, CommandMissingError, CommandRefusedError, OSError.
        """
        self.prepare(command[0])
        return self._launch(command, below, mask, inherit)

    def prepare(self, name: str) -> None:
        """Takes the session for a program `name`, if need be; raises as `start`, which calls it."""
        self._repository.sessions.get(self._session)
        if self.mode == LAZY or self._held is not None:
            return
        try:
            self._held = self._take(f"running {name}")
            if self.mode == OVERLAY:
                self._hand_over(self._held)
            else:
                self._check_out(self._held)
        except BaseException:
            self._give_back()
            raise

    def _hand_over(self, held: HeldSession) -> None:
        try:
            self._repository.hand_over(held)
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
            raise ModeRefusedError(OVERLAY, "the store's disk has no user attributes") from error

    def _check_out(self, held: HeldSession) -> None:
        tree = SessionTree(self._repository.store, self._repository.objects, held)
        with self._repository.storing():
            tree.make(self._progress)
        self._tree = tree
        if self._place is None:
            self._cover = take_own_directory(self._repository.path)

    def _take(self, what: str) -> HeldSession:
        """Takes the session from the daemon."""
        with contextlib.ExitStack() as stack:
            client = find_daemon(self._repository.path)  # who lends may be busy for long
            if client is not None:
                stack.enter_context(client)  # which keeps it for us
                try:
                    client.ask(messages.Lend(self._session))
                except DaemonError as error:
                    if error.kind == InUseError.__name__:
                        raise ModeRefusedError(self.mode, str(error)) from error
                    raise
            return self._repository.sessions.hold(self._session, what, wait=TAKE_SECONDS)

    def _layers(self) -> tuple[str, str, str, str]:
        """Returns what is to be mounted, as `Job` has it."""
        if self._held is not None and self.mode == OVERLAY:
            assert self._place is not None
            upper = self._held.upper()
            base = base_path(self._repository, self._held.session)
            lower = os.path.join(self._place.mountpoint, base)
            return lower, os.fsdecode(upper.root), os.fsdecode(upper.work), ""
        if self._tree is not None and not self._bare:
            return "", "", "", self._tree.path
        if self.mode == LAZY and self.at is not None:
            return "", "", "", self.in_mount
        return "", "", "", ""

    def _launch(
        self, command: Sequence[str], below: str, mask: Sequence[int] | None,
        inherit: Sequence[int],
    ) -> int:  # fmt: skip
        self._tell, told = os.pipe()
        lives, self._life = os.pipe()
        lease = self._held.lease.fileno() if self._held is not None else self._lease
        mountpoint, life, cover = "", -1, -1
        if self._cover is not None:
            mountpoint, cover = self._cover.path, self._cover.fileno()
        elif self._place is not None:
            mountpoint, life = self._place.mountpoint, self._place.life
        if mask is None:
            mask = list(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        job = Job(
            told, lives, lease, life, cover, mountpoint, *self._layers(), self.shown,
            f"amalgamfs:{self._session}", os.path.join(self.shown, below), list(map(int, mask)),
        )  # fmt: skip
        given = {told, lives, *(fd for fd in (lease, life, cover) if fd >= 0), *inherit}
        try:
            # -P: what lies in the directory where it starts is no module of ours.
            self._supervisor = subprocess.Popen(
                [sys.executable, "-P", "-m", "fsdriver.supervisor", json.dumps(job), *command],
                pass_fds=tuple(given), cwd="/",
            )  # fmt: skip
        finally:
            os.close(told)
            os.close(lives)
        answer = self._read_start()
        if "started" in answer:
            self._command = int(answer["started"])
            return self._command
        self._drop_supervisor()
        if "refused" in answer:
            step, code = answer["refused"]
            if self.mode == FULL and self.at is None and not self._bare:
                self._bare = True  # then it is where it is
                return self._launch(command, below, mask, inherit)
            error = OSError(code, os.strerror(code), step)
            if self._held is not None or self.at is not None:
                raise ModeRefusedError(self.mode, f"{step}: {os.strerror(code)}") from error
            raise error
        if "failed" in answer:
            code = int(answer["failed"])
            self.close()
            if code == errno.ENOENT:
                raise CommandMissingError(command[0])
            raise CommandRefusedError(command[0], os.strerror(code))
        raise SupervisorLostError

    def _read_start(self) -> dict[str, Any]:
        """Returns what the supervisor says first, or nothing; raises when it hangs.

        It goes into the mount, and may wait for a daemon that does not answer. The signals that
        would end us are held back meanwhile: one that has come is heeded.
        """
        began = time.monotonic()
        while b"\n" not in self._said and not self._can_read(HEED_SECONDS):
            waited = time.monotonic() - began
            if waited > BEGIN_SECONDS or signal.sigpending() & _ENDING:
                self._abandon()
                raise StartAbandonedError(f"it has not begun for {waited:.0f} seconds")
            if self._place is not None and self._place.mountpoint:
                try:
                    find_place(self._repository.path)
                except DaemonLostError:
                    self._abandon()
                    raise
        return self._read()

    def _can_read(self, seconds: float) -> bool:
        waiting = select.poll()
        waiting.register(self._tell, select.POLLIN)
        return bool(waiting.poll(seconds * 1000))

    def _abandon(self) -> None:
        """Kills a supervisor that hangs, and leaves it: it may wait in the kernel."""
        if self._supervisor is not None:
            self._supervisor.kill()
        self._drop_supervisor()

    def _read(self) -> dict[str, Any]:
        """Returns what the supervisor says next; nothing if it is gone."""
        while b"\n" not in self._said:
            part = os.read(self._tell, 4096)
            if not part:
                return {}
            self._said += part
        line, _, self._said = self._said.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    # While it runs.

    def wait(self) -> Ended:
        """Waits until the command has ended. Raises SupervisorLostError."""
        while self._ended is None:
            self._hear()
        return self._ended

    def _hear(self) -> bool:
        """Hears from the supervisor; tells whether the command has stopped."""
        answer = self._read()
        if not answer:
            raise SupervisorLostError
        if "ended" in answer:
            code = os.waitstatus_to_exitcode(answer["ended"])
            left = bool(answer["left"])
            killed = -code if code < 0 else None
            self._ended = Ended(128 + killed if killed else code, killed, left)
        return "stopped" in answer

    def wait_forwarding(self) -> Ended:
        """Waits likewise, and passes on the signals that come meanwhile; see `signals_held`."""
        fcntl.fcntl(self._tell, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(self._tell, fcntl.F_SETFL, os.O_ASYNC)
        while self._ended is None:
            if self._said or select.select([self._tell], [], [], 0)[0]:
                if self._hear() and _is_stopped(self._command):
                    os.kill(os.getpid(), signal.SIGSTOP)  # as the command would be seen to
                continue
            info = signal.sigwaitinfo(WATCHED)
            if info.si_signo in FORWARDED and info.si_code <= 0:  # else the terminal sent it to all
                self.send_signal(info.si_signo)
        return self._ended

    def send_signal(self, number: int) -> None:
        """Sends the command a signal."""
        if self._supervisor is not None:
            self._supervisor.send_signal(number)

    # Afterwards.

    def close(self) -> None:
        """Lets the mount have the session again; kills a command that has not ended.

        What was changed in a checkout is durably the session's then, and the checkout removed.
        After an error (a full disk) it stays, and whoever takes the session next tries again.
        """
        supervisor = self._supervisor
        if supervisor is not None:
            self._let_go()
            with contextlib.suppress(SupervisorLostError):
                self._wait_for_killed(supervisor)
        left = self._ended is not None and self._ended.left
        if left and supervisor is not None:
            # What is left goes on with the session, and the supervisor with both.
            if self._cover is not None:
                self._cover.hand_on()
                self._cover = None
            if self._place is not None:
                self._place.needed = True
            if self._held is not None:
                self._held.lease.describe(what="what a command left running", pid=supervisor.pid)
                self._held.lease.hand_on()
                self._held = None
        self._drop_supervisor(left=left)
        self._give_back()

    def _wait_for_killed(self, supervisor: subprocess.Popen[bytes]) -> None:
        """Waits for a command that was killed; one that waits in the kernel counts as left."""
        until = time.monotonic() + KILLED_SECONDS
        while self._ended is None:
            if not self._said and not self._can_read(max(0.0, until - time.monotonic())):
                self._ended = Ended(128 + signal.SIGKILL, signal.SIGKILL, left=True)
                who = f"process {supervisor.pid} waits for it"
                self.warnings += (f"the command does not end, though killed: {who}",)
                return
            self._hear()

    def _let_go(self) -> None:
        """Makes the supervisor kill the command, if that has not ended."""
        if self._life >= 0:
            os.close(self._life)
            self._life = -1

    def _drop_supervisor(self, *, left: bool = False) -> None:
        supervisor, self._supervisor = self._supervisor, None
        self._let_go()
        if self._tell >= 0:
            os.close(self._tell)
            self._tell = -1
        if supervisor is None:
            return
        if left:
            supervisor.returncode = 0  # it outlives us: nobody waits for it
            return
        try:
            supervisor.wait(KILLED_SECONDS)
        except subprocess.TimeoutExpired:
            supervisor.returncode = 0  # it waits in the kernel

    def _give_back(self) -> None:
        held, self._held = self._held, None
        if held is None:
            return
        try:
            if self._tree is not None:
                with contextlib.suppress(OSError):
                    self.reads = self._tree.reads()
                with self._repository.storing():
                    self.warnings = self._tree.take_in()
            elif self.mode == OVERLAY:
                held.take_back()
        finally:
            held.release()
            if self._cover is not None:
                self._cover.leave()
                self._cover = None


def _is_stopped(pid: int) -> bool:
    """Tells whether a process is stopped still: what stopped it may have stopped us, too."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"T"
    except OSError:
        return False


@contextlib.contextmanager
def signals_held() -> Iterator[list[int]]:
    """Holds back the signals that `Run.wait_forwarding` passes on, for the main thread.

    Gives the mask that there was before, with which the command is to begin.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    try:
        yield [int(number) for number in before]
    finally:
        for number in (signal.SIGIO, signal.SIGCHLD):  # those that only `wait_forwarding` is for
            signal.sigtimedwait([number], 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
