"""The state engine: store, trees, snapshots, sessions, diff, checkout, collection.

A synchronous library that needs no FUSE. `Repository` is its front door, `Workspace` a tree in
memory for search loops, `Vfs` what a driver puts into the kernel; docs/concepts/architecture.md
lists the folders and what is in them. It meets no terminal, no environment
variable, no trio. What is not asked for is not loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError
from engine.ids import ChunkId, InodeNo, NodeId, SnapshotId

if TYPE_CHECKING:
    from engine.repository import Repository
    from engine.workspaces.workspace import Workspace

__all__ = ["ChunkId", "EngineError", "InodeNo", "NodeId", "Repository", "SnapshotId", "Workspace"]

_LATE = {"Repository": "engine.repository", "Workspace": "engine.workspaces.workspace"}


def __getattr__(name: str) -> Any:
    """Loads a name of the face when it is first asked for."""
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LATE[name]), name)
    return value
