"""scripts/disk-failures in a short form: some of its cells, each as it is there."""

import os
from pathlib import Path

import pytest

from scripts.disk_failures import COMMANDS, FAULTS, Bench

CELLS = [
    ("import", "full"), ("gc --compact", "full"), ("session rm", "inodes"), ("commit", "read-only"),
    ("export --tar", "io"), ("commit", "io"), ("import", "fsize"), ("git export", "fsize"),
    ("commit", "map"), ("import", "memory"), ("checkout", "quota"),
]  # fmt: skip
MOUNTED = ["full", "meta", "memory"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("failures"))


def test_the_matrix_knows_the_cells():
    assert {command for command, _ in CELLS} <= set(COMMANDS)
    assert {fault for _, fault in CELLS} | set(MOUNTED) <= set(FAULTS)


@pytest.mark.parametrize(("command", "fault"), CELLS)
def test_a_command_on_a_failing_disk(bench: Bench, command: str, fault: str) -> None:
    skip_unless_possible(fault)
    verdict = bench.command(command, fault)
    assert not verdict.why, verdict.why


@pytest.mark.fuse
@pytest.mark.parametrize("fault", MOUNTED)
def test_programs_in_a_mount_on_a_failing_disk(bench: Bench, fault: str) -> None:
    skip_unless_possible(fault)
    verdict = bench.cell("mounted", fault)
    assert not verdict.why, verdict.why


def skip_unless_possible(fault: str) -> None:
    if FAULTS[fault].root and os.geteuid() != 0:
        pytest.skip("only root can mount a disk that fails")


def test_the_home_of_the_bench_is_left_clean(bench: Bench) -> None:
    assert not list(Path(bench.disk).iterdir())
