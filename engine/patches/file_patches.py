"""What a patch says, file by file: the result of `patch_parsing`, which `patching` carries out."""

from enum import Enum
from typing import NamedTuple

import msgspec


class Action(Enum):
    """What a patch does to a file."""

    MODIFY = "modify"
    CREATE = "create"
    DELETE = "delete"
    RENAME = "rename"
    COPY = "copy"


class Hunk(msgspec.Struct, frozen=True):
    """Lines to be found, with their ends, and what stands in their place afterwards.

    `old_start` counts from 1, or is 0 for the beginning. `leading` and `trailing` lines are
    context. `line` is where the hunk is in the patch.
    """

    old_start: int
    old: list[bytes]
    new: list[bytes]
    leading: int
    trailing: int
    line: int


class BinaryHunk(msgspec.Struct, frozen=True):
    """Deflated bytes of `size`: a content, or a delta that makes one."""

    is_delta: bool
    size: int
    deflated: bytes


class FilePatch(msgspec.Struct):
    """What a patch does to one file. A path is None where there is no file.

    Modes are those of stat, None where the patch says nothing. `loose` is set for plain diffs,
    of which it is not certain how many directories lead their paths: `paths` are those to try.
    """

    line: int
    action: Action = Action.MODIFY
    old_path: bytes | None = None
    new_path: bytes | None = None
    old_mode: int | None = None
    new_mode: int | None = None
    hunks: list[Hunk] = []
    binary: BinaryHunk | None = None
    old_blob: bytes | None = None
    new_blob: bytes | None = None
    loose: bool = False
    paths: list[bytes] = []

    @property
    def path(self) -> bytes:
        """The path that the patch is about, as it will be if there is a file then."""
        return self.new_path or self.old_path or b""


class Patch(NamedTuple):
    """What a patch does, in its order; `left_out` are lines that name a change it does not hold."""

    files: list[FilePatch]
    left_out: list[bytes]
