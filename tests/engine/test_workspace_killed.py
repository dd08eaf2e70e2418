"""Processes that commit and are killed: a prefix of their commits is there, none by half.

The child kills itself at a chosen transaction (before it, inside of it when all is written but
not committed, after it), or is killed from outside whenever it happens.
"""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine import Repository, SnapshotId
from engine.storage.objects import Objects
from tests.conftest import ROOT

CHILD = """
import os, random, signal, sys, threading
from engine import Repository

path, name, durable_every, step, where = sys.argv[1:4] + sys.argv[4:6]
durable_every, left = int(durable_every), int(step)
repository = Repository.open(path)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

write, counting = repository.store.write, threading.Lock()

def counted(change):
    global left
    with counting:  # a thread writes behind
        left -= 1
        last = left == 0
    if last and where == "before":
        die()

    def inside(writer):
        result = change(writer)
        if last and where == "inside":
            die()
        return result

    result = write(inside)
    if last and where == "after":
        die()
    return result

repository.store.write = counted
workspace = repository.workspace()
for n in range(1_000_000):
    data = random.Random(f"{name}{n}").randbytes(20 + n * 997 % 40_000)
    if n % 7 == 3:
        workspace.write_stream(f"d{n % 5}/{n}", [data], parents=True)
    else:
        workspace.write(f"d{n % 5}/{n}", data, parents=True)
    durable = bool(durable_every) and n % durable_every == durable_every - 1
    made = workspace.commit(str(n), durable=durable)
    print("durable" if durable else "behind", made.snapshot.hex(), flush=True)
"""


def child(
    store: str, name: str, durable_every: int, step: int = 0, where: str = ""
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, store, name, str(durable_every), str(step), where],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def check(store: str, name: str, said: list[list[str]]) -> int:
    """Checks what a killed child has left; returns how many of its commits are there."""
    with Repository.open(store) as repository:
        objects = Objects(repository.store)
        there = set(repository.snapshots())
        present = [SnapshotId(bytes.fromhex(identifier)) in there for _, identifier in said]
        assert present == sorted(present, reverse=True), "a commit is there without one before it"
        for (kind, _), is_there in zip(said, present, strict=True):
            assert is_there or kind == "behind"
        durable = [at for at, (kind, _) in enumerate(said) if kind == "durable"]
        assert not durable or present[durable[-1]]
        for at, (_, identifier) in enumerate(said):
            if present[at] and (at % 5 == 0 or at == sum(present) - 1):
                tree = repository.workspace(SnapshotId(bytes.fromhex(identifier)))
                files = tree.glob("d*/*")
                assert {int(path.partition("/")[2]) for path in files} == set(range(at + 1))
                data = random.Random(f"{name}{at}").randbytes(20 + at * 997 % 40_000)
                assert tree.read(f"d{at % 5}/{at}") == data
        objects.shed()
        assert repository.verify().damage == []
        return sum(present)


def output(process: "subprocess.Popen[str]") -> list[list[str]]:
    assert process.stdout is not None
    lines = [line.split() for line in process.stdout if line.endswith("\n")]
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    return [line for line in lines if len(line) == 2 and len(line[1]) == 64]


@pytest.mark.parametrize("durable_every", [0, 1, 4])
@pytest.mark.parametrize("where", ["before", "inside", "after"])
def test_killed_at_a_transaction(tmp_path: Path, where: str, durable_every: int):
    for step in range(1, 7):
        store = str(tmp_path / f"store{step}")
        Repository.create(store).close()
        said = output(child(store, "x", durable_every, step, where))
        present = check(store, "x", said)
        if durable_every == 1 and where == "before":
            assert present <= len(said)


@pytest.mark.parametrize("durable_every", [0, 1, 5])
def test_killed_at_any_moment(tmp_path: Path, durable_every: int):
    store = str(tmp_path / "store")
    Repository.create(store).close()
    rng = random.Random(durable_every)
    found = 0
    for round_ in range(5):
        process = child(store, f"r{round_}", durable_every)
        assert process.stdout is not None
        lines = rng.randrange(1, 150) if durable_every else rng.randrange(300, 600)
        first = [process.stdout.readline().split() for _ in range(lines)]
        process.kill()
        found += check(store, f"r{round_}", [*first, *output(process)])
    assert found > 0


def test_several_processes_commit_at_once_and_one_is_killed(tmp_path: Path):
    store = str(tmp_path / "store")
    Repository.create(store).close()
    names = ["one", "two", "three"]
    processes = [child(store, name, every) for name, every in zip(names, [0, 1, 3], strict=True)]
    firsts = []
    for process in processes:
        assert process.stdout is not None
        firsts.append([process.stdout.readline().split() for _ in range(10)])
    said = []
    for process, first in zip(processes, firsts, strict=True):
        process.kill()
        said.append([*first, *output(process)])
    for name, lines in zip(names, said, strict=True):
        check(store, name, lines)


def test_another_process_sees_whole_commits_only(tmp_path: Path):
    """A second process reads, again and again, while one commits two files that belong together."""
    store = str(tmp_path / "store")
    writer = """
import sys
from engine import Repository
with Repository.open(sys.argv[1]) as repository:
    workspace = repository.workspace("main")
    for n in range(400):
        workspace.write("a", b"%d" % n * 50)
        workspace.write("d/b", b"%d" % n * 50, parents=True)
        workspace.commit(ref="main", durable=n % 10 == 0)
"""
    with Repository.create(store) as repository:
        workspace = repository.workspace()
        for path in ["a", "d/b"]:
            workspace.write(path, b"0" * 50, parents=True)
        workspace.commit(ref="main")
        process = subprocess.Popen([sys.executable, "-c", writer, store], cwd=ROOT)
        seen = set()
        while process.poll() is None:
            tree = repository.workspace("main")
            data = tree.read("a")
            assert tree.read("d/b") == data
            seen.add(data)
        assert process.returncode == 0
        assert len(seen) > 2
        assert repository.workspace("main").read("a") == b"399" * 50
