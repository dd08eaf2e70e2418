"""Trees as tests compare them: a directory on the host, or a tree in the store, as one dict.

`of_directory` and `of_entry` both give {path: Seen}; two trees are equal when their dicts are.
The root has the empty path. Hard links show as the set of names that share a file.
"""

import os
import random
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from engine.host.hostfs import read_xattrs
from engine.storage import content
from engine.storage.nodes import Entry, Kind
from engine.storage.objects import Objects
from engine.trees.directory import walk

RECENT = 1_577_836_800_000_000_000
"""2020: tests set older times, so a time after it is one that the system has set."""


class Seen(NamedTuple):
    """What can be seen of one path. `names` are all the paths of a hard-linked file."""

    kind: int
    mode: int
    mtime_ns: int
    data: bytes
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    names: tuple[bytes, ...] = ()

    def blurred(self) -> "Seen":
        """Returns it with every time set by the system made the same."""
        return self._replace(mtime_ns=min(self.mtime_ns, RECENT))


Tree = dict[bytes, Seen]


def blurred(tree: Tree) -> Tree:
    return {path: seen.blurred() for path, seen in tree.items()}


def without_times(tree: Tree) -> Tree:
    return {path: seen._replace(mtime_ns=0) for path, seen in tree.items()}


def paths(root: bytes) -> Iterator[tuple[bytes, bytes, os.stat_result]]:
    """Yields (relative path, absolute path, status) of a directory on the host and all below."""
    yield b"", root, os.lstat(root)
    stack = [b""]
    while stack:
        above = stack.pop()
        for name in sorted(os.listdir(os.path.join(root, above))):
            path = above + b"/" + name if above else name
            absolute = root + b"/" + path
            status = os.lstat(absolute)
            yield path, absolute, status
            if stat.S_ISDIR(status.st_mode):
                stack.append(path)


def of_directory(root: str | bytes | Path, modes: dict[int, int] | None = None) -> Tree:
    """Describes a directory on the host; `modes` by inode number instead of the host's."""
    tree: Tree = {}
    links: dict[int, list[bytes]] = {}
    for path, absolute, status in paths(os.fsencode(root)):
        data = b""
        if stat.S_ISREG(status.st_mode):
            data = Path(os.fsdecode(absolute)).read_bytes()
            kind = Kind.FILE
        elif stat.S_ISLNK(status.st_mode):
            data, kind = os.readlink(absolute), Kind.SYMLINK
        elif stat.S_ISDIR(status.st_mode):
            kind = Kind.DIRECTORY
        else:
            assert stat.S_ISFIFO(status.st_mode), path
            kind = Kind.FIFO
        xattrs = () if kind in {Kind.SYMLINK, Kind.FIFO} else read_xattrs(absolute)
        mode = stat.S_IMODE(status.st_mode) if modes is None else modes[status.st_ino]
        tree[path] = Seen(kind, mode, status.st_mtime_ns, data, xattrs)
        if status.st_nlink > 1 and kind != Kind.DIRECTORY:
            links.setdefault(status.st_ino, []).append(path)
    return with_links(tree, list(links.values()))


def with_links(tree: Tree, groups: list[list[bytes]]) -> Tree:
    for group in groups:
        if len(group) > 1:
            for path in group:
                tree[path] = tree[path]._replace(names=tuple(sorted(group)))
    return tree


def of_entry(objects: Objects, root: Entry, *, counts: bool = True) -> Tree:
    """Describes a tree in the store; checks sums, and with `counts` those of links."""
    tree: Tree = {b"": _seen(objects, root)}
    links: dict[bytes, list[bytes]] = {}
    said: dict[bytes, set[int]] = {}
    sums: dict[bytes, list[int]] = {b"": [0, 0, 0]}
    entries = {b"": root}
    for path, entry in walk(objects, root):
        assert path not in tree
        tree[path], entries[path] = _seen(objects, entry), entry
        if entry.kind == Kind.DIRECTORY:
            sums[path] = [0, 0, 0]
        if entry.link is not None:
            links.setdefault(entry.link.group, []).append(path)
            said.setdefault(entry.link.group, set()).add(entry.link.count)
        above = path
        while above:
            above = above.rpartition(b"/")[0]
            sums[above][0] += entry.size if entry.kind == Kind.FILE else 0
            sums[above][1] += 1
            sums[above][2] += entry.link is not None
    for path, (size, below, linked) in sums.items():
        totals = entries[path].totals
        assert totals is not None, path
        assert (entries[path].size, totals.entries, totals.links) == (size, below, linked), path
    for group, names in links.items():
        assert said[group] == {len(names)} or not counts, (names, said[group])
    return with_links(tree, list(links.values()))


def _seen(objects: Objects, entry: Entry) -> Seen:
    data = b""
    if entry.kind == Kind.FILE:
        data = content.read(objects, entry, 0, entry.size)
    elif entry.kind == Kind.SYMLINK:
        assert isinstance(entry.content, bytes)
        data = entry.content
    return Seen(entry.kind, entry.mode, entry.mtime_ns, data, entry.xattrs)


def clone(source: str | bytes | Path, target: str | bytes | Path) -> None:
    """Copies a directory with everything that a tree keeps."""
    root, new = os.fsencode(source), os.fsencode(target)
    known: dict[int, bytes] = {}
    times = []
    for path, absolute, status in list(paths(root)):
        copy = new + b"/" + path if path else new
        if status.st_ino in known:
            os.link(known[status.st_ino], copy, follow_symlinks=False)
            continue
        if stat.S_ISDIR(status.st_mode):
            os.mkdir(copy, 0o700)
        elif stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(absolute), copy)
        elif stat.S_ISFIFO(status.st_mode):
            os.mkfifo(copy)
        else:
            shutil.copyfile(absolute, copy)
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            known[status.st_ino] = copy
        if not stat.S_ISLNK(status.st_mode):
            for name, value in read_xattrs(absolute):
                os.setxattr(copy, name, value)
            os.chmod(copy, stat.S_IMODE(status.st_mode))
        times.append((copy, status.st_mtime_ns))
    for copy, mtime_ns in reversed(times):
        os.utime(copy, ns=(mtime_ns, mtime_ns), follow_symlinks=False)


def age(root: str | bytes | Path, mtime_ns: int = 1_000_000_000_123_456_789) -> None:
    """Gives everything in a directory a time long ago, each its own."""
    for number, (_, absolute, _) in enumerate(reversed(list(paths(os.fsencode(root))))):
        ns = mtime_ns + number
        os.utime(absolute, ns=(ns, ns), follow_symlinks=False)


def noise(size: int, seed: int = 0) -> bytes:
    """Returns bytes that do not compress, the same ones every time."""
    return random.Random(seed).randbytes(size)
