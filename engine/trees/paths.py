"""Paths inside a tree as programs give them, and what can be wrong with one.

A path is text or bytes, relative to the tree's root, its names separated by single slashes; the
root itself is the empty path. Text is UTF-8, and what is not stands there as surrogate escapes,
as in `os.fsencode`. What a path leads through or to is never followed if it is a symbolic link.
"""

import errno
from typing import AnyStr

from engine.errors import EngineError
from engine.storage.nodes import check_file_name

Path = str | bytes


class PathError(EngineError, OSError):
    """Something cannot be done at a path of a tree. `path` is bytes; `errno` is the system's.

    The subclasses are also those of Python's errors that `open` and `os` raise.
    """

    code = errno.EIO
    why = "cannot be used"

    def __init__(self, path: bytes, why: str = "") -> None:
        super().__init__(f"{path.decode(errors='replace')[:300]!r} {why or self.why}")
        self.path, self.errno = path, self.code


class InvalidPathError(PathError, ValueError):
    """It is no path in a tree."""

    code = errno.EINVAL
    why = "is no relative path of names"


class MissingPathError(PathError, FileNotFoundError):
    """There is nothing."""

    code = errno.ENOENT
    why = "does not exist"


class PathExistsError(PathError, FileExistsError):
    """There is something already."""

    code = errno.EEXIST
    why = "exists already"


class NoDirectoryError(PathError, NotADirectoryError):
    """It is no directory, and has to be one."""

    code = errno.ENOTDIR
    why = "is not a directory"


class NoFileError(PathError, IsADirectoryError):
    """It is no file, and has to be one."""

    code = errno.EISDIR
    why = "is not a file"


class NotEmptyError(PathError):
    """It is a directory with something in it."""

    code = errno.ENOTEMPTY
    why = "is not empty"


def names_of(path: Path) -> tuple[bytes, ...]:
    """Returns the names that a path consists of; raises InvalidPathError."""
    try:
        raw = path if isinstance(path, bytes) else path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise InvalidPathError(repr(path).encode(), f"is not Unicode: {error.reason}") from error
    if not raw:
        return ()
    if raw.startswith(b"/"):
        raise InvalidPathError(raw, "begins with a slash: paths are relative to the tree's root")
    names = tuple(raw.split(b"/"))
    for name in names:
        try:
            check_file_name(name)
        except ValueError as error:
            why = f"cannot be a path: {error}" if name else "has an empty name"
            raise InvalidPathError(raw, why) from None
    return names


def joined(names: tuple[bytes, ...]) -> bytes:
    """Returns the path of these names."""
    return b"/".join(names)


def like(name: bytes, path: AnyStr) -> AnyStr:
    """Returns a name as text if `path` is text, else as bytes."""
    if isinstance(path, bytes):
        return name
    return name.decode("utf-8", "surrogateescape")
