"""Whose a store is: that of another user is opened only for who asks for it.

Whoever may write to a store decides what is done to the files of those who open it: where a session
is, what a record says, which file a name leads to. So one that belongs to somebody else is refused,
to root as well, as git refuses a repository (`safe.directory`, since git 2.35.2).
"""

import os
import stat

from engine.host.own_files import check_link, name_of
from engine.storage.store import StoreOwnerError, StorePermissionError

_PARTS = ("", "db", "db/data.mdb", "db/lock.mdb", "locks", "log", "sessions")


def check_owner(path: str, *, trusted: bool = False) -> None:
    """Looks at a store's directory and its parts before anything is opened there.

    Raises StoreOwnerError for what another user owns unless it is `trusted`,
    StorePermissionError if it could not be used either way, StrangeFileError for a link of
    another user in it. There need not be a store.
    """
    us = os.geteuid()
    for part in _PARTS:
        name = os.path.join(path, part) if part else path
        try:
            status = os.lstat(name) if part else os.stat(name)
            check_link(name, status)
            if stat.S_ISLNK(status.st_mode):
                status = os.stat(name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if status.st_uid != us and not trusted:
            who = name_of(status.st_uid)
            if not _is_usable(path):
                raise StorePermissionError(path, f"it belongs to user {who}")
            raise StoreOwnerError(path, name, who)


def _is_usable(path: str) -> bool:
    """Tells whether the system would let us open what is there, or make what is not."""
    needed = {"": os.W_OK | os.X_OK, "db": os.W_OK | os.X_OK,
              "db/data.mdb": os.R_OK | os.W_OK, "db/lock.mdb": os.R_OK | os.W_OK}  # fmt: skip
    parts = {os.path.join(path, part): mode for part, mode in needed.items()}
    return all(os.access(part, mode) for part, mode in parts.items() if os.path.lexists(part))
