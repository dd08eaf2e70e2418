"""Completion as a person has it: real shells on a terminal, asked by the Tab key."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from mountctl.__main__ import cli
from tests.mountctl.conftest import Program
from tests.mountctl.test_help import ALL

SHOW = "\x07"  # Ctrl-G is bound to tell the line that is being typed
READY = {
    "bash": """
        PS1='$ '; bind 'set enable-bracketed-paste off'; eval "$(mountctl completion bash)"
        show() { printf '%s\\0' "$READLINE_LINE" >&9; READLINE_LINE=; }
        bind -x '"\\C-g": show'; printf '\\0' >&9
    """,
    "zsh": """
        PS1='$ '; autoload -Uz compinit; compinit -D -u; eval "$(mountctl completion zsh)"
        show() { printf '%s\\0' "$BUFFER" >&9; BUFFER=; }
        zle -N show; bindkey '^G' show; printf '\\0' >&9
    """,
}
COMMAND = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}


def needs(program: str) -> None:
    if shutil.which(program) is None:
        assert os.environ.get("CI") != "true", f"scripts/setup --dev installs {program}"
        pytest.skip(f"{program} is not installed")


def environment(program: Program, **more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return program.environment(PATH=path, TERM="xterm", **more)


def _one_line(script: str) -> bytes:
    return "; ".join(line.strip() for line in script.strip().splitlines()).encode() + b"\n"


class Shell:
    """A shell on a terminal of its own."""

    def __init__(
        self, name: str, folder: Path, environment: dict[str, str], ready: str = ""
    ) -> None:
        needs(name)
        self._told, told = os.pipe()
        self._master, slave = pty.openpty()

        self._child = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *COMMAND[name]], stdin=slave, stdout=slave,
            stderr=slave, cwd=folder, env=environment, pass_fds=[told],
        )  # fmt: skip
        os.close(slave)
        os.close(told)
        self.shown = b""
        os.write(self._master, _one_line((ready or READY[name]).replace(">&9", f">&{told}")))
        self._answer()

    def complete(self, line: str) -> str:
        """Returns what a line is after the Tab key; `shown` is what the terminal got meanwhile."""
        self.shown = b""
        os.write(self._master, f"{line}\t{SHOW}".encode())
        return self._answer()

    def _answer(self) -> str:
        told = b""
        deadline = time.monotonic() + 120
        while not told.endswith(b"\0"):
            left = deadline - time.monotonic()
            assert left > 0, f"no answer; the terminal shows {self.shown!r}"
            for ready in select.select([self._told, self._master], [], [], left)[0]:
                data = os.read(ready, 65536)
                if ready == self._told:
                    told += data
                else:
                    self.shown += data
        return told[:-1].decode()

    def close(self) -> None:
        os.write(self._master, b"exit\n")
        self._child.wait(120)
        os.close(self._master)
        os.close(self._told)


@pytest.fixture
def full(mountctl, first, tmp_path):
    """A store with one of each, and files beside it."""
    mountctl("ref", "set", "other", "main")
    mountctl("session", "create", "work", "main")
    mountctl("episode", "new", "search", "--root", "main")
    (tmp_path / "here" / "folder").mkdir(parents=True)
    (tmp_path / "here" / "with space").mkdir()
    (tmp_path / "here" / "field").write_text("")
    return mountctl


@pytest.fixture(params=["bash", "zsh"])
def shell(request, full, tmp_path) -> Iterator[Shell]:
    made = Shell(request.param, tmp_path / "here", environment(full))
    yield made
    made.close()


LINES = {
    "mountctl sess": "mountctl session ",
    "mountctl session ren": "mountctl session rename ",
    "mountctl commit --mes": "mountctl commit --message ",
    "mountctl log mai": "mountctl log main ",
    "mountctl log @": "mountctl log @work ",
    "mountctl diff main @w": "mountctl diff main @work ",
    "mountctl session rm wo": "mountctl session rm work ",
    "mountctl session rm @wo": "mountctl session rm @work ",
    "mountctl import folder --ref ma": "mountctl import folder --ref main ",
    "mountctl import folder --ref=ma": "mountctl import folder --ref=main ",
    "mountctl import folder --parent=@w": "mountctl import folder --parent=@work ",
    "mountctl episode show sea": "mountctl episode show search ",
    "mountctl config comp": "mountctl config compression ",
    "mountctl config compression zstd:19": "mountctl config compression zstd:19 ",
    "mountctl config compression of": "mountctl config compression off ",
    "mountctl merge main other --favor uni": "mountctl merge main other --favor union ",
    "mountctl import fo": "mountctl import folder/",
    "mountctl import fi": "mountctl import fi",  # no directory
    "mountctl import wi": "mountctl import with\\ space/",
    "mountctl --store=fo": "mountctl --store=folder/",
    "mountctl bundle inspect fie": "mountctl bundle inspect field ",
    "mountctl export main --tar=fie": "mountctl export main --tar=field ",
    "mountctl bisect main other ": "mountctl bisect main other -- ",
    "mountctl bisect main other -- env": "mountctl bisect main other -- env",
    "mountctl bisect main other -- cat fie": "mountctl bisect main other -- cat field ",
    "true; mountctl log mai": "true; mountctl log main ",
    "true | mountctl log 'mai": "true | mountctl log 'main' ",
    "mountctl --store /nowhere log mai": "mountctl --store /nowhere log mai",
    "mountctl --store ~/store log mai": "mountctl --store ~/store log main ",
    "mountctl nonsense mai": "mountctl nonsense mai",
    "mountctl log 'unfinished": "mountctl log 'unfinished",
    "mountctl log $(": "mountctl log $(",
}


def test_the_tab_key_completes(shell, full, first):
    lines = {**LINES, f"mountctl log {first[:5]}": f"mountctl log {first[:12]} ",
             f"mountctl log {first[:20]}": f"mountctl log {first} "}  # fmt: skip
    found = {}
    for line in lines:
        found[line] = shell.complete(line)
        for word in (b"Traceback", b"rror:", b"not found", b"hint"):
            assert word not in shell.shown
    # Programs whose name begins so differ from machine to machine.
    found["mountctl bisect main other -- env"] = found["mountctl bisect main other -- env"].rstrip()
    assert found == lines


def test_several_possibilities_are_shown_with_what_they_mean(full, tmp_path):
    shell = Shell("zsh", tmp_path / "here", environment(full))
    shell.complete("mountctl log ")
    shown = shell.shown.decode()
    shell.close()
    for text in ("main", "other", "first", "@work", "a session"):
        assert text in shown
    assert "search" not in shown


def test_zsh_loads_the_file_in_its_path(full, tmp_path):
    functions = tmp_path / "functions"
    functions.mkdir()
    (functions / "_mountctl").write_text(full("completion", "zsh").stdout)
    ready = READY["zsh"].replace("autoload", f"fpath=({functions} $fpath); autoload", 1)
    ready = ready.replace('eval "$(mountctl completion zsh)"', "true")
    shell = Shell("zsh", tmp_path / "here", environment(full), ready)
    found = [shell.complete("mountctl session rm @w") for _ in range(3)]
    shell.close()
    assert found == ["mountctl session rm @work "] * 3


def test_bash_loads_the_file_among_its_completions(full, tmp_path):
    package = Path("/usr/share/bash-completion/bash_completion")
    if not package.exists():
        assert os.environ.get("CI") != "true", "scripts/setup --dev installs bash-completion"
        pytest.skip("bash-completion is not installed")
    completions = full.home / ".local/share/bash-completion/completions"
    completions.mkdir(parents=True)
    (completions / "mountctl").write_text(full("completion", "bash").stdout)
    ready = READY["bash"].replace('eval "$(mountctl completion bash)"', f". {package}")
    shell = Shell("bash", tmp_path / "here", environment(full), ready)
    lines = {
        "mountctl session rm @w": "mountctl session rm @work ",
        "mountctl import fie --parent=@w": "mountctl import fie --parent=@work ",
        "mountctl config compression zstd:19": "mountctl config compression zstd:19 ",
        "mountctl bisect main other -- cat fie": "mountctl bisect main other -- cat field ",
    }
    found = {line: shell.complete(line) for line in lines}
    shell.close()
    assert found == lines


def fish(full, script: str, line: str, folder: Path) -> list[str]:
    done = subprocess.run(
        ["fish", "--no-config", "-c", "source $argv[1]; complete -C $argv[2]", "--", script, line],
        cwd=folder, env=environment(full), capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_fish_completes(full, first, tmp_path):
    needs("fish")
    script = tmp_path / "mountctl.fish"
    script.write_text(full("completion", "fish").stdout)

    def ask(line: str) -> list[str]:
        return fish(full, str(script), line, tmp_path / "here")

    assert ask("mountctl sess") == ["session\tWritable copies of snapshots."]
    assert ask("mountctl log ") == ["main\tfirst", "other\tfirst", "@work\ta session"]
    assert ask("mountctl log @w") == ["@work\ta session"]
    assert ask("mountctl session rm w") == ["work\ta session"]
    assert ask(f"mountctl log {first[:6]}") == [f"{first[:12]}\tfirst"]
    assert ask("mountctl import folder --ref=m") == ["--ref=main\tfirst"]
    assert ask("mountctl import f") == ["folder/"]
    assert ask("mountctl --store=f") == ["--store=folder/"]
    assert ask("mountctl bundle inspect f") == ["field", "folder/"]
    assert ask("mountctl bisect main other ") == ["--\tand a command"]
    assert ask("mountctl bisect main other -- cat f") == ["field", "folder/"]
    assert ask("mountctl episode show ") == ["search"]
    assert ask("mountctl --store /nowhere log m") == []
    assert ask("mountctl log 'unfinished") == []
    assert [line.partition("\t")[0] for line in ask("mountctl commit --m")] == [
        "--message",
        "--meta",
    ]


def asked(program: Program, line: str, shell: str = "bash", **more: str) -> str:
    """Returns the answer to a shell; there is nothing on stderr, whatever happens."""
    done = program.run(code=0, _MOUNTCTL_COMPLETE=f"{shell}_complete", COMP_LINE=line, **more)
    assert done.stderr == ""
    return done.stdout.strip("\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_no_answer_and_no_error_where_nothing_can_be_looked_up(nowhere, tmp_path, shell):
    line = "mountctl log "
    assert asked(nowhere, line, shell) == ""
    assert not nowhere.store.exists()
    nowhere.store.mkdir()
    assert asked(nowhere, line, shell) == ""
    (nowhere.store / "db").write_text("no directory")
    assert asked(nowhere, line, shell) == ""
    assert asked(nowhere, line, shell, AMALGAMFS_STORE="", HOME="", XDG_DATA_HOME="") == ""
    assert asked(nowhere, "", shell) == asked(nowhere, "mountctl ", shell)
    assert asked(nowhere, "mountctl log \udcff", shell) == ""
    assert sorted(os.listdir(nowhere.store)) == ["db"]


def test_a_damaged_store_is_no_answer(full):
    (full.store / "db" / "data.mdb").write_bytes(os.urandom(65536))
    assert asked(full, "mountctl log ") == ""


def test_an_answer_writes_nothing(full):
    def state() -> dict[Path, tuple[int, int]]:
        return {
            path: (path.stat().st_mtime_ns, path.stat().st_size)
            for path in full.store.rglob("*")
            if path.name != "lock.mdb"
        }

    before = state()
    assert asked(full, "mountctl log m") == "plain,main"
    assert asked(full, "mountctl status ") == "plain,work"
    assert state() == before


def test_what_an_answer_loads(full, first):
    """The modules of commands are light; the engine is loaded for a name of the store only."""
    program = (
        "import sys, atexit\nfrom mountctl.__main__ import main\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\nmain()"
    )

    def loaded(line: str) -> set[str]:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True,
            env=full.environment(_MOUNTCTL_COMPLETE="bash_complete", COMP_LINE=line),
        )  # fmt: skip
        return set(done.stderr.split())

    modules = loaded("mountctl ")
    assert not {"engine", "fsdriver", "rich", "msgspec"} & modules
    assert not [name for name in modules if name.startswith("mountctl.commands.")]
    modules = loaded("mountctl import --re")
    assert not {"engine", "fsdriver"} & modules
    modules = loaded("mountctl session rm ")
    assert "engine" in modules
    assert not {"fsdriver", "fsdriver.client", "trio", "pyfuse3", "rich"} & modules


FREE = {
    "N", "NUMBER", "TEXT", "WORD", "JSON", "TIME", "SHARE", "SECONDS", "KEY=VALUE", "WHO", "NAME",
    "STEP", "[STEP]", "NEW", "VALUE", "[REVISION]...", "FLOAT", "INTEGER",
}  # fmt: skip
"""What nobody but the user can know."""
OPEN = {
    ("checkout", "snapshot"),
}
"""What shall be completed and is not yet."""


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_everything_that_can_be_completed_is(full, monkeypatch, path):
    monkeypatch.setenv("AMALGAMFS_STORE", str(full.store))
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        command = command.get_command(click.Context(command), name) or command
    for parameter in command.params:
        if isinstance(parameter, click.Option) and (parameter.is_flag or parameter.flag_value):
            continue
        context = click.Context(command)
        shown = parameter.make_metavar(context)
        if shown in FREE and "--ref" not in parameter.opts:
            continue
        completes = bool(parameter.shell_complete(context, ""))
        assert completes != ((path[0], parameter.opts[0]) in OPEN), f"{parameter.opts}: {shown}"


def test_the_scripts_are_what_the_shells_accept(full, tmp_path):
    for shell in ("bash", "zsh", "fish"):
        needs(shell)
        script = full("completion", shell).stdout
        assert script == full.json("completion", shell)["script"]
        done = subprocess.run(
            [shell, "-n"], input=script, capture_output=True, text=True, check=False, timeout=120
        )
        assert (done.returncode, done.stderr) == (0, "")
