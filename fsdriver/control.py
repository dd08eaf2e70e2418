"""The control socket: what the command line asks of a running mount.

Only the user who mounted, and root, are answered. One request at a time is carried out; the
kernel's requests are answered meanwhile, except in the moment in which a commit changes over.
"""

import contextlib
import functools
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

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
from fsdriver.operations import Operations
from fsdriver.pressure import Pressure, give_back

LONGEST_REQUEST = 1 << 20
AHEAD = 3
"""How often a tree is built ahead of a commit, until nothing was changed meanwhile."""
ANSWER_SECONDS = 5.0
"""How long a client that does not read is waited for; then it is hung up on."""

FORGET_POLL, FORGET_SECONDS = 0.01, 0.25
"""How often it is looked what the kernel gives back, and how long after nothing came any more."""

log = structlog.get_logger("control")


_CHANGING = {messages.Commit, messages.Fork, messages.Reset, messages.Remove, messages.Rename}
"""What changes names in the mount's own directories."""


class Control:
    """Answers clients for one mount."""

    def __init__(
        self, vfs: Vfs, operations: Operations, channel: Channel, facts: messages.Status
    ) -> None:
        self._vfs, self._operations, self._channel, self._facts = vfs, operations, channel, facts
        self._turn = trio.Lock()
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
        await trio.serve_listeners(self._connection, [server])

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
        try:
            request = msgspec.json.decode(line, type=messages.AnyRequest)
            reply = await self._handlers[type(request)](request)
            if isinstance(request, messages.Lend):
                lent.append(request.session)
            if type(request) in _CHANGING:
                await self.refresh()
            return reply
        except (EngineError, msgspec.MsgspecError, ValueError, OSError) as error:
            return messages.Failed(type(error).__name__, str(error))
        except Exception as error:
            log.exception("a request crashed")
            return messages.Failed(type(error).__name__, str(error))

    async def _status(self, request: messages.GetStatus) -> messages.AnyReply:
        return msgspec.structs.replace(self._facts, sessions=sorted(self._vfs.live))

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

    async def _commit(self, request: messages.Commit) -> messages.AnyReply:
        if request.ref is not None:
            check_name("ref", request.ref)
        async with self._frozen(request.session) as (live, freeze):
            report = live.held.commit(
                freeze, request.message, request.metadata, request.ref, live.overlay
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
            live.held.fork(freeze, request.name, live.overlay)
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
                self._vfs.restore(name, freeze, request.paths)
                await self._channel.forget_entry(SESSIONS, name.encode())
            return messages.Done()
        async with self._thrown_away(name, request.force):
            self._vfs.reset(name, to, factory=request.factory)
            await self._channel.forget_entry(SESSIONS, name.encode())
        return messages.Done()

    @contextlib.asynccontextmanager
    async def _thrown_away(self, name: str, force: bool) -> AsyncIterator[None]:
        """Gives the turn to throw a session away; raises UncommittedChangesError unless `force`.

        Whoever is given it goes on without waiting: no program writes between the look and that.
        """
        repository = self._vfs.repository
        if force:
            async with self._turn:
                storing = repository.storing()
                await trio.to_thread.run_sync(storing.__enter__)
                try:
                    yield
                finally:
                    storing.__exit__(None, None, None)
            return
        async with self._frozen(name) as (live, freeze):
            base = await trio.to_thread.run_sync(repository.sessions.stands_on, live.held.session)
            root = live.held.peek_root(freeze, live.overlay)
            if root != base:
                await trio.to_thread.run_sync(repository.store.write, freeze.save)
                refuse = functools.partial(refuse_changes, repository.objects, name, base, root)
                await trio.to_thread.run_sync(refuse)
            yield

    async def _remove(self, request: messages.Remove) -> messages.AnyReply:
        async with self._thrown_away(request.session, request.force):
            self._vfs.remove(request.session)
            await self._channel.forget_entry(SESSIONS, request.session.encode())
        return messages.Done()

    async def _rename(self, request: messages.Rename) -> messages.AnyReply:
        async with self._turn:
            self._vfs.rename(request.session, request.name)
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
        before, waited = 0, 0.0
        while (count := len(self._vfs.files_in_use(name))) and waited < FORGET_SECONDS:
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
            await trio.sleep(seconds)
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
        await self._channel.unmount()
        self._channel.stop()
        return messages.Done()


def listen(store_path: str) -> socket.socket:
    """Binds the control socket of a store; the caller holds the mount's lease."""
    path = socket_path(store_path)
    if os.path.lexists(path):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    bind(sock, path)
    sock.listen(128)
    return sock
