"""Layers: a folded stack is what an overlay of them would show."""

from pathlib import Path

import pytest
from hypothesis import given, settings

from engine import Repository, SnapshotId
from engine.storage.nodes import Entry, Kind
from engine.trees.layers import fold
from tests.engine.test_diffing import Spec, Trees, below
from tests.engine.trees import of_entry


def naive(lower: dict[bytes, Entry], higher: dict[bytes, Entry]) -> dict[bytes, Entry]:
    merged = dict(lower)
    for path, entry in higher.items():
        if entry.kind != Kind.DIRECTORY or merged.get(path, entry).kind != Kind.DIRECTORY:
            for hidden in [p for p in merged if p == path or p.startswith(path + b"/")]:
                del merged[hidden]
        merged[path] = entry
    return merged


def essence(tree: dict[bytes, Entry]) -> dict[bytes, object]:
    return {
        path: (e.kind, e.mode, e.mtime_ns, e.xattrs, e.content if e.kind != Kind.DIRECTORY else b"")
        for path, e in tree.items()
    }


@given(one=below, two=below, three=below)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_a_fold_is_what_an_overlay_shows(one: Spec, two: Spec, three: Spec):
    trees = Trees()
    layers = [trees.make(spec, mode=0o700 + n) for n, spec in enumerate([one, two, three])]
    trees.save()
    folded = fold(trees.objects, trees.nodes.put, layers)
    trees.save()
    expected: dict[bytes, Entry] = {}
    for layer in layers:
        expected = naive(expected, trees.flat(layer))
    assert essence(trees.flat(folded)) == essence(expected)
    assert folded.mode == 0o702
    of_entry(trees.objects, folded)  # its sums are right


def test_one_layer_is_itself():
    trees = Trees()
    layer = trees.make({b"a": (Kind.FILE, 0o644, 1, b"x", ())})
    assert fold(trees.objects, trees.nodes.put, [layer]) is layer


def test_what_one_layer_alone_has_is_not_read():
    trees = Trees()
    lower: Spec = {b"l": (Kind.DIRECTORY, 0o755, 1, {b"x": (Kind.FIFO, 0, 0, b"", ())}, ())}
    higher: Spec = {b"h": (Kind.DIRECTORY, 0o755, 1, {b"y": (Kind.FIFO, 0, 0, b"", ())}, ())}
    roots = [trees.make(lower), trees.make(higher)]
    trees.save()
    fold(trees.objects, trees.nodes.put, roots)
    assert trees.objects.statistics().node_misses == 2


def imported(repository: Repository, path: Path, files: dict[str, bytes]) -> SnapshotId:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return SnapshotId(repository.import_directory(str(path)).snapshot)


def test_a_session_on_a_stack(repository: Repository, tmp_path: Path):
    low = imported(repository, tmp_path / "low", {"a": b"low", "d/x": b"low", "d/y": b"low"})
    mid = imported(repository, tmp_path / "mid", {"b": b"mid", "d/y": b"mid"})
    top = imported(repository, tmp_path / "top", {"c": b"top", "d/z": b"top"})
    session = repository.sessions.create("s", (low, mid, top))
    assert [name for name, _ in session.layers] == ["0-infrastructure", "1-global", "2-blueprint"]
    with repository.tree("@s") as root:
        files = {p: s.data for p, s in of_entry(repository.objects, root).items() if s.kind == 1}
    assert files == {
        b"a": b"low", b"b": b"mid", b"c": b"top", b"d/x": b"low", b"d/y": b"mid", b"d/z": b"top",
    }  # fmt: skip
    repository.sessions.create("two", (None, mid, top))
    report = repository.commit("s")
    assert report.changed  # the stack as one tree
    assert not repository.commit("s").changed
    root = repository.snapshot(SnapshotId(report.snapshot)).root
    found = of_entry(repository.objects, root)
    assert {p: s.data for p, s in found.items() if s.kind == 1} == files
    with repository.sessions.hold("s", "a test") as held:
        held.reset(top)
    with repository.tree("@s") as root:
        found = of_entry(repository.objects, root)
        assert {p: s.data for p, s in found.items() if s.kind == 1} == files
    repository.collect()
    assert repository.verify().damage == []


def test_linked_files_of_two_layers_stay_apart(repository: Repository, tmp_path: Path):
    """Two layers may each have a pair of linked files, alike in everything."""
    import os

    layers = []
    for layer, names in [("low", ["a", "b"]), ("top", ["c", "d"])]:
        directory = tmp_path / layer / "same"
        directory.mkdir(parents=True)
        (directory / names[0]).write_bytes(b"linked")
        os.utime(directory / names[0], ns=(5, 5))
        os.link(directory / names[0], directory / names[1])
        result = repository.import_directory(str(tmp_path / layer))
        layers.append(SnapshotId(result.snapshot))
    repository.sessions.create("s", (layers[0], None, layers[1]))
    with repository.tree("@s") as root:
        found = of_entry(repository.objects, root)
    assert found[b"same/a"].names == (b"same/a", b"same/b")
    assert found[b"same/c"].names == (b"same/c", b"same/d")


def test_a_linked_file_with_a_name_that_is_hidden(repository: Repository, tmp_path: Path):
    import os

    (tmp_path / "low").mkdir()
    (tmp_path / "low/a").write_bytes(b"linked")
    os.link(tmp_path / "low/a", tmp_path / "low/b")
    os.link(tmp_path / "low/a", tmp_path / "low/c")
    low = SnapshotId(repository.import_directory(str(tmp_path / "low")).snapshot)
    top = imported(repository, tmp_path / "top", {"b": b"hides"})
    repository.sessions.create("s", (low, None, top))
    with repository.tree("@s") as root:
        found = of_entry(repository.objects, root)
    assert found[b"a"].names == (b"a", b"c")


@pytest.mark.parametrize("layers", [(None, None)])
def test_a_session_needs_a_blueprint(repository: Repository, layers: tuple[None, None]):
    from engine.errors import MissingObjectError

    with pytest.raises(MissingObjectError):
        repository.sessions.create("s", (*layers, SnapshotId(bytes(32))))
