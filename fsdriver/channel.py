"""The channel to the kernel: the one module that owns the connection of a mount.

It holds the open /dev/fuse and gives pyfuse3 one end of a SOCK_SEQPACKET pair as `/dev/fd/N`,
so that one message stays one message. Between the two it does four things, and knows no
rule about trees:

- in the kernel's INIT it reads what the kernel can do, and in the reply it adds what pyfuse3
  cannot ask for (see `_INIT_ADD`) and bounds the size of messages by the socket's buffer;
- it answers OPEN for reading itself, and RELEASE: the kernel has checked permission, the handle
  is the inode's number, and cached pages are good. OPEN for writing is for pyfuse3 to decide.
  IOCTL, which Python sends for every file it opens and pyfuse3 does not serve, it refuses;
- where a listing carries the file handle 0, it puts the inode's number: pyfuse3 passes only the
  handle on, and a kernel that was told not to send OPENDIR has none;
- it lets no more requests through than the socket has room for replies to, because pyfuse3 writes
  replies from the thread that also empties the socket. Notifications it sends itself, from
  a thread: one may wait for a request to be answered.

With `plain`, pyfuse3 has the device itself and none of this happens.
The protocol: include/uapi/linux/fuse.h.
"""

import contextlib
import errno
import os
import socket
import struct
import threading
from collections.abc import Callable

import pyfuse3
import structlog
import trio

from engine import InodeNo
from fsdriver.abilities import Abilities
from fsdriver.device import MountRefusedError, mount
from fsdriver.mountpoint import UnmountError, unmount

log = structlog.get_logger("channel")

_IN = struct.Struct("=IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, extension, pad
_OUT = struct.Struct("=IiQ")  # len, error, unique
_INIT_IN = struct.Struct("=IIII")  # major, minor, max_readahead, flags
_INIT_OUT = struct.Struct("=IIIIHHIIHH")  # … flags, background, congestion, max_write, gran, pages
_HANDLE = struct.Struct("=Q")
_FLAGS = struct.Struct("=I")

_OPEN_REPLY = struct.Struct("=IiQQII")  # len, error, unique, handle, flags, pad

_FORGET, _OPEN, _READ, _RELEASE, _INIT, _READDIR = 2, 14, 15, 18, 26, 28
_FSYNCDIR, _INTERRUPT, _IOCTL, _BATCH_FORGET, _READDIRPLUS = 30, 36, 39, 42, 44
_OF_DIRECTORIES = {_READDIR, _READDIRPLUS, _FSYNCDIR}
_WITHOUT_REPLY = {_FORGET, _BATCH_FORGET, _INTERRUPT}
_SIZED = {_READ, _READDIR, _READDIRPLUS}

_PARALLEL_DIROPS = 1 << 18
_MAX_PAGES = 1 << 22
_CACHE_SYMLINKS = 1 << 23
_NO_OPENDIR_SUPPORT = 1 << 24
_INIT_ADD = _NO_OPENDIR_SUPPORT | _PARALLEL_DIROPS | _CACHE_SYMLINKS | _MAX_PAGES

_KEEP_CACHE, _NO_FLUSH = 1 << 1, 1 << 5

_NOTIFY_INVAL_INODE, _NOTIFY_INVAL_ENTRY = 2, 3

LARGEST_IO = 1 << 20
"""The most that a read or write moves in one message, if the socket's buffer has room."""
_PAGE = 4096
_HEADROOM = 8192
_SMALLEST_REPLY = 4096
"""What a reply without data is reckoned to take in the socket, with the kernel's bookkeeping."""


class Channel:
    """One mount's connection."""

    def __init__(
        self,
        operations: pyfuse3.Operations,
        abilities: Abilities,
        mountpoint: str,
        *,
        source: str,
        allow_other: bool,
        plain: bool = False,
    ) -> None:
        """Mounts; `abilities` say what was agreed with the kernel once it has answered.

        `source` is what /proc/mounts shows as the device. Raises MountRefusedError.
        """
        self.abilities = abilities
        self._mountpoint = mountpoint
        self._plain = plain
        self.opened = 0
        self._device = -1
        if plain:
            self._start(operations, mountpoint, _options(source, allow_other))
            return
        self._device = mount(mountpoint, source=source, allow_other=allow_other)
        try:
            self._ours, self._theirs = socket.socketpair(
                socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC
            )
            self._ours_out = self._ours.dup()
            self._ours_out.setblocking(True)
            self._ours.setblocking(True)
            self._bound_messages()
            self._start(operations, f"/dev/fd/{self._theirs.fileno()}", _options(source, False))
        except BaseException:
            self._unmount()
            raise

    def _start(self, operations: pyfuse3.Operations, where: str, options: set[str]) -> None:
        try:
            pyfuse3.init(operations, where, options)
        except RuntimeError as error:
            raise MountRefusedError(f"the mount was refused: {error}") from error

    def _bound_messages(self) -> None:
        """Asks for room in the socket and settles for what there is."""
        for end in (self._ours, self._theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * LARGEST_IO)
        room = self._theirs.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self._largest = LARGEST_IO
        while self._largest + _HEADROOM > room // 2 and self._largest > 16 * _PAGE:
            self._largest //= 2
        self._room = room - room // 4
        self._taken = 0
        self._weights: dict[int, int] = {}
        self._room_made = threading.Condition()
        self._init_unique: int | None = None
        self._kernel_flags = 0
        self._inbox = bytearray(LARGEST_IO + _HEADROOM)
        self._outbox = bytearray(LARGEST_IO + _HEADROOM)

    async def serve(self) -> None:
        """Answers requests until the mount ends or `stop` is called.

        Two readers at least: with pyfuse3's one, each request starts a task and ends another,
        and a warm `find` takes half as long again.
        """
        if self._plain:
            await pyfuse3.main(min_tasks=2, max_tasks=99)
            return
        async with trio.open_nursery() as nursery:
            token = trio.lowlevel.current_trio_token()
            threading.Thread(target=self._pump_requests, args=(token,), daemon=True).start()
            nursery.start_soon(self._pump_replies)
            await pyfuse3.main(min_tasks=2, max_tasks=99)
            nursery.cancel_scope.cancel()

    def stop(self) -> None:
        """Makes `serve` return; the mount stays until `close`."""
        pyfuse3.terminate()

    def close(self) -> None:
        """Ends the mount, even a busy one, and the connection."""
        if not self._plain:
            self._unmount()
        pyfuse3.close(unmount=True)
        if not self._plain:
            self._ours.close()
            with contextlib.suppress(OSError):  # pyfuse3 has closed it
                os.close(self._theirs.detach())

    def _unmount(self) -> None:
        with contextlib.suppress(UnmountError):  # it was unmounted already
            unmount(self._mountpoint, lazy=True)
        os.close(self._device)

    # From the kernel.

    def _pump_requests(self, token: trio.lowlevel.TrioToken) -> None:
        """Takes requests from the kernel until the mount ends. A thread's work."""
        device, box = self._device, self._inbox
        view = memoryview(box)
        while True:
            try:
                size = os.readv(device, [box])
            except OSError as error:
                if error.errno in {errno.ENOENT, errno.EINTR}:
                    continue  # the request was taken back
                with contextlib.suppress(trio.RunFinishedError):
                    token.run_sync_soon(self.stop)  # ENODEV: unmounted
                return
            self._forward(view[:size])

    def _forward(self, message: memoryview) -> None:
        _, opcode, unique, node, *_ = _IN.unpack_from(message)
        if opcode == _OPEN and _only_reads(_FLAGS.unpack_from(message, _IN.size)[0]):
            self.opened += 1
            flags = _KEEP_CACHE | _NO_FLUSH
            self._write(_OPEN_REPLY.pack(_OPEN_REPLY.size, 0, unique, node, flags, 0))
            return
        if opcode == _RELEASE:
            self._write(_OUT.pack(_OUT.size, 0, unique))
            return
        if opcode == _IOCTL:
            self._write(_OUT.pack(_OUT.size, -errno.ENOSYS, unique))
            return
        if opcode in _OF_DIRECTORIES and not _HANDLE.unpack_from(message, _IN.size)[0]:
            _HANDLE.pack_into(message, _IN.size, node)
        elif opcode == _INIT:
            self._init_unique = unique
            self._kernel_flags = _INIT_IN.unpack_from(message, _IN.size)[3]
        weight = 0
        if opcode not in _WITHOUT_REPLY:
            weight = _SMALLEST_REPLY
            if opcode in _SIZED:
                weight += _FLAGS.unpack_from(message, _IN.size + 16)[0]
        if weight:
            with self._room_made:
                while self._taken and self._taken + weight > self._room:
                    self._room_made.wait()
                self._taken += weight
                self._weights[unique] = weight
        self._ours_out.send(message)

    # To the kernel.

    async def _pump_replies(self) -> None:
        ours, box = self._ours, self._outbox
        view = memoryview(box)
        while True:
            await trio.lowlevel.wait_readable(ours)
            while True:
                try:
                    size = ours.recv_into(box, 0, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    break
                if not size:
                    return
                self._reply(view[:size])

    def _reply(self, message: memoryview) -> None:
        unique = _OUT.unpack_from(message)[2]
        with self._room_made:
            self._taken -= self._weights.pop(unique, 0)
            self._room_made.notify()
        if unique == self._init_unique:
            self._init_unique = None
            self._agree(message)
        self._write(message)

    def _write(self, message: memoryview | bytes) -> None:
        try:
            os.write(self._device, message)
        except OSError as error:
            # ENOENT: the request was taken back. ENODEV: unmounted.
            if error.errno not in {errno.ENOENT, errno.EINTR, errno.ENODEV}:
                log.error("a reply was refused", error=str(error), size=len(message))

    def _agree(self, message: memoryview) -> None:
        """Changes the reply to INIT to what this channel offers."""
        if len(message) < _OUT.size + _INIT_OUT.size:
            return
        fields = list(_INIT_OUT.unpack_from(message, _OUT.size))
        flags = fields[3] | (_INIT_ADD & self._kernel_flags)
        fields[3] = flags
        fields[6] = min(fields[6], self._largest)
        fields[8] = self._largest // _PAGE if flags & _MAX_PAGES else 0
        _INIT_OUT.pack_into(message, _OUT.size, *fields)
        self.abilities.no_opendir = bool(flags & _NO_OPENDIR_SUPPORT)
        log.info(
            "agreed", flags=hex(flags), largest=self._largest, no_opendir=self.abilities.no_opendir
        )

    # Notifications.

    async def forget_entry(self, parent: InodeNo, name: bytes) -> None:
        """Makes the kernel look a name up again."""
        if self._plain:
            await _quietly(pyfuse3.invalidate_entry, parent, name)
            return
        body = struct.pack("=QII", parent, len(name), 0) + name + b"\0"
        await _quietly(self._notify, _NOTIFY_INVAL_ENTRY, body)

    async def forget_attributes(self, ino: InodeNo) -> None:
        """Makes the kernel ask for an inode's attributes again, and list a directory again."""
        if self._plain:
            await _quietly(pyfuse3.invalidate_inode, ino, True)
            return
        await _quietly(self._notify, _NOTIFY_INVAL_INODE, struct.pack("=Qqq", ino, -1, 0))

    def _notify(self, code: int, body: bytes) -> None:
        os.write(self._device, _OUT.pack(_OUT.size + len(body), code, 0) + body)


def _only_reads(flags: int) -> bool:
    return flags & os.O_ACCMODE == os.O_RDONLY and not flags & os.O_TRUNC


async def _quietly(function: Callable[..., None], *arguments: object) -> None:
    """Notifies the kernel from a thread; that it did not know the inode is no failure."""

    def notify() -> None:
        with contextlib.suppress(OSError):
            function(*arguments)

    await trio.to_thread.run_sync(notify)


def _options(source: str, allow_other: bool) -> set[str]:
    options = set(pyfuse3.default_options)
    name = os.fsencode(source).decode("ascii", "backslashreplace")
    name = name.replace("\\", "\\\\").replace(",", "\\,")
    options |= {f"fsname={name}", "subtype=amalgamfs"}
    if os.geteuid() == 0:
        options |= {"dev", "suid"}
    if allow_other:
        options.add("allow_other")
    return options
