"""Restoring: paths of a tree become again what another tree has there."""

import time
from collections.abc import Iterable

from engine.errors import NotFoundError
from engine.storage.nodes import Entry, Kind
from engine.storage.objects import Objects
from engine.trees.directory import find
from engine.trees.links import groups_in
from engine.workspaces.committing import Batch
from engine.workspaces.working_tree import WorkingTree, is_directory


def restored(
    objects: Objects, batch: Batch, root: Entry, source: Entry, paths: Iterable[bytes]
) -> Entry:
    """Returns `root` with what `source` has at `paths`, whole directories too.

    New nodes are in `batch`. What `source` lacks is removed. A directory on the way that is missing
    comes back with no more in it than what was asked for. Raises NotFoundError for a path that
    neither has.
    """
    tree = WorkingTree(objects, root)
    now = time.time_ns()
    for path in paths:
        names = [name for name in path.split(b"/") if name not in {b"", b"."}]
        wanted = find(objects, source, b"/".join(names))
        if not names or b".." in names:
            raise NotFoundError("path in the tree", path.decode("utf-8", "backslashreplace"))
        for depth in range(1, len(names)):
            above = tree.own(names[: depth - 1])
            below = tree.child(above, names[depth - 1])
            if is_directory(below):
                continue
            like = find(objects, source, b"/".join(names[:depth]))
            if like is None or like.kind != Kind.DIRECTORY or wanted is None:
                raise NotFoundError("path in the tree", path.decode("utf-8", "backslashreplace"))
            tree.forget(below)
            folder = tree.new_folder(like.mode, like.mtime_ns)
            folder.xattrs, folder.user = like.xattrs, like.owner
            above.names.set(names[depth - 1], folder)
        folder = tree.own(names[:-1])
        before = tree.child(folder, names[-1])
        if before is None and wanted is None:
            raise NotFoundError("path in the tree", path.decode("utf-8", "backslashreplace"))
        if before == wanted:
            continue
        tree.forget(before)
        folder.names.set(names[-1], wanted)
        folder.mtime_ns = now
        if wanted is not None:
            tree.relinked |= frozenset(groups_in(objects, wanted))
    return tree.freeze(batch)
