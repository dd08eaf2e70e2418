"""A real directory beside a session, on which the same system calls are made.

Permission bits are kept apart, so that an ordinary user can go on reading and writing
whatever they are: the kernel checks them, not the engine.
"""

import os
import stat

from tests.engine.trees import Tree, clone, of_directory, paths

NOREPLACE, EXCHANGE = 1, 2
NO_LINK = {"follow_symlinks": False}


class Twin:
    """The directory at `root`, with the modes that its files are meant to have."""

    def __init__(self, source: bytes, root: bytes, modes: dict[bytes, int] | None = None) -> None:
        """Copies `source`, whose modes by path are its own unless given."""
        clone(source, root)
        self.root = root
        self.modes: dict[int, int] = {}
        for path, absolute, status in list(paths(root)):
            mode = stat.S_IMODE(status.st_mode) if modes is None else modes[path]
            self.modes[status.st_ino] = mode
            if not stat.S_ISLNK(status.st_mode):
                os.chmod(absolute, 0o700 if stat.S_ISDIR(status.st_mode) else 0o600)
            times = (status.st_mtime_ns, status.st_mtime_ns)
            os.utime(absolute, ns=times, follow_symlinks=False)

    def at(self, path: bytes) -> bytes:
        return self.root + b"/" + path if path else self.root

    def made(self, path: bytes, mode: int) -> None:
        self.modes[os.lstat(self.at(path)).st_ino] = mode

    def modes_by_path(self) -> dict[bytes, int]:
        return {path: self.modes[status.st_ino] for path, _, status in paths(self.root)}

    def tree(self) -> Tree:
        return of_directory(self.root, self.modes)

    def listed(self) -> list[tuple[bytes, int]]:
        """Returns all paths with their kind, a stat mode's type bits."""
        return [(path, stat.S_IFMT(status.st_mode)) for path, _, status in paths(self.root)]
