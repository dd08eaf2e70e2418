"""The control socket: what the command line asks of a running mount.

Only the user who mounted, and root, are answered. One request at a time is carried out; the
kernel's requests are answered meanwhile, except in the moment in which a commit changes over.
"""

import contextlib
import errno
import functools
import os
import socket
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import msgspec
import structlog
import trio

from engine import EngineError, SnapshotId
from engine.ids import check_name
from engine.mounted.vfs import LAYERS, SESSIONS, SNAPSHOTS, LiveSession, Vfs
from engine.sessions.changes import refuse_changes
from engine.sessions.freezing import Freeze
from engine.storage.nodes import encode
from fsdriver import messages, metrics
from fsdriver.channel import Channel
from fsdriver.client import bind, socket_path
from fsdriver.errnos import is_of_memory
from fsdriver.operations import Operations
from fsdriver.pressure import Pressure, give_back

LONGEST_REQUEST = 1 << 20
AHEAD = 3
"""How often a tree is built ahead of a commit, until nothing was changed meanwhile."""
SPARES = 12
"""Descriptors kept for clients: `status` and `umount` get through when there are no others.

So many that the process which unmounts can be started.
"""
FULL_POLL = 0.1
"""How often it is looked for a descriptor when those are in use too, in seconds."""
ANSWER_SECONDS = 5.0
"""How long a client that does not read is waited for; then it is hung up on."""

FORGET_POLL, FORGET_SECONDS = 0.01, 0.25
"""How often it is looked what the kernel gives back, and how long after nothing came any more."""

log = structlog.get_logger("control")

T = TypeVar("T")


SLOW_SECONDS = 5.0
"""Of a request that took longer, the log tells."""
STILL_SECONDS = 2.0
"""Of a moment that long in which nothing was served, the log tells."""
LEND_SECONDS = 5.0
"""How long the kernel may take to give back the files of a session that is to be lent."""

_CHANGING = {messages.Commit, messages.Fork, messages.Reset, messages.Remove, messages.Rename}
"""What changes names in the mount's own directories."""


def _refill(spares: list[int]) -> None:
    """Opens the descriptors that are missing among the spares, if there are any left."""
    with contextlib.suppress(OSError):
        while len(spares) < SPARES:
            spares.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


class Control:
    """Answers clients for one mount."""

    def __init__(
        self, vfs: Vfs, operations: Operations, channel: Channel, facts: messages.Status
    ) -> None:
        self._vfs, self._operations, self._channel, self._facts = vfs, operations, channel, facts
        self._turn = trio.Lock()
        self._spares: list[int] = []
        self._doing: dict[int, tuple[str, float]] = {}
        """What clients wait for, and since when: by any number."""
        self._sheds = 0
        vfs.texts["metrics"] = self._metrics
        self._handlers: dict[type, Callable[..., Awaitable[messages.AnyReply]]] = {
            messages.GetStatus: self._status,
            messages.GetStatistics: self._statistics,
            messages.Commit: self._commit,
            messages.Fork: self._fork,
            messages.Freeze: self._freeze,
            messages.Reset: self._reset,
            messages.Remove: self._remove,
            messages.Rename: self._rename,
            messages.Lend: self._lend,
            messages.Refresh: self._refresh,
            messages.Shed: self._shed,
            messages.Compact: self._compact,
            messages.Shutdown: self._shutdown,
        }

    async def serve(self, listener: socket.socket) -> None:
        """Answers connections on a bound socket until cancelled."""
        server = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
        spares = self._spares
        _refill(spares)
        try:
            async with server, trio.open_nursery() as nursery:
                while True:
                    try:
                        stream = await server.accept()
                    except OSError as error:
                        if error.errno not in {errno.EMFILE, errno.ENFILE}:
                            raise
                        if spares:
                            os.close(spares.pop())
                        else:  # each client bounds its own wait
                            await trio.sleep(FULL_POLL)
                        continue
                    nursery.start_soon(self._admitted, stream)
        finally:
            self._release()

    def _release(self) -> None:
        while self._spares:
            os.close(self._spares.pop())

    async def _admitted(self, stream: trio.SocketStream) -> None:
        try:
            await self._connection(stream)
        finally:
            await trio.aclose_forcefully(stream)
            _refill(self._spares)

    async def _connection(self, stream: trio.SocketStream) -> None:
        raw = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        _, uid, _ = struct.unpack("iII", raw)
        if uid not in {0, os.geteuid()}:
            log.warning("refused a client", uid=uid)
            await stream.aclose()
            return
        buffer = b""
        lent: list[str] = []
        try:
            async for part in stream:
                buffer += part
                while b"\n" in buffer:
                    line, _, buffer = buffer.partition(b"\n")
                    # What was begun is ended and answered, though the mount may end meanwhile.
                    with trio.CancelScope(shield=True):
                        reply = await self._answer(line, lent)
                        with trio.move_on_after(ANSWER_SECONDS) as patience:
                            await stream.send_all(msgspec.json.encode(reply) + b"\n")
                    if patience.cancelled_caught:
                        return  # what it has of this answer is not whole: no other may follow
                if len(buffer) > LONGEST_REQUEST:
                    return
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return  # the client went away; what it asked for is done
        finally:
            for session in lent:
                self._vfs.lent_out(session)
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.aclose()

    async def _answer(self, line: bytes, lent: list[str]) -> messages.AnyReply:
        began = trio.current_time()
        try:
            request = msgspec.json.decode(line, type=messages.AnyRequest)
            if not isinstance(request, messages.GetStatus):
                self._doing[id(request)] = (_words(request), began)
            try:
                reply = await self._handlers[type(request)](request)
            finally:
                what, _ = self._doing.pop(id(request), ("", 0))
                took = trio.current_time() - began
                if took > SLOW_SECONDS:
                    log.warning("a request took long", what=what, seconds=round(took, 1))
            if isinstance(request, messages.Lend):
                lent.append(request.session)
            if type(request) in _CHANGING:
                await self.refresh()
            return reply
        except (EngineError, msgspec.MsgspecError, ValueError, OSError) as error:
            return messages.Failed(type(error).__name__, str(error))
        except Exception as error:
            if is_of_memory(error):
                with contextlib.suppress(MemoryError):
                    log.error("no memory for a request")
                return messages.Failed("MemoryError", "the mount's daemon has not enough memory")
            log.exception("a request crashed")
            return messages.Failed(type(error).__name__, str(error))

    async def _status(self, request: messages.GetStatus) -> messages.AnyReply:
        now = trio.current_time()
        doing = [messages.Doing(what, now - since) for what, since in self._doing.values()]
        return msgspec.structs.replace(self._facts, sessions=sorted(self._vfs.live), doing=doing)

    async def _statistics(self, request: messages.GetStatistics) -> messages.AnyReply:
        groups = {**self._groups(), "moved": self._vfs.moved()}
        return messages.Statistics(groups, self._operations.timings)

    def _groups(self) -> dict[str, dict[str, int]]:
        vfs, timings = self._vfs, self._operations.timings
        ahead = self._operations.ahead
        return {
            "vfs": msgspec.to_builtins(vfs.statistics()),
            "objects": msgspec.to_builtins(vfs.repository.objects.statistics()),
            "process": msgspec.to_builtins(metrics.of_this_process()),
            "operations": {name: timing.count for name, timing in timings.items()},
            "pressure": {"sheds": self._sheds},
            "ahead": msgspec.to_builtins(ahead.statistics()) if ahead else {},
            "messages": self._channel.counts(),
        }

    def requests(self) -> int:
        """Returns how many requests of the kernel were answered so far."""
        return sum(timing.count for timing in self._operations.timings.values())

    def _metrics(self) -> str:
        """Returns the text of `/.amalgam/metrics`."""
        groups = self._groups()
        del groups["operations"]  # their timings have it
        return "\n".join(metrics.exposition(groups, self._operations.timings)) + "\n"

    @contextlib.asynccontextmanager
    async def _frozen(self, name: str) -> AsyncIterator[tuple[LiveSession, Freeze]]:
        """Freezes a session as far as that can be done while programs write on.

        Garbage collection is kept away until what is stored here has something that refers to it.
        """
        async with self._turn:
            live = self._vfs.session(name)
            storing = self._vfs.repository.storing()
            await trio.to_thread.run_sync(storing.__enter__)
            try:
                freeze = live.held.freeze(live.overlay)
                await trio.to_thread.run_sync(freeze.prepare)
                for _ in range(AHEAD):
                    freeze.mark()
                    await trio.to_thread.run_sync(freeze.build_ahead)
                    if freeze.is_ahead():
                        break
                await self._operations.writes.wait_until_whole()
                yield live, freeze  # and until it is frozen, no other task gets a turn
            finally:
                live.overlay.changed = None
                storing.__exit__(None, None, None)

    async def _change_over(self, work: Callable[[], T]) -> T:
        """Does `work`, which ends in a write to the store, while nothing else is done here.

        The turn to write is waited for in a thread: another process may have it for long, as an
        import does, and the mount is served meanwhile.
        """
        store, token = self._vfs.repository.store, trio.lowlevel.current_trio_token()
        still, done = threading.Event(), threading.Event()

        def stand_still() -> None:
            still.set()
            done.wait()

        def wait_and_work() -> T:
            try:
                with store.turn():
                    token.run_sync_soon(stand_still)
                    still.wait()
                    return work()
            finally:
                done.set()

        return await trio.to_thread.run_sync(wait_and_work)

    async def _commit(self, request: messages.Commit) -> messages.AnyReply:
        if request.ref is not None:
            check_name("ref", request.ref)
        async with self._frozen(request.session) as (live, freeze):
            report = await self._change_over(
                lambda: live.held.commit(
                    freeze, request.message, request.metadata, request.ref, live.overlay
                )
            )
            await trio.to_thread.run_sync(live.held.clean)
        return messages.Committed(
            report.snapshot.hex(),
            report.changed,
            report.new_bytes,
            list(report.warnings),
            report.lost_owners,
            report.lost,
        )

    async def _fork(self, request: messages.Fork) -> messages.AnyReply:
        check_name("session", request.name)
        async with self._frozen(request.session) as (live, freeze):
            await self._change_over(
                lambda: live.held.fork(freeze, request.name, live.overlay)
            )  # fmt: skip
        return messages.Done()

    async def _freeze(self, request: messages.Freeze) -> messages.AnyReply:
        async with self._frozen(request.session) as (live, freeze):
            root = live.held.peek_root(freeze, live.overlay)
            store = self._vfs.repository.store
            await trio.to_thread.run_sync(functools.partial(store.write, freeze.save))
        return messages.Frozen(encode(root))

    async def _reset(self, request: messages.Reset) -> messages.AnyReply:
        name, to = request.session, None
        if request.to is not None:
            to = SnapshotId(bytes.fromhex(request.to))
        if request.paths:
            async with self._frozen(name) as (_, freeze):
                await self._change_over(lambda: self._vfs.restore(name, freeze, request.paths))
                await self._channel.forget_entry(SESSIONS, name.encode())
            return messages.Done()
        await self._throw_away(
            name, request.force, lambda: self._vfs.reset(name, to, factory=request.factory)
        )
        return messages.Done()

    async def _remove(self, request: messages.Remove) -> messages.AnyReply:
        name = request.session
        await self._throw_away(name, request.force, lambda: self._vfs.remove(name))
        return messages.Done()

    async def _throw_away(self, name: str, force: bool, work: Callable[[], object]) -> None:
        """Does what throws changes away; unless `force`, only if there are none.

        No program writes between the look and the work. Raises UncommittedChangesError.
        """
        repository = self._vfs.repository
        if force:
            async with self._turn:
                storing = repository.storing()
                await trio.to_thread.run_sync(storing.__enter__)
                try:
                    await self._change_over(work)
                finally:
                    storing.__exit__(None, None, None)
                await self._channel.forget_entry(SESSIONS, name.encode())
            return
        async with self._frozen(name) as (live, freeze):
            base = await trio.to_thread.run_sync(repository.sessions.stands_on, live.held.session)
            refuse = functools.partial(refuse_changes, repository.objects, name, base)
            if (ahead := freeze.ahead()) is not None:
                await trio.to_thread.run_sync(refuse, ahead.plain)

            def look_and_work() -> None:
                root = live.held.peek_root(freeze, live.overlay)
                if root != base:  # as where only the times of directories differ
                    repository.store.write(freeze.save)
                    refuse(root)
                work()

            await self._change_over(look_and_work)
            await self._channel.forget_entry(SESSIONS, name.encode())

    async def _rename(self, request: messages.Rename) -> messages.AnyReply:
        async with self._turn:
            await self._change_over(lambda: self._vfs.rename(request.session, request.name))
            await self._channel.forget_entry(SESSIONS, request.session.encode())
        return messages.Done()

    async def _lend(self, request: messages.Lend) -> messages.AnyReply:
        name = request.session
        async with self._turn:
            self._vfs.session(name)
            await self._channel.forget_entry(SESSIONS, name.encode())
            await self._wait_until_forgotten(name)
            for directory in self._vfs.lend(name):
                await self._channel.forget_inode(directory)
        return messages.Done()

    async def _wait_until_forgotten(self, name: str) -> None:
        """Waits while the kernel, told to forget a session, gives its files back."""
        before, waited, until = 0, 0.0, trio.current_time() + LEND_SECONDS
        while (count := len(self._vfs.files_in_use(name))) and waited < FORGET_SECONDS:
            if trio.current_time() > until:
                return
            waited = 0.0 if count != before else waited + FORGET_POLL
            before = count
            await trio.sleep(FORGET_POLL)

    async def _refresh(self, request: messages.Refresh) -> messages.AnyReply:
        await self.refresh()
        return messages.Done()

    async def refresh(self) -> None:
        """Makes the kernel list snapshots and sessions again, and forget those removed."""
        for directory in (SNAPSHOTS, SESSIONS, LAYERS):
            await self._channel.forget_inode(directory)
        for name in self._vfs.removed_snapshots():
            await self._channel.forget_entry(SNAPSHOTS, name)

    async def watch(
        self, seconds: float, pressure: Pressure, check_log: Callable[[], None]
    ) -> None:
        """Looks every so often whether somebody else has changed the store, or memory is short.

        And whether there is something to do about the log.
        """
        store = self._vfs.repository.store
        last = store.transaction_id()
        while True:
            due = trio.current_time() + seconds
            await trio.sleep_until(due)
            if (late := trio.current_time() - due) > STILL_SECONDS:
                log.warning("nothing was served", seconds=round(late, 1))
            check_log()
            if pressure.is_high():
                await self._shed(messages.Shed())
            elif self._vfs.shrink():
                give_back()
            now = store.transaction_id()
            if now != last:
                last = now
                await self.refresh()

    async def _shed(self, request: messages.Shed) -> messages.AnyReply:
        self._sheds += 1
        self._vfs.shrink()
        self._vfs.shed()
        give_back()
        return messages.Done()

    async def _compact(self, request: messages.Compact) -> messages.AnyReply:
        report = await trio.to_thread.run_sync(self._vfs.repository.compact)
        return messages.Compacted(report.bytes_before, report.bytes_after)

    async def _shutdown(self, request: messages.Shutdown) -> messages.AnyReply:
        """Unmounts and ends; refused while the mount is busy.

        A command in a session makes it busy. Any other copy of the mount, in another mount
        namespace, is dead from then on.
        """
        for session in self._vfs.lent:
            self._vfs.check_not_lent(session)
        self._release()  # for the process that unmounts
        await self._channel.unmount()
        self._channel.stop()
        return messages.Done()


def _words(request: messages.AnyRequest) -> str:
    """Returns what a request does, for people: `commit of @work`."""
    name = type(request).__name__.removeprefix("Get").lower()
    session = getattr(request, "session", None)
    return name if session is None else f"{name} of @{session}"


def listen(store_path: str) -> socket.socket:
    """Binds the control socket of a store; the caller holds the mount's lease."""
    path = socket_path(store_path)
    if os.path.lexists(path):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    bind(sock, path)
    sock.listen(128)
    return sock
