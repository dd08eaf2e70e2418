"""The program `mountctl`: its commands, each loaded when it is called, and how it ends.

Whatever goes wrong becomes a message, a hint and an exit code here and nowhere else.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click

from mountctl import no_memory
from mountctl.command import Group
from mountctl.failures import BUG, INTERRUPTED, READER_GONE, SYSTEM, describe
from mountctl.invocation import COMPLETE_VARIABLE, Invocation
from mountctl.output import Output

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMMANDS = {
    "The store": {
        "init": ("init", "Make an empty store."),
        "import": ("importing", "Store a directory as a snapshot."),
        "git": ("git", "Snapshots from git's commits, and commits from snapshots."),
        "checkout": ("checkout", "Write a snapshot out as a real directory."),
        "export": ("export", "Write a snapshot out as a tar archive or an OCI image."),
        "bundle": ("bundle", "Snapshots as one file, whole or what another store lacks."),
        "gc": ("gc", "Remove what nothing refers to any more."),
        "verify": ("verify", "Read everything and name what is damaged."),
        "stats": ("stats", "Show how many bytes trees have and take."),
        "config": ("config", "Show or change a store's settings."),
    },
    "The mount": {
        "mount": ("mount", "Show the store as a filesystem."),
        "umount": ("umount", "End a mount."),
        "run": ("run", "Run a command in a session, or on a snapshot."),
        "status": ("status", "Tell what there is, or what a session changed."),
        "top": ("top", "Show what a mount is doing."),
        "doctor": ("doctor", "Tell what this machine lacks, and what to do."),
        "completion": ("completion", "Print the script that lets a shell complete commands."),
    },
    "Snapshots and sessions": {
        "log": ("log", "Show a snapshot and those it came from."),
        "merge-base": ("merge_base", "Show the snapshot that two others both came from."),
        "bisect": ("bisect", "Find the first bad snapshot by running a command in some."),
        "diff": ("diff", "Show what differs between two snapshots."),
        "merge": ("merge", "Make one snapshot of two, with both as parents."),
        "apply": ("apply", "Make a snapshot of another one and a patch."),
        "commit": ("commit", "Store what a session changed as a snapshot."),
        "session": ("session", "Writable copies of snapshots."),
        "snapshot": ("snapshot", "List, show and remove snapshots."),
        "ref": ("ref", "Names for snapshots."),
        "episode": ("episode", "What a search did, step by step, and what came of it."),
    },
}
"""The modules of `mountctl.commands` by section and command, with the first line of their help."""


class _ReaderGoneError(Exception):
    """Nobody reads what we write any more."""


class Program(Group):
    """The program itself: knows its commands without loading them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for section in COMMANDS.values() for name in section]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for section in COMMANDS.values():
            if cmd_name in section:
                module = importlib.import_module(f"mountctl.commands.{section[cmd_name][0]}")
                command: click.Command = module.command
                return command
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(len(name) for name in self.list_commands(ctx))
        for title, section in COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(name.ljust(width), summary) for name, (_, summary) in section.items()]
                )

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem[str]]":
        from click.shell_completion import CompletionItem

        summaries = [row for section in COMMANDS.values() for row in section.items()]
        return [
            CompletionItem(name, help=summary)
            for name, (_, summary) in summaries
            if name.startswith(incomplete)
        ] + click.Command.shell_complete(self, ctx, incomplete)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:
            raise _ReaderGoneError from None
        return result

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Runs the program and ends the process, whatever happens and whatever the mode."""
        args = sys.argv[1:] if args is None else list(args)
        invocation = extra["obj"] = Invocation()
        if COMPLETE_VARIABLE in os.environ:
            from mountctl import shells  # noqa: F401 - makes them known to click
        try:
            code = super().main(args, prog_name, complete_var, False, **extra)
        except _ReaderGoneError:
            _drop_stdout()
            code = READER_GONE
        except click.Abort:
            code = INTERRUPTED
        except Exception as error:  # noqa: BLE001 - the edge: every error gets its exit code
            if isinstance(error, click.UsageError) and "--json" in args:
                invocation.json = True  # it may stand behind what was wrong
            code = _say_and_fail(invocation, error)
        sys.exit(code if isinstance(code, int) else 0)


def _say_and_fail(invocation: Invocation, error: Exception) -> int:
    """Says what went wrong and returns the exit code, even where there is no memory to say it."""
    if no_memory.is_of_memory(error):
        error.__traceback__ = None  # the frames hold what took the memory
    try:
        return _fail(invocation.output, error)
    except (MemoryError, SystemError, ImportError, OSError) as second:
        if not no_memory.is_of_memory(second):
            raise
        no_memory.last_words(json=invocation.json)
        return SYSTEM


def _fail(output: Output, error: Exception) -> int:
    """Says what went wrong and returns the exit code."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        output.lines(error.ctx.get_help() + "\n\n")
        error = click.UsageError("a command is missing", error.ctx)
    elif isinstance(error, click.UsageError) and error.ctx is not None:
        output.lines(error.ctx.get_usage())
    failure = describe(error)
    if failure.exit_code == BUG:
        import traceback

        output.lines("".join(traceback.format_exception(error)))
    output.failure(failure)
    try:
        sys.stdout.flush()
    except OSError:
        _drop_stdout()
    return failure.exit_code


def _drop_stdout() -> None:
    """Lets what was not written yet go nowhere, so that the interpreter's end stays quiet."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _show_version(context: click.Context, option: click.Parameter, value: bool) -> None:
    if not value or context.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        number = version("amalgamfs")
    except PackageNotFoundError:
        number = "(not installed)"
    click.echo(f"mountctl {number}")
    context.exit()


@click.group(
    "mountctl",
    cls=Program,
    example="""
    $ mountctl init
    $ mountctl import ~/src/lua --ref main
    $ mountctl session create work main
    $ mkdir ~/mnt && mountctl mount ~/mnt
    $ make -C ~/mnt/sessions/work
    $ mountctl commit work -m "built"
    $ mountctl diff main @work
    """,
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version,
    help="Show the version and exit.",
)  # fmt: skip
def cli() -> None:
    """Keep trees of files as snapshots, and work on them without copying.

    Snapshots are named by an id, the beginning of one, a ref, or @SESSION. `mountctl COMMAND
    --help` explains a command, with examples.
    """


def main() -> NoReturn:
    """Runs the program with the process's arguments."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a TextIOWrapper
    try:
        sys.exit(cli(prog_name="mountctl"))
    except (MemoryError, SystemError) as error:  # on the way in, or out
        if not no_memory.is_of_memory(error):
            raise
        no_memory.last_words()
        sys.exit(SYSTEM)


if __name__ == "__main__":
    main()
