"""A command on trial: run in one folder after the other, ended with all that it started.

For `mountctl bisect`. The command has a process group of its own, nothing to read, and this
process's stderr for what it writes. A signal that would end this process ends the command first
and comes out of the next step as KeyboardInterrupt, so that what was made can be removed.
"""

import os
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from types import FrameType

from engine.errors import EngineError
from engine.host.removing import remove_tree
from fsdriver.running import CommandMissingError, CommandRefusedError

LOOK = 0.5
"""Seconds after which it is looked, at the latest, whether this process was asked to end."""
PATIENCE = 5.0
"""Seconds that a command has to end after it was asked to, before it is killed."""

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class TrialAbortedError(EngineError):
    """The command ended in a way that is no verdict."""

    def __init__(self, command: str, snapshot: str, how: str) -> None:
        super().__init__(f"{command!r} {how} in snapshot {snapshot}, which is no verdict")
        self.command, self.snapshot, self.how = command, snapshot, how


class Trials:
    """Runs a command in folders; in a `with` statement, which gives a place for folders."""

    def __init__(self, command: Sequence[str]) -> None:
        """Raises CommandMissingError if the command cannot be found from any folder."""
        if os.sep not in command[0] and shutil.which(command[0]) is None:
            raise CommandMissingError(command[0])
        self._command = list(command)
        self._child: subprocess.Popen[bytes] | None = None
        self._asked = False
        self._old: dict[int, object] = {}
        self.place = ""

    def __enter__(self) -> "Trials":
        for number in (*_ENDING, signal.SIGALRM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                self._old[number] = signal.signal(number, self._end)
        try:
            self.place = tempfile.mkdtemp(prefix="amalgamfs-bisect-")
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.remove(self.place)
        finally:
            self._restore()

    def _restore(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # it came from there

    def _end(self, number: int, frame: FrameType | None) -> None:
        again, self._asked = self._asked, True
        self._stop(signal.SIGKILL if again else signal.SIGTERM)

    def _stop(self, number: int) -> None:
        """Signals the command, if there is one, and comes again if it does not end."""
        if self._child is not None:
            _signal_group(self._child.pid, number)
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)

    def check(self, *_: object) -> None:
        """Raises KeyboardInterrupt if this process was asked to end."""
        if self._asked:
            raise KeyboardInterrupt

    def folder(self, name: str) -> str:
        """Returns a path that does not exist yet."""
        return os.path.join(self.place, name)

    def remove(self, folder: str) -> None:
        """Removes a folder and all that is in it, whatever its permissions."""
        remove_tree(os.fsencode(folder))

    def run(self, folder: str, variables: Mapping[str, str]) -> int:
        """Runs the command in a folder; returns its exit code, -N if signal N killed it.

        What it left running is killed. Raises CommandMissingError, CommandRefusedError.
        """
        self.check()
        try:
            self._child = subprocess.Popen(
                self._command, cwd=folder, env={**os.environ, **variables, "PWD": folder},
                stdin=subprocess.DEVNULL, stdout=2, process_group=0,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise CommandMissingError(self._command[0]) from error
        except OSError as error:
            why = error.strerror or str(error)
            raise CommandRefusedError(self._command[0], why) from error
        try:
            if self._asked:  # since the check, when there was nothing to signal
                self._stop(signal.SIGTERM)
            # Not reaped yet, so that its group's number is still its own.
            _wait(self._child.pid)
            _signal_group(self._child.pid, signal.SIGKILL)
            code = self._child.wait()
        finally:
            self._child = None
        self.check()
        return code


def _wait(pid: int) -> None:
    """Waits until a process has ended, and leaves it to be reaped.

    Looks up now and then: a signal that comes when Python is about to wait, and has just looked for
    signals, would else be acted on only when the process ends, which it was to bring about.
    """
    handle = os.pidfd_open(pid)
    try:
        while not select.select([handle], [], [], LOOK)[0]:
            pass
    finally:
        os.close(handle)


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        pass  # all have ended
