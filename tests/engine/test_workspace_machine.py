"""Workspaces against a dictionary: whatever is done to forks, each shows what its model says.

The model of a tree is {path: bytes of a file | its target after "-> " | None for a directory}.
"""

import os
import shutil
import tempfile

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import engine.trees.directory
from engine import Repository, SnapshotId
from engine.storage.nodes import Kind
from engine.storage.objects import Objects
from engine.trees.paths import (
    InvalidPathError,
    MissingPathError,
    NoDirectoryError,
    NoFileError,
    NotEmptyError,
    PathError,
    PathExistsError,
)
from engine.workspaces.workspace import Workspace
from tests.engine.machines import run_machine
from tests.engine.trees import of_entry

Model = dict[str, bytes | str | None]

names = st.sampled_from(["a", "b", "c", "ü", "e" * 20])
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
contents = st.one_of(st.binary(max_size=10), st.integers(0, 5).map(lambda n: b"%d" % n * 40_000))


def above(path: str) -> str:
    return path.rpartition("/")[0]


def is_dir(model: Model, path: str) -> bool:
    return not path or (path in model and model[path] is None)


def below(model: Model, path: str) -> list[str]:
    return [p for p in model if p.startswith(path + "/")]


def trouble_above(model: Model, path: str) -> type[PathError] | None:
    """What is in the way of making `path`, of which the directories have to be there."""
    parts = path.split("/")
    for at in range(1, len(parts)):
        parent = "/".join(parts[:at])
        if parent not in model:
            return MissingPathError
        if not is_dir(model, parent):
            return NoDirectoryError
    return None


class Workspaces(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.path = tempfile.mkdtemp(prefix="afs")
        self.repository = Repository.create(self.path + "/store")
        self.live: list[tuple[Workspace, Model]] = [(self.repository.workspace(), {})]
        self.commits: list[tuple[SnapshotId, Model]] = []
        self.rounds = 0

    def teardown(self) -> None:
        self.repository.flush()
        stored = Objects(self.repository.store)
        for snapshot, model in self.commits:
            self.check_stored(stored, snapshot, model)
        assert self.repository.verify().damage == []
        self.repository.close()
        shutil.rmtree(self.path)

    def pick(self, which: int) -> tuple[Workspace, Model]:
        return self.live[which % len(self.live)]

    @rule(which=st.integers(0, 9), path=paths, data=contents, parents=st.booleans())
    def write(self, which, path, data, parents):
        workspace, model = self.pick(which)
        trouble = trouble_above(model, path)
        if parents and trouble is MissingPathError:
            trouble = None
        if trouble is None and path in model and not isinstance(model[path], bytes):
            trouble = NoFileError
        if trouble is not None:
            with pytest.raises(trouble):
                workspace.write(path, data, parents=parents)
            return
        workspace.write(path, data, parents=parents)
        parts = path.split("/")
        for at in range(1, len(parts)):
            model["/".join(parts[:at])] = None
        model[path] = data

    @rule(which=st.integers(0, 9), path=paths, data=contents, offset=st.integers(0, 50_000))
    def write_at(self, which, path, data, offset):
        workspace, model = self.pick(which)
        old = model.get(path)
        if isinstance(old, bytes):
            workspace.write_at(path, offset, data)
            model[path] = old.ljust(offset, b"\0")[:offset] + data + old[offset + len(data) :]

    @rule(which=st.integers(0, 9), path=paths, data=contents)
    def stream(self, which, path, data):
        workspace, model = self.pick(which)
        if trouble_above(model, path) is None and isinstance(model.get(path, b""), bytes):
            workspace.write_stream(
                path, [data[at : at + 7_001] for at in range(0, len(data), 7_001)]
            )
            model[path] = data

    @rule(which=st.integers(0, 9), path=paths, to=names)
    def symlink(self, which, path, to):
        workspace, model = self.pick(which)
        trouble = trouble_above(model, path) or (PathExistsError if path in model else None)
        if trouble is not None:
            with pytest.raises(trouble):
                workspace.symlink(path, to)
            return
        workspace.symlink(path, to)
        model[path] = "-> " + to

    @rule(which=st.integers(0, 9), path=paths)
    def mkdir(self, which, path):
        workspace, model = self.pick(which)
        trouble = trouble_above(model, path) or (PathExistsError if path in model else None)
        if trouble is not None:
            with pytest.raises(trouble):
                workspace.mkdir(path)
            return
        workspace.mkdir(path)
        model[path] = None

    @rule(which=st.integers(0, 9), path=paths, recursive=st.booleans())
    def remove(self, which, path, recursive):
        workspace, model = self.pick(which)
        trouble = trouble_above(model, path)
        if trouble is None and path not in model:
            trouble = MissingPathError
        elif trouble is None and below(model, path) and not recursive:
            trouble = NotEmptyError
        if trouble is not None:
            with pytest.raises(trouble):
                workspace.remove(path, recursive=recursive)
            return
        workspace.remove(path, recursive=recursive)
        for gone in [path, *below(model, path)]:
            del model[gone]

    @rule(which=st.integers(0, 9), old=paths, new=paths)
    def rename(self, which, old, new):
        workspace, model = self.pick(which)
        trouble = trouble_above(model, old)
        if trouble is None and old not in model:
            trouble = MissingPathError
        trouble = trouble or (NoDirectoryError if trouble_above(model, new) is NoDirectoryError
                              else None)  # fmt: skip
        if trouble is None and old != new:
            if new.startswith(old + "/"):
                trouble = InvalidPathError
            elif is_dir(model, old) and new in model and not is_dir(model, new):
                trouble = NoDirectoryError
            elif is_dir(model, old) and below(model, new):
                trouble = NotEmptyError
            elif not is_dir(model, old) and is_dir(model, new):
                trouble = NoFileError
            else:
                trouble = trouble_above(model, new)
        if trouble is not None:
            with pytest.raises(trouble):
                workspace.rename(old, new)
            return
        workspace.rename(old, new)
        moved = {new + path[len(old) :]: model[path] for path in [old, *below(model, old)]}
        for path in [old, *below(model, old)]:
            del model[path]
        model.update(moved)

    @rule(which=st.integers(0, 9))
    def fork(self, which):
        workspace, model = self.pick(which)
        if len(self.live) < 5:
            self.live.append((workspace.fork(), dict(model)))

    @rule(which=st.integers(0, 9))
    def drop(self, which):
        if len(self.live) > 1:
            del self.live[which % len(self.live)]

    @rule(which=st.integers(0, 9), durable=st.booleans())
    def commit(self, which, durable):
        workspace, model = self.pick(which)
        before = workspace.snapshot
        made = workspace.commit("message", durable=durable)
        assert workspace.snapshot == made.snapshot
        assert made.changed == (made.snapshot != before)
        assert not workspace.is_changed()
        assert list(workspace.changes()) == []
        assert not workspace.commit(durable=False).changed
        self.commits.append((made.snapshot, dict(model)))
        if made.changed and before is not None:
            assert self.repository.snapshot(made.snapshot).parents == (before,)
        if durable:
            self.check_stored(Objects(self.repository.store), made.snapshot, model)

    @rule(which=st.integers(0, 9), commit=st.integers(0, 99))
    def restore(self, which, commit):
        if self.commits:
            workspace, model = self.pick(which)
            snapshot, there = self.commits[commit % len(self.commits)]
            workspace.restore(snapshot)
            model.clear()
            model.update(there)

    @rule(which=st.integers(0, 9), other=st.integers(0, 9))
    def diff(self, which, other):
        (one, old), (two, new) = self.pick(which), self.pick(other)
        kinds = {path: change.kind.value for change in one.diff(two)
                 for path in [change.path.decode()]}  # fmt: skip
        kinds = {path: kind for path, kind in kinds.items() if kind != "metadata"}
        expected = dict.fromkeys(new.keys() - old.keys(), "added")
        expected |= dict.fromkeys(old.keys() - new.keys(), "removed")
        expected |= {
            path: "modified" if type(old[path]) is type(new[path]) else "type"
            for path in old.keys() & new.keys()
            if old[path] != new[path]
        }
        assert kinds == expected

    @invariant()
    def every_one_shows_its_model(self) -> None:
        self.rounds += 1
        workspace, model = self.pick(self.rounds)
        assert {path for path, _ in workspace.walk()} == set(model)
        assert workspace.glob("**") == sorted(model, key=str.encode)
        for path, _ in workspace.walk():
            self.check_path(workspace, path, model[path])
        assert workspace.list() == sorted((p for p in model if "/" not in p), key=str.encode)

    def check_path(self, workspace: Workspace, path: str, expected: bytes | str | None) -> None:
        kind = workspace.stat(path).kind
        if expected is None:
            assert kind == Kind.DIRECTORY
            assert workspace.list(path) == [p.rpartition("/")[2] for p, _ in workspace.walk(path)
                                            if above(p) == path]  # fmt: skip
        elif isinstance(expected, bytes):
            assert kind == Kind.FILE
            assert workspace.read(path) == expected
            assert workspace.read(path, 3, 70_000) == expected[3:70_003]
            assert workspace.stat(path).size == len(expected)
        else:
            assert kind == Kind.SYMLINK
            assert "-> " + workspace.read_link(path).decode() == expected

    def check_stored(self, objects: Objects, snapshot: SnapshotId, model: Model) -> None:
        tree = of_entry(objects, objects.snapshot(snapshot).root)
        del tree[b""]
        seen: Model = {}
        for path, what in tree.items():
            target = "-> " + what.data.decode("latin-1")
            shown = {Kind.DIRECTORY: None, Kind.FILE: what.data, Kind.SYMLINK: target}
            seen[os.fsdecode(path)] = shown[Kind(what.kind)]
        expected = {p: v if not isinstance(v, str) else v.encode().decode("latin-1")
                    for p, v in model.items()}  # fmt: skip
        assert seen == expected


def run(examples: int, steps: int) -> None:
    run_machine(type("Machine", (Workspaces,), {}), examples, steps)


def test_workspaces_are_like_dictionaries() -> None:
    run(40, 50)


def test_workspaces_with_directories_in_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.trees.directory, "PAGED_FROM", 2)
    monkeypatch.setattr(engine.trees.directory, "PAGE_BITS", 1)
    run(30, 50)


def test_workspaces_whose_changes_are_in_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.workspaces.working_tree._COPIED", 1)
    monkeypatch.setattr("engine.workspaces.workspace.LARGE_BYTES", 30_000)
    run(30, 50)
