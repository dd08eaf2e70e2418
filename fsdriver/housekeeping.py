"""Housekeeping: a daemon collects its store's garbage now and then, and gives room back.

Due every so often, and when the disk has little room left. What is due for its time alone
waits until nobody has used the mount for a while, but not for ever. The collection runs in a
process of its own; the compaction that may follow is the daemon's, because only who has the
store's file open can put another in its place; its readers wait for a tenth of a second.
"""

import json
import os
import sys
import time
from collections.abc import Callable

import msgspec
import structlog
import trio

from engine import EngineError, Repository

LOOK_SECONDS = 30.0
QUIET_SECONDS = 10.0
"""How long a mount is not used before it counts as idle."""
LATEST_SECONDS = 3600.0
"""How long what is due waits for that."""
AGAIN_SECONDS = 600.0
"""How long after one collection another may begin, however little room there is."""
WORTH_BYTES, WORTH_SHARE = 64 << 20, 0.25
"""A compaction follows where so many bytes of the file, and such a share of it, are free."""
LITTLE_BYTES = 1 << 20
"""The same where the disk has little room."""
LITTLE_ROOM = "little room"

log = structlog.get_logger("housekeeping")


class Schedule(msgspec.Struct, frozen=True):
    """When to collect: `every` so many seconds, and `below` such a share of free room; 0: never."""

    every: float = 0.0
    below: float = 0.0
    look: float = LOOK_SECONDS


class Housekeeping:
    """The schedule of one mount."""

    def __init__(
        self, repository: Repository, schedule: Schedule, requests: Callable[[], int]
    ) -> None:
        """Gets ready; `requests` counts what the kernel has asked so far."""
        self._repository, self._schedule, self._requests = repository, schedule, requests
        self._started = time.time()
        self._asked, self._asked_at = -1, time.monotonic()
        self._last, self._last_state = -AGAIN_SECONDS, -1

    async def run(self) -> None:
        """Looks after the store until cancelled."""
        if not self._schedule.every and not self._schedule.below:
            return
        while True:
            await trio.sleep(self._schedule.look)
            reason = self._due()
            if reason:
                await self._collect(reason)

    def _due(self) -> str:
        """Says why a collection is due now; empty if none is."""
        now, store = time.monotonic(), self._repository.store
        if (asked := self._requests()) != self._asked:
            self._asked, self._asked_at = asked, now
        schedule = self._schedule
        if schedule.below and now - self._last >= min(AGAIN_SECONDS, 10 * schedule.look):
            disk = os.statvfs(self._repository.path)
            little = disk.f_bavail < schedule.below * disk.f_blocks
            if little and store.transaction_id() != self._last_state:
                return LITTLE_ROOM
        if schedule.every:
            before = max(self._repository.collected_ns() / 1e9, self._started)
            overdue = time.time() - before - schedule.every
            quiet = now - self._asked_at >= min(QUIET_SECONDS, schedule.look)
            if overdue >= 0 and (quiet or overdue >= LATEST_SECONDS):
                return "time"
        return ""

    async def _collect(self, reason: str) -> None:
        path, store = self._repository.path, self._repository.store
        log.info("collecting", reason=reason)
        self._started = time.time()  # what failed is tried again when it is due again
        try:
            done = await trio.run_process(
                [sys.executable, "-P", "-m", "fsdriver.collector", path],
                capture_stdout=True, check=False, cwd="/",
            )  # fmt: skip
            self._started = time.time()
            log.info("collected", status=done.returncode, **json.loads(done.stdout or b"{}"))
            facts = store.statistics()
            free = facts.file_bytes - facts.used_bytes
            worth = LITTLE_BYTES if reason == LITTLE_ROOM else WORTH_BYTES
            if free > worth and free > WORTH_SHARE * facts.file_bytes:
                report = await trio.to_thread.run_sync(self._repository.compact)
                log.info("compacted", before=report.bytes_before, after=report.bytes_after)
        except (EngineError, OSError, ValueError) as error:
            log.warning("not compacted", kind=type(error).__name__, error=str(error))
        self._last, self._last_state = time.monotonic(), store.transaction_id()
