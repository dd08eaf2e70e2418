"""Checkout: a tree becomes a real directory.

Everything is made in a new directory beside the target, relative to directories' descriptors
and never through a symbolic link, and renamed to the target when it is whole: a checkout that
was killed leaves a directory called `.NAME.checkout-XXXXXXXX`, never half a target. Whoever
makes one holds an flock on it, so that the next checkout to that target can tell what a dead one
left, and removes it.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable

from engine.host.removing import remove_tree
from engine.host.set_id import leaving
from engine.plain.checkout_records import mark, mark_of, unmark
from engine.plain.filling import (
    OPEN_DIRECTORY,
    CheckoutRefusedError,
    CheckoutReport,
    Fill,
    Rows,
    write_entry,
)
from engine.plain.surveying import Room, Survey
from engine.progress import Progress
from engine.storage.nodes import Entry, Kind
from engine.storage.objects import Objects
from engine.trees.outside_links import check_links

_OPEN_AROUND = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_IN_THE_WAY = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}
_TICK = 0.02
"""Seconds in which a file's ctime may stand still: twice the kernel's tick at its coarsest."""
Recorder = Callable[[os.stat_result, bool, Rows], None]
"""Called when all is made, before the rename: the directory's status, whether it could be
marked, and the rows of the stat cache."""


def check_out(
    objects: Objects,
    root: Entry,
    target: str,
    *,
    identifier: bytes,
    record: Recorder,
    tracked: bool = True,
    outside_links: bool = False,
    set_id: bool = False,
    progress: Progress | None = None,
) -> CheckoutReport:
    """Makes the tree at `target`, which must not exist or be an empty directory.

    Files of root's get no set-id bits unless `set_id`; see `engine.host.set_id`.

    The directory is marked with `identifier`. Raises CheckoutRefusedError, TreeTooLargeError,
    and OutsideLinkError unless `outside_links`, before anything is made; OSError (a full disk) and
    damage of objects, after which the target is as it was.
    """
    target = os.path.abspath(target)
    check_target(target)
    parent, name = os.path.split(target)
    _remove_dead(parent, name)
    around = os.open(parent, _OPEN_AROUND)
    temporary = f".{name[:50]}.checkout-{secrets.token_hex(4)}"
    try:
        survey = Survey(objects)
        Room.free(around).check(objects, [root], survey, target)
        if not outside_links:
            check_links(objects, root, survey)
        os.mkdir(temporary, 0o700, dir_fd=around)
        maker = os.getpid()
        try:
            fd = os.open(temporary, OPEN_DIRECTORY, dir_fd=around)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                marked = mark(fd, identifier)
                bits = leaving(asked=set_id)
                job = Fill(objects, root, fd, target, progress, bits=bits)
                job.run()
                if tracked:
                    _wait_for_tick()
                else:
                    unmark(fd)
                record(os.fstat(fd), marked, job.rows)
                try:
                    os.rename(temporary, name, src_dir_fd=around, dst_dir_fd=around)
                except OSError as error:
                    if error.errno not in _IN_THE_WAY:
                        raise
                    why = "something has come there meanwhile"
                    raise CheckoutRefusedError(target, why) from error
            finally:
                os.close(fd)
        except BaseException:
            if os.getpid() == maker:  # not in a child that `progress` has forked
                remove_tree(os.fsencode(temporary), around)
            raise
    finally:
        os.close(around)
    job.report.tracked = marked and tracked
    return job.report


def check_target(target: str) -> None:
    """Raises CheckoutRefusedError if a tree cannot be made at `target`."""
    target = os.path.abspath(target)
    parent = os.path.dirname(target)
    try:
        os.lstat(target)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise CheckoutRefusedError(target, "its name is too long") from error
    if os.path.lexists(target):
        if os.path.islink(target) or not os.path.isdir(target):
            raise CheckoutRefusedError(target, "it exists and is not a directory")
        if os.listdir(target):
            raise CheckoutRefusedError(target, "the directory is not empty")
    if not os.path.isdir(parent):
        raise CheckoutRefusedError(target, f"{parent!r} is not a directory")


def check_out_file(
    objects: Objects, entry: Entry, target: str, *, set_id: bool = False
) -> CheckoutReport:
    """Makes a single file or symbolic link at `target`, where nothing may be. Raises as above."""
    target = os.path.abspath(target)
    parent, name = os.path.split(target)
    if os.path.lexists(target):
        raise CheckoutRefusedError(target, "it exists already")
    if not os.path.isdir(parent):
        raise CheckoutRefusedError(target, f"{parent!r} is not a directory")
    temporary = os.fsencode(f".{name[:50]}.checkout-{secrets.token_hex(4)}")
    bits = leaving(asked=set_id)
    fd = os.open(parent, _OPEN_AROUND)
    try:
        try:
            write_entry(objects, fd, entry, temporary, bits=bits)
            # A link, unlike a rename, does not replace what has come there meanwhile.
            os.link(temporary, name, src_dir_fd=fd, dst_dir_fd=fd, follow_symlinks=False)
        except FileExistsError as error:
            raise CheckoutRefusedError(target, "it exists already") from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=fd)
    finally:
        os.close(fd)
    if entry.kind != Kind.FILE:
        return CheckoutReport(1, 0)
    return CheckoutReport(1, entry.size, set_id_dropped=int(entry.mode & bits != entry.mode))


def _remove_dead(parent: str, name: str) -> None:
    """Removes what killed checkouts to the same target have left, if that is certain."""
    pattern = re.compile(re.escape(f".{name[:50]}.checkout-") + "[0-9a-f]{8}")
    for found in [each for each in os.listdir(parent) if pattern.fullmatch(each)]:
        path = os.path.join(parent, found)
        with contextlib.suppress(OSError):
            fd = os.open(path, OPEN_DIRECTORY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if mark_of(fd) is not None:
                    remove_tree(os.fsencode(path))
            finally:
                os.close(fd)


def _wait_for_tick() -> None:
    """Waits until a change of a file could no longer have the time of its last change here."""
    time.sleep(_TICK)
