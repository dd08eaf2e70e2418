"""scripts/posix: what it says of a suite, and that nothing stays behind it.

The suites here are small programs in the place of fsx; the real ones run in scripts/test.
"""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fsdriver.mountpoint import mounts
from scripts.posix_main import SUITES, with_kept
from scripts.posix_scores import Failure, Known, Score, new_failures, read_known, table
from scripts.posix_setting import SIDES

ROOT = Path(__file__).resolve().parent.parent


def start(tmp_path: Path, program: str, *arguments: str) -> subprocess.Popen[str]:
    suite = tmp_path / "fsx"
    suite.write_text(f"#!/bin/sh\n{program}\n")
    suite.chmod(0o755)
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-P", "-m", "scripts.posix_main", "fsx", "--short"]
    command += ["--fsx", str(suite), "--json", str(tmp_path / "posix.json"), *arguments]
    return subprocess.Popen(
        command, env={**os.environ, "TMPDIR": str(tmp_path / "work")}, cwd=ROOT,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def gone(tmp_path: Path) -> None:
    assert not list((tmp_path / "work").iterdir())
    assert not [m for m in mounts() if m.path.startswith(str(tmp_path))]


def wait_until_gone(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        ended = select.select([handle], [], [], 120)[0]
        os.close(handle)
        assert ended, f"process {pid} goes on"


@pytest.mark.fuse
def test_a_suite_that_is_content(tmp_path: Path) -> None:
    run = start(tmp_path, 'echo text >"$7"', "--in", ",".join(SIDES))
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    cells = " | ".join("0 of 2" for _ in SIDES)
    assert f"| fsx, runs of 2,000 operations, the short form | {cells} |" in out
    gone(tmp_path)


@pytest.mark.fuse
@pytest.mark.parametrize(("side", "kind"), [("sessions", "fuseblk"), ("run", "overlayfs")])
def test_a_failure_is_named_and_what_still_runs_is_ended(
    tmp_path: Path, side: str, kind: str
) -> None:
    pids = tmp_path / "pids"
    program = f'setsid sleep 1000 <"$0" >"$7" & echo $! >>"{pids}"; stat -f -c %T .; exit 1'
    run = start(tmp_path, program, "--in", side)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 1, err
    assert f"| fsx | {side} | `seed 2` | NOT KNOWN: {kind} |" in out
    assert "the mount" not in out, "what was left running had a file open"
    scores = json.loads((tmp_path / "posix.json").read_text())["scores"]
    assert [f["test"] for f in scores[0]["failures"]] == ["seed 1", "seed 2"]
    for pid in pids.read_text().split():
        wait_until_gone(int(pid))
    gone(tmp_path)


@pytest.mark.fuse
@pytest.mark.parametrize("side", ["sessions", "run"])
def test_interrupted_it_leaves_nothing(tmp_path: Path, side: str) -> None:
    pids = tmp_path / "pids"
    program = f'setsid sleep 1000 >"$7" & echo $! $$ >"{pids}"; exec sleep 1000'
    run = start(tmp_path, program, "--in", side)
    deadline = time.monotonic() + 120
    while not (pids.exists() and pids.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGINT
    for pid in pids.read_text().split():
        wait_until_gone(int(pid))
    gone(tmp_path)


def test_what_cannot_run_is_said(tmp_path: Path) -> None:
    run = start(tmp_path, "", "--fsx", str(tmp_path / "nothing"))
    out, err = run.communicate(timeout=120)
    assert run.returncode == 3
    assert f"did not run: fsx: {tmp_path}/nothing is not a program" in err
    assert "| not run |" in out


def test_only_what_is_not_known_is_new() -> None:
    known = [Known("fsx", "seed *", ("disk",), "the disk is\nlike that")]
    on_disk = Score("fsx", "disk", 2, failures=[Failure("seed 1"), Failure("another", "a | b")])
    in_session = Score("fsx", "sessions", 1, failures=[Failure("seed 1")])
    new = new_failures(known, [on_disk, in_session])
    assert [(s.side, f.test) for s, f in new] == [("disk", "another"), ("sessions", "seed 1")]
    text = table({"fsx": "fsx"}, known, [in_session, on_disk])
    assert "| fsx, tests | **1 of 1 fail** | **2 of 2 fail** |" in text
    assert "| fsx | disk | `seed 1` | the disk is like that |" in text
    assert r"| fsx | disk | `another` | NOT KNOWN: a \| b |" in text


def test_scores_of_earlier_runs_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "posix.json"
    old = [Score("fsx", "disk", 1), Score("fsx", "sessions", 2, failures=[Failure("a", "b")])]
    file.write_text(json.dumps({"scores": [score.as_json() for score in old]}))
    assert with_kept(str(file), [Score("fsx", "disk", 3)]) == [old[1], Score("fsx", "disk", 3)]


def test_known_failures_are_of_suites_and_sides_that_there_are() -> None:
    for one in read_known():
        assert one.suite in SUITES
        assert set(one.sides) <= set(SIDES)
        assert re.search(r"\w", one.reason)
