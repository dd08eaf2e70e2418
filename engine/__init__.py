"""The state engine: store, trees, snapshots, sessions, diff, checkout, collection.

A synchronous library that needs no FUSE. `Repository` is its front door, `Workspace` a tree in
memory for search loops, `Vfs` what a driver puts into the kernel; the other modules are listed,
from the front door down, in docs/concepts/architecture.md. It meets no terminal, no environment
variable, no trio.
"""

from engine.errors import EngineError
from engine.ids import ChunkId, InodeNo, NodeId, SnapshotId
from engine.repository import Repository
from engine.workspace import Workspace

__all__ = ["ChunkId", "EngineError", "InodeNo", "NodeId", "Repository", "SnapshotId", "Workspace"]
