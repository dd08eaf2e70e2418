"""What all commands have in common: the global options anywhere, and help with an example."""

import inspect
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from mountctl.invocation import Invocation

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Function = Callable[..., Any]


def _remember(context: click.Context, option: click.Parameter, value: Any) -> None:
    invocation = context.ensure_object(Invocation)
    if value and option.name:
        setattr(invocation, option.name, value)


class GlobalOption(click.Option):
    """An option that every command takes, before and after its name."""

    def __init__(self, *names: str, **settings: Any) -> None:
        super().__init__(names, expose_value=False, callback=_remember, **settings)


def _global_options() -> list[click.Parameter]:
    return [
        GlobalOption(
            "--store", type=DIRECTORY, metavar="DIR",
            help="The store; else $AMALGAMFS_STORE, else amalgamfs/store among the XDG data.",
        ),
        GlobalOption(
            "--trust-store", is_flag=True,
            help="Open a store of another user, too; else those in $AMALGAMFS_TRUST_STORE.",
        ),
        GlobalOption("--json", is_flag=True, help="Answer with one JSON object or array."),
        GlobalOption("--quiet", "-q", is_flag=True, help="No notes and no progress."),
    ]  # fmt: skip


class Command(click.Command):
    """A command with `example`, lines as they would be typed."""

    def __init__(self, *args: Any, example: str, **settings: Any) -> None:
        settings.setdefault("context_settings", {"help_option_names": ["-h", "--help"]})
        super().__init__(*args, **settings)
        self.example = inspect.cleandoc(example)
        self.params.extend(_global_options())

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own: list[tuple[str, str]] = []
        common: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                (common if isinstance(parameter, GlobalOption) else own).append(record)
        for title, records in (("Options", own), ("Global options", common)):
            with formatter.section(title):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Example"):
            for line in self.example.splitlines():
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


class Group(Command, click.Group):
    """A command with commands below it."""

    command_class = Command

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


class _Directory(click.Path):
    """A path that a shell completes as a directory's; the engine says what is wrong with it."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> "list[CompletionItem[str]]":
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="dir")]


Completer = Callable[[click.Context, click.Parameter, str], "list[CompletionItem[str]]"]


def completing(name: str) -> Completer:
    """Returns what completes a parameter by a function of `mountctl.candidates`, loaded late."""

    def complete(
        context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> "list[CompletionItem[str]]":
        from mountctl import candidates

        found: Completer = getattr(candidates, name)
        return found(context, parameter, incomplete)

    return complete


class _Completed(click.ParamType[str]):
    """Text that is completed by a function of `mountctl.candidates`, which is named here."""

    candidates: str

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> "list[CompletionItem[str]]":
        return completing(self.candidates)(ctx, param, incomplete)


class _SnapshotName(_Completed):
    name = "snapshot"
    candidates = "snapshots"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return value


class _SessionName(_Completed):
    name = "session"
    candidates = "sessions"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name = value.removeprefix("@")
        if not name:
            self.fail("give a session as NAME or @NAME", param, ctx)
        return name


class _Command(click.ParamType[str]):
    name = "command"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return value

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> "list[CompletionItem[str]]":
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="command")]


class _Text(click.ParamType[str]):
    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            value.encode()
        except UnicodeEncodeError:
            self.fail("it is not valid UTF-8", param, ctx)
        return value


class _RefName(_Text, _Completed):
    name = "ref"
    candidates = "refs"


class _EpisodeName(_Text, _Completed):
    name = "episode"
    candidates = "episodes"


class _Duration(click.ParamType[float]):
    name = "duration"

    def convert(
        self, value: str | float, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        found = re.fullmatch(r"([0-9]{1,6})([smhd])", str(value))
        if value == "off":
            return 0.0
        if found is None or not int(found[1]):
            self.fail("give a time as 90s, 30m, 24h or 7d, or `off`", param, ctx)
        return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


class _Share(click.ParamType[float]):
    name = "share"

    def convert(
        self, value: str | float, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        found = re.fullmatch(r"([0-9]{1,2})%", str(value))
        if value == "off":
            return 0.0
        if found is None or not int(found[1]):
            self.fail("give a share as 5%, up to 99%, or `off`", param, ctx)
        return int(found[1]) / 100


DURATION = _Duration()
"""A time in seconds; 0 for `off`."""
SHARE = _Share()
"""A share of a whole, of 1; 0 for `off`."""
SNAPSHOT = _SnapshotName()
"""What names a snapshot, in all the ways there are."""
SESSION = _SessionName()
"""The name of a session, given as `name` or `@name`."""
_SESSION_HELP = "A session, as NAME or @NAME."
TEXT = _Text()
"""Text that goes into the store, and so must be UTF-8."""
REF, EPISODE = _RefName(), _EpisodeName()
"""The name of a ref, of an episode, there or to be made: TEXT."""
COMMAND = _Command()
"""A word of another program's command line."""
DIRECTORY = _Directory(readable=False)
"""The path of a directory, there or to be made."""

pass_invocation = click.make_pass_decorator(Invocation, ensure=True)


def snapshot_argument(name: str = "snapshot", **settings: Any) -> Callable[[Function], Function]:
    """Returns the argument that names a snapshot in all the ways there are."""
    settings.setdefault("help", "An id, the beginning of one, a ref, or @SESSION.")
    settings.setdefault("type", SNAPSHOT)
    return click.argument(name, **settings)


def metadata_option() -> Callable[[Function], Function]:
    """Returns the option that gives facts to keep with a snapshot, `metadata`, a dict."""
    return click.option(
        "--meta", "metadata", metavar="KEY=VALUE", type=TEXT, multiple=True, callback=_metadata,
        help="Keep a fact with the snapshot; with KEY:=VALUE, the value is JSON. Repeatable.",
    )  # fmt: skip


def _refuse(constant: str) -> None:
    raise ValueError(f"JSON has no {constant}")


def _metadata(
    context: click.Context, option: click.Parameter, values: tuple[str, ...]
) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for value in values:
        key, sign, text = value.partition("=")
        is_json = key.endswith(":")
        key = key.removesuffix(":")
        if not key or not sign:
            raise click.BadParameter("give it as KEY=VALUE", context, option)
        try:
            facts[key] = json.loads(text, parse_constant=_refuse) if is_json else text
        except (ValueError, RecursionError):
            raise click.BadParameter(
                f"{text!r} is not JSON; give a text as {key}=TEXT", context, option
            ) from None
    return facts


def session_argument(
    name: str = "session", *, required: bool = True
) -> Callable[[Function], Function]:
    """Returns the argument that names a session."""
    return click.argument(name, type=SESSION, required=required, help=_SESSION_HELP)
