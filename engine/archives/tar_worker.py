"""A process that makes parts of an archive for another; `tar_crew` starts it and gives it work.

It opens the store itself, as LMDB wants of each process. Parts come, and what was made goes, in
slots of memory that both have mapped; over a socket goes a message of fixed size for each, so that
neither ever waits for the other to read. When the other process ends, however it does, the socket
is closed, and this one ends with the part that it is at.

A part that cannot be made here (a damaged chunk, one too large for its slot) is given back: the
other process makes it itself, and meets the error, if it is one, itself.
"""

import mmap
import socket
import struct
import sys

import msgspec

from engine.archives.tar_parts import Extent, Members, members
from engine.archives.tar_writing import TarWriter, small
from engine.errors import EngineError
from engine.host.set_id import SET_ID
from engine.storage import content
from engine.storage.lmdb_store import LmdbStore
from engine.storage.nodes import Entry, Kind
from engine.storage.objects import Objects

SLOT_BYTES = 4 << 20
ASKED = struct.Struct("<II")
"""The slot, and how many bytes of it are the part."""
MADE = struct.Struct("<?III")
"""Whether it was made; bytes, members; then how many bytes the `Left` take that follow."""


class Left(msgspec.Struct, array_like=True, frozen=True):
    """A member that is in a link group, for the other process: where in the bytes it belongs."""

    at: int
    path: bytes
    entry: Entry


class SlotFullError(Exception):
    """A part is larger than its directories say; only this module hears of it."""


class Slot:
    """A stream into a buffer of fixed size."""

    def __init__(self, view: memoryview) -> None:
        self._view, self.at = view, 0

    def write(self, data: bytes | memoryview) -> int:
        """Adds bytes. Raises SlotFullError."""
        end = self.at + len(data)
        if end > len(self._view):
            raise SlotFullError("a part does not fit")
        self._view[self.at : end] = data
        self.at = end
        return len(data)


def needs_parent(entry: Entry) -> bool:
    """Tells whether who puts the parts together makes a member itself.

    Only there is known which name of a file came first, and whether set-id bits are wanted.
    """
    return entry.link is not None or bool(entry.mode & SET_ID and entry.kind == Kind.FILE)


def make(objects: Objects, part: Members | Extent, slot: Slot) -> tuple[int, list[Left]]:
    """Writes a part; returns how many members, and those that were left.

    Raises what reading a tree and its contents does, and SlotFullError.
    """
    left: list[Left] = []
    writer = TarWriter(objects, slot)  # type: ignore[arg-type]  # all of IO that is written
    with objects.chunks() as chunk:
        if isinstance(part, Extent):
            for piece in part.pieces:
                for data in content.part_of(*piece, chunk):
                    slot.write(data)
            return 0, left
        for path, entry in members(objects, part.runs):
            if needs_parent(entry):
                left.append(Left(slot.at, path, entry))
            else:
                writer.add(path, entry, small(entry, chunk))
    return writer.report.entries, left


def serve(objects: Objects, connection: socket.socket, memory: memoryview) -> None:
    """Makes parts until the connection is closed."""
    decoder = msgspec.msgpack.Decoder(Members | Extent)
    connection.sendall(MADE.pack(True, 0, 0, 0))  # ready
    while asked := connection.recv(ASKED.size, socket.MSG_WAITALL):
        number, length = ASKED.unpack(asked)
        view = memory[number * SLOT_BYTES : (number + 1) * SLOT_BYTES]
        slot = Slot(view)
        try:
            entries, left = make(objects, decoder.decode(view[:length]), slot)
            size, rest = slot.at, msgspec.msgpack.encode(left) if left else b""
            slot.write(rest)
            answer = MADE.pack(True, size, entries, len(rest))
        except (EngineError, SlotFullError, OSError):
            answer = MADE.pack(False, 0, 0, 0)
        connection.sendall(answer)


def main(path: str, memory: str) -> None:
    """Works for the process at the other end of standard input, which has mapped `memory` too."""
    store = LmdbStore(path, trusted=True, to_read=True)  # who started this has it open
    with socket.socket(fileno=0) as connection, mmap.mmap(int(memory), 0) as shared:
        try:
            serve(Objects(store), connection, memoryview(shared))
        except (BrokenPipeError, ConnectionResetError):
            sys.exit(1)  # nobody waits for it any more
