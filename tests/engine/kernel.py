"""What Linux does between system calls and a filesystem, as far as sessions are concerned.

It remembers which name leads to which inode number for as long as it likes, counts its
references and gives them back, keeps removed files while they are open, and refuses by itself
what it can judge by itself. Drives a `Vfs` as fsdriver does, without FUSE.
"""

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator

from engine.mounted.inodes import Attributes, Changes, Inode, fail
from engine.mounted.vfs import SESSIONS, Vfs
from engine.storage.nodes import Owner
from tests.engine.trees import Seen, Tree, with_links

NOREPLACE, EXCHANGE = 1, 2
KINDS = {stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFLNK: 3, stat.S_IFIFO: 4, stat.S_IFSOCK: 5}
PART = 128 << 10


class Kernel:
    """The kernel's view of one session."""

    def __init__(self, vfs: Vfs, session: str) -> None:
        self.vfs = vfs
        self.owner = Owner(os.getuid(), os.getgid())
        self.names: dict[tuple[int, bytes], int] = {}
        self.missing: set[tuple[int, bytes]] = set()
        self.counts: Counter[int] = Counter()
        self.pins: Counter[int] = Counter()
        self.dead: set[int] = set()
        root = vfs.inode(SESSIONS).lookup(session.encode())
        assert root is not None
        self.root = self.refer(root)
        self.pins[self.root] += 1

    def inode(self, ino: int) -> Inode:
        return self.vfs.inode(ino)

    def refer(self, inode: Inode) -> int:
        known = self.vfs.known(inode)
        assert known.attributes().ino == known.ino
        assert self.vfs.refer(known) is known
        self.counts[known.ino] += 1
        return known.ino

    # Names.

    def lookup(self, parent: int, name: bytes) -> int | None:
        key = (parent, name)
        if key in self.missing:
            return None
        ino = self.names.get(key)
        if ino is None:
            if parent in self.dead:
                return None
            found = self.inode(parent).lookup(name)
            if found is None:
                self.missing.add(key)
                return None
            ino = self.names[key] = self.refer(found)
        return ino

    def resolve(self, path: bytes) -> int:
        at = self.root
        for name in path.split(b"/") if path else []:
            below = self.lookup(at, name)
            if below is None:
                raise fail(errno.ENOENT)
            at = below
        return at

    def parent(self, path: bytes) -> tuple[int, bytes]:
        above, _, name = path.rpartition(b"/")
        return self.resolve(above), name

    def listing(self, ino: int, batch: int = 7) -> dict[bytes, int]:
        """Lists a directory in several calls, as getdents and FUSE_READDIRPLUS do."""
        found: dict[bytes, int] = {}
        cookie = 0
        while ino not in self.dead:
            taken = 0
            calls: Iterator[tuple[int, bytes, Inode]] = self.inode(ino).listing(cookie)
            for at, name, inode in calls:
                cookie = at  # where the next call goes on
                assert name not in found
                found[name] = self.refer(inode)
                before = self.names.get((ino, name))
                assert before in {None, found[name]}, (name, "has another number than before")
                self.names[ino, name] = found[name]
                self.missing.discard((ino, name))
                taken += 1
                if taken == batch:
                    break
            calls.close()  # type: ignore[attr-defined]  # a generator
            if taken < batch:
                break
        return found

    def kind(self, ino: int) -> int:
        return stat.S_IFMT(self.inode(ino).attributes().mode)

    def is_directory(self, ino: int) -> bool:
        return self.kind(ino) == stat.S_IFDIR

    # What is remembered, and forgotten.

    def pin(self, ino: int) -> int:
        self.pins[ino] += 1
        return ino

    def unpin(self, ino: int) -> None:
        self.pins[ino] -= 1
        self.drop(ino)

    def drop(self, ino: int) -> None:
        """Forgets an inode that nothing refers to any more."""
        if (
            not self.pins[ino]
            and ino not in self.names.values()
            and all(parent != ino for parent, _ in self.names)
        ):
            self.missing = {key for key in self.missing if key[0] != ino}
            count = self.counts.pop(ino, 0)
            if count:
                self.vfs.forget(ino, count)

    def leaves(self) -> list[tuple[int, bytes]]:
        """Returns the names that could be forgotten now."""
        parents = {parent for parent, _ in self.names}
        return sorted(
            key for key, ino in self.names.items() if ino not in parents and not self.pins[ino]
        )

    def evict(self, key: tuple[int, bytes]) -> None:
        self.drop(self.names.pop(key))

    def evict_all(self) -> None:
        while leaves := self.leaves():
            for key in leaves:
                self.evict(key)
        self.missing.clear()

    def unname(self, key: tuple[int, bytes]) -> None:
        ino = self.names.pop(key, None)
        if ino is not None:
            self.drop(ino)

    # System calls, by directory and name, or by inode.

    def _free(self, parent: int, name: bytes) -> None:
        if self.lookup(parent, name) is not None:
            raise fail(errno.EEXIST)
        if parent in self.dead:
            raise fail(errno.ENOENT)

    def _made(self, parent: int, name: bytes, inode: Inode) -> int:
        self.missing.discard((parent, name))
        ino = self.names[parent, name] = self.refer(inode)
        return ino

    def create(self, parent: int, name: bytes, mode: int) -> int:
        self._free(parent, name)
        return self._made(parent, name, self.inode(parent).create(name, mode, self.owner))

    def mkdir(self, parent: int, name: bytes, mode: int) -> int:
        self._free(parent, name)
        return self._made(parent, name, self.inode(parent).mkdir(name, mode, self.owner))

    def symlink(self, parent: int, name: bytes, target: bytes) -> int:
        self._free(parent, name)
        return self._made(parent, name, self.inode(parent).symlink(name, target, self.owner))

    def link(self, ino: int, parent: int, name: bytes) -> None:
        self._free(parent, name)
        if self.is_directory(ino):
            raise fail(errno.EPERM)
        self._made(parent, name, self.inode(parent).link(name, self.inode(ino)))

    def unlink(self, parent: int, name: bytes) -> None:
        ino = self.lookup(parent, name)
        if ino is None:
            raise fail(errno.ENOENT)
        if self.is_directory(ino):
            raise fail(errno.EISDIR)
        self.inode(parent).unlink(name)
        self.unname((parent, name))

    def rmdir(self, parent: int, name: bytes) -> None:
        ino = self.lookup(parent, name)
        if ino is None:
            raise fail(errno.ENOENT)
        if not self.is_directory(ino):
            raise fail(errno.ENOTDIR)
        self.inode(parent).rmdir(name)
        self._bury(ino)
        self.unname((parent, name))

    def _bury(self, ino: int) -> None:
        self.dead.add(ino)
        for key in [key for key in self.names if key[0] == ino]:
            self.unname(key)

    def above(self, ino: int) -> set[int]:
        """Returns a directory and those that it stands in, by the names that are cached."""
        found: set[int] = set()
        todo = {ino}
        while todo:
            found |= todo
            todo = {parent for (parent, _), child in self.names.items() if child in todo} - found
        return found

    def rename(self, one: int, name: bytes, other: int, new: bytes, flags: int = 0) -> None:
        source, target = self.lookup(one, name), self.lookup(other, new)
        if source is None or (flags & EXCHANGE and target is None):
            raise fail(errno.ENOENT)
        if flags & NOREPLACE and target is not None:
            raise fail(errno.EEXIST)
        if other in self.dead:
            raise fail(errno.ENOENT)
        if self.is_directory(source) and source in self.above(other):
            raise fail(errno.EINVAL)
        if target is not None and target in self.above(one):
            raise fail(errno.EINVAL if flags & EXCHANGE else errno.ENOTEMPTY)
        if source == target:
            return
        if target is not None and not flags & EXCHANGE:
            if self.is_directory(source) and not self.is_directory(target):
                raise fail(errno.ENOTDIR)
            if self.is_directory(target) and not self.is_directory(source):
                raise fail(errno.EISDIR)
        replaced_directory = target is not None and self.is_directory(target)
        self.inode(one).rename(name, self.inode(other), new, flags)
        self.missing.discard((other, new))
        if flags & EXCHANGE and target is not None:
            self.names[one, name], self.names[other, new] = target, source
            return
        del self.names[one, name]
        if target is not None:
            if replaced_directory:
                self._bury(target)
            self.unname((other, new))
        self.names[other, new] = source

    def stat(self, ino: int) -> Attributes:
        return self.inode(ino).attributes()

    def read(self, ino: int) -> bytes:
        inode = self.inode(ino)
        size = inode.attributes().size
        data = b"".join(inode.read(at, min(PART, size - at)) for at in range(0, size, PART))
        assert len(data) == size
        assert inode.read(size, 10) == b""
        return data

    def change(self, ino: int, changes: Changes) -> None:
        after = self.inode(ino).change(changes)
        assert after == self.inode(ino).attributes()

    def sync(self, ino: int) -> None:
        fd = self.inode(ino).open_to_sync()
        if fd >= 0:
            os.fsync(fd)
            os.close(fd)

    # The whole.

    def numbers(self) -> dict[bytes, int]:
        """Returns the inode number of every path."""
        found = {}
        stack = [(b"", self.root)]
        while stack:
            path, ino = stack.pop()
            found[path] = ino
            if self.is_directory(ino):
                for name, below in self.listing(ino).items():
                    stack.append((path + b"/" + name if path else name, below))
        return found

    def tree(self, batch: int = 7, *, counts: bool = True) -> Tree:
        """Looks at everything there is; `counts` whether link counts must be right."""
        tree: Tree = {}
        places: dict[int, list[bytes]] = {}
        links: dict[int, int] = {}
        stack = [(b"", self.root)]
        while stack:
            path, ino = stack.pop()
            inode, attributes = self.inode(ino), self.stat(ino)
            kind, mode = KINDS[stat.S_IFMT(attributes.mode)], stat.S_IMODE(attributes.mode)
            data = b""
            if kind == 1:
                data = self.read(ino)
            elif kind == 2:
                for name, below in self.listing(ino, batch).items():
                    stack.append((path + b"/" + name if path else name, below))
            elif kind == 3:
                data = inode.readlink()
                assert attributes.size == len(data)
            xattrs = tuple(sorted(inode.xattrs().items()))
            tree[path] = Seen(kind, mode, attributes.mtime_ns, data, xattrs)
            if kind != 2:
                places.setdefault(ino, []).append(path)
                links[ino] = attributes.nlink
        for ino, names in places.items():
            assert links[ino] == len(names) or not counts, (names, links[ino])
        return with_links(tree, list(places.values()))
