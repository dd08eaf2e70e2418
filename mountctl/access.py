"""The store as commands use it: a mount's daemon does what it must, this process the rest.

A session that a mount shows is held by the mount's daemon, so whoever has the store mounted
is asked to commit, fork, reset, remove, rename or freeze it; without a mount it is done here.
Everything else is done here always, and a daemon is told when the store has changed. The
only module that knows both ways.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import cbor2
import msgspec

from engine.errors import EngineError
from engine.ids import SnapshotId, check_name
from engine.repository import Repository
from engine.sessions.sessions import CommitReport, Session
from engine.storage.nodes import Entry
from fsdriver import messages
from fsdriver.client import Client, DaemonLostError, find_daemon
from mountctl.output import Output
from mountctl.text import short


class StoreAccess:
    """An open store, to be used in a `with` statement."""

    def __init__(self, path: str, output: Output, *, trusted: bool) -> None:
        """Opens the store at `path`. Raises what `Repository.open` does."""
        self.repository = Repository.open(path, trusted=trusted, to_read=True)
        self._output = output
        self._client: Client | None = None

    def __enter__(self) -> "StoreAccess":
        return self

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._client.close()
        self.repository.close()

    @cached_property
    def _daemon(self) -> Client | None:
        """Who has the store mounted. Raises DaemonLostError."""
        self._client = find_daemon(self.repository.path)
        return self._client

    # Snapshots and trees.

    def resolve(self, name: str) -> SnapshotId:
        """Returns the snapshot that `name` means; of `@session` the one that it stands on.

        Tells so in a note, because a session may have changed since.
        """
        identifier = self.repository.resolve(name)
        if name.startswith("@"):
            self._output.note(
                f"{name} stands on snapshot {short(identifier)}; what it changed since is left out"
            )
        return identifier

    @contextmanager
    def tree(self, name: str) -> Iterator[Entry]:
        """Gives the root of what `name` means; a session is frozen as it is now."""
        daemon = self._daemon if name.startswith("@") else None
        if daemon is None:
            with self.repository.tree(name) as root:
                yield root
            return
        with self.repository.storing():
            reply = daemon.ask(messages.Freeze(name[1:]))
            assert isinstance(reply, messages.Frozen)
            yield _decode_root(reply.root)

    def refresh(self) -> None:
        """Tells a mount that the store has changed; the command has done its work by then."""
        try:
            if self._daemon is not None:
                self._daemon.ask(messages.Refresh())
        except EngineError as error:
            self._output.warning(f"done, but the mount may not show it yet: {error}")

    def compact(self) -> tuple[int, int]:
        """Makes the store's file smaller; a mount's daemon does it. Returns sizes: before, after.

        This process closes the store for it: nothing can be asked of it afterwards.
        """
        daemon = self._daemon
        if daemon is None:
            report = self.repository.compact()
            return report.bytes_before, report.bytes_after
        self.repository.close()
        reply = daemon.ask(messages.Compact())
        assert isinstance(reply, messages.Compacted)
        return reply.bytes_before, reply.bytes_after

    # Sessions.

    def commit(
        self, session: str, message: str, ref: str | None, metadata: dict[str, Any] | None = None
    ) -> CommitReport:
        """Commits a session and goes on from the new snapshot."""
        if self._daemon is None:
            return self.repository.commit(session, message=message, ref=ref, metadata=metadata)
        reply = self._daemon.ask(messages.Commit(session, message, ref, metadata or {}))
        assert isinstance(reply, messages.Committed)
        return CommitReport(
            bytes.fromhex(reply.snapshot),
            reply.changed,
            reply.new_bytes,
            tuple(reply.warnings),
            reply.lost_owners,
            reply.lost,
        )

    def fork(self, session: str, name: str) -> None:
        """Makes a session that begins with all that another one has now."""
        if self._daemon is None:
            self.repository.fork(session, name)
        else:
            self._daemon.ask(messages.Fork(session, name))

    def reset(
        self,
        session: str,
        to: SnapshotId | None = None,
        *,
        factory: bool = False,
        paths: Sequence[bytes] = (),
        force: bool = False,
    ) -> None:
        """Throws away what a session changed; see `Repository.reset_session`."""
        if self._daemon is None:
            self.repository.reset_session(session, to, factory=factory, paths=paths, force=force)
        else:
            target = None if to is None else to.hex()
            self._daemon.ask(messages.Reset(session, target, factory, list(paths), force))

    def remove(self, session: str, *, force: bool = False) -> None:
        """Removes a session; with `force` also one with changes that no snapshot has."""
        if self._daemon is None:
            self.repository.remove_session(session, force=force)
        else:
            self._daemon.ask(messages.Remove(session, force))

    def stands_on(self, session: Session) -> Entry:
        """Returns the tree of a session without what is not committed."""
        with self.repository.storing():
            return self.repository.sessions.stands_on(session)

    def rename(self, session: str, name: str) -> None:
        """Gives a session another name."""
        check_name("session", name)
        if self._daemon is None:
            self.repository.sessions.rename(session, name)
        else:
            self._daemon.ask(messages.Rename(session, name))


def _decode_root(data: bytes) -> Entry:
    """Returns the root of a frozen tree as a daemon sends it."""
    return msgspec.convert(cbor2.loads(data), Entry)


def ask_status(store_path: str, seconds: float) -> messages.Status | DaemonLostError | None:
    """Returns what a mount's daemon says of itself, that it does not answer, or None."""
    try:
        client = find_daemon(store_path, seconds)
        if client is None:
            return None
        with client:
            reply = client.ask(messages.GetStatus())
    except DaemonLostError as error:
        return error
    assert isinstance(reply, messages.Status)
    return reply
