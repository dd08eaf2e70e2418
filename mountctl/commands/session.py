"""`mountctl session`."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from mountctl.command import (
    SNAPSHOT,
    TEXT,
    Group,
    pass_invocation,
    session_argument,
    snapshot_argument,
)
from mountctl.invocation import Invocation
from mountctl.text import count, quoted, short, visible, when

if TYPE_CHECKING:
    from mountctl.access import StoreAccess
    from mountctl.output import Output


@click.group(
    "session",
    cls=Group,
    example="""
    $ mountctl session create work main
    $ mountctl session fork work attempt-2
    """,
)
def command() -> None:
    """Writable copies of snapshots.

    A session shows a snapshot and keeps what is changed on top of it, in the mount's
    sessions/NAME, until it is committed or reset. Making or forking one copies nothing.
    """


def _new_name(name: str = "name") -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.argument(name, type=TEXT, help="The new session's name.")


@command.command("create", example="$ mountctl session create work main\n$ ls ~/mnt/sessions/work")
@_new_name()
@snapshot_argument()
@click.option("--infrastructure", type=SNAPSHOT, help="A layer below: the lowest.")
@click.option("--global", "global_", type=SNAPSHOT, help="A layer below: the middle one.")
@pass_invocation
def create(
    invocation: Invocation,
    name: str,
    snapshot: str,
    infrastructure: str | None,
    global_: str | None,
) -> None:
    """Make a session on a snapshot.

    With layers, directories of the same path are merged, and anything else of a higher layer
    hides what is below it.
    """
    output = invocation.output
    with invocation.open() as store:
        layers = tuple(
            None if layer is None else store.resolve(layer)
            for layer in (infrastructure, global_, snapshot)
        )
        session = store.repository.sessions.create(name, layers)
        store.refresh()
        _tell(store, output, name, f"@{name} stands on snapshot {short(session.parent)}")


@command.command("list", example="$ mountctl session list")
@pass_invocation
def list_sessions(invocation: Invocation) -> None:
    """List all sessions."""
    from mountctl.records import session_fields, show_sessions

    output = invocation.output
    with invocation.open() as store:
        repository = store.repository
        sessions = repository.sessions.all()
        if output.json:
            output.result([session_fields(repository, session) for session in sessions])
            return
        show_sessions(output, repository, sessions)
        if not sessions:
            output.note("there are no sessions: `mountctl session create NAME SNAPSHOT` makes one")


@command.command("show", example="$ mountctl session show work\n$ mountctl status work")
@session_argument("name")
@pass_invocation
def show(invocation: Invocation, name: str) -> None:
    """Show what a session stands on, who holds it, and where it keeps its changes."""
    from engine.trees.layers import NAMES
    from mountctl.records import holder_text, session_fields

    output = invocation.output
    with invocation.open() as store:
        repository = store.repository
        session = repository.sessions.get(name)
        upper = repository.sessions.upper(session).root
        if output.json:
            fields = session_fields(repository, session)
            output.result({**fields, "upper": upper.decode("utf-8", "backslashreplace")})
            return
        output.facts(
            [
                ("session", output.style(visible(session.name), "green")),
                ("snapshot", output.style(session.parent.hex(), "yellow")),
                *(
                    (f"layer {label}", layer.hex())
                    for label, layer in session.layers
                    if (label, layer) != (NAMES[-1], session.parent)
                ),
                ("created", when(session.created_ns)),
                ("held by", visible(holder_text(repository, session)) or "-"),
                ("upper", quoted(upper)),
            ]
        )


@command.command("fork", example="$ mountctl session fork work attempt-2")
@session_argument("source")
@_new_name("new")
@pass_invocation
def fork(invocation: Invocation, source: str, new: str) -> None:
    """Make a session that begins with all that another one has now."""
    with invocation.open() as store:
        store.fork(source, new)
        _tell(store, invocation.output, new, f"@{new} begins where @{source} is now")


@command.command("rename", example="$ mountctl session rename attempt-2 work-2")
@session_argument("old")
@_new_name("new")
@pass_invocation
def rename(invocation: Invocation, old: str, new: str) -> None:
    """Give a session another name."""
    with invocation.open() as store:
        store.rename(old, new)
        _tell(store, invocation.output, new, f"@{old} is now @{new}")


def _force() -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option("--force", is_flag=True, help="Throw away changes that no snapshot has.")


@command.command(
    "reset",
    example="""
    $ mountctl session reset work
    $ mountctl session reset work --to main --force
    $ mountctl session reset work --factory etc/app.toml
    """,
)
@session_argument("name")
@click.argument(
    "paths", metavar="[PATH]...", nargs=-1, type=click.Path(),
    help="With --factory: what becomes as it was; the rest stays.",
)  # fmt: skip
@click.option("--to", type=SNAPSHOT, help="Go on from another snapshot.")
@click.option("--factory", is_flag=True, help="Go back to the layers that it was made of.")
@_force()
@pass_invocation
def reset(
    invocation: Invocation, name: str, paths: tuple[str, ...], to: str | None, factory: bool,
    force: bool,
) -> None:  # fmt: skip
    """Go back to a session's last commit.

    Refuses if something was changed since, unless --force throws it away. With --factory, goes
    back to what the session was made of, with all its layers; the snapshots of its commits stay.
    PATH, with --factory, are paths in the session: only these change, as an edit would.
    """
    if to is not None and factory:
        raise click.UsageError("--to and --factory are two things")
    if paths and not factory:
        raise click.UsageError("PATH goes with --factory; it would come from the layers")
    with invocation.open() as store:
        store.reset(
            name, None if to is None else store.resolve(to),
            factory=factory, paths=[os.fsencode(path) for path in paths], force=force,
        )  # fmt: skip
        session = store.repository.sessions.get(name)
        if paths:
            text = f"restored {count(len(paths), 'path')} of @{name} from its layers"
        elif factory:
            text = f"@{name} is what it was made of"
        else:
            text = f"@{name} is as snapshot {short(session.parent)}"
        _tell(store, invocation.output, name, text)


@command.command(
    "rm", example="$ mountctl session rm attempt-2\n$ mountctl session rm attempt-3 --force"
)
@session_argument("name")
@_force()
@pass_invocation
def remove(invocation: Invocation, name: str, force: bool) -> None:
    """Remove a session; the snapshots of its commits stay.

    Refuses if something was changed since the last commit, unless --force throws it away.
    """
    with invocation.open() as store:
        store.remove(name, force=force)
    if invocation.output.json:
        invocation.output.result({"removed": name})
    else:
        invocation.output.note(f"removed @{name}")


def _tell(store: "StoreAccess", output: "Output", name: str, text: str) -> None:
    """Says what a session is now."""
    if not output.json:
        output.note(text)
        return
    from mountctl.records import session_fields

    repository = store.repository
    output.result(session_fields(repository, repository.sessions.get(name)))
