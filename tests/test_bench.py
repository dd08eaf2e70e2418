"""scripts/bench engine: a whole run of it on a small tree, and what is said of its figures."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench_checkout import measure_checkout
from scripts.bench_engine import measure_engine
from scripts.bench_figures import US, Bench, Figure, amount, most_of, tables
from scripts.bench_main import joined
from scripts.bench_plot import script
from scripts.bench_volume import child

ROOT = Path(__file__).resolve().parent.parent


def make_tree(at: Path) -> None:
    for number in range(60):
        file = at / f"directory-{number % 7}" / f"file-{number}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(random.Random(number).randbytes(500 * number))


def test_the_smallest_run(tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    place = tmp_path / "place"
    place.mkdir()
    bench = Bench(str(tmp_path), str(place), str(tmp_path / "tree"), 1, [], 10_000)
    measure_engine(bench)
    groups = {figure.group.removeprefix("engine").removeprefix(", ") for figure in bench.figures}
    assert groups == {
        "", "by files", "by names", "by forks", "by snapshots", "by commits", "by bytes",
    }  # fmt: skip
    samples = [values for figure in bench.figures for values in figure.samples.values()]
    assert all(value > 0 for values in samples for value in values)
    promised = {figure.measure for figure in bench.figures if figure.targets()}
    assert promised >= {
        "fork", "write a file, commit", "write a file, commit durably", "open a snapshot",
        "restore", "diff of ten files", "change one of the names, commit durably",
        "new objects for it, KiB", "1,000 durable commits by 8 forks", "gc, for 1,000 unique nodes",
        "peak memory of gc, MB",
        "import of large files, new",
    }  # fmt: skip
    assert "set object" in script({}, bench.figures, "picture.svg")
    assert [left.name for left in place.iterdir()] == ["store"]  # of the tree, for other groups


def test_the_smallest_run_of_checkouts(tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    place = tmp_path / "place"
    place.mkdir()
    bench = Bench(str(tmp_path), str(place), str(tmp_path / "tree"), 1, ["git"], 10_000)
    measure_checkout(bench)
    samples = [values for figure in bench.figures for values in figure.samples.values()]
    assert all(value > 0 for values in samples for value in values)
    promised = {figure.measure for figure in bench.figures if figure.targets()}
    assert promised == {
        "the tree as a directory", "a large file as a directory", "tar of the tree, written",
        "switch to a snapshot ten files away, in the engine", "tar of the tree, read",
        "a history of git", "bundle written, each GB", "bundle applied, each GB",
    }  # fmt: skip
    assert sorted(left.name for left in place.iterdir()) == ["copy", "store"]  # for other groups


def figure(samples: dict[str, list[float]], measure: str = "fork") -> Figure:
    return Figure("engine", measure, samples)


def test_what_is_promised_however_many_there_are() -> None:
    few, many = f"{US}, 1,000 files", f"{US}, 1,000,000 files"
    assert (
        "1,000,000 files below 2 x 1,000 files: kept" in figure({few: [1.0], many: [1.9]}).cells()
    )
    said = figure({few: [1.0], many: [2.5]}).cells()[-1]
    assert said == "1,000,000 files below 2 x 1,000 files: missed: 2.5 x 1,000 files"
    assert figure({US: [21e-6]}).cells()[-1] == "below 20.0 µs: missed"


def test_many_samples_are_told_by_a_percentile() -> None:
    values = [0.001] * 98 + [0.005, 0.009]
    assert most_of(values) == 0.005
    assert amount(values, "s") == "1.00 (99%: 5.00) ms"
    assert amount([0.00002], "s") == "20.0 µs"
    assert "12.0 KiB" in tables([figure({US: [12.0]}, "new objects for it, KiB")])
    summary = figure({US: values}).as_json()["summary"]
    assert summary == {US: {"median": 0.001, "99th percentile": 0.005}}


def test_figures_of_several_runs(tmp_path: Path) -> None:
    for number in (1, 2):
        figures = [
            figure({US: [float(number)]}).as_json(),
            figure({US: [5.0]}, f"{number}").as_json(),
        ]
        found = {"facts": {"when": f"{number}"}, "left_out": [], "figures": figures}
        (tmp_path / f"{number}.json").write_text(json.dumps(found))
    result = joined([str(tmp_path / f"{number}.json") for number in (1, 2)])
    assert result["facts"] == {"when": "1"}
    assert [(f["measure"], f["samples"][US]) for f in result["figures"]] == [
        ("fork", [2.0]), ("1", [5.0]), ("2", [5.0]),
    ]  # fmt: skip


def test_a_child_does_not_outlive_what_waits_for_it(tmp_path: Path) -> None:
    bench = Bench(str(tmp_path), str(tmp_path), None, 1, [])
    store = bench.path("store")
    subprocess.run(
        [Path(sys.executable).with_name("mountctl"), "--store", store, "init"], check=True
    )
    with (
        pytest.raises(KeyboardInterrupt),
        child("commit", store, "/dev/null", "1", "x", "1") as process,
    ):
        raise KeyboardInterrupt
    assert process.returncode == -signal.SIGKILL
