"""The tests of sessions, imports and kills once more, as an ordinary user.

Root may read and write whatever the permission bits say, so as root they show less.
"""

import os
from pathlib import Path

import pytest

from tests.conftest import ROOT, Run

SUITES = ["importing", "killed", "session_machine", "session_tree", "sessions", "upper_format"]
SAME_FOR_ALL = ["large_directory", "deep_tree", "killed_import", "kill_during", "many_chunks"]


@pytest.mark.timeout(900)  # half a minute where nothing else runs
@pytest.mark.unprivileged
def test_an_ordinary_user_can_do_everything(
    public_path: Path, as_user: Run, monkeypatch: pytest.MonkeyPatch
):
    if os.geteuid() != 0:
        pytest.skip("all tests run as an ordinary user here")
    monkeypatch.setenv("AMALGAMFS_EXAMPLES_FEW", "1")
    done = as_user(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={public_path}/t",
        "-k", " and ".join(f"not {name}" for name in SAME_FOR_ALL),
        *(str(ROOT / f"tests/engine/test_{suite}.py") for suite in SUITES),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5_000:] + done.stderr
    assert " passed" in done.stdout
