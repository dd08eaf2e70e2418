"""The channel to the kernel: the one module that owns the connections of a mount.

It holds the open /dev/fuse and gives pyfuse3 one end of a SOCK_SEQPACKET pair as `/dev/fd/N`,
so that one message stays one message. Between the two it does six things, and knows no
rule about trees:

- it joins two mounts to one pyfuse3. What is immutable is mounted a second time inside of the
  first, read-only for the kernel: see `Part`. Its root is the inode that pyfuse3 knows by another
  number;
- in the kernel's INIT it reads what the kernel can do, and in the reply it adds what pyfuse3
  cannot ask for (see `_INIT_ADD`) and bounds the size of messages by the socket's buffer;
- it abolishes OPEN and with it RELEASE, once the part is mounted: cached pages are good, and the
  kernel has checked permission. Without it, OPEN for reading is answered here, and OPEN for
  writing is for pyfuse3 to decide. IOCTL, which Python sends for every file it opens and
  pyfuse3 does not serve, is refused; so is GETXATTR for what is not in `user.`, which the
  kernel sends before a first write and `ls -l` for every name, and for overlayfs's own. INTERRUPT
  as well, whereupon the kernel sends no other: no handler can be interrupted;
- in place of a file handle it puts the inode's number: pyfuse3 passes only the handle on, and a
  kernel that does not send OPEN has none. The handle's first bit says whether set-user-ID and
  set-group-ID bits are to go, which the kernel then does not ask for beforehand;
- what pyfuse3 has no handlers for and a filesystem should do, `ranges` does: FALLOCATE, LSEEK and
  COPY_FILE_RANGE, each in a task of its own;
- notifications it sends itself, from a thread: one may wait for a request to be answered.

All of it happens where pyfuse3 waits for a request: it takes a request from the device and puts it
into the socket. pyfuse3 lets its event library be replaced, which its asyncio mode is made of;
`_TrioForPyfuse3` is trio but for that place. Tasks or threads that pump between the two take twice
as long for each request. What a handler answers goes to the device without coming by here: see
`seat`.

With `plain`, pyfuse3 has the device itself and none of this happens.
"""

import contextlib
import errno
import os
import select
import socket
import struct
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import NamedTuple

import pyfuse3
import structlog
import trio

from engine import InodeNo
from fsdriver import protocol
from fsdriver.abilities import Abilities
from fsdriver.device import Access, MountRefusedError, mount, mount_part
from fsdriver.errand import Errand
from fsdriver.guard import Guard
from fsdriver.mountpoint import (
    UnmountError,
    check_unmounted,
    mounts,
    parts_in,
    unmount,
    unmount_command,
)
from fsdriver.ranges import Ranges
from fsdriver.seat import Seat

log = structlog.get_logger("channel")

_INIT_ADD = (
    protocol.NO_OPEN_SUPPORT
    | protocol.NO_OPENDIR_SUPPORT
    | protocol.PARALLEL_DIROPS
    | protocol.CACHE_SYMLINKS
    | protocol.MAX_PAGES
    | protocol.HANDLE_KILLPRIV_V2
)
_INIT_CLEAR = protocol.ATOMIC_O_TRUNC | protocol.AUTO_INVAL_DATA | protocol.ASYNC_DIO
"""Truncation comes as SETATTR: in an OPEN that nobody sends, it would be lost. Pages stay when the
time of a change turns out to be another than the kernel thought: it was the kernel's own. After a
write past the page cache the kernel drops the pages that a reader has filled meanwhile, but not
if it lets an asynchronous one end by itself: then old bytes would stay."""

_ANSWERED_HERE = frozenset(
    {
        protocol.OPEN, protocol.RELEASE, protocol.IOCTL, protocol.GETXATTR, protocol.INIT,
        protocol.INTERRUPT, *protocol.ABOUT_RANGES,
    }
)  # fmt: skip

_ROOT = 1

_GUARDS = 10
"""So many times at most a guard is replaced that somebody has ended."""
_GATHERED = 64
"""So many FORGETs at most wait until they are passed on as one."""
_IN_A_ROW = 32
"""So many requests at most are taken before other tasks get a turn."""
_SOON = 50_000
"""Nanoseconds within which the next request is tried for, where the last one came so soon.

To be woken takes as long: who asks in a loop is answered in two thirds of the time.
"""

_PAGE = 4096

_NOTICE_SECONDS = 10.0
"""How long a notification may wait in the kernel; its thread is left there then."""

_ATTRIBUTES_ONLY = struct.pack("=qq", -1, 0)
"""The range of a notification that is about no page: a negative offset."""


class Part(NamedTuple):
    """A directory of the mount's root that is mounted by itself, read-only for the kernel.

    The kernel then refuses to open its files for writing, which nobody could once OPEN is
    abolished, and keeps attributes over a read, since there is no access time to change.
    """

    name: str
    root: InodeNo
    elsewhere: Callable[[bool], None]
    """Told whether it is mounted by itself, so that the whole has only a place for it."""


class _Connection:
    """One mount: its device, and how its numbers are told from the other's."""

    def __init__(self, device: int, mountpoint: str, root: int, guard: Guard) -> None:
        self.device, self.mountpoint, self.root = device, mountpoint, root
        self.inbox = guard.protect(device, protocol.LARGEST_IO + protocol.HEADROOM)
        self.inbox_view = memoryview(self.inbox)

    def write(self, message: memoryview | bytes) -> None:
        """Answers the kernel."""
        try:
            os.write(self.device, message)
        except OSError as error:
            # ENOENT: the request was taken back. ENODEV: unmounted.
            if error.errno not in {errno.ENOENT, errno.EINTR, errno.ENODEV, errno.EBADF}:
                log.error("a reply was refused", error=str(error), size=len(message))

    def notify(self, code: int, node: int, rest: bytes) -> None:
        """Tells the kernel; that it did not know the inode is no failure."""
        if node == self.root:
            node = _ROOT
        body = protocol.WORD.pack(node) + rest
        with contextlib.suppress(OSError):
            os.write(self.device, protocol.OUT.pack(protocol.OUT.size + len(body), code, 0) + body)


class Channel:
    """One mount's connection, or its two."""

    def __init__(
        self,
        operations: pyfuse3.Operations,
        abilities: Abilities,
        mountpoint: str,
        *,
        source: str,
        access: Access,
        plain: bool = False,
        part: Part | None = None,
    ) -> None:
        """Mounts; `abilities` say what was agreed with the kernel once it has answered.

        `source` is what /proc/mounts shows as the device. Raises MountRefusedError.
        """
        self.abilities = abilities
        self._counts = [0] * 256
        self._mountpoint, self._source, self._access = mountpoint, source, access
        self._plain = plain
        self.ranges: Ranges | None = None
        self._wanted = None if plain else part
        self._part: _Connection | None = None
        if plain:
            self._start(operations, mountpoint, _options(source, access))
            return
        self._agreed = trio.Event()
        self._connections: list[_Connection] = []
        self._reading = self._stopping = self._unmounting = self._gone = False
        self._readers = trio.lowlevel.ParkingLot()
        self._turns = self._slept = 0
        self._in_a_loop = False
        self._init_reply = b""
        self._forgotten: list[bytes] = []
        self._waiting: tuple[_Connection, memoryview] | None = None
        """A request that comes after what was forgotten, and is still in its inbox."""
        self._guard = Guard()
        try:
            device = mount(mountpoint, source=source, access=access)
            self._whole = self._connection(device, mountpoint, _ROOT)
        except BaseException:
            self._guard.close()
            raise
        try:
            self._ours, self._theirs = socket.socketpair(
                socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC
            )
            self._ours.setblocking(False)
            self._bound_messages()
            self.seat = Seat(self._theirs.fileno())
            self._events = select.epoll()
            self._start(operations, f"/dev/fd/{self._theirs.fileno()}", _options(source, Access()))
        except BaseException:
            self._give_up()
            raise

    def _connection(self, device: int, where: str, root: int) -> _Connection:
        """Takes what was mounted, the whole or a part of it. Raises OSError."""
        try:
            return _Connection(device, where, root, self._guard)
        except BaseException:
            os.close(device)
            unmount(where, lazy=True)
            raise

    def _start(self, operations: pyfuse3.Operations, where: str, options: set[str]) -> None:
        try:
            pyfuse3.init(operations, where, options)
        except RuntimeError as error:
            raise MountRefusedError(f"the mount was refused: {error}") from error

    def _bound_messages(self) -> None:
        """Asks for room in the socket and settles for what there is."""
        for end in (self._ours, self._theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * protocol.LARGEST_IO)
        room = self._theirs.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self._largest = protocol.LARGEST_IO
        while self._largest + protocol.HEADROOM > room // 2 and self._largest > 16 * _PAGE:
            self._largest //= 2
        self._init_unique: int | None = None
        self._kernel_flags = 0
        self._outbox = bytearray(protocol.LARGEST_IO + protocol.HEADROOM)
        self._outbox_view = memoryview(self._outbox)

    async def serve(self, ready: Callable[[], None]) -> None:
        """Answers requests until the mount ends or `stop` is called; `ready` once all is mounted.

        Two readers at least: with pyfuse3's one, each request starts a task and ends another.
        """
        if self._plain:
            ready()
            await pyfuse3.main(min_tasks=2, max_tasks=99)
            return
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._listen(self._whole)
            nursery.start_soon(self._complete, ready)
            nursery.start_soon(self._keep_guard)
            pyfuse3.trio = _TrioForPyfuse3(self)  # type: ignore[attr-defined]  # it has no types
            try:
                await pyfuse3.main(min_tasks=2, max_tasks=99)
            finally:
                pyfuse3.trio = trio  # type: ignore[attr-defined]  # likewise
                # Before a task is waited for that may wait for the mount.
                self._give_up()
                self.seat.put(-1, answered=False)
            nursery.cancel_scope.cancel()

    async def _complete(self, ready: Callable[[], None]) -> None:
        """Mounts the part once the whole is served."""
        await self._agreed.wait()
        await self._mount_part()
        ready()

    async def _mount_part(self) -> None:
        """Mounts the part if it can be; else the whole shows it."""
        wanted = self._wanted
        if wanted is None:
            return
        where = os.path.join(self._mountpoint, wanted.name)
        wanted.elsewhere(True)
        try:
            device = await mount_part(where, source=self._source, access=self._access)
            self._part = self._connection(device, where, wanted.root)
        except (MountRefusedError, OSError) as error:
            log.info("one mount for all", error=str(error))
            wanted.elsewhere(False)
            self._wanted = None
            await self.forget_entry(InodeNo(_ROOT), os.fsencode(wanted.name))
            return
        self._listen(self._part)
        self.abilities.no_open = bool(self._kernel_flags & protocol.NO_OPEN_SUPPORT)

    def counts(self) -> dict[str, int]:
        """Returns how many requests of each kind the kernel has sent; none is counted if plain."""
        return {
            protocol.NAMES.get(opcode, str(opcode)): count
            for opcode, count in enumerate(self._counts)
            if count
        }

    def stop(self) -> None:
        """Makes `serve` return; the mount stays until `close`."""
        pyfuse3.terminate()

    async def unmount(self) -> None:
        """Ends the mount unless it is busy (UnmountError); `serve` returns then."""
        part, self._unmounting = self._part, True
        try:
            for where in (*parts_in(self._mountpoint), self._mountpoint):
                with Errand(unmount_command(where)) as errand:
                    await trio.lowlevel.wait_readable(errand.fileno())
                    check_unmounted(where, *errand.done())
        except UnmountError:
            if part is not None and not any(mount.path == part.mountpoint for mount in mounts()):
                await self._mount_part()
            raise
        finally:
            self._unmounting = False

    def close(self) -> None:
        """Ends the mount, even a busy one, and the connection."""
        if not self._plain:
            self._give_up()
            self.seat.close()
        pyfuse3.close(unmount=True)
        if not self._plain:
            self._events.close()
            for connection in {*self._connections, self._whole}:
                os.close(connection.device)
            self._ours.close()
            with contextlib.suppress(OSError):  # pyfuse3 has closed it
                os.close(self._theirs.detach())

    def _give_up(self) -> None:
        """Lets whoever waits for the mount fail, and unmounts even a busy one; again is harmless.

        Nothing here waits for the mount: from now on the guard refuses what comes, and without a
        guard the kernel, for nobody has the devices open. Their numbers stay ours, because a
        thread may be about to write to one.
        """
        if self._gone:
            return
        self._gone = True
        self._guard.close()
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for connection in {*self._connections, self._whole}:
            os.dup2(nothing, connection.device, inheritable=False)
        os.close(nothing)
        here = [mount for mount in mounts() if mount.path == self._mountpoint]
        if here and here[-1].source == self._source:  # else it was unmounted already
            try:
                unmount(self._mountpoint, lazy=True)  # and what is mounted inside
            except UnmountError as error:
                log.error("the mount was left", error=str(error))

    async def _keep_guard(self) -> None:
        """Starts another guard when somebody has ended it, but not again and again."""
        for _ in range(_GUARDS):
            await trio.lowlevel.wait_readable(self._guard.fileno())
            log.warning("the guard has ended, and another one begins")
            try:
                self._guard.start()
            except OSError as error:
                log.error("there is no guard any more", error=str(error))
                return
        await trio.lowlevel.wait_readable(self._guard.fileno())
        log.error("the guard has ended too often: killed, the daemon may leave programs waiting")

    # From the kernel.

    def _listen(self, connection: _Connection) -> None:
        os.set_blocking(connection.device, False)
        self._connections.append(connection)
        self._events.register(connection.device, select.EPOLLIN)

    async def next_request(self) -> None:
        """Returns when a request lies in the socket; the caller takes it before it waits again.

        pyfuse3's readers come here, one at a time. What they have answered meanwhile is passed
        on first. Raises trio.ClosedResourceError when there will be none.
        """
        while self._reading:
            await self._readers.park()
        self._reading = True
        try:
            while not await self._advance():
                pass
        finally:
            self._reading = False
            self._readers.unpark()

    def close_requests(self) -> None:
        """Makes `next_request` raise, also where it waits."""
        self._stopping = True
        trio.lowlevel.notify_closing(self._events.fileno())

    async def _advance(self) -> bool:
        """Passes one request on and tells whether pyfuse3 has to answer it; or waits for one."""
        if self.seat.unanswered:
            self._pass_reply()
        self._turns += 1
        if self._turns % _IN_A_ROW == 0:
            await trio.lowlevel.checkpoint()
        if self._stopping:
            raise trio.ClosedResourceError
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            return self._forward(*waiting)
        began = perf_counter_ns()
        until = began + _SOON if self._in_a_loop else began
        while True:
            for connection in self._connections:
                message = self._receive(connection)
                if message is not None:
                    if self._slept < _SOON:
                        self._in_a_loop = True
                    self._slept = 0
                    return self._forward(connection, message)
            if perf_counter_ns() >= until:
                break
        self._in_a_loop = False
        if self._forgotten:
            self._pass_forgotten()
            return True
        if not self._stopping:
            await trio.lowlevel.wait_readable(self._events.fileno())
            self._slept = perf_counter_ns() - began
        return False

    def _receive(self, connection: _Connection) -> memoryview | None:
        """Takes a request, if there is one."""
        try:
            size = os.readv(connection.device, [connection.inbox])
            return connection.inbox_view[:size]
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.EINTR}:
                return None  # the request was taken back
            # ENODEV: unmounted.
        self._events.unregister(connection.device)
        self._connections.remove(connection)
        if connection is self._whole:
            self.stop()
            return None
        os.close(connection.device)
        self._guard.release(connection.device)
        if connection is self._part:
            self._part = None
            if not self._unmounting:
                log.warning("a part was unmounted from outside", path=connection.mountpoint)
        return None

    def _forward(self, connection: _Connection, message: memoryview) -> bool:
        """Answers a request here, or changes it for pyfuse3 and sends it there (True)."""
        _, opcode, unique, node, *_ = protocol.IN.unpack_from(message)
        if self._forgotten and opcode in protocol.ABOUT_ROOM:
            self._waiting = connection, message
            self._pass_forgotten()  # a file that was removed takes room until then
            return True
        self._counts[opcode & 255] += 1
        if opcode == protocol.FORGET:
            self._forgotten.append(
                bytes(message[protocol.NODE_AT : protocol.NODE_AT + 8])
                + bytes(message[protocol.BODY_AT :])
            )
            if len(self._forgotten) < _GATHERED:
                return False
            self._pass_forgotten()
            return True
        if opcode in _ANSWERED_HERE and self._serve_here(connection, message, opcode, unique, node):
            return False
        if node == _ROOT and connection.root != _ROOT:
            node = connection.root
            protocol.WORD.pack_into(message, protocol.NODE_AT, node)
        if opcode in protocol.BY_HANDLE:
            handle = node
            if opcode == protocol.WRITE:
                flags = protocol.HALF.unpack_from(message, protocol.WRITE_FLAGS_AT)[0]
                if flags & protocol.WRITE_KILL_SUIDGID:
                    handle |= protocol.KILL_SUIDGID
            elif opcode == protocol.READ:
                flags = protocol.HALF.unpack_from(message, protocol.READ_FLAGS_AT)[0]
                if flags & os.O_NOATIME:
                    handle |= protocol.UNSEEN
            protocol.WORD.pack_into(message, protocol.BODY_AT, handle)
        elif opcode == protocol.SETATTR:
            valid = protocol.HALF.unpack_from(message, protocol.BODY_AT)[0]
            if valid & protocol.ATTR_KILL_SUIDGID:
                handle = node | protocol.KILL_SUIDGID
                protocol.HALF.pack_into(message, protocol.BODY_AT, valid | protocol.ATTR_HANDLE)
                protocol.WORD.pack_into(message, protocol.SETATTR_HANDLE_AT, handle)
        self._last = connection
        self.seat.put(connection.device, answered=opcode not in protocol.WITHOUT_REPLY)
        self._ours.send(message)
        return True

    def _pass_forgotten(self) -> None:
        """Passes on what the kernel has forgotten, as the kernel does where it has much."""
        count, pairs = len(self._forgotten), b"".join(self._forgotten)
        self._forgotten.clear()
        size = protocol.IN.size + protocol.BATCH_HEAD.size + len(pairs)
        head = protocol.IN.pack(size, protocol.BATCH_FORGET, 0, 0, 0, 0, 0, 0, 0)
        self.seat.put(-1, answered=False)
        self._ours.send(head + protocol.BATCH_HEAD.pack(count, 0) + pairs)

    def _serve_here(
        self, connection: _Connection, message: memoryview, opcode: int, unique: int, node: int
    ) -> bool:
        """Answers what needs no look at the tree; tells whether it did."""
        if opcode == protocol.OPEN:
            if self.abilities.no_open:
                self._answer(connection, unique, -errno.ENOSYS)  # it does not ask again
                return True
            if not _only_reads(protocol.HALF.unpack_from(message, protocol.BODY_AT)[0]):
                return False
            flags = protocol.KEEP_CACHE | protocol.NO_FLUSH
            size = protocol.OPEN_REPLY.size
            connection.write(protocol.OPEN_REPLY.pack(size, 0, unique, node, flags, 0))
        elif opcode == protocol.RELEASE:
            self._answer(connection, unique, 0)
        elif opcode in {protocol.IOCTL, protocol.INTERRUPT}:
            self._answer(connection, unique, -errno.ENOSYS)
        elif opcode == protocol.GETXATTR:
            at = protocol.XATTR_NAME_AT
            if protocol.is_served(message[at:]):
                return False
            self._answer(connection, unique, -errno.ENODATA)
        elif opcode in protocol.ABOUT_RANGES:
            if self.ranges is None:
                return False  # libfuse answers that it has none
            self._in_a_loop = False  # the task begins when nobody is waited for
            self._nursery.start_soon(self._serve_ranges, connection, bytes(message))
        elif connection is not self._whole:  # INIT: as the whole's was answered
            reply = bytearray(self._init_reply)
            protocol.WORD.pack_into(reply, protocol.UNIQUE_AT, unique)
            connection.write(bytes(reply))
        else:
            self._init_unique = unique
            self._kernel_flags = protocol.INIT_IN.unpack_from(message, protocol.BODY_AT)[3]
            return False
        return True

    def _answer(self, connection: _Connection, unique: int, error: int) -> None:
        connection.write(protocol.OUT.pack(protocol.OUT.size, error, unique))

    async def _serve_ranges(self, connection: _Connection, message: bytes) -> None:
        assert self.ranges is not None
        _, opcode, unique, node, uid, *_ = protocol.IN.unpack_from(message)
        try:
            reply = await self.ranges.answer(opcode, node, uid, message[protocol.BODY_AT :])
        except OSError as error:
            self._answer(connection, unique, -(error.errno or errno.EIO))
        else:
            size = protocol.OUT.size + len(reply)
            connection.write(protocol.OUT.pack(size, 0, unique) + reply)

    # To the kernel.

    def _pass_reply(self) -> None:
        """Passes on what libfuse has answered by itself to the last request."""
        try:
            size = self._ours.recv_into(self._outbox)
        except BlockingIOError:
            return
        message = self._outbox_view[:size]
        if size and protocol.WORD.unpack_from(message, protocol.UNIQUE_AT)[0] == self._init_unique:
            self._init_unique = None
            self._agree(message)
        self._last.write(message)

    def _agree(self, message: memoryview) -> None:
        """Changes the reply to INIT to what this channel offers."""
        if len(message) < protocol.OUT.size + protocol.INIT_OUT.size:
            return
        fields = list(protocol.INIT_OUT.unpack_from(message, protocol.OUT.size))
        flags = (fields[3] | (_INIT_ADD & self._kernel_flags)) & ~_INIT_CLEAR
        fields[3] = flags
        fields[6] = min(fields[6], self._largest)
        fields[8] = self._largest // _PAGE if flags & protocol.MAX_PAGES else 0
        protocol.INIT_OUT.pack_into(message, protocol.OUT.size, *fields)
        self.abilities.largest = fields[6]
        self._init_reply = bytes(message)
        self.abilities.no_opendir = bool(flags & protocol.NO_OPENDIR_SUPPORT)
        log.info(
            "agreed", flags=hex(flags), largest=self._largest, no_opendir=self.abilities.no_opendir
        )
        self._agreed.set()

    # Notifications.

    async def forget_entry(self, parent: InodeNo, name: bytes) -> None:
        """Makes the kernel look a name up again."""
        if self._plain:
            await _quietly(pyfuse3.invalidate_entry, parent, name)
            return
        await _quietly(self._notify, protocol.INVAL_ENTRY, parent, _name(name))

    async def forget_inode(self, ino: InodeNo) -> None:
        """Makes the kernel ask for an inode's attributes again, and list a directory again."""
        if self._plain:
            await _quietly(pyfuse3.invalidate_inode, ino)
            return
        await _quietly(self._notify, protocol.INVAL_INODE, ino, struct.pack("=qq", 0, 0))

    def attributes_changed(self, ino: int) -> None:
        """Makes the kernel ask for a session's inode's attributes again, at once.

        May be called while a request is answered: no page is touched, so nothing is waited for.
        """
        if self._plain:
            with contextlib.suppress(OSError):
                pyfuse3.invalidate_inode(ino, attr_only=True)
            return
        self._whole.notify(protocol.INVAL_INODE, ino, _ATTRIBUTES_ONLY)

    def write_back(self, ino: int, offset: int, length: int) -> None:
        """Makes the kernel write what it has of a session's file, and drop it.

        Not from the serving thread, which answers those writes.
        """
        self._whole.notify(protocol.INVAL_INODE, ino, struct.pack("=qq", offset, length))

    def give(self, ino: int, offset: int, data: Sequence[bytes | memoryview]) -> None:
        """Puts bytes of a file into the kernel's page cache. Not from the serving thread.

        `data` are up to 1,000 pieces that follow each other. The kernel keeps whole pages only.

        The kernel may hold the page for a request that is being answered. Raises OSError.
        """
        connection = self._part or self._whole
        size = sum(map(len, data))
        length = protocol.STORE_HEAD.size + size
        head = protocol.STORE_HEAD.pack(length, protocol.STORE, 0, ino, offset, size, 0)
        os.writev(connection.device, [head, *data])

    def _notify(self, code: int, node: int, rest: bytes) -> None:
        for connection in (self._whole, self._part):
            if connection is not None:
                connection.notify(code, node, rest)


class _TrioForPyfuse3:
    """What pyfuse3 uses of trio, with the channel in the place of its descriptor."""

    ClosedResourceError = trio.ClosedResourceError
    open_nursery = staticmethod(trio.open_nursery)
    from_thread = trio.from_thread
    current_task = staticmethod(trio.lowlevel.current_task)
    current_trio_token = staticmethod(trio.lowlevel.current_trio_token)

    class Lock:
        """Keeps nobody out: the channel lets one reader in at a time."""

        async def __aenter__(self) -> None:
            return None

        async def __aexit__(self, *_: object) -> None:
            return None

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.lowlevel = self

    async def wait_readable(self, fd: int) -> None:
        """Returns when a request can be read from pyfuse3's descriptor."""
        await self._channel.next_request()

    def notify_closing(self, fd: int) -> None:
        """Ends the waiting."""
        self._channel.close_requests()


def _name(name: bytes) -> bytes:
    """Returns what follows the parent's number in a notification about a name."""
    return struct.pack("=II", len(name), 0) + name + b"\0"


def _only_reads(flags: int) -> bool:
    return flags & os.O_ACCMODE == os.O_RDONLY and not flags & os.O_TRUNC


async def _quietly(function: Callable[..., None], *arguments: object) -> None:
    """Notifies the kernel from a thread; that it did not know the inode is no failure."""

    def notify() -> None:
        with contextlib.suppress(OSError):
            function(*arguments)

    with trio.move_on_after(_NOTICE_SECONDS) as patience:
        # The thread may be left: in the kernel it can wait for a request that we answer.
        await trio.to_thread.run_sync(notify, abandon_on_cancel=True)
    if patience.cancelled_caught:
        log.warning("the kernel takes no notice", seconds=_NOTICE_SECONDS)


def _options(source: str, access: Access) -> set[str]:
    options = set(pyfuse3.default_options)
    name = os.fsencode(source).decode("ascii", "backslashreplace")
    name = name.replace("\\", "\\\\").replace(",", "\\,")
    options |= {f"fsname={name}", "subtype=amalgamfs"}
    # libfuse, as root, mounts with neither unless it is asked.
    options |= {"suid" if access.suid else "nosuid", "dev" if access.dev else "nodev"}
    if access.allow_other:
        options.add("allow_other")
    return options
