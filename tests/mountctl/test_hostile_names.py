"""Names that would command a terminal: no command lets one through, to a terminal or a pipe.

One store holds them everywhere: files, links, messages, authors, archives, patches, git's names,
directories that are named on the command line. Each command is called with a terminal and with a
pipe, and what it writes is looked through for control characters.
"""

import io
import os
import re
import socket
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mountctl.__main__ import cli
from mountctl.invocation import COMPLETE_VARIABLE
from tests.mountctl.conftest import Program

EVIL = "\x1b[31;7m\x1b]0;owned\x07\x9b2J\x08\r\x7f\u202etxt\x0e"
"""A colour, a title, a bell, a C1 sequence, backspace, return, delete, text turned around."""

_OURS = re.compile(r"\x1b\[(?:0|1|2|3[0-7]|9[0-7])m")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@contextmanager
def terminal() -> Iterator[list[str]]:
    """Makes stdout and stderr a terminal; what it got is in the list afterwards."""
    ours, theirs = os.openpty()
    import termios

    settings = termios.tcgetattr(theirs)
    settings[1] &= ~termios.OPOST
    termios.tcsetattr(theirs, termios.TCSANOW, settings)
    parts: list[bytes] = []

    def read() -> None:
        while True:
            try:
                parts.append(os.read(ours, 65536))
            except OSError:
                return

    reader = threading.Thread(target=read)
    reader.start()
    found: list[str] = []
    before = sys.stdout, sys.stderr
    stream = open(theirs, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    sys.stdout = sys.stderr = stream
    try:
        yield found
    finally:
        sys.stdout, sys.stderr = before
        stream.close()
        reader.join()
        os.close(ours)
        found.append(b"".join(parts).decode("utf-8", "backslashreplace"))


def call(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli(words, prog_name="mountctl")
    assert ended.value.code != 70, words  # a bug


def written(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    """Returns what a command writes to a terminal and to a pipe."""
    with terminal() as shown:
        call(words)
    capsys.readouterr()
    call(words)
    piped = capsys.readouterr()
    return [("terminal", _OURS.sub("", shown[0])), ("pipe", piped.out + piped.err)]


class Hostile:
    """Places with hostile names, and a store that holds them."""

    def __init__(self, mountctl: Program, home: Path) -> None:
        self.store = mountctl.store
        self.tree = home / f"tree{EVIL}"
        (self.tree / f"d{EVIL}").mkdir(parents=True)
        (self.tree / f"d{EVIL}" / f"f{EVIL}").write_text(f"line{EVIL}\nother\n")
        (self.tree / os.fsdecode(b"\xff\x1b[2J")).write_bytes(b"x\0y")
        (self.tree / f"link{EVIL}").symlink_to(EVIL)
        self.socket = socket.socket(socket.AF_UNIX)
        here = os.getcwd()
        os.chdir(self.tree)  # a path of more than 108 bytes has no socket
        self.socket.bind(f"s{EVIL}")
        os.chdir(here)
        mountctl("import", self.tree, "--ref", "one", "-m", EVIL, "--meta", f"k{EVIL}={EVIL}")
        (self.tree / f"d{EVIL}" / f"f{EVIL}").write_text(f"other{EVIL}\nline\n")
        (self.tree / f"d{EVIL}" / f"new{EVIL}").write_text("x")
        mountctl("import", self.tree, "--ref", "two", "-m", f"a\n{EVIL}")
        (self.tree / f"d{EVIL}" / f"f{EVIL}").write_text(f"third{EVIL}\nline\n")
        mountctl("import", self.tree, "--ref", "three", "--parent", "one", "-m", EVIL)
        mountctl("session", "create", "work", "two")
        upper = Path(mountctl.json("session", "show", "work")["upper"])
        (upper / f"mine{EVIL}").write_text(EVIL)
        self.out = home / f"out{EVIL}"
        mountctl("checkout", "two", self.out, "--outside-links")
        (self.out / f"d{EVIL}" / f"f{EVIL}").write_text("edited")
        self.bundle = home / f"bundle{EVIL}"
        mountctl("bundle", "create", self.bundle, "one")
        self.archive = home / f"tar{EVIL}"
        self.devices = home / f"devices{EVIL}"
        for path, name, kind in (
            (self.archive, f"../{EVIL}", tarfile.REGTYPE),
            (self.devices, f"dev{EVIL}", tarfile.CHRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type = kind
            with tarfile.open(path, "w") as archive:
                archive.addfile(member, io.BytesIO())
        self.patch = home / f"patch{EVIL}"
        self.patch.write_text(f"--- a/x{EVIL}\n+++ b/x{EVIL}\n@@ -1 +1 @@\n-a{EVIL}\n+b\n")
        self.image = home / f"image{EVIL}"
        self.image.mkdir()
        (self.image / "index.json").write_text(
            f'{{"manifests": [{{"digest": "sha:{EVIL[-4:]}"}}]}}'
        )
        self.missing = home / f"missing{EVIL}"


def commands(h: Hostile) -> dict[str, list[list[str]]]:
    t, out, missing = str(h.tree), str(h.out), str(h.missing)
    return {
        "init": [["init"]],
        "import": [
            ["import", t], ["import", missing], ["import", "--tar", str(h.archive)],
            ["import", "--tar", str(h.devices)], ["import", "--oci", str(h.image)],
            ["import", t, "--ref", EVIL], ["import", t, "--meta", EVIL],
        ],
        "git": [
            ["git", "import", missing], ["git", "import", t],
            ["git", "export", "two", missing, "--branch", EVIL],
        ],
        "checkout": [
            ["checkout", "--status", out], ["checkout", "--list"],
            ["checkout", "--switch", "one", out], ["checkout", "one", t],
            ["checkout", "one", missing], ["checkout", f"one:{EVIL}", missing + "2"],
        ],
        "export": [
            ["export", "one", "--tar", missing + "/x"], ["export", "one", "--oci", t],
            ["export", EVIL, "--tar", missing],
        ],
        "bundle": [
            ["bundle", "inspect", str(h.bundle)], ["bundle", "apply", str(h.bundle)],
            ["bundle", "apply", str(h.archive)], ["bundle", "create", missing, EVIL],
        ],
        "gc": [["gc", "--dry-run"]],
        "verify": [["verify"]],
        "stats": [["stats"], ["stats", "one"]],
        "config": [["config"], ["config", EVIL, EVIL]],
        "mount": [["mount", missing], ["mount", t]],
        "umount": [["umount", missing]],
        "run": [
            ["run", "work", "--mode", "full", "--", EVIL], ["run", EVIL, "--", "true"],
            ["run", "--history"], ["run", "work", "--explain", "--", EVIL],
        ],
        "status": [["status"], ["status", "work"]],
        "top": [["top", "--times", "1"]],
        "doctor": [["doctor"]],
        "completion": [["completion", EVIL]],
        "log": [["log", "two"], ["log", "--graph", "two", "three"]],
        "merge-base": [["merge-base", "two", "three"], ["merge-base", EVIL, "one"]],
        "bisect": [["bisect", "one", "two", "--", EVIL]],
        "diff": [
            ["diff", "one", "two"], ["diff", "one", "two", "--stat"],
            ["diff", "one", "two", "--renames"], ["diff", "one", "@work"],
        ],
        "merge": [["merge", "two", "three"], ["merge", "two", "three", "-m", EVIL]],
        "apply": [
            ["apply", str(h.patch), "--on", "one"], ["apply", missing, "--on", "one"],
            ["apply", str(h.archive), "--on", "one"],
        ],
        "commit": [["commit", "work", "-m", EVIL], ["commit", "--from", t], ["commit", EVIL]],
        "session": [
            ["session", "list"], ["session", "show", "work"], ["session", "create", EVIL, "one"],
            ["session", "show", EVIL],
        ],
        "snapshot": [["snapshot", "list"], ["snapshot", "show", "one"]],
        "ref": [["ref", "list"], ["ref", "set", EVIL, "one"], ["ref", "rm", EVIL]],
        "episode": [["episode", "list"], ["episode", "show", EVIL]],
        "usage": [[f"--x{EVIL}"], [EVIL], ["log", f"--x{EVIL}"], ["log", "one", EVIL]],
    }  # fmt: skip


def test_no_command_lets_a_control_character_through(mountctl, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    hostile = Hostile(mountctl, tmp_path)
    capsys.readouterr()
    seen = 0
    for words in (words for each in commands(hostile).values() for words in each):
        full = [words[0], *words[1:]]
        at = full.index("--") if "--" in full else len(full)
        store = ["--store", str(mountctl.store)]
        for more in ([], ["--json"]):
            line = [*full[:at], *([] if words[0].startswith(("-", "\x1b")) else store), *more]
            for where, text in written([*line, *full[at:]], capsys):
                found = _CONTROL.search(text)
                assert found is None, (where, words, text[max(found.start() - 99, 0) :][:200])
                assert "owned\x07" not in text
                seen += "owned" in text
    assert seen > 60  # the names were shown, made harmless
    hostile.socket.close()


def test_a_patch_is_raw_for_a_program_only(mountctl, tmp_path, capsys):
    hostile = Hostile(mountctl, tmp_path)
    words = ["diff", "one", "two", "--patch", "--store", str(mountctl.store)]
    (_, shown), (_, piped) = written(words, capsys)
    assert _CONTROL.search(shown) is None
    assert f"-line{EVIL}\n" in piped
    assert all(_CONTROL.search(line) is None for line in piped.split("\n") if line[:3] == "---")
    hostile.socket.close()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_offers_nothing_that_commands_a_terminal(
    mountctl, tmp_path, capsys, monkeypatch, shell
):
    hostile = Hostile(mountctl, tmp_path)
    monkeypatch.setenv("AMALGAMFS_STORE", str(mountctl.store))
    monkeypatch.setenv(COMPLETE_VARIABLE, f"{shell}_complete")
    for line in ("mountctl log ", "mountctl log t", f"mountctl log {EVIL}", "mountctl session rm "):
        monkeypatch.setenv("COMP_LINE", line)
        monkeypatch.setenv("COMP_WORDBREAKS", " :=")
        capsys.readouterr()
        call([])
        assert _CONTROL.search(capsys.readouterr().out) is None
    hostile.socket.close()
