"""Keeping a process apart from a mount: so that it asks nothing of the mount that it serves.

A request of the daemon to its own mount can wait for ever. A path is looked at in more places
than meet the eye: a module that is imported late is sought in `sys.path`, a program in PATH, and
the working directory stands for all that is relative. What leads into the mount is taken out of
these, here and for the processes that this one starts.
"""

import os
import sys
from collections.abc import Iterable

_PATHS = ("PATH", "PYTHONPATH")


def keep_apart(mountpoint: str) -> None:
    """Leaves a directory that is going to be a mount, and all paths that lead there.

    To be called before there is the mount; `mountpoint` is its real path.
    """
    os.chdir("/")
    sys.path[:] = _outside(mountpoint, sys.path)
    for name in _PATHS:
        inherited = os.environ.get(name)  # noqa: TID251 - by the processes that this one starts
        if inherited is not None:
            paths = os.pathsep.join(_outside(mountpoint, inherited.split(os.pathsep)))
            os.environ[name] = paths  # noqa: TID251 - likewise


def _outside(mountpoint: str, paths: Iterable[str]) -> list[str]:
    """Returns the absolute paths that lead elsewhere; a relative one means the old directory."""
    return [
        path
        for path in paths
        if os.path.isabs(path) and not is_inside(mountpoint, os.path.realpath(path))
    ]


def is_inside(directory: str, path: str) -> bool:
    """Tells whether a path is a directory or leads into it; both are real."""
    return (path + os.sep).startswith(directory.rstrip(os.sep) + os.sep)
