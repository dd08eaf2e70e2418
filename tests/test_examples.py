"""The guide to branching, run as a person would, and the example that it leads to.

`python -m tests.test_examples` puts what the commands say now into the guide.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from engine import Repository
from tests.conftest import ROOT
from tests.test_guides import write
from tests.test_readme import DOCS, plain, run_tour, tour

GUIDE = DOCS / "guide/branching.md"


def put_search(folder: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (folder / "search.py").write_text("\n".join(blocks))


@pytest.mark.fuse
def test_the_guide_to_branching_shows_what_its_program_does(tmp_path: Path):
    put_search(tmp_path)
    page = GUIDE.read_text()
    assert plain(run_tour(page, str(tmp_path))) == plain(tour(page))


def fetch_project(folder: Path) -> None:
    """Puts the project that the example repairs into the cache; without a network, skips."""
    done = subprocess.run(
        [ROOT / "scripts/fetch-project", folder, sys.executable],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    if done.returncode:
        assert os.environ.get("CI") != "true", done.stderr
        pytest.skip(f"the project to repair cannot be fetched: {done.stderr}")


def suite_passes(folder: Path) -> bool:
    return not subprocess.run(
        [sys.executable, "-B", "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir=.",
         "--confcutdir=.", "-p", "no:cacheprovider", "toolz/tests"],
        cwd=folder, capture_output=True, timeout=120, check=False,
    ).returncode  # fmt: skip


@pytest.mark.fuse
@pytest.mark.parametrize("where", ["in the mount", "in copies"])
def test_the_example_repairs_a_real_project(tmp_path: Path, where: str):
    fetch_project(tmp_path / "project")
    store = tmp_path / "store"
    command = [sys.executable, "-m", "docs.examples.repair", "--seed", "1"]
    command += ["--store", str(store)]
    if where == "in copies":
        command.append("--no-mount")
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")

    with Repository.open(str(store)) as repository:
        refs = repository.refs()
        for name in ("broken", "repaired"):
            root = repository.snapshot(refs[name]).root
            repository.check_out(root, str(tmp_path / name))
            assert suite_passes(tmp_path / name) == (name == "repaired")
        (best,) = repository.episodes.best("repair")
        path = repository.episodes.path("repair", best.number)
        steps = list(repository.episodes.steps("repair"))
        assert repository.verify().damage == []
    assert (best.snapshot, best.reward, best.verdict) == (refs["repaired"], 1.0, "pass")
    # Each edit on the way lets more tests pass; others were tried, and visits were passed back.
    rewards = [step.reward or 0.0 for step in path]
    assert rewards == sorted(set(rewards))
    assert len(steps) > len(path) > 2
    assert path[0].visits == len(steps) - 1
    # The graph shows every step, and the way to the best.
    shown = re.findall(r"^[ |/\\]*([*o])[ |/\\]* (\d+) ", done.stdout, re.MULTILINE)
    assert sorted(int(number) for _, number in shown) == [step.number for step in steps]
    assert {int(number) for mark, number in shown if mark == "*"} == {s.number for s in path}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        put_search(Path(place))
        write("branching", place)
