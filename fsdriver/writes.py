"""Whole writes: what of a write(2) comes in several messages is in a snapshot whole, or not at all.

The kernel passes most of them on in one WRITE. It cuts one that is longer than a message, and one
that begins in the middle of a page that it has not cached whole: it sends the first page alone then
(`fuse_fill_write_pages`: it must not hold two such pages locked). Each WRITE but the last ends with
a page, and the file's inode is locked until the last one is answered. So whoever is about to
freeze a session lets no write(2) begin, and waits for the rest of those that may have one.

A write that happens to end with a page looks as if more came, hence there is a bound: HALF_SECONDS
after a message nothing more is waited for. Serves the thread of the mount.
"""

import trio

HALF_SECONDS = 0.05
"""How long after its first part the rest of a write(2) is waited for."""
ALL_SECONDS = 1.0
"""How long at most for all parts: of one of hundreds of MB each may be in time."""

IN_PAGE = 4095
_MANY = 1000
"""With more files than that, those that nothing more came for are forgotten."""


class Writes:
    """The WRITEs of one mount."""

    def __init__(self) -> None:
        self.halves: dict[int, float] = {}
        """The files of which more may come, and when the last part came."""
        self.gate: trio.Event | None = None
        """Only while somebody waits, and who writes has to `begin`: set when they may."""
        self._changed: trio.Event | None = None

    async def begin(self, ino: int) -> None:
        """Returns when a WRITE may be carried out: at once, but while somebody waits."""
        while (gate := self.gate) is not None and ino not in self.halves:
            await gate.wait()

    def end(self, ino: int, offset: int, size: int, largest: int) -> None:
        """Notes that a WRITE was carried out: more may come, or the one before is whole.

        Nothing changes, and nobody need call it, without `halves` and inside of a page.
        """
        if not (offset + size) & IN_PAGE and (offset & IN_PAGE or size >= largest):
            self.halves[ino] = trio.current_time()
            if len(self.halves) > _MANY:
                self._waited_for()
        elif self.halves:
            self.halves.pop(ino, None)
        else:
            return
        if self._changed is not None:
            self._changed.set()

    def _waited_for(self) -> float | None:
        """Forgets what took too long; returns when the next one will, None without any."""
        now = trio.current_time()
        for ino in [ino for ino, at in self.halves.items() if now - at >= HALF_SECONDS]:
            del self.halves[ino]
        return min(self.halves.values()) + HALF_SECONDS if self.halves else None

    async def wait_until_whole(self) -> None:
        """Returns in a moment when no write(2) is known to be half done, ALL_SECONDS at most.

        The caller must not give other tasks a turn until it is done.
        """
        gate = self.gate = trio.Event()
        try:
            with trio.move_on_after(ALL_SECONDS):
                while (until := self._waited_for()) is not None:
                    self._changed = trio.Event()
                    with trio.move_on_at(until):
                        await self._changed.wait()
        finally:
            self._changed = self.gate = None
            gate.set()
