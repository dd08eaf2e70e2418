"""Damage at which LMDB ends the process: each command says that the store is damaged."""

import json
import os
import struct
import sys
from pathlib import Path

import pytest

PAGE = 4096


@pytest.fixture
def aborting(mountctl, tmp_path: Path) -> Path:
    """A store whose tree of nodes has a root with one child: LMDB asserts that there are two."""
    tree = tmp_path / "tree"
    for number in range(60):
        (tree / f"d{number}").mkdir(parents=True)
        (tree / f"d{number}" / "f").write_text("x" * number)
    mountctl("import", str(tree), "--ref", "main")
    path = Path(mountctl.store) / "db" / "data.mdb"
    data = bytearray(path.read_bytes())
    changed = 0
    for at in range(2 * PAGE, len(data), PAGE):
        own, _, flags, _, _ = struct.unpack_from("=QHHHH", data, at)
        if own == at // PAGE and flags == 1:
            struct.pack_into("=H", data, at + 12, 18)
            changed += 1
    assert changed
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "command", [["checkout", "main", "out"], ["stats"], ["import", "tree", "--no-cache"]]
)
def test_a_command_that_dies_in_lmdb_says_why(mountctl, aborting: Path, command: list[str]):
    error = mountctl.run(*command, code=9).stderr
    assert "Assertion" in error, "no longer an abort: damage it otherwise"
    assert "is damaged" in error.splitlines()[-2]
    assert "page" in error.splitlines()[-2]
    assert "mountctl verify" in error.splitlines()[-1]
    assert "Traceback" not in error


def test_it_says_so_in_json_too(mountctl, aborting: Path):
    last = mountctl.run("stats", "--json", code=9).stderr.splitlines()[-1]
    assert json.loads(last)["error"]["kind"] == "StoreDamagedError"


def test_verify_lives_and_repair_mends(mountctl, aborting: Path):
    assert "in the store's file: " in mountctl("verify", code=9).stdout
    mountctl.fails(9, "gc")
    mountctl("verify", "--repair")
    mountctl("verify")
    mountctl("checkout", "main", mountctl.home / "out")
    assert aborting.with_name("damaged").is_dir()


def test_a_crash_with_a_whole_store_stays_that_crash(mountctl, tmp_path: Path):
    import signal
    import subprocess

    code = (
        "import os,sys; from mountctl import crashed; crashed.arm(sys.argv[1], False); os.abort()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(mountctl.store)],
        capture_output=True, check=False, timeout=60, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert done.returncode == -signal.SIGABRT
