"""Counts and durations: how they are gathered and written."""

import re
import subprocess

import pytest

from fsdriver.metrics import BUCKETS, Timing, exposition, of_this_process
from tests.fsdriver.conftest import Mount, until

LINE = re.compile(
    r"# TYPE [a-z_]+ (gauge|counter|histogram)"
    r'|[a-zA-Z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [0-9.e+-]+'
)


def filled(*durations: int) -> Timing:
    timing = Timing()
    for nanoseconds in durations:
        timing.add(nanoseconds)
    return timing


@pytest.mark.parametrize(
    ("nanoseconds", "bound"),
    [(0, 1000), (999, 1000), (1000, 2000), (1999, 2000), (2000, 4000), (1_000_000, 1024_000)],
)
def test_a_duration_lies_below_its_bound(nanoseconds, bound):
    assert filled(nanoseconds).quantile(1) == bound


def test_quantiles_and_differences():
    first = filled(*[500] * 98)
    timing = filled(*[500] * 98, 5_000, 50_000)
    assert (timing.quantile(0.5), timing.quantile(0.99), timing.quantile(1)) == (1000, 8000, 64_000)
    later = timing.since(first)
    assert (later.count, later.total) == (2, 55_000)
    assert later.quantile(0.5) == 8000
    assert Timing().quantile(0.99) == 0


def test_what_takes_very_long_is_counted_too():
    timing = filled(10**12)
    assert timing.buckets == [0] * (BUCKETS - 1) + [1]


def test_the_exposition_is_prometheus_text():
    groups = {"vfs": {"inodes": 3}, "objects": {"node_hits": 7}, "messages": {"READ": 4}}
    lines = list(exposition(groups, {"read": filled(500, 5_000)}))
    assert all(LINE.fullmatch(line) for line in lines), lines
    assert "amalgamfs_vfs_inodes 3" in lines
    assert "amalgamfs_objects_node_hits_total 7" in lines
    assert 'amalgamfs_messages_total{kind="READ"} 4' in lines
    buckets = [line for line in lines if line.startswith("amalgamfs_operation_seconds_bucket")]
    assert [int(line.split()[1]) for line in buckets] == [1, 1, 1] + [2] * (BUCKETS - 3)
    assert buckets[-1] == 'amalgamfs_operation_seconds_bucket{operation="read",le="+Inf"} 2'
    assert 'amalgamfs_operation_seconds_count{operation="read"} 2' in lines


def test_a_process_knows_what_it_uses():
    used = of_this_process()
    assert used.resident > 1 << 20
    assert used.descriptors >= 3
    assert used.threads >= 1


@pytest.mark.fuse
def test_a_mount_shows_its_metrics(mount: Mount, session):
    (session / "file").write_text("some")
    path = mount.path / ".amalgam/metrics"
    first = path.read_text()
    assert all(LINE.fullmatch(line) for line in first.splitlines()), first
    assert writes(first)
    before = mount.statistics()["operations"]["write"]  # which `first`, a second old, may not tell
    (session / "file").write_text("more")
    until(lambda: writes(path.read_text()) == before + 1)  # a look lasts a second
    assert mount.statistics()["operations"]["write"] == before + 1


def writes(text: str) -> int:
    found = re.search(r'operation_seconds_count\{operation="write"\} (\d+)', text)
    assert found
    return int(found[1])


def test_metrics_can_be_copied(mount: Mount, tmp_path):
    subprocess.run(["cp", mount.path / ".amalgam/metrics", tmp_path], check=True)
    assert LINE.fullmatch((tmp_path / "metrics").read_text().splitlines()[0])
