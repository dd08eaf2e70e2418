import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from mountctl.__main__ import COMMANDS, cli
from mountctl.command import Command


def walk(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from walk(below, (*path, name))


ALL = list(walk(cli, ()))


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_command_explains_itself(nowhere, path):
    page = nowhere(*path, "--help").stdout
    assert page.startswith("Usage: mountctl")
    assert "  $ mountctl" in page.partition("\nExample:\n")[2]
    for option in ("--store DIR", "--json", "--quiet"):
        assert option in page
    assert nowhere(*path, "-h").stdout == page


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_command_documents_its_parameters(path):
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        below = command.get_command(click.Context(command), name)
        assert below is not None
        command = below
    assert isinstance(command, Command)
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "help", None), parameter.name


def test_the_list_of_commands_says_what_their_own_help_says():
    for section in COMMANDS.values():
        for name, (_, summary) in section.items():
            command = cli.get_command(click.Context(cli), name)
            assert command is not None
            assert command.name == name
            assert (command.help or "").partition("\n")[0] == summary


def test_examples_name_only_commands_and_options_there_are(nowhere):
    for path in ALL:
        command: click.Command = cli
        for name in path:
            assert isinstance(command, click.Group)
            command = command.get_command(click.Context(command), name) or command
        assert isinstance(command, Command)
        for line in command.example.splitlines():
            words = line.removeprefix("$ ").split("|")[0].split("&&")[-1].split(" -- ")[0].split()
            if words[0] != "mountctl":
                continue
            at: click.Command = cli
            while isinstance(at, click.Group) and len(words) > 1:
                below = at.get_command(click.Context(at), words.pop(1))
                assert below is not None, line
                at = below
            known = {opt for parameter in at.params for opt in parameter.opts}
            options = {word for word in words if word.startswith("-") and word != "-"}
            assert options <= known, line


def loaded(nowhere, *words: str) -> set[str]:
    """Returns the modules that a call of the program loads."""
    program = (
        "import sys\nfrom mountctl.__main__ import cli\n"
        f"try: cli({list(words)!r}, 'mountctl')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=nowhere.environment(), capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    return set(done.stderr.splitlines()[-1].split())


def test_help_loads_neither_the_engine_nor_a_command(nowhere):
    modules = loaded(nowhere, "--help")
    assert not {"engine", "fsdriver", "rich", "msgspec"} & modules
    assert not [name for name in modules if name.startswith("mountctl.commands.")]


def test_no_command_loads_what_only_the_daemon_needs(mountctl, first):
    for words in (["status"], ["log"], ["session", "list"], ["doctor"]):
        assert not {"trio", "pyfuse3", "structlog", "rich"} & loaded(mountctl, *words)


def test_version(nowhere):
    assert nowhere("--version").stdout.startswith("mountctl ")


@pytest.mark.parametrize(
    "words",
    [
        ["--json", "session", "list"],
        ["session", "--json", "list"],
        ["session", "list", "--json"],
    ],
)
def test_global_options_may_stand_anywhere(mountctl, words):
    assert mountctl(*words).stdout == "[]\n"


def test_the_store_is_named_by_option_then_environment_then_data_directory(nowhere, tmp_path):
    assert nowhere.run("init", "--store", tmp_path / "a").stdout == f"{tmp_path}/a\n"
    assert nowhere.run("init", AMALGAMFS_STORE=str(tmp_path / "b")).stdout == f"{tmp_path}/b\n"
    shared = str(tmp_path / "data")
    done = nowhere.run("init", AMALGAMFS_STORE="", XDG_DATA_HOME=shared)
    assert done.stdout == f"{shared}/amalgamfs/store\n"
    done = nowhere.run("init", AMALGAMFS_STORE="")
    assert done.stdout == f"{tmp_path}/.local/share/amalgamfs/store\n"


def test_the_option_behind_the_command_wins(mountctl, tmp_path):
    assert mountctl("status", "--store", tmp_path / "other", code=6)


@pytest.mark.parametrize("words", [["nonsense"], ["log", "--nonsense"], ["commit"], ["session"]])
def test_a_wrong_command_line(nowhere, words):
    result = nowhere(*words, code=2)
    assert "Usage: mountctl" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("hint: ")


@pytest.mark.parametrize("path", [(), ("session",)])
def test_without_a_command_there_is_help(nowhere, path):
    lines = nowhere.run(*path, code=2).stderr.splitlines()
    page = nowhere.run(*path, "--help").stdout.splitlines()
    assert lines[: len(page)] == page
    assert lines[-2:] == [
        "error: a command is missing",
        f"hint: `{' '.join(['mountctl', *path])} --help` explains it",
    ]


def test_a_wrong_command_line_under_json(nowhere):
    import json

    lines = nowhere("log", "--nonsense", "--json", code=2).stderr.splitlines()
    error = json.loads(lines[-1])["error"]
    assert error["kind"] == "UsageError"
    assert error["exit_code"] == 2
    assert error["hint"]
