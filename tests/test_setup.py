"""scripts/setup, as far as it can be asked without making an environment."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    made = tmp_path / "checkout"
    made.mkdir()
    shutil.copytree(ROOT / "scripts", made / "scripts")
    shutil.copy(ROOT / "pyproject.toml", made)
    return made


def environment_of(elsewhere: Path) -> Path:
    """Makes what looks like the environment of another checkout."""
    elsewhere.mkdir()
    (elsewhere / "pyvenv.cfg").write_text("home = /usr/bin\n")
    (elsewhere / "stamp-pins").write_text("others'\n")
    (elsewhere / "stamp-project").write_text("/another/checkout\n")
    return elsewhere


def set_up(checkout: Path) -> "subprocess.CompletedProcess[str]":
    kept = {name: value for name, value in os.environ.items() if name != "AMALGAMFS_VENV"}
    return subprocess.run(
        [str(checkout / "scripts" / "setup"), "--dev"], env={**kept, "PYTHON": "/nowhere/python"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def state(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_environment_behind_a_link_is_not_set_up(checkout, tmp_path):
    elsewhere = environment_of(tmp_path / "elsewhere")
    before = state(elsewhere)
    (checkout / ".venv").symlink_to(elsewhere)
    done = set_up(checkout)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"setup: {checkout}/.venv is a link to {elsewhere}, an environment that is not this "
        f"checkout's\nhint: remove the link, or name another directory: AMALGAMFS_VENV=DIR "
        f"{checkout}/scripts/setup\n"
    )
    assert state(elsewhere) == before
    assert (checkout / ".venv").is_symlink()


def test_a_link_that_leads_nowhere_is_refused_as_well(checkout, tmp_path):
    (checkout / ".venv").symlink_to(tmp_path / "gone")
    done = set_up(checkout)
    assert done.returncode == 1
    assert "is a link" in done.stderr
    assert not (tmp_path / "gone").exists()
