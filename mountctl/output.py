"""The way to the terminal: data on stdout, all else on stderr. The only module that knows rich.

With `--json`, stdout carries one JSON object or array, and every line on stderr is a JSON
object with one key, `note`, `warning`, `error` or `run`. Colour is added where a terminal shows it
and NO_COLOR is not set, and never says anything that the text does not.
"""

import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import click

from mountctl.failures import Failure
from mountctl.text import plain, size, visible

if TYPE_CHECKING:
    from engine.progress import Progress

PATIENCE = 1.0
"""Seconds that an operation takes before a bar appears."""
INTERVAL = 0.1
"""Seconds that a bar stays as it is at least."""

_RATE_SECONDS = 5.0
_MOST_WARNINGS = 20
_TABLE_ROWS = 200
_COLOUR = re.compile(r"(\x1b\[[0-9;]{1,12}m)")


def _is_terminal(stream: IO[str] | None) -> bool:
    return stream is not None and stream.isatty()


def _tell(text: str, colour: bool | None = None) -> None:
    """Writes to stderr. A full disk, or nobody who reads it, changes nothing of what was done."""
    try:
        click.echo(text, err=True, color=colour)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)  # what was not written yet would fail again at the end
        os.close(nowhere)


def _json(value: Any, indent: int | None = None) -> str:
    """Returns a value as JSON, all in printable ASCII: a terminal could obey nothing in it."""
    return json.dumps(plain(value), indent=indent)


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
        """Writes a line of data; what came from outside was quoted by the caller.

        Should that have been forgotten, nothing but colours of ours reaches the terminal.
        """
        if not text.isprintable():
            text = self._checked(text)
        click.echo(text, color=self._colour)

    def _checked(self, text: str) -> str:
        if not self._colour:
            return visible(text, keep="\n\t")
        parts = _COLOUR.split(text)  # every second one is a colour
        return "".join(
            part if at % 2 else visible(part, keep="\n\t") for at, part in enumerate(parts)
        )

    def raw(self, data: bytes) -> None:
        """Writes data as it is, for another program."""
        click.echo(data, nl=False)

    def result(self, value: Any) -> None:
        """Writes the one object or array of a command under `--json`."""
        click.echo(_json(value, indent=2 if self.to_terminal else None))

    def record(self, value: Any) -> None:
        """Writes one of many objects under `--json`, each on a line of its own."""
        click.echo(_json(value))
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
            _tell(visible(text, keep="\n").removesuffix("\n"))

    def last(self, label: str, value: Any) -> None:
        """Writes, under `--json`, what came of a command whose stdout is another program's."""
        click.echo(_json({label: value}), err=True)

    def failure(self, failure: Failure) -> None:
        """Tells why the command ends, and what to do."""
        if self.json:
            _tell(_json({"error": failure._asdict()}))
            return
        self._say("error", failure.message, "red")
        self._say("hint", failure.hint, "cyan")

    def _say(self, label: str, text: str, colour: str) -> None:
        if self.json:
            _tell(_json({label: text}))
            return
        if label != "note":
            text = f"{click.style(label + ':', fg=colour)} {text}"
        _tell(text, self._error_colour)

    @contextmanager
    def progress(
        self, label: str, things: str = "", *, in_bytes: bool = False
    ) -> "Iterator[Progress]":
        """Gives a function to call with progress; shows a bar on a terminal after a second.

        What is counted are `things`, in the plural, or with `in_bytes` nothing but bytes.
        """
        dumb = os.environ.get("TERM") == "dumb"
        if self.quiet or self.json or dumb or not _is_terminal(sys.stderr):
            yield lambda done, total, size=0: None
            return
        bar = _Bar(label, things, in_bytes)
        try:
            yield bar.update
        finally:
            bar.stop()


class _Bar:
    """A bar that appears once the operation has taken long enough; then rich is loaded.

    A timer lets it appear though nothing is told; whatever else is done, the caller's thread does.
    """

    def __init__(self, label: str, things: str, in_bytes: bool) -> None:
        self._label, self._things, self._in_bytes = label, things, in_bytes
        self._begun = self._due = time.monotonic()
        self._due += PATIENCE
        self._told: tuple[int, int | None, int] = (0, None, 0)
        self._past = deque([(self._begun, 0)])
        self._lock = threading.RLock()
        self._bar: Any = None
        self._ended = False
        self._timer = threading.Timer(PATIENCE, self._show)
        self._timer.daemon = True
        with _signals_blocked():
            self._timer.start()

    def update(self, done: int, total: int | None, size: int = 0, /) -> None:
        self._told = (done, total, size)
        now = time.monotonic()
        if now >= self._due:
            self._due = now + INTERVAL
            self._show()

    def stop(self) -> None:
        """Takes the bar away; nothing of it is left on the terminal."""
        self._timer.cancel()
        with self._lock:
            self._ended = True
            if self._bar is not None:
                self._bar.stop()

    def _show(self) -> None:
        with self._lock:
            if self._ended:
                return
            if self._bar is None:
                self._bar = _rich_bar()
                self._bar.add_task(self._label, total=None, facts="")
                with _signals_blocked():
                    self._bar.start()
            done, total, _ = self._told
            self._bar.update(0, completed=done, total=total, facts=self._facts(), refresh=True)

    def _facts(self) -> str:
        """Returns what is done, of how much, and how fast it goes now."""
        done, total, bytes_done = self._told
        if self._in_bytes:
            bytes_done = done
        now = time.monotonic()
        self._past.append((now, bytes_done or done))
        while len(self._past) > 2 and now - self._past[1][0] > _RATE_SECONDS:
            self._past.popleft()
        then, before = self._past[0]
        rate = max(0, int(((bytes_done or done) - before) / max(now - then, 0.001)))
        of = "" if total is None else f" of {size(total) if self._in_bytes else f'{total:,}'}"
        facts = [] if self._in_bytes else [f"{done:,}{of} {self._things}".rstrip()]
        if bytes_done:
            facts += [size(bytes_done) + (of if self._in_bytes else ""), f"{size(rate)}/s"]
        elif done:
            facts.append(f"{rate:,}/s")
        return ", ".join(facts)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Lets threads that begin in the block never take a signal.

    Otherwise one could take Ctrl-C, and the caller's thread would go on waiting in a `read`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _rich_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
        Elapsed(),
        console=Console(stderr=True),
        transient=True,
    )
