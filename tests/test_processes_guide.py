"""The guide to processes and threads: its programs run, and each row of its table has its tests."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from engine import Repository
from tests.conftest import PATIENCE, ROOT
from tests.engine import test_forks as forks
from tests.engine import test_threads as threads
from tests.mountctl import test_failures as failures

PAGE = (ROOT / "docs/guide/processes-and-threads.md").read_text()

TESTS: dict[str, list[Callable[..., None]]] = {
    "the store's path": [forks.test_workers_open_the_store_themselves],
    "`Repository`": [
        threads.test_threads_use_one_repository_at_the_same_time,
        threads.test_a_store_is_open_once_in_a_process,
        threads.test_event_loops_use_it_in_threads,
        forks.test_a_child_is_told_at_once,
        forks.test_what_belongs_to_a_process_says_so_when_it_is_pickled,
    ],
    "`Workspace`": [forks.test_a_workspace_in_a_child_has_what_is_in_memory],
    "`HeldSession`": [
        forks.test_a_held_session_stays_its_parents,
        threads.test_a_session_is_held_once_and_used_by_one_thread_after_the_other,
    ],
    "a session's live view": [forks.test_a_view_of_a_session_is_closed_in_a_child],
    "a view of the store (`store.read()`), a generator": [
        forks.test_a_child_that_has_an_open_view_frees_nothing,
        threads.test_a_generator_may_be_ended_by_another_thread,
    ],
    "ids, `Session`, `Snapshot`, `Entry`, reports": [forks.test_values_cross_to_other_processes],
    "errors": [
        failures.test_every_error_crosses_to_other_processes,
        forks.test_an_error_of_a_worker_arrives,
    ],
}


def test_each_row_has_its_tests():
    rows = re.findall(r"^\| ([^|]+?) \|.*\|$", PAGE, re.MULTILINE)
    assert [row for row in rows if not set(row) <= set("- ")] == list(TESTS)


def test_its_programs_run(tmp_path: Path):
    workers, loop = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    with Repository.create(str(tmp_path / "store")) as repository:
        repository.workspace().commit("empty", parents=(), ref="main")
    shown = []
    for number, code in enumerate((workers, loop)):
        program = tmp_path / f"program{number}.py"
        program.write_text(code)
        done = subprocess.run(
            [sys.executable, "-W", "error", program.name], cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert done.stderr == ""
        shown.append(done.stdout)
    assert shown == ["4\n4\n", "4\n"]
