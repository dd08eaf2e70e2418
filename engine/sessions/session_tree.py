"""The full tree of a session: all of it as a plain directory, for programs that need no mount.

It lies beside the session's upper, as `tree`. `make` writes it; `take_in` makes what it has
become what the session has, and removes it. Meanwhile the session's record is as it was before.
A holder that is killed in between leaves the tree, and whoever holds the session next takes it
in. Not if the machine was started anew since: then what was written may not have reached the
disk, and the session is what it was. A tree that was not finished is removed.

What was not changed is not read again: its stat row is as it was when the tree was made (git's
index, Documentation/technical/racy-git.txt).
"""

import os
import time
from collections.abc import Iterator

import msgspec

from engine.host.removing import remove_tree
from engine.plain.filling import OPEN_DIRECTORY, CheckoutReport, Fill
from engine.progress import Progress
from engine.sessions.freezing import Known, Sign, sign_of
from engine.sessions.sessions import HeldSession
from engine.sessions.upper import Upper
from engine.storage.nodes import Entry, Kind
from engine.storage.objects import Objects
from engine.storage.store import Store
from engine.trees.directory import Directory, directory_id

TICK = 0.01
"""Seconds after which a change to a file surely gets another time than the one before."""


_FILES_CLOCK = 5
"""CLOCK_REALTIME_COARSE, for which Python has no name: the time that the kernel gives to files. It
may be a tick behind the other, so what was read at once would seem to have been read before."""

_Row = tuple[Sign, Known]


class TreeReads(msgspec.Struct, frozen=True):
    """What was read in a full tree, as far as its disk notes it (not with `noatime`)."""

    files: int
    bytes: int


class SessionTree:
    """The full tree of a session that this process holds."""

    def __init__(self, store: Store, objects: Objects, held: HeldSession) -> None:
        self._store, self._objects, self._held = store, objects, held
        self._known: dict[Sign, Known] = {}
        self._started_ns = 0

    @property
    def path(self) -> str:
        """Where it is: the same for the session's life."""
        return self._held.tree_path

    def make(self, progress: Progress | None = None) -> CheckoutReport:
        """Writes the session out. The caller holds the lease on objects.

        `progress` is called with bytes done and bytes in all. Raises OSError (a full disk) and
        damage of objects; the session is as it was then.
        """
        freeze = self._held.freeze()
        freeze.prepare()
        if self._held.peek(freeze).shown != self._held.session.root:
            self._held.fold(freeze)
            self._held.clean()
        report = self._write(self._held.session.root, progress)
        time.sleep(TICK)
        self._started_ns = time.clock_gettime_ns(_FILES_CLOCK)
        self._held.finish_tree()
        return report

    def _write(self, root: Entry, progress: Progress | None) -> CheckoutReport:
        os.mkdir(self.path, 0o700)
        maker = os.getpid()
        try:
            fd = os.open(self.path, OPEN_DIRECTORY)
            try:
                job = Fill(self._objects, root, fd, self.path, progress)
                job.run()
            finally:
                os.close(fd)
            self._known = dict(_known(self._objects, self._upper(), b"", root))
        except BaseException:
            if os.getpid() == maker:  # not in a child that `progress` has forked
                remove_tree(os.fsencode(self.path))
            raise
        return job.report

    def reads(self) -> TreeReads:
        """Tells which of its first files were read since it was made. Raises OSError."""
        first = {sign[0] for sign in self._known}
        read = [
            status.st_size
            for _, status in self._upper().inside(b"")
            if status.st_ino in first and status.st_atime_ns >= self._started_ns
        ]
        return TreeReads(len(read), sum(read))

    def _upper(self) -> Upper:
        return Upper(self.path, "")

    def take_in(self) -> tuple[str, ...]:
        """Makes it what the session has, durably, and removes it. Returns warnings.

        The caller holds the lease on objects. After an error (a full disk) the tree stays, and
        the next holder takes it in.
        """
        return self._held.take_in(self._known)


def _known(objects: Objects, upper: Upper, path: bytes, folder: Entry) -> Iterator[_Row]:
    """Yields what the files of a tree just written are, by their stat rows.

    But for those in a directory that keeps its owner out: what is not known is read later.
    """
    if os.geteuid() != 0 and folder.mode & 0o500 != 0o500:
        return
    entries = {entry.name: entry for entry in Directory(objects, directory_id(folder))}
    for name, status in upper.scan(path):
        entry = entries.get(name)
        if entry is None or status is None:
            continue
        if entry.kind == Kind.DIRECTORY:
            yield from _known(objects, upper, path + b"/" + name if path else name, entry)
        elif entry.kind == Kind.FILE:
            yield sign_of(status), (entry.content, entry.mode, entry.xattrs)
