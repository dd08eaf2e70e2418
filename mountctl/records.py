"""Snapshots and sessions as commands list them, for people and for JSON."""

from collections.abc import Iterable
from typing import Any

from engine.host.leases import holder_of, is_held
from engine.ids import SnapshotId
from engine.repository import Repository
from engine.sessions.sessions import Session
from engine.storage.snapshots import Snapshot
from engine.trees.history import History
from mountctl.graph import Graph, show_node
from mountctl.output import Output
from mountctl.text import plain, short, size, visible, when

_LONGEST_MESSAGE = 60


class Names:
    """What points at snapshots: refs, and sessions that stand on them."""

    def __init__(self, repository: Repository) -> None:
        self.refs: dict[bytes, list[str]] = {}
        self.sessions: dict[bytes, list[str]] = {}
        for name, target in repository.refs().items():
            self.refs.setdefault(target, []).append(name)
        for session in repository.sessions.all():
            self.sessions.setdefault(session.parent, []).append(session.name)

    def of(self, identifier: bytes) -> list[str]:
        """Returns the refs and @sessions of a snapshot."""
        return [
            *self.refs.get(identifier, []),
            *("@" + name for name in self.sessions.get(identifier, [])),
        ]


def show_snapshots(
    output: Output, names: Names, records: Iterable[tuple[SnapshotId, Snapshot]]
) -> None:
    """Writes snapshots as a table, in the order they come."""
    rows = (
        (
            output.style(short(identifier), "yellow"),
            when(snapshot.time_ns),
            f"{_entries(snapshot):,}",
            size(snapshot.root.size),
            output.style(visible(" ".join(names.of(identifier))), "green"),
            _first_line(snapshot.message),
        )
        for identifier, snapshot in records
    )
    output.table(("SNAPSHOT", "TIME", "ENTRIES", "SIZE", "NAMES", "MESSAGE"), rows)


def show_graph(
    output: Output,
    names: Names,
    history: History,
    records: Iterable[tuple[SnapshotId, Snapshot]],
) -> None:
    """Writes snapshots, one a line, with lines that lead to their parents; each as it comes."""
    graph: Graph[SnapshotId] = Graph()
    for identifier, snapshot in records:
        text = output.style(short(identifier), "yellow")
        if names.of(identifier):
            text += " (" + output.style(visible(", ".join(names.of(identifier))), "green") + ")"
        if snapshot.message:
            text += " " + _first_line(snapshot.message)
        show_node(output, graph, identifier, history.parents(identifier), text)


def _entries(snapshot: Snapshot) -> int:
    return snapshot.root.totals.entries if snapshot.root.totals else 0


def _first_line(message: str) -> str:
    line = visible(message.partition("\n")[0])
    return line if len(line) <= _LONGEST_MESSAGE else line[: _LONGEST_MESSAGE - 1] + "…"


def snapshot_fields(names: Names, identifier: SnapshotId, snapshot: Snapshot) -> dict[str, Any]:
    """Returns a snapshot for JSON."""
    return {
        "snapshot": identifier,
        "parents": snapshot.parents,
        "time": when(snapshot.time_ns),
        "time_ns": snapshot.time_ns,
        "message": snapshot.message,
        "metadata": snapshot.metadata,
        "entries": _entries(snapshot),
        "bytes": snapshot.root.size,
        "refs": names.refs.get(identifier, []),
        "sessions": names.sessions.get(identifier, []),
    }


def show_snapshot(output: Output, names: Names, identifier: SnapshotId, snapshot: Snapshot) -> None:
    """Writes all that a snapshot's record says."""
    facts = [
        ("snapshot", output.style(identifier.hex(), "yellow")),
        ("names", visible(" ".join(names.of(identifier))) or "-"),
        ("parents", " ".join(parent.hex() for parent in snapshot.parents) or "-"),
        ("time", when(snapshot.time_ns)),
        ("entries", f"{_entries(snapshot):,}"),
        ("size", size(snapshot.root.size)),
    ]
    for key, value in snapshot.metadata.items():
        facts.append((visible(str(key)), visible(str(plain(value)))))
    output.facts(facts)
    if snapshot.message:
        output.line()
        for line in snapshot.message.splitlines():
            output.line("    " + visible(line))


def holder_text(repository: Repository, session: Session) -> str:
    """Says who holds a session right now; empty if nobody does."""
    lease = f"session-{session.uid}"
    if not is_held(repository.path, lease):
        return ""
    facts = holder_of(repository.path, lease)
    what = str(facts.get("what", ""))
    return what if what == "the mount" else f"process {facts.get('pid', '?')} ({what})"


def show_sessions(output: Output, repository: Repository, sessions: list[Session]) -> None:
    """Writes sessions as a table."""
    rows = [
        (
            output.style(visible(session.name), "green"),
            output.style(short(session.parent), "yellow"),
            when(session.created_ns),
            visible(holder_text(repository, session)) or "-",
        )
        for session in sessions
    ]
    output.table(("SESSION", "SNAPSHOT", "CREATED", "HELD BY"), rows)
    for session in sessions:
        warn_of_left_over(output, repository, session)


def warn_of_left_over(output: Output, repository: Repository, session: Session) -> None:
    """Names what an interrupted operation has left of a session and nobody could finish."""
    for path in repository.sessions.left_over(session):
        output.warning(
            f"@{session.name}: what an interrupted operation could not move is in {path!r}"
        )


def session_fields(repository: Repository, session: Session) -> dict[str, Any]:
    """Returns a session for JSON."""
    return {
        "session": session.name,
        "snapshot": session.parent,
        "layers": [{"layer": label, "snapshot": layer} for label, layer in session.layers],
        "created": when(session.created_ns),
        "created_ns": session.created_ns,
        "held_by": holder_text(repository, session) or None,
        "left_over": repository.sessions.left_over(session),
    }
