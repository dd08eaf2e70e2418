"""Removal of a directory of the host with all that is in it, however deep and whoever may write.

Goes down and up by descriptors, one or two at a time, and never through a symbolic link. Whoever
moves a directory elsewhere meanwhile does not lead the removal there. What somebody else removes
meanwhile is removed: a session's directory can be swept by a collection just as `session rm`
removes it.
"""

import contextlib
import errno
import os

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class MovedMeanwhileError(OSError):
    """A directory was moved while it was being emptied; it, and what is around it, is left."""

    def __init__(self, path: bytes) -> None:
        super().__init__(errno.EBUSY, "a directory in it was moved meanwhile", os.fsdecode(path))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (os.fsencode(self.filename),)


def remove_tree(path: bytes, directory: int | None = None) -> None:
    """Removes a directory, named relative to an open one if that is given. Raises OSError.

    That there is none is no error.
    """
    try:
        at = _enter(path, directory)
    except FileNotFoundError:
        return
    way: list[tuple[str, tuple[int, int]]] = []
    try:
        while True:
            below = _remove_files(at)
            if below is None and not way:
                break
            if below is not None:
                around = _identity(at)
                try:
                    next_at = _enter(below, at)
                except FileNotFoundError:
                    continue
                way.append((below, around))
            else:
                next_at = os.open("..", _DIRECTORY, dir_fd=at)
            os.close(at)
            at = next_at
            if below is None:
                name, around = way.pop()
                if _identity(at) != around:
                    raise MovedMeanwhileError(path)
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(name, dir_fd=at)
    finally:
        os.close(at)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(path, dir_fd=directory)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _enter(path: str | bytes, directory: int | None) -> int:
    """Opens a directory for emptying it, which its permissions may forbid an ordinary user."""
    try:
        fd = os.open(path, _DIRECTORY, dir_fd=directory)
    except PermissionError:
        os.chmod(path, 0o700, dir_fd=directory)
        fd = os.open(path, _DIRECTORY, dir_fd=directory)
    if os.fstat(fd).st_mode & 0o700 != 0o700:
        os.fchmod(fd, 0o700)
    return fd


def _remove_files(directory: int) -> str | None:
    """Removes what can be removed at once; returns the first directory with something in it."""
    with os.scandir(directory) as listing:
        for item in listing:
            if not item.is_dir(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(item.name, dir_fd=directory)
                continue
            try:
                os.rmdir(item.name, dir_fd=directory)
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
                return item.name
    return None
