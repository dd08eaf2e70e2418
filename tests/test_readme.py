"""The README's tour, run as a person would type it, on a terminal; its output is the README's.

`python tests/test_readme.py --write` puts what the commands say now into the README.
"""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from engine import Repository, SnapshotId

README = Path(__file__).resolve().parent.parent / "README.md"
DOCS = README.parent / "docs"
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
PROMPT = "\x01done\x01"

VARYING = [
    (re.compile(r"\b[0-9a-f]{12}([0-9a-f]{28}|[0-9a-f]{52})?\b"), "7fa7a54c36ef"),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d([+-]\d\d:\d\d)?"), "2026-11-21 12:00:00+00:00"),
    (re.compile(r"\b\d+(\.\d+)? (B|KiB|MiB)\b"), "1.0 KiB"),
    (re.compile(r" +"), " "),
]


def tour(page: str) -> list[list[str]]:
    """Returns the blocks of a page's tour, as lines."""
    part = page.split("<!-- tour:begin -->")[1].split("<!-- tour:end -->", maxsplit=1)[0]
    return [block.rstrip("\n").split("\n") for block in BLOCK.findall(part)]


class Terminal:
    """A shell on a terminal of its own, asked one command at a time."""

    def __init__(self, folder: str) -> None:
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": folder,
            "LC_ALL": "C.UTF-8",
            "TZ": "UTC",
            "TERM": "dumb",
            "NO_COLOR": "1",
            "COLUMNS": "100",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        }
        self.master, slave = pty.openpty()
        self.shell = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            stdin=subprocess.PIPE, stdout=slave, stderr=slave, cwd=folder, env=environment,
            text=True,
        )  # fmt: skip
        os.close(slave)

    def ask(self, command: str) -> str:
        """Runs a command and returns what the terminal shows."""
        assert self.shell.stdin is not None
        self.shell.stdin.write(f"{{ {command}; }} </dev/null\nprintf '\\001done\\001'\n")
        self.shell.stdin.flush()
        shown = b""
        deadline = time.monotonic() + 120
        while not shown.endswith(PROMPT.encode()):
            left = deadline - time.monotonic()
            assert left > 0, f"{command!r} has not ended; it showed {shown.decode()!r}"
            if select.select([self.master], [], [], left)[0]:
                shown += os.read(self.master, 65536)
        return shown.decode().replace("\r\n", "\n").removesuffix(PROMPT)

    def close(self) -> None:
        assert self.shell.stdin is not None
        self.shell.stdin.close()
        self.shell.wait(120)
        os.close(self.master)


def run_tour(page: str, folder: str) -> list[list[str]]:
    """Runs the tour in `folder`; returns its blocks with what the commands show now."""
    terminal = Terminal(folder)
    try:
        blocks = []
        for block in tour(page):
            lines = []
            for line in block:
                if line.startswith("$ "):
                    lines.append(line)
                    shown = terminal.ask(line[2:]).replace(folder, "~")
                    lines.extend(shown.rstrip("\n").split("\n") if shown.strip() else [])
            blocks.append(lines)
        return blocks
    finally:
        terminal.ask("mountctl umount")
        terminal.close()


def plain(blocks: list[list[str]]) -> list[list[str]]:
    """Returns the blocks with what varies from run to run made equal."""

    def one(line: str) -> str:
        for pattern, text in VARYING:
            line = pattern.sub(text, line)
        return line.rstrip()

    return [[one(line) for line in block] for block in blocks]


def test_the_tour_shows_what_the_readme_says(tmp_path: Path) -> None:
    page = README.read_text()
    assert plain(run_tour(page, str(tmp_path))) == plain(tour(page))


def test_the_python_guide_runs(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "file").write_text("text")
    guide = (DOCS / "guide/python.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", guide, re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"\[\]\n[0-9a-f]{64}\nmodified src/main.py\n\['src/best.py'\] print\('try 2'\)\n",
        done.stdout,
    )


@pytest.mark.fuse
def test_the_guide_to_run_runs(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    with Repository.create(str(tmp_path / "store")) as repository:
        first = SnapshotId(repository.import_directory(str(tmp_path / "project")).snapshot)
        repository.sessions.create("work", (None, None, first))
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "guide/run.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    assert re.fullmatch(r"0 (overlay|lazy)\n", done.stdout)


def test_every_link_in_the_documentation_leads_somewhere() -> None:
    for page in [README, *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def write() -> None:
    """Puts what the commands say now into the README."""
    page = README.read_text()
    folder = tempfile.mkdtemp()
    try:
        blocks = iter(run_tour(page, folder))
    finally:
        shutil.rmtree(folder)
    head, rest = page.split("<!-- tour:begin -->")
    body, tail = rest.split("<!-- tour:end -->")
    body = BLOCK.sub(lambda _: "```console\n" + "\n".join(next(blocks)) + "\n```", body)
    README.write_text(f"{head}<!-- tour:begin -->{body}<!-- tour:end -->{tail}")


if __name__ == "__main__" and "--write" in sys.argv:
    write()
