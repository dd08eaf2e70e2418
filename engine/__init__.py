"""The state engine: store, trees, snapshots, sessions, diff, checkout, collection.

A synchronous library that needs no FUSE. `Repository` is its front door, `Workspace` a tree in
memory for search loops, `Vfs` what a driver puts into the kernel; docs/concepts/architecture.md
lists the folders and what is in them. It meets no terminal, no environment
variable, no trio.
"""

from engine.errors import EngineError
from engine.ids import ChunkId, InodeNo, NodeId, SnapshotId
from engine.repository import Repository
from engine.workspaces.workspace import Workspace

__all__ = ["ChunkId", "EngineError", "InodeNo", "NodeId", "Repository", "SnapshotId", "Workspace"]
