"""Checkout: a tree becomes a real directory.

Everything is made in a new directory beside the target, relative to directories' descriptors
and never through a symbolic link, and renamed to the target when it is whole: a checkout that
was killed leaves a directory called `.NAME.checkout-XXXXXXXX`, never half a target.
"""

import os
import secrets
import stat
from collections.abc import Callable

import msgspec

from engine import content
from engine.directory import Directory, directory_id
from engine.errors import EngineError
from engine.hostfs import set_times, write_xattrs
from engine.nodes import DEEPEST, Entry, Kind
from engine.objects import Objects
from engine.upper import Upper

Progress = Callable[[int, int | None], None]

_LINKS = 40
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class CheckoutRefusedError(EngineError):
    """The target or the tree does not allow a checkout. `path` names what is in the way."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"cannot check out to {path!r}: {why}")
        self.path, self.why = path, why


class OutsideLinkError(EngineError):
    """A symbolic link in the tree leads out of it."""

    def __init__(self, path: bytes, target: bytes) -> None:
        super().__init__(
            f"the link {os.fsdecode(path)!r} leads out of the tree, to {os.fsdecode(target)!r}"
        )
        self.path, self.target = path, target


class CheckoutReport(msgspec.Struct):
    """What a checkout made."""

    entries: int = 0
    bytes: int = 0


def check_out(
    objects: Objects,
    root: Entry,
    target: str,
    *,
    outside_links: bool = False,
    progress: Progress | None = None,
) -> CheckoutReport:
    """Makes the tree at `target`, which must not exist or be an empty directory.

    Raises CheckoutRefusedError; OutsideLinkError unless `outside_links`, before anything is
    made; OSError (a full disk) and damage of objects, after which the target is as it was.
    """
    target = os.path.abspath(target)
    if os.path.lexists(target):
        if os.path.islink(target) or not os.path.isdir(target):
            raise CheckoutRefusedError(target, "it exists and is not a directory")
        if os.listdir(target):
            raise CheckoutRefusedError(target, "the directory is not empty")
    if not outside_links:
        _check_links(objects, root)
    parent, name = os.path.split(target)
    if not os.path.isdir(parent):
        raise CheckoutRefusedError(target, f"{parent!r} is not a directory")
    temporary = os.path.join(parent, f".{name[:50]}.checkout-{secrets.token_hex(4)}")
    os.mkdir(temporary, 0o700)
    try:
        fd = os.open(temporary, _OPEN_DIRECTORY)
        job = _Checkout(objects, root, fd, progress)
        try:
            job.fill(fd, root, 0)
            job.finish()
        finally:
            os.close(fd)
        os.rename(temporary, target)
    except BaseException:
        Upper(temporary, "").remove_tree(os.fsencode(temporary))
        raise
    return job.report


class _Checkout:
    def __init__(self, objects: Objects, root: Entry, fd: int, progress: Progress | None) -> None:
        self.objects = objects
        self.report = CheckoutReport()
        self.progress = progress or (lambda done, total: None)
        self.total = root.totals.entries if root.totals else None
        self.groups: dict[bytes, tuple[list[bytes], bytes]] = {}
        self.root, self.root_fd = root, fd
        self.way: list[bytes] = []
        self.closed: list[tuple[list[bytes], Entry]] = []

    def fill(self, fd: int, directory: Entry, depth: int) -> None:
        """Makes what is in a directory, in the open directory `fd`."""
        if depth > DEEPEST:
            raise CheckoutRefusedError("", f"the tree is deeper than {DEEPEST} directories")
        for entry in Directory(self.objects, directory_id(directory)):
            if entry.kind == Kind.DIRECTORY:
                os.mkdir(entry.name, 0o700, dir_fd=fd)
                below = os.open(entry.name, _OPEN_DIRECTORY, dir_fd=fd)
                self.way.append(entry.name)
                try:
                    self.fill(below, entry, depth + 1)
                    if entry.mode & 0o500 == 0o500:
                        self.dress(below, entry)
                    else:  # an ordinary user could not enter it again to link what is in it
                        self.closed.append((list(self.way), entry))
                finally:
                    os.close(below)
                self.way.pop()
            elif entry.link is None:
                self._make(fd, entry)
            elif entry.link.group in self.groups:
                self._link(fd, entry.name, *self.groups[entry.link.group])
            else:
                self._make(fd, entry)
                self.groups[entry.link.group] = (list(self.way), entry.name)
            self.report.entries += 1
            self.progress(self.report.entries, self.total)

    def _link(self, fd: int, name: bytes, way: list[bytes], first: bytes) -> None:
        """Makes another name of a file made before, called `first` in the directory at `way`."""
        there = self._open(way)
        try:
            os.link(first, name, src_dir_fd=there, dst_dir_fd=fd, follow_symlinks=False)
        finally:
            os.close(there)

    def _open(self, way: list[bytes]) -> int:
        fd = os.dup(self.root_fd)
        for name in way:
            try:
                below = os.open(name, _OPEN_DIRECTORY, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
        return fd

    def finish(self) -> None:
        """Gives the directories their attributes that were left open until now."""
        for way, entry in self.closed:
            fd = self._open(way)
            try:
                self.dress(fd, entry)
            finally:
                os.close(fd)
        self.dress(self.root_fd, self.root)

    def _make(self, fd: int, entry: Entry) -> None:
        if entry.kind == Kind.SYMLINK and isinstance(entry.content, bytes):
            os.symlink(entry.content, entry.name, dir_fd=fd)
        elif entry.kind == Kind.FIFO:
            os.mkfifo(entry.name, 0o600, dir_fd=fd)
            os.chmod(entry.name, entry.mode, dir_fd=fd)
        else:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(entry.name, flags, 0o600, dir_fd=fd)
            try:
                content.write_out(self.objects, entry, file)
                self.dress(file, entry)
            finally:
                os.close(file)
            self.report.bytes += entry.size
            return
        set_times(entry.name, entry.mtime_ns, dir_fd=fd)

    def dress(self, fd: int, entry: Entry) -> None:
        """Gives an open file or directory its attributes; nothing is made in it afterwards."""
        write_xattrs(fd, entry.xattrs)
        os.fchmod(fd, stat.S_IMODE(entry.mode))
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))


def _check_links(objects: Objects, root: Entry) -> None:
    """Raises OutsideLinkError for the first link that leads out of the tree."""
    stack = [root]

    def visit(path: bytes) -> None:
        for entry in Directory(objects, directory_id(stack[-1])):
            child = path + b"/" + entry.name if path else entry.name
            if entry.kind == Kind.SYMLINK and isinstance(entry.content, bytes):
                if _leads_out(objects, stack, entry.content):
                    raise OutsideLinkError(child, entry.content)
            elif entry.kind == Kind.DIRECTORY:
                if len(stack) > DEEPEST:
                    raise CheckoutRefusedError("", f"the tree is deeper than {DEEPEST} directories")
                stack.append(entry)
                visit(child)
                stack.pop()

    visit(b"")


def _leads_out(objects: Objects, directories: list[Entry], target: bytes) -> bool:
    """Follows a link's target inside the tree, through other links, as the kernel would."""
    at: list[Entry | None] = list(directories)
    rest = [target]
    followed = 0
    while rest:
        path = rest.pop()
        if path.startswith(b"/"):
            return True
        for number, name in enumerate(parts := path.split(b"/")):
            if name in {b"", b"."}:
                continue
            if name == b"..":
                at.pop()
                if not at:
                    return True
                continue
            here = at[-1]
            entry = None
            if here is not None and here.kind == Kind.DIRECTORY:
                entry = Directory(objects, directory_id(here)).get(name)
            if (
                entry is not None
                and entry.kind == Kind.SYMLINK
                and isinstance(entry.content, bytes)
            ):
                followed += 1
                if followed > _LINKS:
                    return False  # the kernel answers ELOOP
                rest.append(b"/".join(parts[number + 1 :]).lstrip(b"/"))
                rest.append(entry.content)
                break
            at.append(entry)
    return False
