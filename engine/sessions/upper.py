"""The upper of a session: a directory on the host in the kernel's overlayfs format.

What a session changed, laid over its base:

    regular files, links, fifos   stand for themselves and hide what the base has there
    whiteout                      a character device 0:0 (or, where none can be made, an empty
                                  file with `user.overlay.whiteout` in a directory marked
                                  `user.overlay.opaque=x`): the base's name is gone. All may be
                                  names of one file
    directory                     merged with the base's directory of the same path,
      user.overlay.opaque=y       unless it hides it,
      user.overlay.redirect=/p    or is merged with the base's directory at /p instead

That is overlayfs (Documentation/filesystems/overlayfs.rst) with `userxattr`. One addition,
which overlayfs hides from programs and ignores: `user.overlay.amalgam.mode`, the permission
bits (octal) of a file whose own would lock out an ordinary user who owns it; the file itself
then has u+rw, a directory u+rwx. The kernel's overlayfs ignores that as well, and has neither
redirects nor whiteout files under `userxattr`: see `is_foreign` and `hand_over`.

Every change is one rename or one creation in place, so a process killed at any moment leaves
the state before or after it. Beside the upper lies `work`, for what is not yet in place.
Only paths below the upper's root are touched; names come from callers who checked them.
"""

import contextlib
import ctypes
import errno
import itertools
import os
import stat
from collections.abc import Iterator

from engine.host.hostfs import read_xattrs, set_times, write_xattrs
from engine.host.owners import give
from engine.host.removing import remove_tree
from engine.storage.nodes import Entry, Kind, Owner

OPAQUE = b"user.overlay.opaque"
REDIRECT = b"user.overlay.redirect"
WHITEOUT = b"user.overlay.whiteout"
MODE = b"user.overlay.amalgam.mode"
NOTE = b"user.overlay.amalgam.note"

FOLLOWS = b"user.overlay.amalgam.follows"
"""On the root of an upper that is to get what a commit could not put into its tree."""

NOREPLACE, EXCHANGE, LEAVE_WHITEOUT = 1, 2, 4
"""Flags of renameat2(2)."""

LONGEST_PATH = 3500
"""Longer paths, with a name still to be added, may be more than the kernel takes at once."""

_COPYING = b"copying."
_numbers = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def rename(old: bytes, new: bytes, flags: int = 0) -> None:
    """renameat2(2). Raises OSError."""
    if not flags:
        os.rename(old, new)
        return
    if _libc.renameat2(_AT_FDCWD, old, _AT_FDCWD, new, ctypes.c_uint(flags)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fsdecode(new))


class _LongPath(bytes):
    """A path by way of a descriptor of a directory on it, open for as long as this lives."""

    fd = -1

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def _shortened(path: bytes) -> _LongPath:
    """Returns a path that means the same as one of any length."""
    fd = -1
    while len(path) > LONGEST_PATH:
        cut = path.rindex(b"/", 0, LONGEST_PATH)
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        below = os.open(path[:cut], flags, dir_fd=None if fd < 0 else fd)
        if fd >= 0:
            os.close(fd)
        fd, path = below, path[cut + 1 :]
    short = _LongPath(b"/proc/self/fd/%d/./%s" % (fd, path))
    short.fd = fd
    return short


class Upper:
    """One session's upper and its work directory. Paths are relative, as bytes."""

    def __init__(self, root: str, work: str) -> None:
        self.root, self.work = os.fsencode(root), os.fsencode(work)
        self._whiteout: bytes | None = None

    def at(self, path: bytes) -> bytes:
        """Returns an absolute path, good for as long as it is kept."""
        absolute = self.root + b"/" + path if path else self.root
        return absolute if len(absolute) <= LONGEST_PATH else _shortened(absolute)

    def scratch(self) -> bytes:
        """Returns a new absolute path in the work directory."""
        return self.work + b"/%d.%d" % (os.getpid(), next(_numbers))

    @contextlib.contextmanager
    def making(self) -> Iterator[bytes]:
        """Gives a new path in the work directory; what was made there goes if the block fails."""
        temporary = self.scratch()
        try:
            yield temporary
        except BaseException:
            self.discard(temporary)
            raise

    def copying(self, group: bytes) -> bytes:
        """Returns where in the work directory a linked file is that is getting its names."""
        return self.work + b"/" + _COPYING + group.hex().encode()

    def all_copying(self) -> Iterator[tuple[bytes, bytes]]:
        """Yields (group, absolute path) of what is there at such a place."""
        for name in os.listdir(self.work):
            if name.startswith(_COPYING):
                yield bytes.fromhex(name[len(_COPYING) :].decode()), self.work + b"/" + name

    # Reading.

    def scan(self, path: bytes) -> Iterator[tuple[bytes, os.stat_result | None]]:
        """Yields the names in a directory with their status; None for a whiteout."""
        absolute = self.at(path)
        marked = self._mark(absolute) == b"x"
        with os.scandir(absolute) as listing:
            for item in listing:
                status = item.stat(follow_symlinks=False)
                yield item.name, None if is_whiteout(item.path, status, marked) else status

    def _mark(self, absolute: bytes) -> bytes:
        return attribute(absolute, OPAQUE) or b""

    def is_opaque(self, path: bytes) -> bool:
        """Tells whether a directory hides the base's."""
        return self._mark(self.at(path)) == b"y"

    def redirect(self, path: bytes) -> bytes | None:
        """Returns the base's path, without its leading slash, that a directory is merged with."""
        value = attribute(self.at(path), REDIRECT)
        return value.strip(b"/") if value else None

    def mode(self, where: bytes | int, status: os.stat_result) -> int:
        """Returns the permission bits that programs are to see."""
        if _has_bits(status):
            kept = _kept_mode(where)
            if kept is not None:
                return kept
        return stat.S_IMODE(status.st_mode)

    # The kernel's overlayfs as the user of the upper, by turns with a session.

    def is_foreign(self) -> bool:
        """Tells whether the kernel's overlayfs would show something else: it must be folded."""
        return any(
            self.redirect(path) is not None or self._mark(self.at(path)) == b"x"
            for path, status in self.inside(b"")
            if stat.S_ISDIR(status.st_mode)
        )

    def hand_over(self) -> None:
        """Gives every file its own permission bits, and notes that the kernel has the upper.

        The note is overlayfs's own directory in `work`. It comes first, so that whoever finds it
        takes everything back, however far this came. Raises OSError ENOTSUP on a disk without
        `user.*` attributes.
        """
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._note(), 0o700)
        os.setxattr(self._note(), NOTE, b"")
        for path, status in self.inside(b""):
            if not _has_bits(status):
                continue
            where = self.at(path)
            kept = _kept_mode(where)
            if kept is not None:
                os.removexattr(where, MODE)  # first: without u+w it could not be
                os.chmod(where, kept)

    def take_back(self) -> None:
        """Makes what the kernel's overlayfs may have left accessible to its owner again."""
        if os.path.lexists(self._note()):
            self._open_up(0o600)

    def open_up(self) -> None:
        """Makes what programs have left here readable for its owner."""
        self._open_up(0o400)

    def _open_up(self, for_files: int) -> None:
        if os.geteuid() == 0:
            return
        pending = [b""]
        while pending:
            path = pending.pop()
            self._unlock(self.at(path), 0o700)
            for item in os.scandir(self.at(path)):
                below = path + b"/" + item.name if path else item.name
                if item.is_dir(follow_symlinks=False):
                    pending.append(below)
                elif item.is_file(follow_symlinks=False):
                    self._unlock(self.at(below), for_files)

    def _unlock(self, where: bytes, needed: int) -> None:
        mode = stat.S_IMODE(os.lstat(where).st_mode)
        if mode & needed != needed:
            needed = 0o700 if needed == 0o700 else 0o600
            os.chmod(where, mode | needed)  # first: without u+w it has no attributes
            os.setxattr(where, MODE, b"%o" % mode)

    def _note(self) -> bytes:
        return self.work + b"/work"

    def inside(self, path: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
        """Yields everything, directories after what is in them."""
        for name, status in self.scan(path):
            below = path + b"/" + name if path else name
            if status is None:
                continue
            if stat.S_ISDIR(status.st_mode):
                yield from self.inside(below)
            else:
                yield below, status
        yield path, os.lstat(self.at(path))

    # Writing.

    def shows(self, mode: int, *, directory: bool) -> bool:
        """Tells whether a file may have such permission bits itself, and its owner still use it."""
        needed = 0o700 if directory else 0o600
        return mode & needed == needed or os.geteuid() == 0

    def chmod(self, where: bytes | int, mode: int, directory: bool, *, new: bool = False) -> None:
        """Sets the permission bits so that the session itself can still read and write.

        With `new` the file was just made, and has no bits kept aside.
        """
        needed = 0o700 if directory else 0o600
        if self.shows(mode, directory=directory):
            os.chmod(where, mode)
            if not new and attribute(where, MODE) is not None:
                os.removexattr(where, MODE)
            return
        try:
            os.setxattr(where, MODE, b"%o" % mode)
        except PermissionError:  # a fifo or a socket: it has no attributes, and is not opened
            os.chmod(where, mode)
            return
        os.chmod(where, mode | needed)

    def follow(self, follows: bool) -> None:
        """Says whether sockets and devices are still in the upper of the generation before."""
        if follows:
            os.setxattr(self.root, FOLLOWS, b"y")
        else:
            os.removexattr(self.root, FOLLOWS)

    def follows(self) -> bool:
        """Tells what `follow` said."""
        return attribute(self.root, FOLLOWS) is not None

    def set_opaque(self, path: bytes) -> None:
        """Marks a directory as hiding the base's."""
        os.setxattr(self.at(path), OPAQUE, b"y")

    def set_redirect(self, path: bytes, base_path: bytes) -> None:
        """Merges a directory with the base's directory at `base_path`."""
        os.setxattr(self.at(path), REDIRECT, b"/" + base_path)

    def make_whiteout(self, absolute: bytes) -> None:
        """Makes a whiteout at a free path."""
        if self.link_whiteout(absolute):
            return
        try:
            os.mknod(absolute, stat.S_IFCHR, os.makedev(0, 0))
        except PermissionError:
            self._make_whiteout_file(absolute)
            return
        another = self.scratch()
        with contextlib.suppress(OSError):  # then each is made by itself
            os.link(absolute, another)
            self._whiteout = another

    def link_whiteout(self, path: bytes, place: int | None = None) -> bool:
        """Gives the last whiteout another name where nothing is; tells whether it could.

        `path` is absolute or starts at the descriptor `place`. As overlayfs does: a new file takes
        several times as long, and room on the disk.
        """
        if self._whiteout is None:
            return False
        try:
            os.link(self._whiteout, path, dst_dir_fd=place)
        except FileExistsError:
            return False
        except OSError:
            self._whiteout = None
            return False
        return True

    def _make_whiteout_file(self, absolute: bytes) -> None:
        fd = os.open(absolute, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.setxattr(fd, WHITEOUT, b"y")
        except OSError:
            os.unlink(absolute)
            raise
        finally:
            os.close(fd)

    def whiteout(self, path: bytes) -> None:
        """Puts a whiteout where nothing is, or in place of what is there, at once."""
        target = self.at(path)
        if self.link_whiteout(target):
            return
        with self.making() as temporary:
            self.make_whiteout(temporary)
            self._mark_parent(temporary, target)
            try:
                status = os.lstat(target)
            except FileNotFoundError:
                rename(temporary, target)
                return
            if stat.S_ISDIR(status.st_mode):
                rename(temporary, target, EXCHANGE)
                self.discard(temporary)
            else:
                rename(temporary, target)

    def remove(self, path: bytes, *, directory: bool) -> None:
        """Removes a file, or a directory that looks empty, at once."""
        target = self.at(path)
        if not directory:
            os.unlink(target)
            return
        try:
            os.rmdir(target)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            temporary = self.scratch()
            rename(target, temporary)
            self.discard(temporary)

    def discard(self, temporary: bytes) -> None:
        """Removes what is in the work directory; what resists, the session's next holder will."""
        with contextlib.suppress(OSError):
            if stat.S_ISDIR(os.lstat(temporary).st_mode):
                remove_tree(temporary)
            else:
                os.unlink(temporary)

    def _mark_parent(self, whiteout: bytes, target: bytes) -> None:
        if stat.S_ISREG(os.lstat(whiteout).st_mode):
            parent = os.path.dirname(target)
            if self._mark(parent) == b"":
                os.setxattr(parent, OPAQUE, b"x")

    def move(self, old: bytes, new: bytes, *, leave_whiteout: bool = False) -> None:
        """Renames inside the upper, replacing what is at `new`, at once.

        With `leave_whiteout` one appears at `old` in the same instant.
        """
        if not leave_whiteout:
            rename(self.at(old), self.at(new))
            return
        try:
            rename(self.at(old), self.at(new), LEAVE_WHITEOUT)
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.EPERM}:
                raise
            self._move_and_whiteout(old, new)

    def _move_and_whiteout(self, old: bytes, new: bytes) -> None:
        """Does it in two steps, without whiteout devices.

        Killed in between, both names show. A failure then comes too late to take the first step
        back, and can hardly be: the whiteout is made, the name in its directory just became free.
        """
        with self.making() as temporary:
            self.make_whiteout(temporary)
            self._mark_parent(temporary, self.at(old))
            rename(self.at(old), self.at(new))
        try:
            rename(temporary, self.at(old))
        except OSError:
            self.discard(temporary)

    def move_onto_whiteout(self, old: bytes, new: bytes, *, leave_whiteout: bool) -> bool:
        """Renames a directory to a path that has a whiteout, which a plain rename refuses.

        Tells whether there is a whiteout at `old` then.
        """
        self._mark_parent(self.at(new), self.at(old))
        self.exchange(old, new)
        if not leave_whiteout:
            with contextlib.suppress(OSError):
                os.unlink(self.at(old))
                return False
        return True

    def exchange(self, one: bytes, other: bytes) -> None:
        """Swaps two paths at once."""
        rename(self.at(one), self.at(other), EXCHANGE)

    def install(self, temporary: bytes, path: bytes, over_whiteout: bool) -> None:
        """Moves something made in the work directory into place, maybe over a whiteout."""
        target = self.at(path)
        if over_whiteout and stat.S_ISDIR(os.lstat(temporary).st_mode):
            rename(temporary, target, EXCHANGE)
            self.discard(temporary)
        else:
            rename(temporary, target)

    def empty(self, path: bytes) -> None:
        """Puts an empty, opaque directory in the place of one that looks empty, at once."""
        target = self.at(path)
        status = os.lstat(target)
        with self.making() as temporary:
            os.mkdir(temporary, 0o700)
            os.setxattr(temporary, OPAQUE, b"y")
            write_xattrs(temporary, read_xattrs(target))
            give(temporary, Owner(status.st_uid, status.st_gid))
            self.chmod(temporary, self.mode(target, status), directory=True, new=True)
            os.utime(temporary, ns=(status.st_atime_ns, status.st_mtime_ns))
            rename(temporary, target, EXCHANGE)
        self.discard(temporary)

    def dress(self, absolute: bytes, entry: Entry) -> None:
        """Gives a file or directory the attributes of `entry`."""
        give(absolute, entry.owner)
        if entry.kind != Kind.SYMLINK:
            if entry.xattrs:
                write_xattrs(absolute, entry.xattrs)
            self.chmod(absolute, entry.mode, entry.kind == Kind.DIRECTORY, new=True)
        set_times(absolute, entry.mtime_ns)


def _needed(status: os.stat_result) -> int:
    """Returns the permission bits without which an owner cannot read and write."""
    return 0o700 if stat.S_ISDIR(status.st_mode) else 0o600


def _has_bits(status: os.stat_result) -> bool:
    """Tells whether a file may have bits of its own kept aside."""
    needed = _needed(status)
    return status.st_mode & needed == needed and not stat.S_ISLNK(status.st_mode)


def is_whiteout(absolute: bytes, status: os.stat_result, marked: bool) -> bool:
    """Tells whether a file is a whiteout; `marked` if its directory may hold whiteout files."""
    if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
        return True
    if not marked or not stat.S_ISREG(status.st_mode) or status.st_size:
        return False
    return attribute(absolute, WHITEOUT) is not None


def _kept_mode(where: bytes | int) -> int | None:
    """Returns the permission bits kept aside; None also for what some program put there."""
    kept = attribute(where, MODE)
    try:
        return None if kept is None else int(kept, 8) & 0o7777
    except ValueError:
        return None


def attribute(where: bytes | int, name: bytes) -> bytes | None:
    """Returns an extended attribute; None if there is none, or no such file."""
    try:
        return os.getxattr(where, name, follow_symlinks=isinstance(where, int))
    except OSError as error:
        if error.errno in {errno.ENODATA, errno.ENOTSUP, errno.ENOENT}:
            return None
        raise
