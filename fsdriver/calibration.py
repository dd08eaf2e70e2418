"""Measures what the modes of `run` cost on this machine, for `cost_model`.

In a store of its own beside the real one, so on the same disk: trees of many small files and of
one large one, in which this module's program works, in a plain directory and in each mode. What
a mode takes longer, by the number of things that were done, is its cost.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import msgspec

from engine.errors import EngineError
from engine.ids import SnapshotId
from engine.repository import Repository
from engine.sessions.sessions import Session
from fsdriver import messages
from fsdriver.choosing import Attempt
from fsdriver.client import find_daemon
from fsdriver.cost_model import ELSEWHERE, FULL, LAZY, OVERLAY, Costs, ModeCosts, Outcome
from fsdriver.launch import LaunchError
from fsdriver.run_records import this_machine
from fsdriver.running import ModeRefusedError, mounted

FOLDERS, FILES, FILE_BYTES = 30, 50, 4096
LARGE_BYTES = 48 << 20
MADE, REWRITTEN, REMOVED, WRITTEN = 400, 200, 400, 32 << 20
"""How many files, and bytes, are worked on."""
TIMES = 2
"""How often each is done; the fastest counts."""

Phases = dict[str, float]


class Measured(msgspec.Struct, frozen=True):
    """One run: what it took but for the program's start, what its phases took, what it did."""

    seconds: float
    phases: Phases
    outcome: Outcome


# The program that works.


def main(arguments: Sequence[str]) -> int:
    """Does what the words after the first say, here; the times go to the first, a file."""
    report, *names = arguments
    phases = {}
    for name in names:
        began = time.perf_counter()
        _PHASES[name]()
        phases[name] = time.perf_counter() - began
    with open(report, "w", encoding="ascii") as file:
        json.dump(phases, file)
    return 0


def _read() -> None:
    for folder, _, names in os.walk("."):
        for name in names:
            with open(os.path.join(folder, name), "rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass


def _make() -> None:
    os.mkdir("made")
    for number in range(MADE):
        with open(f"made/{number}", "wb", buffering=0) as file:
            file.write(b"x" * FILE_BYTES)


def _rewrite() -> None:
    for number in range(REWRITTEN):
        with open(f"{number % FOLDERS}/{number // FOLDERS}", "ab", buffering=0) as file:
            file.write(b"more")


def _write() -> None:
    with open("written", "wb", buffering=0) as file:
        file.writelines(bytes(1 << 17) for _ in range(WRITTEN >> 17))


def _remove() -> None:
    for number in range(REWRITTEN, REWRITTEN + REMOVED):
        os.unlink(f"{number % FOLDERS}/{number // FOLDERS}")


_PHASES = {
    "read": _read, "make": _make, "rewrite": _rewrite, "write": _write, "remove": _remove,
}  # fmt: skip


# What has it work.


def calibrate(store: str) -> Costs:
    """Returns what the modes cost here; a mode that is not possible has another machine's costs.

    Takes 10 to 20 seconds. Raises OSError, StoreFullError.
    """
    with (
        tempfile.TemporaryDirectory(prefix="calibrating-", dir=store) as home,
        Repository.create(os.path.join(home, "store")) as repository,
    ):
        bench = _Bench(repository, home)
        modes, mount = {}, ELSEWHERE.mount
        disk = bench.on_disk()
        bench.find_program_seconds()
        for mode in (LAZY, OVERLAY):
            with contextlib.suppress(ModeRefusedError, LaunchError):
                modes[mode], mount = bench.of_mount(mode, disk)
        modes[FULL] = bench.of_checkout(disk)
    return Costs(mount, {**ELSEWHERE.modes, **modes}, this_machine(), time.time_ns())


class _Bench:
    def __init__(self, repository: Repository, home: str) -> None:
        self._repository, self._home = repository, home
        self._report = os.path.join(home, "report")
        noise = random.Random(0)
        self.small = self._tree("small", _small_files(noise))
        self.large = self._tree("large", iter([("large", noise.randbytes(LARGE_BYTES))]))
        self.empty = self._tree("empty", iter(()))
        self._program = 0.0

    def _tree(self, name: str, files: Iterator[tuple[str, bytes]]) -> SnapshotId:
        root = os.path.join(self._home, name)
        os.mkdir(root)
        for path, data in files:
            os.makedirs(os.path.dirname(os.path.join(root, path)), exist_ok=True)
            with open(os.path.join(root, path), "wb") as file:
                file.write(data)
        return SnapshotId(self._repository.import_directory(root).snapshot)

    def _command(self, names: Sequence[str]) -> list[str]:
        return [sys.executable, "-P", "-m", "fsdriver.calibration", self._report, *names]

    def find_program_seconds(self) -> None:
        """Finds how long the program takes to start, which no mode is to blame for."""
        times = []
        for _ in range(TIMES):
            began = time.perf_counter()
            subprocess.run(self._command([]), cwd=self._home, check=True)
            times.append(time.perf_counter() - began)
        self._program = min(times)

    def _run(self, mode: str, snapshot: SnapshotId, *names: str) -> Measured:
        """Runs the program in a mode, `TIMES` times; returns the fastest."""
        command = self._command(names)
        found = []
        for _ in range(TIMES):
            session, lease = self._repository.sessions.create_temporary(snapshot)
            with lease:
                with Attempt(self._repository, session.name, [mode]) as attempt:
                    code = attempt.start(command).wait().exit_code
                outcome = attempt.outcome()
                self._remove(session)
            if code:
                raise CalibrationFailedError(mode)
            seconds = max(0.0, attempt.seconds - self._program)
            found.append(Measured(seconds, _read_report(self._report), outcome))
        return min(found, key=lambda each: each.seconds)

    def _remove(self, session: Session) -> None:
        client = find_daemon(self._repository.path)
        if client is not None:
            with client:
                client.ask(messages.Remove(session.name, force=True))
            return
        sessions = self._repository.sessions
        sessions.remove(sessions.hold(session.name, "calibrating"))

    def on_disk(self) -> Phases:
        """Returns what the phases take in plain directories."""
        phases = {}
        for snapshot, names in ((self.small, [*_PHASES]), (self.large, ["read"])):
            times = []
            for number in range(TIMES):
                target = os.path.join(self._home, f"plain-{len(names)}-{number}")
                root = self._repository.snapshot(snapshot).root
                self._repository.check_out(root, target, tracked=False)
                here = os.getcwd()
                os.chdir(target)
                try:
                    main([self._report, *names])
                finally:
                    os.chdir(here)
                times.append(_read_report(self._report))
            label = "" if snapshot == self.small else "large "
            for name in names:
                phases[label + name] = min(each[name] for each in times)
        return phases

    def of_mount(self, mode: str, disk: Phases) -> tuple[ModeCosts, float]:
        """Returns what a mode in a mount costs, and a mount."""
        alone = self._run(mode, self.empty)
        with mounted(self._repository.path):
            start = self._run(mode, self.empty).seconds
        small, large = self._run(mode, self.small, *_PHASES), self._run(mode, self.large, "read")
        took, other = small.phases, ELSEWHERE.modes[mode]
        costs = ModeCosts(
            start,
            asked=_each(took["read"] - disk["read"], small.outcome.work.asked, other.asked),
            read=_each(large.phases["read"] - disk["large read"], LARGE_BYTES, other.read),
            made=_each(took["make"] - disk["make"], MADE, other.made),
            rewritten=_each(took["rewrite"] - disk["rewrite"], REWRITTEN, other.rewritten),
            written=_each(took["write"] - disk["write"], WRITTEN, other.written),
            removed=_each(took["remove"] - disk["remove"], REMOVED, other.removed),
        )
        return costs, _each(alone.seconds - start, 1, ELSEWHERE.mount)

    def of_checkout(self, disk: Phases) -> ModeCosts:
        """Returns what a checkout costs."""
        other = ELSEWHERE.modes[FULL]
        start = self._run(FULL, self.empty).seconds
        byte = _each(self._run(FULL, self.large).seconds - start, LARGE_BYTES, other.byte)
        bare = self._run(FULL, self.small).seconds
        small_bytes = FOLDERS * FILES * FILE_BYTES
        made = self._run(FULL, self.small, "make")
        write = self._run(FULL, self.empty, "write")
        return ModeCosts(
            start, byte=byte,
            entry=_each(bare - start - byte * small_bytes, FOLDERS * (FILES + 1), other.entry),
            made=(new := _each(made.seconds - made.phases["make"] - bare, MADE, other.made)),
            rewritten=new,
            written=_each(write.seconds - write.phases["write"] - start, WRITTEN, other.written),
        )  # fmt: skip


class CalibrationFailedError(EngineError):
    """The program that was to be timed failed."""

    def __init__(self, mode: str) -> None:
        super().__init__(f"the program to be timed failed in mode {mode!r}")
        self.mode = mode


def _small_files(noise: random.Random) -> Iterator[tuple[str, bytes]]:
    for folder in range(FOLDERS):
        for file in range(FILES):
            yield f"{folder}/{file}", noise.randbytes(FILE_BYTES)


def _read_report(path: str) -> Phases:
    with open(path, "rb") as file:
        phases: Phases = json.load(file)
    return phases


def _each(seconds: float, number: int, elsewhere: float) -> float:
    """Returns the share of one; where noise hides that there is a cost, that of elsewhere."""
    return seconds / number if number and seconds > 0 else elsewhere


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
