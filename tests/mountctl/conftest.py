import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mountctl.__main__ import cli

ROOT = Path(__file__).parents[2]


class Program:
    """Runs mountctl on one store: by calling it in this process, by `run` as a process."""

    def __init__(self, store: Path, home: Path) -> None:
        self.store, self.home = store, home

    def __call__(self, *words: str | Path, code: int = 0) -> Result:
        arguments = ["--store", str(self.store), *map(str, words)]
        result = CliRunner().invoke(cli, arguments, prog_name="mountctl")
        assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}"
        return result

    def json(self, *words: str | Path, code: int = 0) -> Any:
        return json.loads(self(*words, "--json", code=code).stdout)

    def fails(self, code: int, *words: str | Path) -> str:
        """Returns the error; it must end in a hint, and leave stdout empty."""
        result = self(*words, code=code)
        lines = result.stderr.splitlines()
        assert result.stdout == ""
        assert lines[-1].startswith("hint: ")
        assert lines[-2].startswith("error: ")
        return lines[-2].removeprefix("error: ")

    def environment(self, **more: str) -> dict[str, str]:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        kept = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
        return {**kept, "HOME": str(self.home), "PYTHONPATH": path, "LC_ALL": "C.UTF-8",
                "AMALGAMFS_STORE": str(self.store), **more}  # fmt: skip

    def command(self, *words: str | Path) -> list[str]:
        return [sys.executable, "-m", "mountctl", *map(str, words)]

    def run(
        self, *words: str | Path, code: int = 0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*words), env=self.environment(**environment), cwd=self.home,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="surrogateescape",
            check=False,
        )  # fmt: skip
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def on_terminal(self, *words: str | Path, program: str = "", **environment: str) -> str:
        """Returns what a terminal gets of a call; `program` is Python to run before it."""
        program = f"from mountctl.__main__ import main\n{program}\nmain()"
        ours, theirs = os.openpty()
        child = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, words)],
            stdin=theirs, stdout=theirs, stderr=theirs,
            env=self.environment(**{"TERM": "xterm", **environment}),
        )  # fmt: skip
        os.close(theirs)
        data = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # EIO: its other end is closed
                break
            data += part
        os.close(ours)
        assert child.wait() == 0, data
        return data.decode()


@pytest.fixture
def nowhere(tmp_path: Path) -> Program:
    """The program, and no store."""
    return Program(tmp_path / "store", tmp_path)


@pytest.fixture
def mountctl(nowhere: Program) -> Program:
    """The program with an empty store."""
    nowhere("init")
    return nowhere


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with one of each kind."""
    top = tmp_path / "tree"
    (top / "src" / "empty").mkdir(parents=True)
    (top / "src" / "main.c").write_text("int main(void)\n{\n  return 0;\n}\n")
    (top / "src" / "tool.sh").write_text("#!/bin/sh\n")
    (top / "src" / "tool.sh").chmod(0o755)
    (top / "data.bin").write_bytes(bytes(range(256)) * 200)
    (top / "link").symlink_to("src/main.c")
    os.mkfifo(top / "pipe")
    return top


@pytest.fixture
def first(mountctl: Program, tree: Path) -> str:
    """The id of a snapshot of the tree, with the ref main."""
    identifier: str = mountctl.json("import", tree, "--ref", "main", "-m", "first")["snapshot"]
    return identifier


@pytest.fixture
def upper(mountctl: Program, first: str) -> Path:
    """The directory where a session called `work` keeps what it changed."""
    mountctl("session", "create", "work", "main")
    return Path(mountctl.json("session", "show", "work")["upper"])
