"""`mountctl status`."""

import os
from typing import TYPE_CHECKING, Any

import click

from mountctl.command import SESSION, Command, pass_invocation
from mountctl.invocation import Invocation
from mountctl.text import count, quoted, short, size, when

if TYPE_CHECKING:
    from fsdriver.client import DaemonLostError
    from fsdriver.messages import Status

ANSWER_SECONDS = 3.0


@click.command(
    "status",
    cls=Command,
    example="""
    $ mountctl status
    $ mountctl status work
    """,
)
@click.argument(
    "session", required=False, type=SESSION, help="A session, as NAME or @NAME; else the store."
)
@pass_invocation
def command(invocation: Invocation, session: str | None) -> None:
    """Tell what there is, or what a session changed.

    Without SESSION: the store, its mount, its sessions. With it: the paths that differ from the
    snapshot it stands on, as `mountctl diff` writes them.
    """
    if session is None:
        _show_store(invocation)
    else:
        _show_session(invocation, session)


def _show_store(invocation: Invocation) -> None:
    from mountctl.access import ask_status
    from mountctl.records import session_fields, show_sessions

    output = invocation.output
    with invocation.open() as store:
        repository = store.repository
        statistics = repository.store.statistics()
        sessions = repository.sessions.all()
        counts = statistics.counts
        mount = ask_status(repository.path, ANSWER_SECONDS)
        if output.json:
            output.result(
                {
                    "store": repository.path,
                    "bytes": statistics.file_bytes,
                    "snapshots": counts["snapshots"],
                    "refs": counts["refs"],
                    "mount": _mount_fields(mount),
                    "sessions": [session_fields(repository, session) for session in sessions],
                }
            )
            return
        facts = [
            ("store", quoted(repository.path)),
            (
                "holds",
                f"{count(counts['snapshots'], 'snapshot')}, {count(counts['refs'], 'ref')}, "
                f"{count(counts['sessions'], 'session')}, {size(statistics.file_bytes)}",
            ),
            *_mount_facts(mount),
        ]
        output.facts(facts)
        if sessions:
            output.line()
            show_sessions(output, repository, sessions)


def _mount_facts(mount: "Status | DaemonLostError | None") -> list[tuple[str, str]]:
    if mount is None:
        return [("mount", "none")]
    if isinstance(mount, Exception):
        return [
            ("mount", quoted(str(mount))),
            ("hint", "`mountctl umount --force` ends it; sessions keep what was written"),
        ]
    return [
        ("mount", quoted(mount.mountpoint)),
        ("daemon", f"process {mount.pid}, since {when(mount.started_ns)}"),
        ("log", quoted(mount.log)),
        *(("busy", f"{doing.what}, for {doing.seconds:.0f} s") for doing in mount.doing),
    ]


def _mount_fields(mount: "Status | DaemonLostError | None") -> dict[str, Any] | None:
    if mount is None:
        return None
    if isinstance(mount, Exception):
        return {"pid": mount.pid, "problem": str(mount)}
    return {
        "mountpoint": os.path.abspath(mount.mountpoint),
        "pid": mount.pid,
        "log": mount.log,
        "started_ns": mount.started_ns,
        "sessions": mount.sessions,
        "doing": [
            {"what": doing.what, "seconds": round(doing.seconds, 1)} for doing in mount.doing
        ],
    }


def _show_session(invocation: Invocation, name: str) -> None:
    from mountctl.changes import change_fields, show_names, summary
    from mountctl.records import warn_of_left_over

    output = invocation.output
    with invocation.open() as store:
        session = store.repository.sessions.get(name)
        base = store.stands_on(session)
        with store.tree("@" + name) as root:
            changes = store.repository.diff(base, root)
            if output.json:
                fields = [change_fields(change) for change in changes]
                output.result({"session": name, "snapshot": session.parent, "changes": fields})
                return
            number = show_names(output, changes)
            warn_of_left_over(output, store.repository, session)
        output.note(summary(number, f"since snapshot {short(session.parent)}"))
