"""The answers about ranges of a file that pyfuse3 has no handlers for.

FALLOCATE, LSEEK for holes, and COPY_FILE_RANGE, as the channel gives them: by the inode's number,
since in a mount without OPEN there are no handles. As in `operations`, a handler decodes, makes
one call of the engine, encodes, and waits only for what threads do: copies of large files, and the
kernel while it writes back what a program has in a mapping.
"""

import contextlib
import errno
import os
from collections.abc import Awaitable, Callable
from time import perf_counter_ns

import structlog
import trio

from engine import EngineError
from engine.host.ranges import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
from engine.mounted.inodes import Inode
from fsdriver import protocol
from fsdriver.errnos import errno_of, is_of_memory
from fsdriver.operations import Operations

SEEK_IN_THREAD = 64 << 20
"""The holes of a file larger than that are looked for in a thread."""

_MODES = frozenset({0, KEEP_SIZE, KEEP_SIZE | PUNCH_HOLE, ZERO_RANGE, KEEP_SIZE | ZERO_RANGE})

log = structlog.get_logger("fsdriver")


class Ranges:
    """Answers such requests for one mount."""

    def __init__(
        self,
        operations: Operations,
        write_back: Callable[[int, int, int], None],
        attributes_changed: Callable[[int], None],
    ) -> None:
        """`write_back` and `attributes_changed` are the channel's."""
        self._operations, self._vfs = operations, operations.vfs
        self._write_back, self._attributes_changed = write_back, attributes_changed
        self._handlers: dict[int, Callable[[int, int, bytes], Awaitable[bytes]]] = {
            protocol.FALLOCATE: self._allocate,
            protocol.LSEEK: self._seek,
            protocol.COPY_FILE_RANGE: self._copy,
            protocol.COPY_FILE_RANGE_64: self._copy_64,
        }

    async def answer(self, opcode: int, node: int, uid: int, body: bytes) -> bytes:
        """Returns what follows a reply's head. Raises OSError for an errno, and nothing else."""
        began = perf_counter_ns()
        name = protocol.NAMES[opcode].lower()
        try:
            return await self._handlers[opcode](node, uid, body)
        except OSError:
            raise
        except EngineError as error:
            log.error("failed", operation=name, kind=type(error).__name__, error=str(error))
            raise _os_error(errno_of(error)) from error
        except Exception as error:
            if is_of_memory(error):
                with contextlib.suppress(MemoryError):
                    log.error("no memory", operation=name)
                raise _os_error(errno.ENOMEM) from None
            log.exception("crashed", operation=name)
            raise _os_error(errno.EIO) from error
        finally:
            self._operations.timings[name].add(perf_counter_ns() - began)

    async def _allocate(self, node: int, uid: int, body: bytes) -> bytes:
        _, offset, length, mode = protocol.FALLOCATE_IN.unpack_from(body)
        inode = self._vfs.inode(node)
        if mode not in _MODES:
            raise _os_error(errno.EOPNOTSUPP)
        await self._get_ready(inode, node, uid)
        inode.allocate(mode, offset, length)
        return b""

    async def _get_ready(self, inode: Inode, node: int, uid: int) -> None:
        """Copies a file up before it is changed, and takes the bits that a write takes.

        The kernel does not say whether they are to go, as with a WRITE: they stay for root.
        """
        if inode.to_copy():
            await self._operations.stage(inode)
        if uid and not inode.read_only:
            inode.drop_set_id()
            self._attributes_changed(node)

    async def _seek(self, node: int, uid: int, body: bytes) -> bytes:
        _, offset, whence = protocol.LSEEK_IN.unpack_from(body)
        if whence not in {os.SEEK_DATA, os.SEEK_HOLE}:
            raise _os_error(errno.EINVAL)
        inode = self._vfs.inode(node)
        found = await self._look(inode, offset, whence)
        # A program that has the file mapped may have written where the disk has a hole.
        while inode.may_have_holes():
            hole, end = _hole(offset, whence, found, inode.attributes().size)
            if hole >= end:
                break
            await trio.to_thread.run_sync(self._write_back, node, hole, end - hole)
            before, found = found, await self._look(inode, offset, whence)
            if found == before:
                break
        if found is None:
            raise _os_error(errno.ENXIO)
        return protocol.WORD.pack(found)

    async def _look(self, inode: Inode, offset: int, whence: int) -> int | None:
        try:
            if inode.attributes().size > SEEK_IN_THREAD and not inode.may_have_holes():
                return await trio.to_thread.run_sync(inode.seek, offset, whence)
            return inode.seek(offset, whence)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return None

    async def _copy(self, node: int, uid: int, body: bytes) -> bytes:
        return protocol.COPY_OUT.pack(await self._copy_range(node, uid, body))

    async def _copy_64(self, node: int, uid: int, body: bytes) -> bytes:
        return protocol.WORD.pack(await self._copy_range(node, uid, body))

    async def _copy_range(self, node: int, uid: int, body: bytes) -> int:
        _, offset, target_node, _, to, length, flags = protocol.COPY_IN.unpack_from(body)
        if flags:
            raise _os_error(errno.EINVAL)
        source, target = self._vfs.inode(node), self._vfs.inode(target_node)
        await self._get_ready(target, target_node, uid)
        return source.copy_range(offset, target, to, min(length, 0x7FFF_F000))


def _hole(offset: int, whence: int, found: int | None, size: int) -> tuple[int, int]:
    """Returns the range that was passed over as a hole, or where one was found the first byte."""
    end = size if found is None else found
    if whence == os.SEEK_DATA:
        return offset, end
    return end, min(end + 1, size)


def _os_error(code: int) -> OSError:
    return OSError(code, os.strerror(code))
