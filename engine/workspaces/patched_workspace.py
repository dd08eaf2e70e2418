"""A workspace as a patch sees it: the operations of `patching.PatchedTree` on one."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from engine.patches.patching import Node
from engine.storage.nodes import Kind

if TYPE_CHECKING:
    from engine.workspaces.workspace import Workspace


class PatchedWorkspace:
    """Changes a workspace, which should be a fork: an operation that fails leaves it half done."""

    def __init__(self, workspace: "Workspace") -> None:
        self._workspace = workspace

    def find(self, path: bytes) -> Node | None:
        """Returns what is there, or None."""
        workspace = self._workspace
        if not workspace.exists(path):
            return None
        stat = workspace.stat(path)
        return Node(stat.kind, stat.mode)

    def read(self, path: bytes) -> bytes:
        """Returns the content of a file, or the target of a link."""
        workspace = self._workspace
        if workspace.stat(path).kind == Kind.SYMLINK:
            return workspace.read_link(path)
        return workspace.read(path)

    def files_below(self, path: bytes) -> Iterator[bytes]:
        """Yields the paths of all that is below a directory and is none itself."""
        return (p for p, stat in self._workspace.walk(path) if stat.kind != Kind.DIRECTORY)

    def write(self, path: bytes, data: bytes, mode: int) -> None:
        """Makes a file, with the directories above it, or changes one."""
        self._workspace.write(path, data, mode=mode, parents=True)

    def symlink(self, path: bytes, target: bytes) -> None:
        """Makes a link, with the directories above it, or another one in its place."""
        if self._workspace.exists(path):
            self._workspace.remove(path)
        self._workspace.symlink(path, target, parents=True)

    def chmod(self, path: bytes, mode: int) -> None:
        """Sets the permission bits of a file."""
        self._workspace.chmod(path, mode)

    def rename(self, old: bytes, new: bytes) -> None:
        """Moves a file or link, making the directories above its new path."""
        above = new.rpartition(b"/")[0]
        if above:
            self._workspace.mkdir(above, parents=True, exist_ok=True)
        self._workspace.rename(old, new)

    def remove(self, path: bytes) -> None:
        """Removes a file, a link, or a directory with all that is in it."""
        self._workspace.remove(path, recursive=True)

    def prune(self, path: bytes) -> None:
        """Removes the directories above a path that are empty, from the lowest up."""
        workspace = self._workspace
        while path := path.rpartition(b"/")[0]:
            if not workspace.exists(path):
                continue
            if workspace.stat(path).kind != Kind.DIRECTORY or workspace.list(path):
                return
            workspace.remove(path)
