"""Applying patches: a unified diff becomes changes of a tree, all of them or none.

Knows no tree but a few operations on one, so that a workspace, a session or a test can be
patched. Everything is worked out and checked before the first operation.
"""

import hashlib
import stat
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from engine.errors import EngineError
from engine.host.set_id import SET_ID
from engine.merging.textdiff import lines_of
from engine.patches.binary_patch import apply_delta, inflated
from engine.patches.file_patches import Action, BinaryHunk, FilePatch, Hunk
from engine.patches.patch_parsing import parse_patch
from engine.storage.nodes import Kind

LARGEST_RESULT = 512 << 20
"""A patch may make a file of so many bytes, and all its files together of twice as many."""

_DEFAULT_MODE = 0o644
_LINK_MODE = 0o777
_LONGEST_TARGET = 4095


class PatchRefusedError(EngineError):
    """A patch does not fit the tree. Nothing was changed.

    `path` is the file, `hunk` the number of the hunk from 1, None if the file itself is at fault.
    """

    def __init__(self, path: bytes, why: str, hunk: int | None = None) -> None:
        where = "" if hunk is None else f", hunk {hunk}"
        name = path.decode("utf-8", "backslashreplace")
        super().__init__(f"the patch does not fit {name!r}{where}: {why}")
        self.path, self.why, self.hunk = path, why, hunk


class Node(NamedTuple):
    """What is at a path of a tree."""

    kind: int
    mode: int


class PatchedTree(Protocol):
    """What a tree can do that can be patched. Paths are relative, links are not followed."""

    def find(self, path: bytes) -> Node | None:
        """Returns what is there, or None."""

    def read(self, path: bytes) -> bytes:
        """Returns the content of a file, or the target of a link."""

    def files_below(self, path: bytes) -> Iterable[bytes]:
        """Returns the paths of all that is below a directory and is none itself."""

    def write(self, path: bytes, data: bytes, mode: int) -> None:
        """Makes a file, with the directories above it, or gives it a content and a mode.

        What else there is to a file, such as attributes, stays.
        """

    def symlink(self, path: bytes, target: bytes) -> None:
        """Makes a link, with the directories above it, or gives it another target."""

    def chmod(self, path: bytes, mode: int) -> None:
        """Sets the permission bits of a file."""

    def rename(self, old: bytes, new: bytes) -> None:
        """Moves a file or link, making the directories above its new path."""

    def remove(self, path: bytes) -> None:
        """Removes a file, a link, or a directory with all that is in it."""

    def prune(self, path: bytes) -> None:
        """Removes the directories above a path that are empty, from the lowest up."""


class PatchReport(NamedTuple):
    """Which paths a patch changed, and how many hunks were not where they should be.

    `left_out` are lines of it that name a change which it does not hold, as `Only in DIR: NAME`.
    """

    paths: list[bytes]
    moved_hunks: int
    left_out: list[bytes]


class _File(NamedTuple):
    """A file or link as it will be; `origin` is where it is in the tree now."""

    kind: int
    mode: int
    data: bytes
    origin: bytes | None


def apply_patch(
    tree: PatchedTree,
    patch: bytes,
    *,
    strip: int | None = None,
    fuzz: int = 0,
    largest: int = LARGEST_RESULT,
    set_id: bool = False,
) -> PatchReport:
    """Applies a patch to a tree, or raises and changes nothing.

    Hunks are looked for around the place they name; `fuzz` lines at each end of their context
    may be different. Directories that get empty go. A patch that gives a file set-id bits is
    refused unless `set_id`. Raises PatchFormatError, PatchRefusedError.
    """
    plan = _Plan(tree, fuzz, largest, set_id)
    parsed = parse_patch(patch, strip=strip)
    for file in parsed.files:
        plan.add(file)
    plan.check()
    plan.carry_out()
    return PatchReport(sorted(plan.after), plan.moved_hunks, parsed.left_out)


class _Plan:
    """What a tree will be: the paths that a patch changes, each as it is afterwards."""

    def __init__(self, tree: PatchedTree, fuzz: int, largest: int, set_id: bool) -> None:
        self._refused_bits = 0 if set_id else SET_ID
        self._tree, self._fuzz, self._largest = tree, fuzz, largest
        self._left = 2 * largest
        self._before: dict[bytes, _File | None] = {}
        self.after: dict[bytes, _File | None] = {}
        self._made: set[bytes] = set()
        self._vacated: set[bytes] = set()
        self._renamed: set[bytes] = set()
        self.moved_hunks = 0

    def _original(self, path: bytes) -> _File | None:
        """Returns a file of the tree as it is now; None for nothing and for a directory."""
        if path not in self._before:
            node = self._tree.find(path)
            self._before[path] = None
            if node is not None and node.kind in {Kind.FILE, Kind.SYMLINK}:
                self._before[path] = _File(node.kind, node.mode, self._tree.read(path), path)
        return self._before[path]

    def _present(self, path: bytes) -> _File | None:
        """Returns a file as the patches so far leave it."""
        return self.after[path] if path in self.after else self._original(path)

    # Working out.

    def add(self, file: FilePatch) -> None:
        """Works out what one file's patch makes."""
        if file.loose:
            self._settle(file)
        if file.action == Action.CREATE:
            self._create(file)
            return
        path = file.old_path or b""
        # A rename or copy is of the file as it was: git's patches do not depend on their order.
        moves = file.action in {Action.RENAME, Action.COPY}
        old = self._original(path) if moves else self._present(path)
        if old is None:
            node = None if path in self.after else self._tree.find(path)
            why = "it is not there" if node is None else "it is neither a file nor a link"
            raise PatchRefusedError(path, why)
        data = self._content(file, old)
        if file.action == Action.DELETE:
            if data:
                raise PatchRefusedError(path, "it has more in it than the patch removes")
            self._vacated.add(path)
            self.after[path] = None
            return
        mode = old.mode
        if file.new_mode is not None:
            mode = self._bits(file, stat.S_IMODE(file.new_mode), old.mode)
        origin = None if file.action == Action.COPY else old.origin
        if moves:
            self._make(file.path)
        if file.action == Action.RENAME:
            if path in self._renamed:
                raise PatchRefusedError(path, "it is renamed twice")
            self._renamed.add(path)
            self._vacated.add(path)
            if path not in self._made:
                self.after[path] = None
        self.after[file.path] = _File(old.kind, mode, data, origin)

    def _settle(self, file: FilePatch) -> None:
        """Decides which path a plain diff is about, and whether it makes a file."""
        known = next((path for path in file.paths if self._present(path) is not None), None)
        first = file.hunks[0]
        if file.action == Action.MODIFY and known is None and not first.old and not first.old_start:
            file.action = Action.CREATE
        path = known or file.paths[0]
        file.old_path = None if file.action == Action.CREATE else path
        file.new_path = None if file.action == Action.DELETE else path

    def _create(self, file: FilePatch) -> None:
        self._make(file.path)
        mode = stat.S_IFREG | _DEFAULT_MODE if file.new_mode is None else file.new_mode
        kind = Kind.SYMLINK if stat.S_ISLNK(mode) else Kind.FILE
        data = self._content(file, _File(kind, 0, b"", None))
        bits = _LINK_MODE if kind == Kind.SYMLINK else self._bits(file, stat.S_IMODE(mode), 0)
        self.after[file.path] = _File(kind, bits, data, None)

    def _bits(self, file: FilePatch, mode: int, before: int) -> int:
        """Returns the permission bits that a patch gives a file; raises for set-id bits."""
        if mode & ~before & self._refused_bits:
            raise PatchRefusedError(file.path, "it would get set-id bits, which nobody asked for")
        return mode

    def _make(self, path: bytes) -> None:
        if path in self._made:
            raise PatchRefusedError(path, "it is made twice")
        self._made.add(path)

    def _content(self, file: FilePatch, old: _File) -> bytes:
        """Returns what a file or link has in it after its patch."""
        for mode in (file.old_mode, file.new_mode):
            if mode is not None and stat.S_ISLNK(mode) != (old.kind == Kind.SYMLINK):
                is_link = old.kind == Kind.SYMLINK
                why = "it is a link, not a file" if is_link else "it is a file, not a link"
                raise PatchRefusedError(file.path, why)
        try:
            if file.binary is not None:
                data = self._binary(file, file.binary, old)
            elif file.hunks:
                patched, moved = _patched(file, lines_of(old.data), self._fuzz)
                self.moved_hunks += moved
                data = b"".join(patched)
            else:
                data = old.data
        except ValueError as error:
            raise PatchRefusedError(file.path, str(error)) from error
        self._left -= len(data)
        if len(data) > self._largest or self._left < 0:
            raise PatchRefusedError(file.path, "the patch makes more bytes than it may")
        if old.kind == Kind.FILE or file.action == Action.DELETE:
            return data
        if not 0 < len(data) <= _LONGEST_TARGET or b"\0" in data:
            raise PatchRefusedError(file.path, "it would be no target of a link")
        return data

    def _binary(self, file: FilePatch, hunk: BinaryHunk, old: _File) -> bytes:
        if file.old_blob is not None and file.action != Action.CREATE:
            _check_blob(old.data, file.old_blob, "it is not the file that the patch is for")
        if hunk.size > self._largest:
            raise ValueError("the patch makes more bytes than it may")
        data = inflated(hunk.deflated, hunk.size)
        if hunk.is_delta:
            data = apply_delta(data, old.data, self._largest)
        if file.new_blob is not None and file.action != Action.DELETE:
            _check_blob(data, file.new_blob, "the patch does not make what it promises")
        return data

    # Checking.

    def check(self) -> None:
        """Refuses what cannot be in one tree: two things at a path, a file inside of a file."""
        for path in self._made:
            node = self._tree.find(path)
            if node is not None and path not in self._vacated:
                if node.kind != Kind.DIRECTORY:
                    raise PatchRefusedError(path, "it is there already")
                if any(below not in self._vacated for below in self._tree.files_below(path)):
                    raise PatchRefusedError(path, "it is a directory with files in it")
        for path, file in self.after.items():
            for above in _directories(path) if file is not None else ():
                if above in self.after:
                    blocked = self.after[above] is not None
                else:
                    node = self._tree.find(above)
                    blocked = node is not None and node.kind != Kind.DIRECTORY
                if blocked:
                    name = above.decode("utf-8", "backslashreplace")
                    raise PatchRefusedError(path, f"{name!r} above it is no directory")

    # Carrying out.

    def carry_out(self) -> None:
        """Changes the tree. Fails only if the tree does not do what it can."""
        tree = self._tree
        kept = {file.origin for file in self.after.values() if file is not None}
        aside: dict[bytes, bytes] = {}
        for path, file in self.after.items():
            if file is None or file.origin in {None, path}:
                continue
            # Out of the way first: its new path may be taken until others have moved.
            number = len(aside)
            while tree.find(name := b".patch-%d" % number) is not None or name in self.after:
                number += 1
            tree.rename(file.origin or b"", name)
            aside[path] = name
        for path, file in self.after.items():
            stays = file is not None and file.origin == path
            if self._original(path) is not None and not stays and path not in kept:
                tree.remove(path)
        for path in self._made:
            node = tree.find(path)
            if node is not None and node.kind == Kind.DIRECTORY:
                tree.remove(path)
        for path, name in aside.items():
            tree.rename(name, path)
        for path, file in self.after.items():
            if file is not None:
                self._write(path, file)
        for path in self._vacated:
            tree.prune(path)

    def _write(self, path: bytes, file: _File) -> None:
        old = None if file.origin is None else self._before[file.origin]
        if old is None or old.data != file.data:
            if file.kind == Kind.SYMLINK:
                self._tree.symlink(path, file.data)
            else:
                self._tree.write(path, file.data, file.mode)
        elif old.mode != file.mode and file.kind == Kind.FILE:
            self._tree.chmod(path, file.mode)


def _check_blob(data: bytes, blob: bytes, why: str) -> None:
    """Raises ValueError if a content has not the id that git gave it."""
    found = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
    if found.hexdigest().encode() != blob:
        raise ValueError(why)


def _directories(path: bytes) -> Iterator[bytes]:
    above = path.rpartition(b"/")[0]
    while above:
        yield above
        above = above.rpartition(b"/")[0]


def _patched(file: FilePatch, lines: list[bytes], fuzz: int) -> tuple[list[bytes], int]:
    """Returns the lines after all hunks, and how many of these were found elsewhere."""
    places: dict[bytes, list[int]] = {}
    for number, line in enumerate(lines):
        places.setdefault(line, []).append(number)
    result: list[bytes] = []
    done = offset = moved = 0
    last = -1
    for number, hunk in enumerate(file.hunks, 1):
        if not hunk.old and hunk.old_start <= last:  # nothing else says where it belongs
            raise PatchRefusedError(file.path, "it does not come after the hunk before it", number)
        last = hunk.old_start
        expected = hunk.old_start - (1 if hunk.old else 0) + offset
        for less in range(fuzz + 1):
            head, tail = min(less, hunk.leading), min(less, hunk.trailing)
            old = hunk.old[head : len(hunk.old) - tail]
            at = _find(lines, places, old, hunk, expected + head, done, less)
            if at is not None:
                break
        else:
            raise PatchRefusedError(file.path, _misfit(hunk, places), number)
        result += lines[done:at]
        result += hunk.new[head : len(hunk.new) - tail]
        done = at + len(old)
        moved += at != hunk.old_start - (1 if hunk.old else 0) + head
        offset = at - head - hunk.old_start + (1 if hunk.old else 0)
    return result + lines[done:], moved


def _misfit(hunk: Hunk, places: dict[bytes, list[int]]) -> str:
    """Says why the lines of a hunk are not in a file."""
    for one, other in ((b"\r\n", b"\n"), (b"\n", b"\r\n")):
        if any(line.endswith(one) for line in hunk.old) and all(
            line.removesuffix(one) + other in places for line in hunk.old if line.endswith(one)
        ):
            where = "the patch" if one == b"\r\n" else "the file"
            return f"lines end in CR LF in {where} only"
    return "its lines are not in the file"


def _find(
    lines: list[bytes],
    places: dict[bytes, list[int]],
    old: list[bytes],
    hunk: Hunk,
    expected: int,
    done: int,
    fuzz: int,
) -> int | None:
    """Returns where the lines `old` are, from line `done` on, the nearest to `expected`.

    A hunk with less context before than after it is from the beginning of a file, one with less
    after than before from its end; there it must be, as for `patch`.
    """
    last = len(lines) - len(old)
    if not old:
        at = max(min(expected, last), done)
        return at if at == expected or not lines else None
    first = done
    if hunk.leading - fuzz < hunk.trailing - fuzz and fuzz == 0 and hunk.old_start <= 1:
        last = min(last, 0)
    if hunk.trailing < hunk.leading and fuzz == 0:
        first = max(first, last)
    if first <= expected <= last and lines[expected : expected + len(old)] == old:
        return expected
    # Only where the rarest of the lines is can all of them be.
    rarest = min(range(len(old)), key=lambda at: len(places.get(old[at], ())))
    found = [
        number - rarest
        for number in places.get(old[rarest], ())
        if first <= number - rarest <= last
    ]
    for at in sorted(found, key=lambda at: abs(at - expected)):
        if lines[at : at + len(old)] == old:
            return at
    return None
