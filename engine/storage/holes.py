"""The holes of a file in the store: where its data are, as lseek(2) tells it.

A hole is a piece of a file that has no chunk (see `nodes`). Cost follows the pieces between the
offset and the answer, and opens no list node before the offset.
"""

import os

from engine.storage.content import parts
from engine.storage.nodes import Entry
from engine.storage.objects import Objects


def seek(objects: Objects, entry: Entry, offset: int, whence: int) -> int | None:
    """Returns where from `offset` on the next data (SEEK_DATA) or hole (SEEK_HOLE) begins.

    None if there are no data up to the end, or the offset is not in the file. The end of a file
    is a hole. May be called from any thread. Raises MissingObjectError, CorruptObjectError.
    """
    if not 0 <= offset < entry.size:
        return None
    if isinstance(entry.content, bytes):
        return offset if whence == os.SEEK_DATA else entry.size
    at = offset
    for ref, start, stop in parts(objects, entry, offset, entry.size):
        if (ref.id is None) == (whence == os.SEEK_HOLE):
            return at
        at += stop - start
    return entry.size if whence == os.SEEK_HOLE else None


def stored_bytes(entry: Entry) -> int:
    """Returns how many bytes of a file are no hole, as far as the entry alone tells it.

    A file of many pieces counts with its whole size: to know better, its lists would be read.
    """
    content = entry.content
    if type(content) is not tuple or any(ref.level for ref in content):
        return entry.size
    return sum(ref.length for ref in content if ref.id is not None)
