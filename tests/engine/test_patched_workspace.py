"""Patches applied to workspaces, and what is shared and kept where one fails."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import Repository, SnapshotId
from engine.patches.patch_parsing import PatchFormatError
from engine.patches.patch_writing import patch_lines
from engine.patches.patching import PatchRefusedError
from engine.storage.nodes import Kind
from engine.trees.directory import find
from engine.trees.renames import diff_with_renames
from engine.workspaces.workspace import Workspace
from tests.engine.plants import DictTree, Leaf, Plant, make_directory, without_times
from tests.engine.test_patching import binaries, names, pairs, texts


def fill(workspace: Workspace, plant: Plant) -> None:
    for path, leaf in plant.items():
        if leaf.kind == Kind.SYMLINK:
            workspace.symlink(path, leaf.data, parents=True)
        else:
            workspace.write(path, leaf.data, mode=leaf.mode, parents=True)


def seen(workspace: Workspace) -> Plant:
    found: Plant = {}
    for path, stat in workspace.walk(b""):
        if stat.kind == Kind.FILE:
            found[path] = Leaf(workspace.read(path), stat.mode)
        elif stat.kind == Kind.SYMLINK:
            found[path] = Leaf(workspace.read_link(path), stat.mode, Kind.SYMLINK)
        elif not workspace.list(path):
            found[path] = Leaf(b"", stat.mode, Kind.DIRECTORY)
    return without_times(found)


@given(pairs(names, st.one_of(texts, binaries)), st.booleans())
@settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
def test_a_diff_applied_to_a_workspace_is_the_other(repository, pair, committed):
    old, new = pair
    one, other = repository.workspace(), repository.workspace()
    fill(one, old)
    fill(other, new)
    roots = [each.commit(durable=False).root for each in (one.fork(), other)]
    changes = diff_with_renames(repository.objects, *roots, copies=True).changes
    lines = [line + b"\n" for change in changes for line in patch_lines(repository.objects, change)]
    if committed:
        one.commit(durable=False)
    if lines:  # what is empty is no patch
        one.apply(b"".join(lines))
    assert seen(one) == without_times(new) == DictTree(new).plant()


PATCH = """\
diff --git a/f b/f
--- a/f
+++ b/f
@@ -1,2 +1,2 @@
 one
-two
+TWO
"""


def test_nothing_is_changed_by_a_patch_that_does_not_fit(repository: Repository):
    workspace = repository.workspace()
    workspace.write("f", "one\ntwo\n")
    workspace.write("g", "other\n")
    before = workspace.commit()
    for bad, error in (
        (PATCH + PATCH.replace("/f", "/g"), PatchRefusedError),
        (PATCH + PATCH.replace("/f", "/../f"), PatchFormatError),
    ):
        with pytest.raises(error):
            workspace.apply(bad)
        assert not workspace.is_changed()
    assert workspace.apply(PATCH).paths == [b"f"]
    assert workspace.read_text("f") == "one\nTWO\n"
    fork = workspace.fork()
    fork.apply(PATCH.replace("two", "x").replace("TWO", "y").replace("-x", "-TWO"))
    assert (workspace.read_text("f"), fork.read_text("f")) == ("one\nTWO\n", "one\ny\n")
    workspace.restore()
    assert not workspace.is_changed()
    assert workspace.commit().snapshot == before.snapshot


def test_what_a_patch_does_not_touch_stays(repository: Repository, tmp_path: Path):
    """Attributes of patched and renamed files, and the ids of everything else."""
    tree = tmp_path / "tree"
    tree.mkdir()
    make_directory(tree, {b"f": Leaf(b"one\ntwo\n"), b"d/k": Leaf(b"k" * 300), b"m": Leaf(b"m")})
    for name in ("f", "m"):
        os.setxattr(tree / name, "user.note", b"kept")
    first = repository.import_directory(str(tree)).snapshot
    workspace = repository.workspace(SnapshotId(first))
    workspace.apply(PATCH + "diff --git a/m b/n/m\nrename from m\nrename to n/m\n")
    assert workspace.stat("f").xattrs == workspace.stat("n/m").xattrs == ((b"user.note", b"kept"),)
    made = workspace.commit()
    before = repository.snapshot(SnapshotId(first)).root
    assert find(repository.objects, made.root, b"d") == find(repository.objects, before, b"d")
    moved, stood = (
        find(repository.objects, root, path) for root, path in ((made.root, b"n/m"), (before, b"m"))
    )
    assert moved == stood
