"""Sessions: named writable overlays on snapshots, and what is on disk for each.

A session's record, database `sessions` under its name, MessagePack: its uid (16 hexadecimal
digits, the directory `sessions/<uid>` beside the database), the snapshot that its next commit
has as parent, the layers that it was made of, the root of its base tree, and the generation of
its upper. The base has the owners of files that are not ours; where snapshots do not keep them,
`plain` is the same tree without, and shares with it what nobody else owns. The upper is
`sessions/<uid>/upper.<generation>`; beside it lies `work`, and while a command runs in a full
checkout of the session, that, as `tree` (see `session_tree`). `kept.<generation>` is an
earlier upper with something that no tree carries, as a socket, and that could not be moved.

A commit writes objects, snapshot and a record with the next generation, whose upper is empty,
in one transaction; the upper of the generation before is garbage from then on. So a process
killed at any moment leaves either the old upper on the old base or the empty one on the new.
"""

import contextlib
import errno
import itertools
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from engine.errors import (
    CorruptObjectError,
    EngineError,
    InUseError,
    MissingObjectError,
    NameTakenError,
    NotFoundError,
)
from engine.host.forks import OfOneProcess
from engine.host.leases import Lease, LeaseHeldError, acquire, is_held
from engine.host.own_files import own_folder
from engine.host.removing import remove_tree
from engine.host.unlocking import unlocked
from engine.ids import SnapshotId, check_name, digest
from engine.mounted.overlay import Lost, Overlay
from engine.mounted.overlay_directory import open_overlay
from engine.sessions.freezing import Changed, Freeze, Known, Sign, Trees
from engine.sessions.restoring import restored
from engine.sessions.upper import Upper, attribute
from engine.storage.nodes import Entry, Owner
from engine.storage.objects import NodeBuffer, Objects
from engine.storage.owners import count_owners, keeps_owners
from engine.storage.reserve import Reserve
from engine.storage.snapshots import encode_snapshot, make_snapshot
from engine.storage.store import LONGEST_KEY, Db, Reader, Store, Writer
from engine.trees.layers import NAMES, fold
from engine.workspaces.committing import Batch

_ADD_WAIT = 30.0
_COMPLETE = b"user.overlay.amalgam.complete"
"""On a full tree in which programs may have written: the generation of the session that it was
made of, and since when the machine runs."""
_KEPT = b"kept."
"""Begins the name of an earlier generation's upper that still has what could not be moved."""
_FULL = {errno.ENOSPC, errno.EDQUOT}
_UID = re.compile(r"[0-9a-f]{16}")


class Session(msgspec.Struct, frozen=True):
    """A session's record. `layers` are (name, snapshot id) from the lowest up: what it was made of.

    No commit touches them; `parent` is the last commit, or the highest layer before the first one.
    A `temporary` session goes when nobody uses it any more. One of a store of format 2 does not
    know what it was made of (`knows_layers`): its highest layer was its last commit.
    """

    name: str
    uid: str
    parent: bytes
    layers: tuple[tuple[str, bytes], ...]
    root: Entry
    generation: int
    created_ns: int
    temporary: bool = False
    plain: Entry | None = None
    knows_layers: bool = False

    def trees(self) -> Trees:
        """Returns the base as it is shown, and as a snapshot would have it."""
        return Trees(self.root, self.plain or self.root)

    def going_on(self, trees: Trees, **changes: Any) -> "Session":
        """Returns the next state of the session: on another base, with an empty upper."""
        plain = None if trees.plain == trees.shown else trees.plain
        changes = {"generation": self.generation + 1, **changes}
        return msgspec.structs.replace(self, root=trees.shown, plain=plain, **changes)


class CommitReport(msgspec.Struct, frozen=True):
    """What a commit did. Without any change there is no new snapshot: `changed` is False.

    `lost_owners` is how many files belong to others, which the snapshot does not keep; the session
    does.
    """

    snapshot: bytes
    changed: bool
    new_bytes: int
    warnings: tuple[str, ...]
    lost_owners: int = 0
    lost: dict[str, int] = {}
    """How many files lost what; see `losses`."""


class Sessions:
    """The sessions of a store."""

    def __init__(self, store: Store, objects: Objects, path: str) -> None:
        self._store, self._objects, self._path = store, objects, path

    def get(self, name: str) -> Session:
        """Returns a session's record. Raises NotFoundError."""
        with self._store.read() as reader:
            return read_record(reader, name)

    def all(self) -> list[Session]:
        """Returns all records by name."""
        with self._store.read() as reader:
            return [decode_record(key, raw) for key, raw in reader.items(Db.SESSIONS)]

    def create(self, name: str, layers: tuple[SnapshotId | None, ...]) -> Session:
        """Makes a session on a stack: infrastructure and global (or None), then the blueprint.

        Raises InvalidNameError, NameTakenError, MissingObjectError.
        """
        check_name("session", name)
        named = tuple(
            (label, layer) for label, layer in zip(NAMES, layers, strict=True) if layer is not None
        )
        roots = [self._objects.snapshot(SnapshotId(layer)).root for _, layer in named]
        nodes = NodeBuffer()
        root = roots[0] if len(roots) == 1 else fold(self._objects, nodes.put, roots)
        session = Session(
            name, os.urandom(8).hex(), named[-1][1], named, root, 0, time.time_ns(),
            knows_layers=True,
        )  # fmt: skip
        return self._add(session, nodes.flush)

    def factory(self, session: Session) -> Entry:
        """Returns the tree that a session was made of: its layers, folded and stored.

        The caller holds the lease on objects. Raises MissingObjectError.
        """
        roots = [self._objects.snapshot(SnapshotId(layer)).root for _, layer in session.layers]
        if len(roots) == 1:
            return roots[0]
        nodes = NodeBuffer()
        root = fold(self._objects, nodes.put, roots)
        self._store.write(nodes.flush)
        return root

    def stands_on(self, session: Session) -> Entry:
        """Returns the tree without what is not committed: the last commit's, as it is stored.

        Before the first commit it is the `factory`'s; the caller holds the lease on objects.
        """
        parent = self._objects.snapshot(SnapshotId(session.parent))
        committed = session.parent != session.layers[-1][1]
        if not session.knows_layers:
            committed = committed or parent.time_ns > session.created_ns
        return parent.root if committed else self.factory(session)

    def create_temporary(self, snapshot: SnapshotId) -> tuple[Session, Lease]:
        """Makes a session for one run on a snapshot; it lasts as long as the lease is held.

        Its name and its directory are the same each time, unless they are taken. Raises
        MissingObjectError.
        """
        root = self._objects.snapshot(snapshot).root
        layers = ((NAMES[-1], bytes(snapshot)),)
        taken = {session.uid for session in self.all()}
        for number in itertools.count(1):
            again = f"-{number}" if number > 1 else ""
            name, uid = f"run-{snapshot.hex()[:12]}{again}", digest(snapshot + again.encode()).hex()
            session = Session(
                name, uid[:16], snapshot, layers, root, 0, time.time_ns(), True, None, True
            )
            if session.uid in taken:
                continue
            with contextlib.suppress(LeaseHeldError, NameTakenError):
                return self._add_temporary(session)
        raise AssertionError

    def _add_temporary(self, session: Session) -> tuple[Session, Lease]:
        lease = acquire(self._path, _run_lease(session), what="running a command")
        try:
            home = os.fsencode(self._home(session))
            if os.path.isdir(home):  # of one whose removal was interrupted
                remove_tree(home)
            return self._add(session, lambda writer: None), lease
        except BaseException:
            lease.release()
            raise

    def unused(self) -> list[Session]:
        """Returns the temporary sessions whose runs have ended without removing them."""
        return [
            session
            for session in self.all()
            if session.temporary and not is_held(self._path, _run_lease(session))
        ]

    def remove_unused(self) -> None:
        """Removes the `unused` sessions, but for those that a mount shows."""
        for session in self.unused():
            with contextlib.suppress(LeaseHeldError, NotFoundError):
                self.remove(self.hold(session.name, "removing it", recover=False))

    def _add(self, session: Session, save: Callable[[Writer], None]) -> Session:
        # The lease, for `sweep` removes directories that have no record.
        with acquire(self._path, "objects", shared=True, wait=_ADD_WAIT):
            return self._add_alone(session, save)

    def _add_alone(self, session: Session, save: Callable[[Writer], None]) -> Session:
        def change(writer: Writer) -> None:
            if writer.has(Db.SESSIONS, session.name.encode()):
                raise NameTakenError("session", session.name)
            save(writer)
            _check_layers(writer, session)
            put_record(writer, session)

        try:
            self._make_upper(session)
            self._store.write(change)
        except BaseException:
            shutil.rmtree(self._home(session), ignore_errors=True)
            raise
        return session

    def _home(self, session: Session) -> str:
        return os.path.join(self._path, "sessions", session.uid)

    def upper(self, session: Session) -> Upper:
        """Returns the session's upper; use it while holding the session only."""
        home = self._home(session)
        return Upper(
            os.path.join(home, f"upper.{session.generation}"), os.path.join(home, "work")
        )  # fmt: skip

    def _make_upper(self, session: Session) -> None:
        own_folder(self._path, "sessions", session.uid, "work")
        upper = self.upper(session)
        if os.path.isdir(upper.root):  # of a commit that did not come to pass
            remove_tree(upper.root)
        os.mkdir(upper.root, 0o700)
        upper.dress(upper.root, session.root)

    def hold(
        self, name: str, what: str, wait: float = 0.0, *, recover: bool = True
    ) -> "HeldSession":
        """Takes a session for oneself. Raises NotFoundError, LeaseHeldError.

        Without `recover`, a full tree that a killed holder has left is thrown away instead of
        taken in, which may fail: for who throws away what was changed.
        """
        while True:
            asked = self.get(name)
            try:
                lease = self._acquire(asked, what, wait)
            except OSError as error:
                reserve = Reserve(os.path.join(self._path, "db", "reserve"))
                if recover or error.errno not in _FULL or not reserve.release():
                    raise
                lease = self._acquire(asked, what, wait)  # with the inode that it had
            try:
                session = self.get(name)  # it may have changed while we waited
                if session.uid != asked.uid:
                    lease.release()
                    continue
                held = HeldSession(self, self._store, self._objects, session, lease)
                if recover:
                    held.recover()
                self._tidy(held.session)
            except BaseException:
                lease.release()
                raise
            return held

    def _acquire(self, session: Session, what: str, wait: float) -> Lease:
        try:
            return acquire(self._path, f"session-{session.uid}", wait=wait, what=what)
        except LeaseHeldError as error:
            raise LeaseHeldError(f"session {session.name!r}", error.holder) from None

    def _tidy(self, session: Session) -> None:
        """Removes what a killed holder, or the kernel's overlayfs, left beside the upper."""
        own_folder(self._path, "sessions", session.uid, "work")
        upper = self.upper(session)
        home = self._home(session)
        if not os.path.isdir(upper.root):
            # Killed between the transaction and this: nothing was written to it yet.
            self._make_upper(session)
        upper.take_back()  # before its note goes from `work`
        # What fails here stays, for the session is to be had anyway; `left_over` names it.
        with contextlib.suppress(OSError, EngineError):
            self._bring_over(session)
        kept = self._kept_uppers(session)
        for name in os.listdir(os.fsencode(home)):
            if name not in kept and name != b"work":
                remove_tree(os.path.join(os.fsencode(home), name))
        if next(upper.all_copying(), None) is not None:
            with contextlib.suppress(OSError, EngineError):
                self._look(session).finish_copies()
        copying = {path for _, path in upper.all_copying()}
        for name in os.listdir(upper.work):
            path = upper.work + b"/" + name
            if path in copying:
                continue
            if os.path.isdir(path) and not os.path.islink(path):
                remove_tree(path)
            else:
                os.unlink(path)

    def _before(self, session: Session) -> Upper:
        """Returns the upper of the generation before."""
        return self.upper(msgspec.structs.replace(session, generation=session.generation - 1))

    def _kept_uppers(self, session: Session) -> set[bytes]:
        """Returns the names of the uppers, beside `work`, that may not be removed."""
        upper = self.upper(session)
        names = {name for name in os.listdir(os.path.dirname(upper.root)) if name.startswith(_KEPT)}
        names.add(os.path.basename(upper.root))
        if upper.follows():
            names.add(os.path.basename(self._before(session).root))
        return names

    def _bring_over(self, session: Session) -> None:
        """Does the rest of commits: moves what no tree carries into the upper. Raises OSError."""
        upper, before = self.upper(session), self._before(session)
        home = os.path.dirname(upper.root)
        for name in sorted(name for name in os.listdir(home) if name.startswith(_KEPT)):
            old = Upper(os.fsdecode(os.path.join(home, name)), os.fsdecode(upper.work))
            if not self._look(session).bring_over(old):
                remove_tree(old.root)
        if upper.follows():
            lost = self._look(session).bring_over(before) if os.path.isdir(before.root) else []
            self._settle(session, lost)

    def _settle(self, session: Session, lost: list[Lost]) -> tuple[str, ...]:
        """Ends a commit's moves; sets the upper before aside if something there did not go.

        Returns warnings that name it, as `CommitReport` has them. Raises OSError.
        """
        upper, before = self.upper(session), self._before(session).root
        kept = os.path.join(os.path.dirname(before), _KEPT + b"%d" % (session.generation - 1))
        if lost:
            os.rename(before, kept)
        upper.follow(False)
        return tuple(
            f"{os.fsdecode(path)!r} could not be carried over ({why}): it is in {os.fsdecode(kept)}"
            for path, why in lost
        )

    def _settle_before(self, session: Session) -> None:
        """Sets aside what is still to be moved, before another generation begins. Raises OSError.

        Only a disk on which not even a directory could be renamed has left any.
        """
        if self.upper(session).follows() and os.path.isdir(self._before(session).root):
            self._settle(session, [Lost(b"", "")])

    def left_over(self, session: Session) -> list[str]:
        """Returns the paths of what an interrupted commit or copy has left and nobody could finish.

        Whoever holds the session next tries again.
        """
        upper = self.upper(session)
        try:
            names = os.listdir(os.path.dirname(upper.root))
            kept = [
                os.path.join(os.path.dirname(upper.root), name)
                for name in sorted(names)
                if name.startswith(_KEPT)
            ]
            kept += [path for _, path in upper.all_copying()]
        except FileNotFoundError:  # nobody has held it yet, or it has just gone
            return []
        return [os.fsdecode(path) for path in kept]

    def _look(self, session: Session) -> Overlay:
        """Opens a view of a session that is held, for what the programs in it do not see."""
        owner = Owner(os.getuid(), os.getgid())
        return open_overlay(self._objects, self.upper(session), session.root, b"", owner)

    def rename(self, old: str, new: str) -> Session:
        """Gives a session another name, whoever holds it. Raises as `create` does."""
        check_name("session", new)

        def change(writer: Writer) -> Session:
            session = read_record(writer, old)
            if writer.has(Db.SESSIONS, new.encode()):
                raise NameTakenError("session", new)
            writer.delete(Db.SESSIONS, old.encode())
            session = msgspec.structs.replace(session, name=new)
            put_record(writer, session)
            return session

        return self._store.write(change)

    def remove(self, held: "HeldSession") -> None:
        """Removes a held session and all that it changed."""
        held.lease.check()
        session = held.session

        def change(writer: Writer) -> None:
            writer.delete(Db.SESSIONS, find_record(writer, session.uid).name.encode())

        self._store.write(change, frees=True)
        held.release()
        remove_tree(os.fsencode(self._home(session)))
        for lease in (f"session-{session.uid}", _run_lease(session)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self._path, "locks", lease))

    def sweep(self) -> int:
        """Removes session directories that no record names; returns how many.

        The caller holds the lease on objects alone, so none is just being made.
        """
        home = os.path.join(self._path, "sessions")
        if not os.path.isdir(home):
            return 0
        live = {session.uid for session in self.all()}
        dead = [name for name in os.listdir(home) if _UID.fullmatch(name) and name not in live]
        for name in dead:
            remove_tree(os.fsencode(os.path.join(home, name)))
        return len(dead)


class HeldSession(OfOneProcess):
    """A session that this process holds: the only way to change one.

    In a child of fork() it is held no more: `release` does nothing, all else raises ForkedError.
    """

    def __init__(
        self, sessions: Sessions, store: Store, objects: Objects, session: Session, lease: Lease
    ) -> None:
        self._sessions, self._store, self._objects = sessions, store, objects
        self.session = session
        self._lease = lease

    @property
    def lease(self) -> Lease:
        """The lease by which it is held."""
        return self._lease

    def release(self) -> None:
        """Gives the session up."""
        self._lease.release()

    def __enter__(self) -> "HeldSession":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def upper(self) -> Upper:
        """Returns the upper of the current generation."""
        self._lease.check()
        return self._sessions.upper(self.session)

    def freeze(self, overlay: Overlay | None = None) -> Freeze:
        """Begins to freeze the session; `overlay` is its live view, if it has one here."""
        changed = None
        if overlay is not None:
            changed = overlay.changed = Changed()
        return Freeze(
            self._store, self._objects, self.upper(), self.session.trees(), changed,
            keeps_owners=self._keeps_owners(),
        )  # fmt: skip

    def _keeps_owners(self) -> bool:
        if self.session.trees().plain.owner is not None:
            return True
        with self._store.read() as reader:
            return keeps_owners(reader)

    def commit(
        self,
        freeze: Freeze,
        message: str = "",
        metadata: dict[str, Any] | None = None,
        ref: str | None = None,
        overlay: Overlay | None = None,
    ) -> CommitReport:
        """Makes a snapshot of what was frozen and goes on from it; durable when it returns.

        Nobody may write the session meanwhile. The old upper stays on the disk until `clean`.
        """
        old = self.session
        self._sessions._settle_before(old)
        trees = self.peek(freeze, overlay)
        if overlay is None and freeze.left_out:
            overlay = self._sessions._look(old)
        unchanged = trees.plain == self._objects.snapshot(SnapshotId(old.parent)).root
        if unchanged:
            identifier, record = SnapshotId(old.parent), b""
        else:
            snapshot = make_snapshot(trees.plain, (SnapshotId(old.parent),), message, metadata)
            identifier, record = encode_snapshot(snapshot)
        session = old.going_on(trees, parent=identifier)
        self._sessions._make_upper(session)
        if freeze.left_out:
            self._sessions.upper(session).follow(True)

        def change(writer: Writer) -> None:
            freeze.save(writer)
            if record:
                writer.put(Db.SNAPSHOTS, identifier, record)
            if ref is not None:
                writer.put(Db.REFS, ref.encode(), identifier)

        session = self._go_on(session, change)
        warnings = (*freeze.warnings, *self._rebase(overlay, freeze))
        return CommitReport(
            identifier, not unchanged, freeze.stored_bytes, warnings,
            count_owners(trees.shown) - count_owners(trees.plain), freeze.lost,
        )  # fmt: skip

    def _rebase(self, overlay: Overlay | None, freeze: Freeze) -> tuple[str, ...]:
        """Shows the next state, and moves what its tree lacks; returns warnings."""
        if overlay is None:
            return ()
        lost = overlay.rebase(self.session.root, self.upper(), freeze.left_out)
        if freeze.left_out:
            with contextlib.suppress(OSError):  # it is done: the next holder does the rest
                return self._sessions._settle(self.session, lost)
        return ()

    def fold(self, freeze: Freeze) -> Session:
        """Makes what was frozen the base, with an empty upper; the parent stays.

        Nobody may write the session meanwhile. The old upper stays on the disk until `clean`.
        """
        self._sessions._settle_before(self.session)
        trees = self.peek(freeze)
        overlay = self._sessions._look(self.session) if freeze.left_out else None
        session = self.session.going_on(trees)
        self._sessions._make_upper(session)
        if freeze.left_out:
            self._sessions.upper(session).follow(True)
        session = self._go_on(session, freeze.save)
        self._rebase(overlay, freeze)
        return session

    # The full tree beside the upper; `session_tree` says what it is for.

    @property
    def tree_path(self) -> str:
        """Where the full tree is while there is one: the same for the session's life."""
        self._lease.check()
        return os.path.join(self._sessions._home(self.session), "tree")

    def finish_tree(self) -> None:
        """Says that the full tree is complete: from now on it is what the session has."""
        with unlocked(self.tree_path) as fd:
            os.setxattr(fd, _COMPLETE, self._complete())

    def _complete(self) -> bytes:
        # The generation: what was taken in, and is just being removed, is not taken in again.
        return b"%d %s" % (self.session.generation, this_boot())

    def recover(self) -> None:
        """Takes in the full tree that a killed holder, or what it left running, has left."""
        mark = None
        missing = contextlib.suppress(FileNotFoundError, NotADirectoryError)
        with missing, unlocked(self.tree_path) as fd:
            mark = attribute(fd, _COMPLETE)
        if mark == self._complete():
            with acquire(self._sessions._path, "objects", shared=True, wait=_ADD_WAIT):
                self.take_in({})

    def take_in(self, known: dict[Sign, Known]) -> tuple[str, ...]:
        """Makes the full tree the session's base, with an empty upper, and removes it.

        The caller holds the lease on objects. Files that are as they are `known` are not read.
        Returns warnings, as `CommitReport` has them. After an error the tree stays.
        """
        tree = Upper(self.tree_path, self.upper().work.decode("utf-8", "surrogateescape"))
        tree.open_up()
        freeze = Freeze(
            self._store, self._objects, tree, None, known=known,
            keeps_owners=self._keeps_owners(), before=self.session.root,
        )  # fmt: skip
        freeze.prepare()
        session = self.session.going_on(self.peek(freeze))
        self._sessions._make_upper(session)
        self._sessions.upper(session).follow(True)  # the upper may have sockets, no tree has
        self._go_on(session, freeze.save)
        self._sessions._tidy(self.session)
        return tuple(freeze.warnings)

    def take_back(self) -> None:
        """Gets the upper back from the kernel's overlayfs, which is mounted no more."""
        self._lease.check()
        self._sessions._tidy(self.session)

    def fork(self, freeze: Freeze, name: str, overlay: Overlay | None = None) -> Session:
        """Makes a session that begins with all that this one has; this one stays as it is."""
        check_name("session", name)
        old = self.session
        session = old.going_on(
            self.peek(freeze, overlay),
            name=name, uid=os.urandom(8).hex(), generation=0, created_ns=time.time_ns(),
            temporary=False,
        )  # fmt: skip
        return self._sessions._add(session, freeze.save)

    def peek(self, freeze: Freeze, overlay: Overlay | None = None) -> Trees:
        """Returns the trees that were frozen; the caller saves them or holds the objects' lease."""
        self._lease.check()
        if overlay is not None:
            overlay.changed = None
        return freeze.build()

    def peek_root(self, freeze: Freeze, overlay: Overlay | None = None) -> Entry:
        """Returns the root of what was frozen as a snapshot would have it; see `peek`."""
        return self.peek(freeze, overlay).plain

    def reset(self, to: SnapshotId | None = None) -> Session:
        """Throws away what the session changed since its last commit, whose tree it shows again.

        With `to`, goes on from another snapshot, as that is stored. The caller holds the lease on
        objects. The session's layers stay.
        """
        parent = self.session.parent if to is None else bytes(to)
        root = self._sessions.stands_on(msgspec.structs.replace(self.session, parent=parent))
        return self._start_over(root, parent)

    def reset_to_factory(self) -> Session:
        """Makes the session what it was made of; its commits stay as snapshots.

        The caller holds the lease on objects.
        """
        root = self._sessions.factory(self.session)
        return self._start_over(root, self.session.layers[-1][1])

    def _start_over(self, root: Entry, parent: bytes) -> Session:
        """Goes on from a tree that is stored, without anything that was changed or kept aside."""
        session = self.session.going_on(Trees(root, root), parent=parent)
        self._sessions._make_upper(session)
        done = self._go_on(session, lambda writer: None, frees=True)
        for path in self._sessions.left_over(done):
            self.upper().discard(os.fsencode(path))
        return done

    def restore(self, freeze: Freeze, paths: Sequence[bytes]) -> Session:
        """Makes paths what they were in the layers, which are changes then; the rest stays.

        The caller holds the lease on objects. Raises NotFoundError for what neither has.
        """
        self._sessions._settle_before(self.session)
        source, trees = self._sessions.factory(self.session), self.peek(freeze)
        self._store.write(freeze.save)
        made = []
        for root in trees:
            batch = Batch()
            made.append(restored(self._objects, batch, root, source, paths))
            self._store.write(batch.flush)
        overlay = self._sessions._look(self.session) if freeze.left_out else None
        session = self.session.going_on(Trees(*made))
        self._sessions._make_upper(session)
        if freeze.left_out:
            self._sessions.upper(session).follow(True)
        session = self._go_on(session, lambda writer: None)
        self._rebase(overlay, freeze)
        return session

    def _go_on(
        self, session: Session, save: Callable[[Writer], None], *, frees: bool = False
    ) -> Session:
        """Stores the next state of the session, under the name that it has by then."""
        old = self.session

        def change(writer: Writer) -> Session:
            current = find_record(writer, old.uid)
            if current.generation != old.generation:
                raise InUseError(f"session {old.name!r}", "somebody who ignored its lease")
            save(writer)
            _check_layers(writer, session)
            renamed = msgspec.structs.replace(session, name=current.name)
            put_record(writer, renamed)
            return renamed

        self.session = self._store.write(change, frees=frees)
        return self.session

    def clean(self) -> None:
        """Removes the uppers of earlier generations; takes as long as they are large.

        Raises nothing, for what was asked for is done: what resists, the next holder removes.
        """
        upper = self.upper()
        home = os.path.dirname(upper.root)
        with contextlib.suppress(OSError):
            kept = self._sessions._kept_uppers(self.session)
            for name in os.listdir(home):
                if name.startswith(b"upper.") and name not in kept:
                    upper.discard(os.path.join(home, name))


def _run_lease(session: Session) -> str:
    return f"run-{session.uid}"


def this_boot() -> bytes:
    """Returns what stands for the time since the machine was started."""
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return file.read().strip()


def _check_layers(reader: Reader, session: Session) -> None:
    """Raises MissingObjectError if a snapshot was removed since the session was thought of."""
    for layer in (session.parent, *(layer for _, layer in session.layers)):
        if not reader.has(Db.SNAPSHOTS, layer):
            raise MissingObjectError("snapshot", layer)


def read_record(reader: Reader, name: str) -> Session:
    """Returns a session's record. Raises NotFoundError, CorruptObjectError."""
    key = name.encode("utf-8", "surrogateescape")
    raw = reader.get(Db.SESSIONS, key) if 0 < len(key) <= LONGEST_KEY else None
    if raw is None:
        raise NotFoundError("session", name)
    return decode_record(key, raw)


def find_record(reader: Reader, uid: str) -> Session:
    """Returns the record of a session that may have been renamed. Raises NotFoundError."""
    for key, raw in reader.items(Db.SESSIONS):
        session = decode_record(key, raw)
        if session.uid == uid:
            return session
    raise NotFoundError("session", uid)


def may_be_uid(name: str) -> bool:
    """True if a directory of this name can be a session's."""
    return _UID.fullmatch(name) is not None


def decode_record(key: bytes, raw: memoryview) -> Session:
    """Returns the record stored under `key`. Raises CorruptObjectError."""
    try:
        session = msgspec.msgpack.decode(raw, type=Session)
    except msgspec.DecodeError as error:
        raise CorruptObjectError("session", key, str(error)) from error
    if _UID.fullmatch(session.uid) is None or session.name.encode() != key:
        raise CorruptObjectError("session", key, "it is not what it is called")
    return session


def put_record(writer: Writer, session: Session) -> None:
    """Stores a session's record under its name."""
    writer.put(Db.SESSIONS, session.name.encode(), msgspec.msgpack.encode(session))
