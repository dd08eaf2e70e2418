"""Histories for merges: a tree and two that came from it, made at random from a seed.

The sides edit, add, remove and copy files, move them, move, split, join and remove directories,
and put files in the place of directories. Each text is its own, so that one edited a little is
still seen to be the same, and no two are alike by chance.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from tests.engine.plants import Leaf, Plant, link

_DIRECTORIES = [b"src", b"lib", b"doc", b"src/core", b"src/net", b"lib/net", b"doc/img"]
_NEW_DIRECTORIES = [b"new", b"old", b"lib/core", b"pkg", b"pkg/net", b"src/core/in"]
_NAMES = [b"a", b"b", b"c", b"main", b"util", b"README"]


class Case(NamedTuple):
    """One merge; `log` says what each side did."""

    seed: int
    base: Plant
    ours: Plant
    theirs: Plant
    log: list[str]


def make_case(seed: int) -> Case:
    """Makes the case of a seed, the same on every machine."""
    dice = random.Random(seed)
    base = _base(dice)
    log: list[str] = []
    sides = [_Side(dice, dict(base), name, log).run() for name in ("ours", "theirs")]
    return Case(seed, base, sides[0], sides[1], log)


def _text(dice: random.Random) -> Leaf:
    mark = dice.randrange(1 << 40)
    lines = [b"line %d of %x: %x\n" % (n, mark, dice.randrange(1 << 30)) for n in range(24)]
    return Leaf(b"".join(lines))


def _base(dice: random.Random) -> Plant:
    found: Plant = {}
    for directory in [b"", *dice.sample(_DIRECTORIES, dice.randint(2, 5))]:
        for name in dice.sample(_NAMES, dice.randint(1, 3)):
            path = directory + b"/" + name if directory else name
            sort = dice.random()
            if sort < 0.06:
                found[path] = link(b"target-%x" % dice.randrange(1 << 30))
            elif sort < 0.12:
                found[path] = Leaf(b"\0" + dice.randbytes(200))
            else:
                found[path] = _text(dice)
    return found


class _Side:
    """One side, while it changes."""

    def __init__(self, dice: random.Random, files: Plant, name: str, log: list[str]) -> None:
        self.dice, self.files, self.name, self.log = dice, files, name, log

    def run(self) -> Plant:
        actions: list[tuple[int, Callable[[], None]]] = [
            (6, self.edit), (2, self.add), (2, self.remove), (3, self.move),
            (4, self.move_directory), (2, self.split_directory), (1, self.remove_directory),
            (1, self.chmod), (1, self.copy), (1, self.into_directory), (1, self.into_file),
            (1, self.retype), (1, self.rewrite),
        ]  # fmt: skip
        weights = [weight for weight, _ in actions]
        for _ in range(self.dice.randint(1, 5)):
            if self.files:
                ((_, action),) = self.dice.choices(actions, weights)
                action()
        return self.files

    def say(self, text: str, *paths: bytes) -> None:
        self.log.append(f"{self.name}: {text} {' '.join(map(bytes.decode, paths))}")

    def file(self) -> bytes:
        return self.dice.choice(sorted(self.files))

    def directories(self) -> list[bytes]:
        found = set()
        for path in self.files:
            while path := path.rpartition(b"/")[0]:
                found.add(path)
        return sorted(found)

    def free(self, path: bytes) -> bool:
        """Tells whether a file can be at a path."""
        above = path
        while above := above.rpartition(b"/")[0]:
            if above in self.files:
                return False
        return path not in self.files and not any(p.startswith(path + b"/") for p in self.files)

    def new_path(self, name: bytes | None = None) -> bytes | None:
        directory = self.dice.choice([b"", *_DIRECTORIES, *_NEW_DIRECTORIES])
        name = self.dice.choice([*_NAMES, b"x", b"y"]) if name is None else name
        path = directory + b"/" + name if directory else name
        return path if self.free(path) else None

    def edit(self) -> None:
        path = self.file()
        leaf = self.files[path]
        if leaf.data.startswith(b"line "):
            lines = leaf.data.splitlines(keepends=True)
            for _ in range(self.dice.randint(1, 3)):
                at = self.dice.randrange(len(lines))
                lines[at] = b"edited %x\n" % self.dice.randrange(1 << 30)
            self.files[path] = leaf._replace(data=b"".join(lines))
        else:
            changed = leaf.data[:8] + b"%x" % self.dice.randrange(1 << 60)
            self.files[path] = leaf._replace(data=changed)
        self.say("edit", path)

    def rewrite(self) -> None:
        path = self.file()
        self.files[path] = _text(self.dice)
        self.say("rewrite", path)

    def add(self) -> None:
        path = self.new_path()
        if path is not None:
            self.files[path] = _text(self.dice)
            self.say("add", path)

    def remove(self) -> None:
        path = self.file()
        del self.files[path]
        self.say("remove", path)

    def move(self) -> None:
        path = self.file()
        leaf = self.files.pop(path)
        keep = path.rpartition(b"/")[2] if self.dice.random() < 0.5 else None
        target = self.new_path(keep) or path
        self.files[target] = leaf
        self.say("move", path, target)

    def _move_all(self, old: bytes, new: bytes, files: list[bytes]) -> None:
        gone = {path: self.files.pop(path) for path in files}
        for path, leaf in gone.items():
            target = new + path[len(old) :]
            self.files[target if self.free(target) else path] = leaf

    def below(self, directory: bytes) -> list[bytes]:
        return sorted(path for path in self.files if path.startswith(directory + b"/"))

    def move_directory(self) -> None:
        directories = self.directories()
        if directories:
            old = self.dice.choice(directories)
            new = self.dice.choice(_DIRECTORIES + _NEW_DIRECTORIES)
            self._move_all(old, new, self.below(old))
            self.say("move directory", old, new)

    def split_directory(self) -> None:
        directories = self.directories()
        if directories:
            old = self.dice.choice(directories)
            for new in self.dice.sample(_DIRECTORIES + _NEW_DIRECTORIES, 2):
                some = [path for path in self.below(old) if self.dice.random() < 0.5]
                self._move_all(old, new, some)
                self.say("split directory", old, new)

    def remove_directory(self) -> None:
        directories = self.directories()
        if directories:
            old = self.dice.choice(directories)
            for path in self.below(old):
                del self.files[path]
            self.say("remove directory", old)

    def chmod(self) -> None:
        path = self.file()
        leaf = self.files[path]
        if leaf.mode != 0o777:
            self.files[path] = leaf._replace(mode=leaf.mode ^ 0o111)
            self.say("chmod", path)

    def copy(self) -> None:
        path, target = self.file(), self.new_path()
        if target is not None:
            self.files[target] = self.files[path]
            self.say("copy", path, target)

    def into_directory(self) -> None:
        """Makes a file a directory with it inside."""
        path = self.file()
        leaf = self.files.pop(path)
        self.files[path + b"/" + self.dice.choice(_NAMES)] = leaf
        self.say("into a directory", path)

    def into_file(self) -> None:
        """Makes a directory a file; what was in it goes, or moves."""
        directories = self.directories()
        if directories:
            old = self.dice.choice(directories)
            if self.dice.random() < 0.5:
                self._move_all(old, b"moved", self.below(old))
            for path in self.below(old):
                del self.files[path]
            if self.free(old):
                self.files[old] = _text(self.dice)
            self.say("into a file", old)

    def retype(self) -> None:
        path = self.file()
        is_link = self.files[path].mode == 0o777
        self.files[path] = _text(self.dice) if is_link else link(b"to-%x" % self.dice.randrange(99))
        self.say("retype", path)
