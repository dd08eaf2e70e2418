"""Pins: the trees that open workspaces stand on, kept though nothing in the store names them.

`locks/pins/` has one file per process, locked (flock, exclusive) as long as it lives: a root
node's id in hexadecimal per line. Whoever pins a root looks afterwards whether it is still in
the store: a collection reads snapshots first, then pins.
"""

import fcntl
import os

from engine.ids import NodeId, is_full_id


def live_pins(store_path: str) -> set[NodeId]:
    """Returns the pinned roots of the processes that live, and removes what dead ones left."""
    home = os.path.join(store_path, "locks", "pins")
    found: set[NodeId] = set()
    try:
        names = os.listdir(home)
    except FileNotFoundError:
        return found
    for name in names:
        path = os.path.join(home, name)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with os.fdopen(os.dup(fd), encoding="ascii", errors="replace") as file:
                    lines = (line.strip() for line in file)
                    found.update(NodeId(bytes.fromhex(line)) for line in lines if is_full_id(line))
            else:
                # Its owner may have made it and not locked it yet: an empty one stays.
                if os.fstat(fd).st_size:
                    os.unlink(path)
        finally:
            os.close(fd)
    return found
