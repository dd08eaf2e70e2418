"""The answers to the kernel: each handler decodes, makes one call of the engine, encodes.

No rule about what a tree looks like is here. A file handle is the inode's number. Whatever
goes wrong is answered with an errno: a request is never left without an answer. Handlers do
not wait, except for copies of large files and for syncs, which run in threads.
"""

import contextlib
import errno
import functools
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from time import perf_counter_ns
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import structlog
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext

from engine import EngineError, InodeNo
from engine.mounted.inodes import Attributes, Changes, Inode
from engine.mounted.vfs import Vfs
from engine.storage.nodes import Owner
from fsdriver.abilities import Abilities
from fsdriver.errnos import errno_of, is_of_memory
from fsdriver.metrics import Timing
from fsdriver.protocol import KILL_SUIDGID, UNSEEN, is_served
from fsdriver.readahead import ReadAhead
from fsdriver.seat import Seat
from fsdriver.writes import IN_PAGE, Writes

T = TypeVar("T")
P = ParamSpec("P")

COPY_IN_THREAD = 1 << 20
"""From how many bytes on a file is copied up in a thread where no disk is waited for."""
"""A file of more bytes than this is copied up in a thread, while others are served."""

OURS = frozenset({errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Answers that are errors of the daemon, or of what it stands on. All others are ordinary."""
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Answers that programs are prepared for, and who looks after the disk wants to know of."""

_DOTS = (b".", b"..")
"""What every listing begins with. The kernel takes the names, and counts no reference."""

SLOW_NS = 5_000_000_000
"""Of an answer that took longer, the log tells."""

log = structlog.get_logger("fsdriver")


def _answered(
    handler: Callable[Concatenate["Operations", P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["Operations", P], Coroutine[Any, Any, T]]:
    """Turns every failure of a handler into an errno for the kernel."""

    @functools.wraps(handler)
    async def answer(self: "Operations", /, *arguments: P.args, **named: P.kwargs) -> T:
        began, seat = perf_counter_ns(), self.seat
        device = seat.begin() if seat is not None else -1
        try:
            return await handler(self, *arguments, **named)
        except FUSEError:
            raise
        except OSError as error:
            code = error.errno or errno.EIO
            if code in OURS:
                log.error("failed", operation=name, error=str(error))
            elif code in NO_ROOM:
                log.warning("no room", error=os.strerror(code))
            raise FUSEError(code) from error
        except EngineError as error:
            code = errno_of(error)
            if code in NO_ROOM:
                log.warning("no room", error=os.strerror(code))
            elif code in OURS:
                log.error("failed", operation=name, kind=type(error).__name__, error=str(error))
            raise FUSEError(code) from error
        except Exception as error:
            if is_of_memory(error):
                with contextlib.suppress(MemoryError):
                    log.error("no memory", operation=name)
                raise FUSEError(errno.ENOMEM) from None
            log.exception("crashed", operation=name)
            raise FUSEError(errno.EIO) from error
        finally:
            if seat is not None:
                seat.end(device)
            took = perf_counter_ns() - began
            self.timings[name].add(took)
            if took > SLOW_NS:
                log.warning("an answer took long", operation=name, seconds=round(took / 1e9, 1))

    name = handler.__name__
    return answer


def _encode(inode: Inode) -> EntryAttributes:
    return _encode_attributes(inode, inode.attributes())


def _encode_attributes(inode: Inode, attributes: Attributes) -> EntryAttributes:
    entry = EntryAttributes()
    entry.st_ino = attributes.ino
    entry.st_mode = attributes.mode
    entry.st_nlink = attributes.nlink
    entry.st_uid = attributes.uid
    entry.st_gid = attributes.gid
    entry.st_rdev = attributes.rdev
    entry.st_size = attributes.size
    entry.st_blocks = attributes.blocks
    entry.st_blksize = 4096
    entry.st_mtime_ns = attributes.mtime_ns
    entry.st_ctime_ns = attributes.ctime_ns
    entry.st_atime_ns = attributes.atime_ns
    entry.entry_timeout = inode.keep_entry
    entry.attr_timeout = inode.keep_attributes
    return entry


class Operations(pyfuse3.Operations):
    """Answers the kernel for one mount."""

    supports_dot_lookup = False

    def __init__(self, vfs: Vfs) -> None:
        super().__init__()
        self.vfs = vfs
        self.timings: defaultdict[str, Timing] = defaultdict(Timing)
        self._staging: dict[int, trio.Event] = {}
        self.copy_here = 0
        """How large a file is copied up here, at most: a disk can keep its copy for minutes."""
        self.abilities = Abilities()
        self.writes = Writes()
        self.ahead: ReadAhead | None = None
        self.seat: Seat | None = None
        self.attributes_changed: Callable[[int], None] | None = None
        """Tells the kernel that it has old attributes."""

    async def stage(self, inode: Inode, changes: Changes | None = None) -> None:
        """Copies a file up in a thread before it is changed; others who change it wait for that."""
        while inode.to_copy(changes) > self.copy_here:
            running = self._staging.get(inode.ino)
            if running is not None:
                await running.wait()
                continue
            event = self._staging[inode.ino] = trio.Event()
            try:
                await trio.to_thread.run_sync(inode.stage)
            finally:
                del self._staging[inode.ino]
                event.set()
            return

    async def _stage_without(self, directory: Inode, name: bytes) -> None:
        """Copies what must be before a name goes."""
        child = directory.copied_without(name)
        if child is not None:
            await self.stage(child)

    async def _sync(self, inode: Inode) -> None:
        """Opens before it waits: by then a commit may have changed over, or a name gone."""
        fd = inode.open_to_sync()
        if fd >= 0:
            try:
                await trio.to_thread.run_sync(os.fsync, fd)
            finally:
                os.close(fd)

    # Looking.

    @_answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        parent = self.vfs.inode(parent_inode)
        found = parent.lookup(name)
        if found is None:
            if not parent.keep_missing:
                raise FUSEError(errno.ENOENT)
            missing = EntryAttributes()
            missing.st_ino = InodeNo(0)
            missing.entry_timeout = parent.keep_missing
            return missing
        found = self.vfs.known(found)
        entry = _encode(found)
        self.vfs.refer(found)
        return entry

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for ino, count in inode_list:
            try:
                self.vfs.forget(ino, count)
            except Exception:  # there is nobody to tell
                log.exception("forget failed", inode=ino)

    @_answered
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return _encode(self.vfs.inode(inode))

    @_answered
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return self.vfs.inode(inode).readlink()

    @_answered
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        if self.abilities.no_opendir:
            raise FUSEError(errno.ENOSYS)  # the kernel does not ask again, and keeps listings
        self.vfs.inode(inode)
        return inode

    @_answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        vfs, directory = self.vfs, self.vfs.inode(fh)
        for at, dots in enumerate(_DOTS[start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, dots, _encode(directory), at):
                return
        listing = directory.listing(max(start_id - len(_DOTS), 0))
        try:
            for cookie, name, inode in listing:
                known = vfs.known(inode)
                try:
                    entry = _encode(known)
                except FileNotFoundError:
                    continue
                if not pyfuse3.readdir_reply(token, name, entry, cookie + len(_DOTS)):
                    break
                vfs.refer(known)
        finally:
            close = getattr(listing, "close", None)
            if close is not None:
                close()
        if self.ahead is not None and not start_id:
            self.ahead.listed(directory.files())

    @_answered
    async def releasedir(self, fh: int) -> None:
        return None

    @_answered
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        disk = os.statvfs(self.vfs.repository.path)
        data = pyfuse3.StatvfsData()
        data.f_bsize, data.f_frsize = disk.f_bsize, disk.f_frsize
        data.f_blocks, data.f_bfree, data.f_bavail = disk.f_blocks, disk.f_bfree, disk.f_bavail
        data.f_files, data.f_ffree, data.f_favail = disk.f_files, disk.f_ffree, disk.f_favail
        data.f_namemax = 255
        return data

    # Files.

    @_answered
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        found = self.vfs.inode(inode)
        if flags & os.O_ACCMODE != os.O_RDONLY and found.read_only:
            raise FUSEError(errno.EROFS)
        if flags & os.O_TRUNC:  # in a mount that is `plain` only; then the kernel does not do it
            if ctx.uid != 0:
                self._drop_set_id(found)
            found.change(Changes(size=0))
        return FileInfo(fh=inode, keep_cache=True)

    @_answered
    async def read(self, fh: int, off: int, size: int) -> bytes:
        if fh >= UNSEEN:
            return self.vfs.inode(fh & ~UNSEEN).read_unseen(off, size)
        inode = self.vfs.inode(fh)
        data = inode.read(off, size)
        if self.ahead is not None:
            self.ahead.read(inode, off, len(data))
        return data

    @_answered
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        writes = self.writes
        if writes.gate is not None:
            await writes.begin(fh & ~KILL_SUIDGID)
        inode = self.vfs.inode(fh & ~KILL_SUIDGID)
        if inode.to_copy():
            await self.stage(inode)
        if fh & KILL_SUIDGID:
            self._drop_set_id(inode)
        done = inode.write(off, buf)
        if not (off + done) & IN_PAGE or writes.halves:
            writes.end(inode.ino, off, done, self.abilities.largest)
        return done

    def _drop_set_id(self, inode: Inode) -> None:
        """Takes set-id bits away where the reply has no attributes, and tells the kernel.

        It would go on with the mode that it has, which is what execve(2) looks at.
        """
        if inode.drop_set_id() and self.attributes_changed is not None:
            self.attributes_changed(inode.ino)

    async def flush(self, fh: int) -> None:
        raise FUSEError(errno.ENOSYS)  # a write has reached the upper when it returns

    @_answered
    async def release(self, fh: int) -> None:
        return None

    @_answered
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._sync(self.vfs.inode(fh))

    @_answered
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._sync(self.vfs.inode(fh))

    # Changing.

    @_answered
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        found = self.vfs.inode(inode)
        changes = Changes(
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        await self.stage(found, changes)
        if fh is not None and fh & KILL_SUIDGID:
            found.drop_set_id()
        return _encode_attributes(found, found.change(changes))

    def _owner(self, ctx: RequestContext) -> Owner:
        return Owner(ctx.uid, ctx.gid)

    def _made(self, inode: Inode) -> EntryAttributes:
        entry = _encode(inode)
        self.vfs.refer(inode)
        return entry

    @_answered
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        parent = self.vfs.inode(parent_inode)
        made = parent.create(name, stat.S_IMODE(mode) | stat.S_IFREG, self._owner(ctx))
        return FileInfo(fh=made.ino, keep_cache=True), self._made(made)

    @_answered
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        parent = self.vfs.inode(parent_inode)
        return self._made(parent.create(name, mode, self._owner(ctx), rdev))

    @_answered
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        parent = self.vfs.inode(parent_inode)
        return self._made(parent.mkdir(name, mode, self._owner(ctx)))

    @_answered
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        parent = self.vfs.inode(parent_inode)
        return self._made(parent.symlink(name, target, self._owner(ctx)))

    @_answered
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        file, parent = self.vfs.inode(inode), self.vfs.inode(new_parent_inode)
        await self.stage(file)
        return self._made(parent.link(new_name, file))

    @_answered
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        parent = self.vfs.inode(parent_inode)
        child = parent.copied_without(name)
        if child is not None:
            await self.stage(child)
        parent.unlink(name)

    @_answered
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        self.vfs.inode(parent_inode).rmdir(name)

    @_answered
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        old, new = self.vfs.inode(parent_inode_old), self.vfs.inode(parent_inode_new)
        moved = old.lookup(name_old)
        if moved is not None and not stat.S_ISDIR(moved.attributes().mode):
            await self.stage(moved)
        await self._stage_without(new, name_new)
        old.rename(name_old, new, name_new, flags)

    # Extended attributes.

    @_answered
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        if not is_served(name):
            raise FUSEError(errno.ENODATA)
        try:
            return self.vfs.inode(inode).xattrs()[name]
        except KeyError:
            raise FUSEError(errno.ENODATA) from None

    @_answered
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        return [name for name in self.vfs.inode(inode).xattrs() if is_served(name)]

    @_answered
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        found = self.vfs.inode(inode)
        await self.stage(found)
        found.set_xattr(name, value)

    @_answered
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        found = self.vfs.inode(inode)
        await self.stage(found)
        found.remove_xattr(name)
