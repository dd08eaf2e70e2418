"""scripts/deaths, some of its cells: whatever is ended, and when, the next command works."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.deaths_main import Cell, Life, cells, die, problems

pytestmark = pytest.mark.fuse

CELLS = [
    Cell("starting", "client", signal.SIGKILL),
    Cell("mounting", "client", signal.SIGTERM),
    Cell("mounting", "daemon", signal.SIGTERM),
    Cell("mounting", "daemon", signal.SIGKILL),
    Cell("running", "client", signal.SIGKILL),
    Cell("running", "supervisor", signal.SIGKILL),
    Cell("lending", "daemon", signal.SIGKILL),
    Cell("ending", "daemon", signal.SIGKILL),
]
BUSY = 30.0
"""Seconds in which the next command is to answer, on the busiest machine."""


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    made = Life(tmp_path)
    yield made
    made.clear()


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_the_next_command_works(life: Life, cell: Cell):
    assert cell in cells()
    assert die(life, cell)
    assert problems(life, BUSY) == []
