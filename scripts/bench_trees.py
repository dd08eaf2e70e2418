"""Trees that are made straight from nodes: any number of empty files, in no time."""

import time

from engine.ids import SnapshotId
from engine.repository import Repository
from engine.storage.nodes import Entry, Kind
from engine.storage.objects import NodeBuffer
from engine.storage.snapshots import encode_snapshot, make_snapshot
from engine.storage.store import Db, Writer
from engine.trees.directory import directory_entry


def path_of(directory: int, file: int) -> str:
    """Returns the path of a file in a snapshot of `add_snapshot`."""
    return f"directory-{directory:06}/file-{file:06}"


def add_snapshot(repository: Repository, directories: int, files_each: int) -> SnapshotId:
    """Adds a snapshot of so many directories of so many empty files each."""
    nodes = NodeBuffer()
    now = time.time_ns()
    names = [b"file-%06d" % number for number in range(files_each)]
    below = [
        directory_entry(
            nodes.put,
            # No two directories are the same node.
            [Entry(name, Kind.FILE, 0o644, now + at, 0, b"") for name in names],
            name=b"directory-%06d" % at, mode=0o755, mtime_ns=now,
        )
        for at in range(directories)
    ]  # fmt: skip
    root = directory_entry(nodes.put, below, name=b"", mode=0o755, mtime_ns=now)
    identifier, record = encode_snapshot(make_snapshot(root))

    def change(writer: Writer) -> None:
        nodes.flush(writer)
        writer.put(Db.SNAPSHOTS, identifier, record)

    repository.store.write(change)
    return identifier
