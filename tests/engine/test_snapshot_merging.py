"""Merging snapshots: history, refs, and what is in the store afterwards."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine import Repository, SnapshotId
from engine.errors import InvalidNameError, NotFoundError
from engine.merging.conflicts import ConflictKind
from engine.merging.snapshot_merging import NoMergeBaseError, Outcome

ROOT = Path(__file__).parents[2]
LINES = "".join(f"{n}\n" for n in range(1, 10))


def made(repository: Repository, on: SnapshotId | None, **files: str) -> SnapshotId:
    workspace = repository.workspace(on, now_ns=lambda: 1)
    for name, text in files.items():
        workspace.write(name, text)
    return workspace.commit().snapshot


def text(repository: Repository, snapshot: SnapshotId | None, name: str) -> str:
    assert snapshot is not None
    return repository.workspace(snapshot).read_text(name)


def test_a_merge_is_a_snapshot_of_both(repository: Repository):
    base = made(repository, None, f=LINES, g="g")
    ours = made(repository, base, f=LINES.replace("1", "one"))
    theirs = made(repository, base, f=LINES.replace("9", "nine"), h="h")
    report = repository.merge(ours, theirs, ref="main", message="both", metadata={"score": 1})
    assert (report.outcome, report.bases) == (Outcome.MERGED, [base])
    assert report.merged_texts == [b"f"]
    assert report.snapshot is not None
    record = repository.snapshot(report.snapshot)
    assert (record.parents, record.message) == ((ours, theirs), "both")
    assert record.metadata == {"score": 1}
    assert repository.refs() == {"main": report.snapshot}
    assert text(repository, report.snapshot, "h") == "h"
    again = repository.merge(report.snapshot, theirs)
    assert (again.outcome, again.snapshot) == (Outcome.ALREADY_MERGED, report.snapshot)
    ahead = repository.merge(ours, report.snapshot, ref="other")
    assert (ahead.outcome, ahead.snapshot) == (Outcome.FAST_FORWARD, report.snapshot)
    assert repository.refs()["other"] == report.snapshot


def test_snapshots_that_are_not_written_yet_merge(repository: Repository):
    base = repository.workspace()
    base.write("f", LINES)
    base.commit(durable=False)
    sides = []
    for old, new in (("1", "one"), ("9", "nine")):
        fork = base.fork()
        fork.write("f", LINES.replace(old, new))
        sides.append(fork.commit(durable=False).snapshot)
    report = repository.merge(*sides)
    both = LINES.replace("1", "one").replace("9", "nine")
    assert text(repository, report.snapshot, "f") == both
    repository.close()
    with Repository.open(repository.path) as other:
        assert text(other, report.snapshot, "f") == both


def test_conflicts_are_kept_with_the_snapshot(repository: Repository):
    base = made(repository, None, f="1\n")
    ours, theirs = (made(repository, base, f=new) for new in ("2\n", "3\n"))
    count = len(repository.snapshots())
    report = repository.merge(ours, theirs, ref="main")
    assert (report.outcome, report.snapshot) == (Outcome.CONFLICTS, None)
    assert [conflict.kind for conflict in report.conflicts] == [ConflictKind.CONTENT]
    assert len(repository.snapshots()) == count
    assert repository.refs() == {}
    report = repository.merge(ours, theirs, ref="main", write_conflicts=True)
    assert report.outcome == Outcome.CONFLICTS
    assert "<<<<<<<" in text(repository, report.snapshot, "f")
    assert report.snapshot is not None
    (conflict,) = repository.snapshot(report.snapshot).metadata["conflicts"]
    assert conflict["kind"] == "content"
    assert not repository.verify().damage


def test_what_cannot_be_merged(repository: Repository):
    one, other = made(repository, None, f="1"), made(repository, None, f="2")
    with pytest.raises(NoMergeBaseError):
        repository.merge(one, other)
    with pytest.raises(InvalidNameError):
        repository.merge(one, one, ref="../x")
    with pytest.raises((NotFoundError, NoMergeBaseError)):
        repository.merge(one, SnapshotId(bytes(32)))
    empty = repository.workspace().commit().snapshot
    report = repository.merge(one, other, base=empty)
    assert [conflict.kind for conflict in report.conflicts] == [ConflictKind.ADD_ADD]


def test_many_threads_merge(repository: Repository):
    base = made(repository, None, **{f"f{n}": LINES for n in range(8)})
    sides = [made(repository, base, **{f"f{n}": f"{n}"}) for n in range(8)]
    results: list[SnapshotId | None] = [None] * 8
    ours = made(repository, base, g="g")

    def run(number: int) -> None:
        results[number] = repository.merge(ours, sides[number]).snapshot

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, snapshot in enumerate(results):
        assert text(repository, snapshot, f"f{number}") == f"{number}"
        assert text(repository, snapshot, "g") == "g"


def test_the_program_of_the_guide_runs(tmp_path: Path):
    page = (ROOT / "docs/guide/diff-and-merge.md").read_text()
    program = page.split("```python\n")[1].split("```")[0]
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 [b'main.c']\nOutcome.MERGED []\n['main.c', 'notes']\n"


KILLED = """
import os, sys
from engine import Repository, SnapshotId
repository = Repository.open(sys.argv[1])
ours, theirs = (repository.resolve(name) for name in ("ours", "theirs"))
print("ready", flush=True)
while True:
    report = repository.merge(ours, theirs, ref="merged")
    print(report.snapshot.hex(), flush=True)
"""


def test_a_killed_merge_leaves_all_or_nothing(repository: Repository, tmp_path: Path):
    base = made(repository, None, **{f"f{n}": LINES * 200 for n in range(20)})
    for name, old, new in (("ours", "1\n", "one\n"), ("theirs", "9\n", "nine\n")):
        texts = {f"f{n}": LINES * 99 + LINES.replace(old, new) + LINES * 100 for n in range(20)}
        repository.set_ref(name, made(repository, base, **texts))
    repository.close()
    for wait in range(6):
        command = [sys.executable, "-c", KILLED, repository.path]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            told = [child.stdout.readline().strip() for _ in range(wait)]
            child.send_signal(signal.SIGKILL)
        with Repository.open(repository.path) as other:
            assert not other.verify().damage
            for snapshot in told:
                assert other.has_snapshot(SnapshotId(bytes.fromhex(snapshot)))
            merged = other.refs().get("merged")
            assert merged is not None or not told
            if merged is not None:
                expected = LINES.replace("1\n", "one\n").replace("9\n", "nine\n")
                assert text(other, merged, "f0") == LINES * 99 + expected + LINES * 100
