"""Bars on a terminal: what they say of long commands, and that nothing of them stays."""

import contextlib
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

IMPATIENT = "import mountctl.output as o; o.PATIENCE = o.INTERVAL = 0"
HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"
SIZE = r"[0-9.]+ (B|KiB|MiB)"


def plain_text(shown: str) -> str:
    """Returns what a terminal shows without the sequences that colour and move."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


def bar(mountctl, *words: str | Path) -> str:
    shown = mountctl.on_terminal(*words, program=IMPATIENT, COLUMNS="150")
    assert shown.rindex(SHOWN) > shown.rindex(HIDDEN)  # the cursor is there again

    return plain_text(shown)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    top = tmp_path / "large"
    top.mkdir()
    for number in range(300):
        (top / f"file-{number}").write_bytes(os.urandom(20_000))
    return top


def test_long_commands_tell_how_much_is_done_and_how_fast(mountctl, large, tmp_path):
    def tells(things: str, *words: str | Path) -> bool:
        return bool(re.search(things, bar(mountctl, *words)))

    rate = rf"{SIZE}, {SIZE}/s"
    assert tells(rf"importing .* [0-9]+ of 300 files, {rate}", "import", large, "--ref", "main")
    bundle, archive, image = tmp_path / "b.flpkg", tmp_path / "a.tar", tmp_path / "image"
    assert tells(
        rf"writing .* [0-9]+ of 3[0-9][0-9] objects, {rate}", "bundle", "create", bundle, "main"
    )
    assert tells(rf"reading .* [0-9]+ of 3[0-9][0-9] objects, {rate}", "bundle", "inspect", bundle)
    assert tells(rf"storing .* [0-9]+ of 3[0-9][0-9] objects, {rate}", "bundle", "apply", bundle)
    assert tells(
        rf"writing .* [0-9]+ of 30[01] members, {rate}", "export", "main", "--tar", archive
    )
    assert tells(rf"writing .* [0-9]+ members, {rate}", "export", "main", "--oci", image)
    assert tells(rf"reading the archive .* {rate}", "import", "--tar", archive)
    assert tells(rf"reading layers .* {SIZE} of {SIZE}, {SIZE}/s", "import", "--oci", image)
    assert tells(rf"reading .* [0-9]+ of [0-9]+ chunks, {rate}", "verify")
    (mountctl.home / "garbage").write_bytes(os.urandom(100_000))
    made = mountctl.json("import", mountctl.home / "large", "--message", "x")["snapshot"]
    mountctl("ref", "rm", "main")
    for each in {made, *[s["snapshot"] for s in mountctl.json("snapshot", "list")]}:
        mountctl("snapshot", "rm", each)
    assert tells(rf"collecting .* [0-9]+ objects, {rate}", "gc", "--compact")


@pytest.mark.parametrize("words", [["--quiet"], ["--json"]])
def test_quiet_and_json_have_no_bar(mountctl, large, words):
    shown = mountctl.on_terminal("import", large, *words, program=IMPATIENT)
    assert HIDDEN not in shown
    assert "importing" not in shown


def test_a_pipe_has_no_bar(mountctl, large):
    done = subprocess.run(
        [sys.executable, "-c", f"from mountctl.__main__ import main\n{IMPATIENT}\nmain()",
         "import", large],
        env=mountctl.environment(TERM="xterm"), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "\x1b" not in done.stdout + done.stderr
    assert "importing" not in done.stderr


class Waiting:
    """`import --tar` of a pipe through which nothing comes, on a terminal of its own."""

    def __init__(self, mountctl, tmp_path: Path, patience: float) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        self._ours, theirs = os.openpty()
        program = (
            "import mountctl.output as o; from mountctl.__main__ import main\n"
            f"o.PATIENCE = {patience}; main()"
        )
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", sys.executable, "-c", program,
             "import", "--tar", str(pipe)],
            stdin=theirs, stdout=theirs, stderr=theirs,
            env=mountctl.environment(TERM="xterm", COLUMNS="120"),
        )  # fmt: skip
        os.close(theirs)
        self.shown = b""
        self._writer = os.open(pipe, os.O_WRONLY)  # waits until it is read

    def until(self, text: bytes) -> None:
        deadline = time.monotonic() + 120
        while text not in self.shown:
            left = deadline - time.monotonic()
            assert left > 0, self.shown
            if select.select([self._ours], [], [], left)[0]:
                self.shown += os.read(self._ours, 65536)

    def end(self) -> int:
        """Types Ctrl-C; returns the exit code.

        And again after a while, as a person would: a signal that comes when Python has just looked
        for signals and is about to read waits for what is read.
        """
        for _ in range(12):
            os.write(self._ours, b"\x03")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
                break
        code = self.process.wait(10)
        while select.select([self._ours], [], [], 0)[0]:
            try:
                self.shown += os.read(self._ours, 65536)
            except OSError:
                break
        os.close(self._writer)
        os.close(self._ours)
        return code


def test_a_bar_appears_though_nothing_is_told_and_an_interrupt_ends_it_cleanly(mountctl, tmp_path):
    waiting = Waiting(mountctl, tmp_path, 0.01)
    waiting.until(b"reading the archive")
    assert waiting.end() == 130
    shown = waiting.shown.decode()
    assert shown.rindex(SHOWN) > shown.rindex(HIDDEN)
    after = plain_text(shown[shown.rindex(SHOWN) :])
    assert "Traceback" not in shown
    assert after.strip() == ""
    # The line that the bar stood in is erased, and the cursor back at its beginning.
    assert "\x1b[2K" in shown[shown.rindex("reading the archive") :]
    assert mountctl.json("snapshot", "list") == []


def test_a_bar_waits_for_long_work(mountctl, tmp_path):
    waiting = Waiting(mountctl, tmp_path, 30)
    assert waiting.end() == 130
    assert HIDDEN.encode() not in waiting.shown
