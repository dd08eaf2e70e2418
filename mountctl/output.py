"""The way to the terminal: data on stdout, all else on stderr. The only module that knows rich.

With `--json`, stdout carries one JSON object or array, and every line on stderr is a JSON
object with one key, `note`, `warning`, `error` or `run`. Colour is added where a terminal shows it
and NO_COLOR is not set, and never says anything that the text does not.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import click

from mountctl.failures import Failure
from mountctl.text import plain, visible

Progress = Callable[[int, int | None], None]
"""Called with what is done and what there is in all, None while that is not known."""

PATIENCE = 1.0
"""Seconds that an operation takes before a bar appears."""

_MOST_WARNINGS = 20
_TABLE_ROWS = 200


def _is_terminal(stream: IO[str] | None) -> bool:
    return stream is not None and stream.isatty()


class Output:
    """Where a command writes. `json` and `quiet` are what the command line said."""

    def __init__(self, *, json: bool, quiet: bool) -> None:
        self.json, self.quiet = json, quiet
        plain_terminal = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
        self.to_terminal = _is_terminal(sys.stdout)
        self._colour = self.to_terminal and not plain_terminal
        self._error_colour = _is_terminal(sys.stderr) and not plain_terminal

    # Data.

    def style(self, text: str, colour: str) -> str:
        """Returns text for `line` and `table` in a colour, where there are colours."""
        return click.style(text, fg=colour) if self._colour else text

    def line(self, text: str = "") -> None:
        """Writes a line of data; what came from outside was made safe by the caller."""
        click.echo(text, color=self._colour)

    def raw(self, data: bytes) -> None:
        """Writes data as it is, for another program."""
        click.echo(data, nl=False)

    def result(self, value: Any) -> None:
        """Writes the one object or array of a command under `--json`."""
        text = json.dumps(plain(value), indent=2 if self.to_terminal else None)
        click.echo(text.replace("\x7f", "\\u007f"))

    def record(self, value: Any) -> None:
        """Writes one of many objects under `--json`, each on a line of its own."""
        click.echo(json.dumps(plain(value)))
        sys.stdout.flush()

    def clear(self) -> None:
        """Empties the screen, if this is one; else begins a new paragraph."""
        if self._colour:
            click.clear()
        else:
            self.line()

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Writes rows in aligned columns below their titles; nothing if there are no rows.

        A long table is written as its rows come; a column may then become wider on the way.
        """
        rest = iter(rows)
        lines: list[Sequence[str]] = list(itertools.islice(rest, _TABLE_ROWS))
        if not lines:
            return
        lines.insert(0, [self.style(title, "bright_black") for title in columns])
        widths = [0] * len(columns)
        while lines:
            lengths = [[len(click.unstyle(cell)) for cell in row] for row in lines]
            widths = [max(known) for known in zip(widths, *lengths, strict=True)]
            for row, used in zip(lines, lengths, strict=True):
                cells = [
                    cell + " " * (width - length)
                    for cell, width, length in zip(row, widths, used, strict=True)
                ]
                self.line("  ".join(cells).rstrip())
            lines = list(itertools.islice(rest, _TABLE_ROWS))

    def facts(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Writes names with their values below each other."""
        width = max(len(name) for name, _ in pairs)
        for name, value in pairs:
            self.line(f"{self.style(name.ljust(width), 'bright_black')}  {value}")

    # All else.

    def note(self, text: str) -> None:
        """Tells what was done or what to do next; not with `--quiet`."""
        if not self.quiet:
            self._say("note", visible(text), "")

    def warning(self, text: str) -> None:
        """Tells of something that may be wrong."""
        self._say("warning", visible(text), "yellow")

    def warnings(self, texts: Sequence[str]) -> None:
        """Tells the first of many warnings, and how many there are."""
        for text in texts[:_MOST_WARNINGS]:
            self.warning(text)
        if len(texts) > _MOST_WARNINGS:
            self.warning(f"and {len(texts) - _MOST_WARNINGS:,} more; --json lists all of them")

    def lines(self, text: str) -> None:
        """Writes lines that explain an error: how a command is used, where a bug struck."""
        if self.json:
            self._say("note", text, "")
        else:
            click.echo(visible(text, keep="\n").removesuffix("\n"), err=True)

    def last(self, label: str, value: Any) -> None:
        """Writes, under `--json`, what came of a command whose stdout is another program's."""
        click.echo(json.dumps({label: plain(value)}), err=True)

    def failure(self, failure: Failure) -> None:
        """Tells why the command ends, and what to do."""
        if self.json:
            click.echo(json.dumps({"error": plain(failure._asdict())}), err=True)
            return
        self._say("error", failure.message, "red")
        self._say("hint", failure.hint, "cyan")

    def _say(self, label: str, text: str, colour: str) -> None:
        if self.json:
            click.echo(json.dumps({label: plain(text)}), err=True)
            return
        if label != "note":
            text = f"{click.style(label + ':', fg=colour)} {text}"
        click.echo(text, err=True, color=self._error_colour)

    @contextmanager
    def progress(self, label: str, *, in_bytes: bool = False) -> Iterator[Progress]:
        """Gives a function to call with progress; shows a bar on a terminal after a second.

        What is counted are things, or with `in_bytes` bytes, shown with their rate.
        """
        if self.quiet or self.json or not _is_terminal(sys.stderr):
            yield lambda done, total: None
            return
        bar = _Bar(label, in_bytes)
        try:
            yield bar.update
        finally:
            bar.stop()


class _Bar:
    """A bar that appears once the operation has taken long enough; then rich is loaded."""

    def __init__(self, label: str, in_bytes: bool) -> None:
        self._label, self._in_bytes = label, in_bytes
        self._due = time.monotonic() + PATIENCE
        self._stop: Callable[[], None] | None = None
        self._show: Progress | None = None

    def update(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + 0.1
        if self._show is None:
            self._start()
        if self._show is not None:
            self._show(done, total)

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            ProgressColumn,
            TaskProgressColumn,
            TextColumn,
            TransferSpeedColumn,
        )
        from rich.progress import TimeElapsedColumn as Elapsed

        amount: tuple[ProgressColumn, ...] = (
            (TaskProgressColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
            if self._in_bytes
            else (TaskProgressColumn(show_speed=True), TextColumn("{task.completed:,.0f}"))
        )

        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *amount,
            Elapsed(),
            console=Console(stderr=True),
            transient=True,
        )
        task = bar.add_task(self._label, total=None)
        bar.start()
        self._stop = bar.stop
        self._show = lambda done, total: bar.update(task, completed=done, total=total)

    def stop(self) -> None:
        if self._stop is not None:
            self._stop()
