"""The manual pages, from the commands themselves: mountctl(1), and mountctl-NAME(1) for each.

In the man macros of roff, as man-db and mandoc both read them. Commands below a command, as in
`mountctl session create`, are parts of its page.
"""

import inspect
import re
import textwrap
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from mountctl.__main__ import COMMANDS, cli
from mountctl.command import Command, GlobalOption
from mountctl.failures import EXIT_CODES

Lines = Iterator[str]

DATE = "2026-11-21"
"""Of the version, not of the day: a page that has not changed stays as it is."""

_ESCAPES = {
    "\\": r"\(rs", "-": r"\-", "'": r"\(aq", '"': r"\(dq", "`": r"\(ga", "^": r"\(ha",
    "~": r"\(ti",
}  # fmt: skip
_ENVIRONMENT = {
    "AMALGAMFS_STORE": "The store, where no --store names one.",
    "XDG_DATA_HOME": "Holds the store, amalgamfs/store, where nothing else names one.",
    "NO_COLOR": "If it is set, nothing is coloured.",
}


def manual_pages(root: Path) -> dict[str, str]:
    """Returns the text of every page by the name of its file."""
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    top = _context(cli, "mountctl", None)
    pages = {"mountctl.1": _top_page(top)}
    for section in COMMANDS.values():
        for name in section:
            context = _below(top, name)
            pages[f"mountctl-{name}.1"] = _page(context)
    return {
        file: "\n".join([_head(file.removesuffix(".1"), version), *lines, ""])
        for file, lines in pages.items()
    }


def roff(text: str) -> str:
    r"""Returns text that prints as itself, within a line and at its beginning.

    `\-` is the minus of options, which can be copied and searched for; the other escapes are for
    what roff takes for a command, an escape, the end of an argument, or a typographer's quote.
    """
    escaped = "".join(
        _ESCAPES.get(c, c if c.isascii() else f"\\[u{ord(c):04X}]") for c in text
    )  # fmt: skip
    return "\\&" + escaped if escaped.startswith(".") else escaped


def _argument(text: str) -> str:
    return f'"{roff(text)}"'


def _head(name: str, version: str) -> str:
    return (
        '.\\" made by scripts/docs\n'
        f".TH {_argument(name.upper())} 1 {DATE} {_argument(f'AmalgamFS {version}')} AmalgamFS"
    )


def _context(command: click.Command, name: str, parent: click.Context | None) -> click.Context:
    return click.Context(command, parent, name, **command.context_settings)


def _below(context: click.Context, name: str) -> click.Context:
    group = context.command
    assert isinstance(group, click.Group)
    command = group.get_command(context, name)
    if command is None:
        raise SystemExit(f"{name} does not load")
    return _context(command, name, context)


def _top_page(context: click.Context) -> list[str]:
    codes = {
        str(code): f"{says[0].upper()}{says[1:]}." for code, says in sorted(EXIT_CODES.items())
    }
    commands = []
    for title, section in COMMANDS.items():
        commands.append(f".SS {_argument(title)}")
        for name, (_, summary) in section.items():
            commands += [".TP", f".BR {roff(f'mountctl-{name}')} (1)", roff(summary)]
    return [
        *_names(context, "mountctl"),
        *_section("SYNOPSIS", _synopsis(context)),
        *_section("DESCRIPTION", _prose(context.command.help or "")),
        *_section("COMMANDS", commands),
        *_section("OPTIONS", _options(context)),
        *_section("GLOBAL OPTIONS", ["Every command takes them, before and after its name."]),
        *_options(context, common=True),
        *_section("EXAMPLES", _example(context.command)),
        *_section("ENVIRONMENT", _list(".B", _ENVIRONMENT.items())),
        *_section("EXIT STATUS", _list(".B", codes.items())),
    ]


def _page(context: click.Context) -> list[str]:
    command = context.command
    dashed = context.command_path.replace(" ", "-")
    parts = []
    synopsis: list[str] = []
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = _below(context, name)
            synopsis += [*([".br"] if synopsis else []), *_synopsis(below)]
            parts += [
                f".SS {_argument(below.command_path)}",
                *_prose(below.command.help or ""),
                *_arguments(below),
                *_options(below),
                ".PP",
                *_example(below.command),
            ]
    else:
        synopsis = list(_synopsis(context))
    return [
        *_names(context, dashed),
        *_section("SYNOPSIS", synopsis),
        *_section("DESCRIPTION", _prose(command.help or "")),
        *_section("COMMANDS", parts),
        *_section("ARGUMENTS", _arguments(context)),
        *_section("OPTIONS", _options(context)),
        *_section("GLOBAL OPTIONS", _options(context, common=True)),
        *_section("EXAMPLES", _example(command)),
        *_section("SEE ALSO", [".BR mountctl (1)"]),
    ]


def _names(context: click.Context, name: str) -> list[str]:
    summary = (context.command.help or "").partition("\n")[0].removesuffix(".")
    return [".SH NAME", f"{roff(name)} \\- {roff(summary)}"]


def _section(title: str, lines: Iterable[str]) -> list[str]:
    found = list(lines)
    return [f".SH {_argument(title) if ' ' in title else title}", *found] if found else []


def _synopsis(context: click.Context) -> Lines:
    yield f".B {_argument(context.command_path)}"
    yield roff(" ".join(context.command.collect_usage_pieces(context)))


def _prose(text: str) -> Lines:
    r"""Yields paragraphs, joined lines but for those that click leaves as they are (`\b`)."""
    for number, paragraph in enumerate(re.split(r"\n{2,}", inspect.cleandoc(text))):
        if number:
            yield ".PP"
        if paragraph.startswith("\b"):
            yield from _as_it_is(paragraph.splitlines()[1:])
        else:
            yield from _lines(_marked(" ".join(paragraph.split())))


def _lines(text: str) -> Lines:
    """Yields text in lines of a readable length; a line may not begin as a command does."""
    for line in textwrap.wrap(text, 78, break_long_words=False, break_on_hyphens=False):
        yield "\\&" + line if line[0] in ".'" else line


def _marked(text: str) -> str:
    """Returns a line in which what stands in backquotes is bold instead."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return roff(text)
    parts[1::2] = [f"\\fB{roff(part)}\\fR" for part in parts[1::2]]
    parts[::2] = [roff(part) for part in parts[::2]]
    return "".join(parts)


def _as_it_is(lines: list[str]) -> Lines:
    yield ".nf"
    yield from (roff(line) for line in lines)
    yield ".fi"


def _list(macro: str, records: Iterable[tuple[str, str]]) -> Lines:
    for name, text in records:
        yield ".TP"
        yield f"{macro} {_argument(name)}"
        yield from _prose(text)


def _arguments(context: click.Context) -> Lines:
    return _list(
        ".I",
        [
            record
            for parameter in context.command.get_params(context)
            if isinstance(parameter, click.Argument)
            and (record := parameter.get_help_record(context)) is not None
        ],
    )


def _options(context: click.Context, *, common: bool = False) -> Lines:
    """Yields the options of a command, or those that every command has."""
    records = []
    for parameter in context.command.get_params(context):
        record = parameter.get_help_record(context)
        shared = isinstance(parameter, GlobalOption) or "--help" in parameter.opts
        if isinstance(parameter, click.Option) and record is not None and shared == common:
            records.append(record)
    return _list(".B", records)


def _example(command: click.Command) -> Lines:
    assert isinstance(command, Command)
    return _as_it_is(command.example.splitlines())
