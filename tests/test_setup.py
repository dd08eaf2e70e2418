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


MISSING = {
    "fusermount3", "gcc", "make", "xz", "pkg-config", "zsh", "fish", "mandoc", "man", "apt-get",
    "sudo",
}  # fmt: skip


def bare_machine(tmp_path: Path) -> Path:
    """Returns a directory of programs without those that setup installs, with an apt that logs."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for folder in ("/usr/bin", "/bin"):
        for path in Path(folder).iterdir():
            made = programs / path.name
            if path.name not in MISSING and "python" not in path.name and not made.exists():
                made.symlink_to(path)
    (programs / "apt-get").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/apt.log\n')
    (programs / "sudo").write_text('#!/bin/sh\n[ "$1" != -n ] || shift\nexec "$@"\n')
    for name in ("apt-get", "sudo"):
        (programs / name).chmod(0o755)
    return programs


def test_system_packages_are_asked_for_in_one_round(checkout, tmp_path):
    programs = bare_machine(tmp_path)
    done = subprocess.run(
        [str(checkout / "scripts" / "setup"), "--dev"],
        env={"PATH": str(programs), "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed" in done.stderr
    calls = (tmp_path / "apt.log").read_text().splitlines()
    installs = [line.split(" install ")[1].split() for line in calls if " install " in line]
    # What apt said it had installed is still not there, so Python alone is asked for again.
    assert set(installs[0]) >= {
        "fuse3", "gcc", "make", "xz-utils", "pkg-config", "libfuse3-dev", "zsh", "fish", "mandoc",
        "man-db", "python3", "python3-venv", "python3-dev",
    }  # fmt: skip
    assert all(names == ["python3", "python3-venv", "python3-dev"] for names in installs[1:])


def test_a_project_can_be_made_where_none_can_be_fetched(tmp_path):
    made = tmp_path / "project"
    subprocess.run([str(ROOT / "scripts" / "make-project"), str(made)], check=True, timeout=120)
    assert len(list(made.rglob("*.c"))) == 161
    assert "check:" in (made / "Makefile").read_text()
