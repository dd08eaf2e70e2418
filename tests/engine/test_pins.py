"""Pins: what open workspaces stand on is known to every process, until they are gone."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import Repository
from engine.errors import MissingObjectError
from engine.ids import NodeId, digest
from engine.trees.directory import directory_id
from engine.workspaces.pins import Pins, live_pins
from tests.conftest import ROOT


def root(number: int) -> NodeId:
    return NodeId(digest(b"%d" % number))


@pytest.fixture
def store(tmp_path: Path) -> str:
    (tmp_path / "locks").mkdir()
    return str(tmp_path)


def files(store: str) -> list[Path]:
    return list(Path(store, "locks/pins").iterdir())


def test_what_is_pinned_is_seen_until_it_is_given_up(store: str):
    assert live_pins(store) == set()
    pins = Pins(store)
    assert not Path(store, "locks/pins").exists()
    held = [pins.pin(root(n)) for n in range(5)]
    again = pins.pin(root(3))
    assert live_pins(store) == {root(n) for n in range(5)}
    (file,) = files(store)
    size = file.stat().st_size
    del held[2:]
    pins.tidy()
    assert live_pins(store) == {root(0), root(1), root(3)}
    assert again.root == root(3)
    more = [pins.pin(root(n)) for n in range(10, 12)]
    assert file.stat().st_size == size, "lines given up are used again"
    assert live_pins(store) == {root(n) for n in (0, 1, 3, 10, 11)}
    assert len(more) == 2
    pins.close()
    assert live_pins(store) == set()
    assert files(store) == []


def test_many_pins_one_after_the_other_take_one_line(store: str):
    pins = Pins(store)
    pin = pins.pin(root(0))
    for n in range(1, 1000):
        pin = pins.pin(root(n))
        assert pin.root in live_pins(store) if n % 100 == 0 else True
    gc.collect()
    (file,) = files(store)
    assert file.stat().st_size <= 3 * 65
    pins.close()


def test_a_dead_process_pins_nothing_and_its_file_goes(store: str):
    code = "import sys, os; from engine.workspaces.pins import Pins; p = Pins(sys.argv[1]);" \
           "h = p.pin(bytes(range(32))); print('pinned', flush=True); sys.stdin.read()"  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", code, store], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"pinned\n"
    assert live_pins(store) == {bytes(range(32))}
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    assert len(files(store)) == 1
    assert live_pins(store) == set()
    assert files(store) == []


def test_a_line_that_is_being_written_is_passed_over(store: str):
    pins = Pins(store)
    held = pins.pin(root(1))
    (file,) = files(store)
    with file.open("ab") as stream:
        stream.write(b"12ab\n\xff\xff\n" + b"\0" * 65)
    assert live_pins(store) == {held.root}
    pins.close()


def test_what_workspaces_stand_on_is_pinned(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("engine.workspaces.committing.WRITE_BEHIND", 3600)
    workspace = repository.workspace()
    workspace.write("file", b"1")
    one = directory_id(workspace.commit().root)
    assert live_pins(repository.path) == {one}
    fork = workspace.fork()
    workspace.write("file", b"2")
    two = directory_id(workspace.commit().root)
    repository.pins.tidy()
    assert live_pins(repository.path) == {one, two}
    fork.restore(workspace.snapshot)
    repository.pins.tidy()
    assert live_pins(repository.path) == {two}
    workspace.write("file", b"3")
    three = directory_id(workspace.commit(durable=False).root)
    fork.restore(workspace.snapshot)
    repository.pins.tidy()
    assert live_pins(repository.path) == {two, three}
    repository.flush()
    repository.pins.tidy()
    assert live_pins(repository.path) == {three}
    del workspace, fork
    repository.pins.tidy()
    assert live_pins(repository.path) == set()


def test_what_a_commit_on_its_way_stands_on_stays_pinned(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("engine.workspaces.committing.WRITE_BEHIND", 3600)
    workspace = repository.workspace()
    roots = []
    for n in range(3):
        workspace.write("file", b"%d" % n)
        roots.append(directory_id(workspace.commit(durable=n == 0).root))
    workspace.write_stream("stream", [bytes(range(256)) * 1000])
    streamed = live_pins(repository.path) - set(roots)
    assert len(streamed) == 1
    roots.append(directory_id(workspace.commit(durable=False).root))
    del workspace
    repository.pins.tidy()
    assert live_pins(repository.path) == {*roots[:3], *streamed}
    repository.flush()
    repository.pins.tidy()
    assert live_pins(repository.path) == set()


def test_a_snapshot_that_is_removed_before_it_is_pinned_is_not_opened(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
):
    workspace = repository.workspace()
    workspace.write("file", b"1")
    made = workspace.commit().snapshot
    other = repository.workspace()
    pin = repository.pins.pin

    def late(root: NodeId):
        repository.remove_snapshot(made)
        return pin(root)

    monkeypatch.setattr(repository.pins, "pin", late)
    with pytest.raises(MissingObjectError):
        other.restore(made)
    assert other.snapshot is None


def test_a_child_that_was_forked_gives_nothing_up(repository: Repository):
    workspace = repository.workspace()
    workspace.write("file", b"1")
    root_ = directory_id(workspace.commit().root)
    code = f"""
import os, sys
from engine import Repository
repository = Repository.open({repository.path!r})
workspace = repository.workspace({workspace.snapshot.hex() if workspace.snapshot else ""!r})
if os.fork() == 0:
    sys.exit()
os.wait()
from engine.workspaces.pins import live_pins
assert len(os.listdir({repository.path + "/locks/pins"!r})) == 2
print(len(live_pins({repository.path!r})))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("1\n", "")
    assert live_pins(repository.path) == {root_}
    assert os.listdir(repository.path + "/locks/pins")
