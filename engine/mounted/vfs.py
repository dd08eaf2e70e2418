"""The virtual filesystem: what a mount shows, as a table of inodes. Needs no FUSE.

    /snapshots/<id>/        every snapshot; refs are links to them
    /snapshots/.base-...    a session's base that is no snapshot, not listed: see `base_path`
    /sessions/<name>/       every session, writable, held from the first look into it on
    /layers/<session>/      0-infrastructure 1-global 2-blueprint, links; 3-session, a link
    /.amalgam/              status (JSON), socket (the control socket's path), and what the driver
                            adds (`texts`)

A driver calls it from one thread. `prepare`-like work that may run in another thread is said
so. What is immutable may be kept by the kernel for ever; what is not is either changed through
this table only, or named by `stale` after a change of the store.
"""

import contextlib
import errno
import itertools
import json
import os
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import msgspec

from engine.errors import InUseError, MissingObjectError, NotFoundError
from engine.host.leases import LeaseHeldError, holder_of, is_held
from engine.ids import InodeNo, SnapshotId, is_full_id
from engine.mounted.inodes import Attributes, Inode, VirtualDirectory, VirtualLink, fail, number
from engine.mounted.overlay import Overlay
from engine.mounted.overlay_directory import SessionDirectory, open_overlay
from engine.mounted.overlay_file import SessionFile
from engine.mounted.session_roots import SessionRoot
from engine.mounted.snapshot_inodes import Shown, SnapshotDirectory
from engine.repository import Repository
from engine.sessions.freezing import Freeze
from engine.sessions.sessions import HeldSession, Session
from engine.storage.nodes import Entry, Owner
from engine.storage.store import Db

_BASE = ".base-"

ROOT = InodeNo(1)
SNAPSHOTS, SESSIONS, LAYERS, _AMALGAM, _PLACE = (InodeNo(n) for n in (2, 3, 4, 5, 6))


_ROOMY, _ROOM_EACH = 1 << 20, 400
"""How many bytes the table may have, and how many more each inode: a dict that grows has 120."""


class VfsStatistics(msgspec.Struct, frozen=True):
    """What the table holds: inodes, sessions, and over all sessions files, orphans, directories."""

    inodes: int
    sessions: int
    open_files: int
    orphans: int
    open_directories: int


class LiveSession:
    """A session that this mount holds, with its view."""

    def __init__(self, held: HeldSession, overlay: Overlay) -> None:
        self.held, self.overlay = held, overlay


class Lent(msgspec.Struct):
    """A session that another process was let have; what it takes to go on afterwards.

    `places` are the directories that somebody still stands in, by inode number. While it is
    `reserved`, the mount does not take it back by itself.
    """

    uid: str
    made: int
    new_directories: set[InodeNo]
    places: dict[int, bytes]
    reserved: bool = True


def base_path(repository: Repository, session: Session) -> str:
    """Returns where a mount shows the base of a session, relative to the mount."""
    if repository.snapshot(SnapshotId(session.parent)).root == session.root:
        return f"snapshots/{session.parent.hex()}"
    return f"snapshots/{_BASE}{session.uid}-{session.generation}"


class Vfs:
    """The inodes of one mount of one repository."""

    def __init__(self, repository: Repository, owner: Owner, facts: dict[str, str]) -> None:
        """Makes the table. `facts` (mount point, socket) go into `/.amalgam`."""
        self.repository, self.owner, self.facts = repository, owner, facts
        self.started_ns = time.time_ns()
        self.snapshots_elsewhere = False
        """Whether `/snapshots` is a mount of its own, and here only a place for it."""
        self.live: dict[str, LiveSession] = {}
        self.lent: dict[str, Lent] = {}
        self.snapshot_roots: set[bytes] = set()
        self._epochs: Counter[str] = Counter()
        self.looks = itertools.count()
        self.texts: dict[str, Callable[[], str]] = {
            "socket": lambda: self.facts.get("socket", "") + "\n",
            "status": lambda: status_text(self),
        }
        """What `/.amalgam` holds: names, and what makes their text."""
        self.table: dict[int, Inode] = {}
        self.shown = Shown(self.find, repository.objects, owner)
        place = _Place(_PLACE, owner, self.started_ns)
        for inode in (
            _Root(self), _Snapshots(self), _Sessions(self), _Layers(self), _Own(self), place,
        ):  # fmt: skip
            self.table[inode.ino] = inode
            inode.lookups = 1

    # The table.

    def inode(self, ino: int) -> Inode:
        """Returns an inode that the kernel knows. Raises ESTALE for one that is gone."""
        try:
            found = self.table[ino]
            if type(found) is _LentDirectory:
                with contextlib.suppress(LeaseHeldError, NotFoundError):
                    self.session(found.session)
                return self.table[ino]
            return found
        except KeyError:
            raise fail(errno.ESTALE) from None

    def find(self, ino: InodeNo) -> Inode | None:
        """Returns the inode of that number if the kernel knows it."""
        return self.table.get(ino)

    def refer(self, inode: Inode) -> Inode:
        """Counts one more of the kernel's references; returns the inode to use."""
        known = self.table.setdefault(inode.ino, inode)
        known.lookups += 1
        return known

    def forget(self, ino: int, count: int) -> None:
        """Takes `count` of the kernel's references back."""
        inode = self.table.get(ino)
        if inode is None or ino <= _PLACE:
            return
        inode.lookups -= count
        if inode.lookups <= 0:
            inode.lookups = 0
            del self.table[ino]
            inode.forgotten()

    def known(self, inode: Inode) -> Inode:
        """Returns the inode in the table of that number, else this one."""
        return self.table.get(inode.ino, inode)

    def shrink(self) -> bool:
        """Gives back the room of what the kernel has forgotten: a dict never does by itself.

        Tells whether that was much.
        """
        if sys.getsizeof(self.table) <= _ROOMY + _ROOM_EACH * len(self.table):
            return False
        self.table = dict(self.table)
        return True

    def shed(self) -> None:
        """Empties the caches: under memory pressure, what they hold is read again instead."""
        self.repository.objects.shed()
        self.repository.store.trim()

    # Sessions.

    def session(self, name: str, *, recover: bool = True) -> LiveSession:
        """Returns a session, taken for this mount; see `Sessions.hold`, which it raises as."""
        live = self.live.get(name)
        if live is None:
            lent = self.lent.get(name)
            if lent is not None and lent.reserved:
                raise LeaseHeldError(f"session {name!r}", {})
            held = self.repository.sessions.hold(name, "the mount", recover=recover)
            self.lent.pop(name, None)
            overlay = open_overlay(
                self.repository.objects, held.upper(), held.session.root,
                self._key(held.session), self.owner,
            )  # fmt: skip
            live = self.live[name] = LiveSession(held, overlay)
            if lent is not None:
                self._settle(lent, overlay if lent.uid == held.session.uid else None)
            shown = self.table.get(overlay.root.ino)
            if isinstance(shown, SessionRoot):
                overlay.root.lookups = shown.lookups
                self.table[overlay.root.ino] = overlay.root
        return live

    def _key(self, session: Session) -> bytes:
        """Returns what a session's inode numbers are made of; others once it was let go."""
        return b"session %s %d" % (session.uid.encode(), self._epochs[session.uid])

    def session_root(self, name: str) -> Inode:
        """Returns a session's root, without taking the session. Raises NotFoundError."""
        live = self.live.get(name)
        if live is not None:
            return live.overlay.root
        sessions = self.repository.sessions
        session = sessions.get(name)
        ino = number(self._key(session))
        known = self.table.get(ino)
        if isinstance(known, SessionRoot):
            known.session = session  # it may have been renamed
            return known
        if type(known) is _LentDirectory:
            return known
        return SessionRoot(ino, sessions, session, self.owner, self._look_into)

    def _look_into(self, shown: SessionRoot) -> Inode:
        try:
            root = self.session(shown.session.name).overlay.root
        except LeaseHeldError:
            raise fail(errno.EBUSY) from None
        except NotFoundError:
            raise fail(errno.ESTALE) from None
        if root.ino != shown.ino:
            raise fail(errno.ESTALE)
        return root

    # Lending a session to somebody else, as to a command under the kernel's overlayfs.

    def files_in_use(self, name: str) -> list[bytes]:
        """Returns the files of a session that the kernel knows, by path.

        Once it was told to forget the session, these are those that somebody has open.
        """
        live = self.live.get(name)
        overlay = None if live is None else live.overlay
        return [
            inode.path()
            for inode in self.table.values()
            if isinstance(inode, SessionFile) and inode.overlay is overlay
        ]

    def lend(self, name: str) -> list[InodeNo]:
        """Lets go of a session for another process, which has until `lent_out` to take it.

        Its directories answer EBUSY until the session comes back, by the next look at it when
        nobody holds it, and then go on. Returns those that the kernel knows. Raises
        NotFoundError, LeaseHeldError; InUseError while files are open.
        """
        live = self.session(name)
        overlay = live.overlay
        files = self.files_in_use(name)
        if files:
            shown = ", ".join(os.fsdecode(path) for path in files[:3])
            raise InUseError(f"session {name!r}", f"whoever has files open in it: {shown}")
        places = {}
        for ino, inode in self.table.items():
            if isinstance(inode, SessionDirectory) and inode.overlay is overlay:
                derived = inode.parent is None or inode.ino == inode.derived_number()
                if inode.gone is None and (derived or inode.ino in overlay.new_directories):
                    places[ino] = inode.path()
        places[overlay.root.ino] = b""
        lookups = {ino: self.table[ino].lookups for ino in places if ino in self.table}
        self._let_go(name)
        for ino, count in lookups.items():
            place = _LentDirectory(InodeNo(ino), self, name)
            place.lookups = count
            self.table[ino] = place
        self.lent[name] = Lent(
            live.held.session.uid, overlay.made, overlay.new_directories, places
        )  # fmt: skip
        return [InodeNo(ino) for ino in places]

    def lent_out(self, name: str) -> None:
        """Ends the reservation of a session that was lent: its taker has it, or never will."""
        if name in self.lent:
            self.lent[name].reserved = False

    def check_not_lent(self, name: str) -> None:
        """Raises InUseError if a session is lent, and its taker has it."""
        lent = self.lent.get(name)
        lease = None if lent is None else f"session-{lent.uid}"
        if lease is not None and is_held(self.repository.path, lease):
            what = holder_of(self.repository.path, lease).get("what", "another process")
            raise InUseError(f"session {name!r}", what)

    def _settle(self, lent: Lent, overlay: Overlay | None) -> None:
        """Gives the directories that somebody stands in their places in the session again."""
        if overlay is not None:
            overlay.made, overlay.new_directories = lent.made, lent.new_directories
        for ino, path in sorted(lent.places.items(), key=lambda place: place[1]):
            waiting = self.table.get(ino)
            if type(waiting) is not _LentDirectory:
                continue
            del self.table[ino]
            if overlay is None:
                continue
            found: Inode | None = overlay.root
            for name in path.split(b"/") if path else []:
                found = found.lookup(name) if isinstance(found, SessionDirectory) else None
            if isinstance(found, SessionDirectory):
                found.ino, found.lookups = InodeNo(ino), waiting.lookups
                self.table[ino] = found

    def drop_session(self, name: str) -> None:
        """Lets go of a session: its inodes answer ESTALE from now on."""
        live = self._let_go(name)
        if live is not None:
            self._epochs[live.held.session.uid] += 1

    def _let_go(self, name: str) -> LiveSession | None:
        live = self.live.pop(name, None)
        if live is None:
            return None
        for ino, inode in list(self.table.items()):
            if getattr(inode, "overlay", None) is live.overlay:
                del self.table[ino]
        live.overlay.close()
        live.held.release()
        return live

    def reset(self, name: str, to: SnapshotId | None, *, factory: bool = False) -> Session:
        """Throws away what a session changed since its last commit; with `factory`, since ever.

        The caller holds the lease on objects.
        """
        live = self.session(name, recover=False)
        session = live.held.reset_to_factory() if factory else live.held.reset(to)
        return self._begin_again(name, live, session)

    def restore(self, name: str, freeze: Freeze, paths: Sequence[bytes]) -> Session:
        """Makes paths of a session what they were in its layers; see `HeldSession.restore`."""
        live = self.session(name)
        live.overlay.changed = None
        return self._begin_again(name, live, live.held.restore(freeze, paths))

    def _begin_again(self, name: str, live: LiveSession, session: Session) -> Session:
        live.held.clean()  # while it is held: the next holder may have a newer upper
        self.drop_session(name)
        return session

    def remove(self, name: str) -> None:
        """Removes a session and what it changed."""
        self.drop_session(name)
        with self.repository.sessions.hold(name, "removing it", recover=False) as held:
            self.repository.sessions.remove(held)
        lent = self.lent.pop(name, None)
        if lent is not None:
            self._settle(lent, None)

    def rename(self, old: str, new: str) -> Session:
        """Gives a session another name; its inodes stay. Raises InUseError while it is lent."""
        self.check_not_lent(old)
        self.lent.pop(old, None)
        session = self.repository.sessions.rename(old, new)
        live = self.live.pop(old, None)
        if live is not None:
            live.held.session = session
            self.live[new] = live
        else:
            self.session_root(new)  # one that the kernel knows takes the new name over
        return session

    def removed_snapshots(self) -> list[bytes]:
        """Returns the names in `/snapshots` that the kernel knows and the store no more."""
        gone = [name for name in self.snapshot_roots if not self._has(name.decode())]
        for name in gone:
            self.snapshot_roots.discard(name)
        return gone

    def _has(self, name: str) -> bool:
        if name.startswith(_BASE):
            return self.base(name) is not None
        return self.repository.has_snapshot(SnapshotId(bytes.fromhex(name)))

    def base(self, name: str) -> Entry | None:
        """Returns the base tree that has a name in `/snapshots`, as `base_path` makes them."""
        uid, _, generation = name.removeprefix(_BASE).partition("-")
        for session in self.repository.sessions.all():
            if session.uid == uid and str(session.generation) == generation:
                return session.root
        return None

    def close(self) -> None:
        """Gives up all sessions."""
        for name in list(self.live):
            self.drop_session(name)

    def moved(self) -> dict[str, int]:
        """Returns by uid how often a directory of a live session's base was renamed."""
        return {live.held.session.uid: live.overlay.moved for live in self.live.values()}

    def statistics(self) -> VfsStatistics:
        """Returns what the table holds."""
        files = [live.overlay.statistics() for live in self.live.values()]
        return VfsStatistics(
            len(self.table), len(self.live), sum(f.open_files for f in files),
            sum(f.orphans for f in files), sum(f.open_directories for f in files),
        )  # fmt: skip


class _Place(VirtualDirectory):
    """What `/snapshots` is mounted on. fusermount3 wants it writable."""

    __slots__ = ()

    mode = 0o755


class _Root(VirtualDirectory):
    __slots__ = ("vfs",)

    def __init__(self, vfs: Vfs) -> None:
        super().__init__(ROOT, vfs.owner, vfs.started_ns)
        self.vfs = vfs

    def names(self) -> list[bytes]:
        return [b".amalgam", b"layers", b"sessions", b"snapshots"]

    def lookup(self, name: bytes) -> Inode | None:
        snapshots = _PLACE if self.vfs.snapshots_elsewhere else SNAPSHOTS
        at = {b"snapshots": snapshots, b"sessions": SESSIONS, b"layers": LAYERS,
              b".amalgam": _AMALGAM}.get(name)  # fmt: skip
        return None if at is None else self.vfs.table[at]


class _OfStore(VirtualDirectory):
    """A directory whose names come from the store, and change when that does."""

    __slots__ = ("_order", "_seen", "vfs")

    keep_attributes = 1.0  # every path leads through here; a listing may be as old

    def __init__(self, ino: InodeNo, vfs: Vfs) -> None:
        super().__init__(ino, vfs.owner, vfs.started_ns)
        self.vfs = vfs
        self._seen = -1
        self._order: tuple[int, list[tuple[int, bytes]]] = (-1, [])

    def changed_ns(self) -> int:
        now = self.vfs.repository.store.transaction_id()
        if now != self._seen:
            self._seen, self.time_ns = now, time.time_ns()
        return self.time_ns

    def order(self) -> list[tuple[int, bytes]]:
        now = self.vfs.repository.store.transaction_id()
        if now != self._order[0]:
            self._order = (now, super().order())
        return self._order[1]


class _Snapshots(_OfStore):
    __slots__ = ()

    def __init__(self, vfs: Vfs) -> None:
        super().__init__(SNAPSHOTS, vfs)

    def names(self) -> list[bytes]:
        repository = self.vfs.repository
        ids = [identifier.hex().encode() for identifier in repository.snapshots()]
        return sorted([*ids, *(name.encode() for name in repository.refs())])

    def lookup(self, name: bytes) -> Inode | None:
        vfs, text = self.vfs, name.decode("ascii", "replace")
        if is_full_id(text) or text.startswith(_BASE):
            try:
                if text.startswith(_BASE):
                    root = vfs.base(text)
                else:
                    root = vfs.repository.snapshot(SnapshotId(bytes.fromhex(text))).root
            except MissingObjectError:
                root = None
            if root is None:
                return None
            vfs.snapshot_roots.add(name)
            return SnapshotDirectory(vfs.shown, root, name, b"")
        with vfs.repository.store.read() as reader:
            raw = reader.get(Db.REFS, name) if len(name) <= 255 else None
            if raw is None:
                return None
            target = bytes(raw).hex().encode()
        return VirtualLink(number(b"ref", name, target), vfs.owner, vfs.started_ns, target)


class _Sessions(_OfStore):
    __slots__ = ()

    def __init__(self, vfs: Vfs) -> None:
        super().__init__(SESSIONS, vfs)

    def names(self) -> list[bytes]:
        return [session.name.encode() for session in self.vfs.repository.sessions.all()]

    def lookup(self, name: bytes) -> Inode | None:
        try:
            return self.vfs.session_root(name.decode("ascii"))
        except (NotFoundError, UnicodeDecodeError):
            return None


class _LentDirectory(VirtualDirectory):
    """Stands for a directory of a session that was lent: there, but not to be entered.

    Its number stays, so that what is mounted over it elsewhere stays mounted.
    """

    __slots__ = ("session",)

    keep_entry = 1.0

    def __init__(self, ino: InodeNo, vfs: Vfs, session: str) -> None:
        super().__init__(ino, vfs.owner, vfs.started_ns)
        self.session = session

    def lookup(self, name: bytes) -> Inode | None:
        raise fail(errno.EBUSY)

    def listing(self, cookie: int) -> Iterator[tuple[int, bytes, Inode]]:
        raise fail(errno.EBUSY)


class _Layers(_OfStore):
    __slots__ = ()

    def __init__(self, vfs: Vfs) -> None:
        super().__init__(LAYERS, vfs)

    def names(self) -> list[bytes]:
        return [session.name.encode() for session in self.vfs.repository.sessions.all()]

    def lookup(self, name: bytes) -> Inode | None:
        try:
            session = self.vfs.repository.sessions.get(name.decode("ascii"))
        except (NotFoundError, UnicodeDecodeError):
            return None
        return _Stack(self.vfs, session)


class _Stack(VirtualDirectory):
    __slots__ = ("_links",)

    keep_entry = 0.0

    def __init__(self, vfs: Vfs, session: Session) -> None:
        self._links = {
            label.encode(): b"../../snapshots/" + layer.hex().encode()
            for label, layer in session.layers
        }
        self._links[b"3-session"] = b"../../sessions/" + session.name.encode()
        parts = [name + target for name, target in self._links.items()]
        super().__init__(number(b"layers", *parts), vfs.owner, vfs.started_ns)

    def names(self) -> list[bytes]:
        return sorted(self._links)

    def lookup(self, name: bytes) -> Inode | None:
        target = self._links.get(name)
        if target is None:
            return None
        ino = number(b"layer", self.ino.to_bytes(8, "big"), name)
        return VirtualLink(ino, self.owner, self.time_ns, target)


class _Own(VirtualDirectory):
    __slots__ = ("vfs",)

    def __init__(self, vfs: Vfs) -> None:
        super().__init__(_AMALGAM, vfs.owner, vfs.started_ns)
        self.vfs = vfs

    def names(self) -> list[bytes]:
        return sorted(name.encode() for name in self.vfs.texts)

    def lookup(self, name: bytes) -> Inode | None:
        make = self.vfs.texts.get(name.decode("ascii", "replace"))
        return None if make is None else _Text(self.vfs, make())


def status_text(vfs: Vfs) -> str:
    """Returns what `/.amalgam/status` says: JSON, one object."""
    facts = {
        **vfs.facts,
        "store": vfs.repository.path,
        "vfs": msgspec.to_builtins(vfs.statistics()),
        "objects": msgspec.to_builtins(vfs.repository.objects.statistics()),
    }
    return json.dumps(facts, indent=1) + "\n"


class _Text(Inode):
    """A file whose text is made when it is looked up, and stays: each look is a file of its own.

    A look lasts so long that a program may stat it, then open it, and find the same.
    """

    __slots__ = ("_owner", "_text", "_time_ns")

    keep_entry = 1.0

    def __init__(self, vfs: Vfs, text: str) -> None:
        super().__init__(number(b"own", b"%d" % next(vfs.looks)))
        self._owner, self._time_ns = vfs.owner, time.time_ns()
        self._text = text.encode("utf-8", "surrogateescape")

    def attributes(self) -> Attributes:
        size, now = len(self._text), self._time_ns
        return Attributes(
            self.ino, stat.S_IFREG | 0o400, 1, *self._owner, size, 1, now, now, now
        )  # fmt: skip

    def read(self, offset: int, size: int) -> bytes:
        return self._text[offset : offset + size]
