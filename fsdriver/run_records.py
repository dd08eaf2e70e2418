"""What earlier runs took and did, for the next to be estimated by.

The file `runs` in the store's directory: one run per line, JSON, the latest last; a line that
cannot be read is passed over. It is advice: losing it costs an estimate, nothing else, so it is
not in the database, whose only writer a run would have to wait for. Beside it lies `costs`,
what the modes cost on this machine.
"""

import os
import platform
import secrets
import shlex
from collections.abc import Iterable, Sequence

import msgspec

from engine.host.leases import LeaseHeldError, acquire
from engine.host.own_files import open_own
from engine.ids import SnapshotId, digest
from fsdriver.cost_model import ELSEWHERE, Costs, Outcome

KEPT = 1000
"""How many runs are kept at least."""
ENOUGH = 10
"""How many runs an estimate rests on at most."""

RUNS, COSTS = "runs", "costs"
"""The names of the two files."""

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_LARGEST = 1 << 20
_WAIT = 1.0


class RunRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One run. `base` is the snapshot that its tree stands on, `estimates` seconds by mode."""

    started_ns: int
    key: str
    command: str
    base: str
    target: str
    outcome: Outcome
    exit_code: int
    asked: str
    """The mode that was asked for."""
    estimates: dict[str, float] = {}


def key_of(command: Sequence[str]) -> str:
    """Returns what stands for a command word by word: 16 hexadecimal digits."""
    return digest(b"\0".join(map(os.fsencode, command)))[:8].hex()


def shown(command: Sequence[str]) -> str:
    """Returns a command as a shell takes it, for people; what is no text is replaced."""
    return os.fsencode(shlex.join(command)).decode("utf-8", "replace")


class RunRecords:
    """The runs of a store, and the machine's costs."""

    def __init__(self, store: str) -> None:
        self._store = store

    def add(self, record: RunRecord) -> None:
        """Keeps a run; of one that cannot be kept nothing is said. Raises OSError."""
        line = msgspec.json.encode(record) + b"\n"
        try:
            lease = acquire(self._store, "runs", wait=_WAIT)
        except LeaseHeldError:
            return
        with lease:
            fd = open_own(self._store, RUNS, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            with open(fd, "ab") as file:
                if file.tell():
                    line = b"\n" + line  # should the last one have been cut off
                file.write(line)
                size = file.tell()
            if size > _LARGEST:
                self._keep(self.all()[-KEPT:])

    def _keep(self, records: Sequence[RunRecord]) -> None:
        lines = b"".join(msgspec.json.encode(record) + b"\n" for record in records)
        self._replace(RUNS, lines)

    def all(self) -> list[RunRecord]:
        """Returns all runs, the latest last. Raises OSError."""
        try:
            with open(open_own(self._store, RUNS, os.O_RDONLY), "rb") as file:
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            try:
                found.append(msgspec.json.decode(line, type=RunRecord))
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue
        return found

    def like(self, command: Sequence[str], lineage: Iterable[SnapshotId]) -> list[RunRecord]:
        """Returns the runs of a command that no signal has ended, the latest last.

        Those on a tree of `lineage`, snapshots that it came from and itself, if there are any.
        """
        key = key_of(command)
        same = [each for each in self.all() if each.key == key and each.exit_code < 128]
        bases = {identifier.hex() for identifier in lineage} if same else set()
        return [each for each in same if each.base in bases] or same

    def costs(self) -> Costs:
        """Returns the machine's costs, or those of another one. Raises OSError."""
        try:
            with open(open_own(self._store, COSTS, os.O_RDONLY), "rb") as file:
                costs = msgspec.json.decode(file.read(), type=Costs)
        except (FileNotFoundError, msgspec.DecodeError):
            return ELSEWHERE
        complete = costs.modes.keys() >= ELSEWHERE.modes.keys()
        return costs if complete and costs.machine == this_machine() else ELSEWHERE

    def set_costs(self, costs: Costs) -> None:
        """Keeps the machine's costs. Raises OSError."""
        self._replace(COSTS, msgspec.json.encode(costs) + b"\n")

    def _replace(self, name: str, data: bytes) -> None:
        temporary = f"{name}.{secrets.token_hex(4)}"
        path = os.path.join(self._store, temporary)
        try:
            with open(open_own(self._store, temporary, _NEW), "wb") as file:
                file.write(data)
            os.replace(path, os.path.join(self._store, name))
        except BaseException:
            if os.path.lexists(path):
                os.unlink(path)
            raise


def this_machine() -> str:
    """Returns what stands for this machine and its kernel."""
    return f"{platform.node()} {platform.release()}"
