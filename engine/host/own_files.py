"""A store's own files: opened so that nobody else leads us to other ones.

A store makes its files itself, so a symbolic link, a pipe or a second name of a file where one of
them should be was put there by somebody: who may write to the store, or could. A process of another
user, root above all, that followed it would write to a file of that user's choice. So what stands
in a store for a file is opened as what it is, and looked at before anything is written.

A folder may be a link that this user made: to keep `db` or `sessions` on another disk.
"""

import contextlib
import errno
import os
import pwd
import stat

from engine.errors import EngineError

_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_STRANGE = {errno.ELOOP: "it is a symbolic link", errno.ENXIO: "it is not a file"}


class StrangeFileError(EngineError):
    """Something in a store is none of its files; nothing was written to it."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path!r} is no file of a store: {why}")
        self.path, self.why = path, why


def name_of(uid: int) -> str:
    """Returns a user's name, or number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def own_folder(store: str, *names: str) -> str:
    """Returns the path of a folder below a store's directory, made if there is none.

    Raises StrangeFileError if that leads through a link that somebody else made; OSError.
    """
    path = store
    for name in names:
        path = os.path.join(path, name)
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            os.makedirs(path, mode=0o700, exist_ok=True)
            if os.geteuid() == 0:
                _give(path, store)
            continue
        check_link(path, status)
    return path


def check_link(path: str, status: os.stat_result) -> None:
    """Raises StrangeFileError for a link that somebody else made, by what lstat(2) says."""
    if stat.S_ISLNK(status.st_mode) and status.st_uid != os.geteuid():
        who = name_of(status.st_uid)
        raise StrangeFileError(path, f"it is a symbolic link that user {who} made")


def open_own(store: str, name: str, flags: int) -> int:
    """Opens a file below a store's directory, `name` by its folders; they were looked at.

    One that it makes is its owner's alone; made by root, the store's owner's. Raises
    StrangeFileError, OSError.
    """
    path = os.path.join(store, name)
    try:
        fd = os.open(path, flags | _FLAGS, 0o600)
    except OSError as error:
        if error.errno in _STRANGE:
            raise StrangeFileError(path, _STRANGE[error.errno]) from None
        raise
    try:
        _check(fd, path, store)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check(fd: int, path: str, store: str) -> None:
    status, us = os.fstat(fd), os.geteuid()
    if not stat.S_ISREG(status.st_mode):
        raise StrangeFileError(path, "it is not a file")
    if status.st_uid == us and status.st_nlink <= 1 and (us or status.st_size):
        return
    owner = os.stat(store).st_uid
    if status.st_uid not in {us, owner}:
        raise StrangeFileError(path, f"it belongs to user {name_of(status.st_uid)}")
    if status.st_nlink > 1 and owner != us:
        raise StrangeFileError(path, "it has another name elsewhere")
    if status.st_uid == us == 0 and not status.st_size:
        _give(fd, store)


def _give(what: int | str, store: str) -> None:
    """Gives what root has made in somebody's store to that user, who could not use it else."""
    owner = os.stat(store)
    if owner.st_uid:
        with contextlib.suppress(OSError):  # root of a user namespace, or of another machine
            os.chown(what, owner.st_uid, owner.st_gid)


def open_pipe(path: str) -> int:
    """Opens a FIFO for reading and writing, without waiting. Raises OSError."""
    fd = os.open(path, os.O_RDWR | _FLAGS)
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileNotFoundError(errno.ENOENT, "no FIFO", path)
    return fd
