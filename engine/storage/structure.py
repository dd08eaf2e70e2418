"""The structure of a store's file: every page is used once or free, and every tree is in order.

What LMDB takes for granted while it reads and writes. A file without flaws can be handed to it.
A page that is used and also free would be written over by the next transaction.
"""

from collections.abc import Callable, Iterator

import msgspec

from engine.ids import ID_BYTES
from engine.storage.metas import BadMetaError, read_metas
from engine.storage.pages import (
    FREE,
    MAIN,
    NAMED,
    NO_PAGE,
    RECORD_BYTES,
    Fits,
    Flaw,
    Meta,
    Tell,
    Tree,
    anything,
    freed_pages,
    read_record,
)
from engine.storage.store import Db

MOST_FLAWS = 200
"""Flaws that are named; more of them tell nobody more."""


class Structure(msgspec.Struct):
    """What was found. `pages` is how many the file has."""

    pages: int = 0
    transaction: int = 0
    entries: dict[str, int] = {}
    flaws: list[Flaw] = []

    def tell(self, flaw: Flaw) -> None:
        """Adds a flaw, up to a number of them."""
        if len(self.flaws) < MOST_FLAWS:
            self.flaws.append(flaw)


def check(fd: int, meta: Meta | None = None, used: bytearray | None = None) -> Structure:
    """Checks the file as the last transaction left it. Blocks; reads each page of a tree once.

    `used` gets a byte for each page: 1 if a tree leads to it, 2 if it is free.

    Whoever lets others write meanwhile holds a view of the store, so that no page that is looked
    at is used again.
    """
    found = Structure()
    try:
        meta = meta or read_metas(fd).newer
    except BadMetaError as error:
        found.tell(error.flaw)
        return found
    found.pages = meta.last_page + 1
    found.transaction = meta.transaction
    used = bytearray() if used is None else used
    used[:] = bytes(found.pages)
    free = Tree(fd, meta, FREE, meta.free, used, found.tell)
    lists = [(node, free.value(node)) for node in free.nodes()]
    free.count()
    for tree in trees(fd, meta, used, found.tell):
        for _ in tree.nodes():
            pass
        tree.count()
        found.entries[tree.name] = tree.entries
    for node, raw in lists:
        _add_free(used, node.page, raw, found.tell)
    if not found.flaws and 0 in used[2:]:
        lost = [page for page, state in enumerate(used) if not state and page > 1]
        found.tell(Flaw(FREE, -1, f"{len(lost)} pages are neither used nor free, first {lost[0]}"))
    return found


def trees(
    fd: int, meta: Meta, used: bytearray, tell: Tell, kind: Callable[..., Tree] = Tree
) -> Iterator[Tree]:
    """Yields a tree for each database that the main database names, to be walked."""
    main = kind(fd, meta, MAIN, meta.main, used, tell, lambda _, size: size == RECORD_BYTES)
    named = []
    for node in main.nodes():
        name = node.key.decode("ascii", errors="backslashreplace")
        if name not in _NAMES and (right := _flipped(node.key)):
            main.tell(node.page, f"the name {name!r} should be {right!r}")
            name = right if main.heals else name
        if node.flags != NAMED or node.size != RECORD_BYTES:
            main.tell(node.page, f"{name!r} is no database")
            continue
        record = read_record(node.value)
        if record.flags or record.pad or (record.root == NO_PAGE) != (record.entries == 0):
            main.tell(node.page, f"what is said of the database {name!r} cannot be")
        named.append(kind(fd, meta, name, record, used, tell, _FITS.get(name, anything)))
    main.count()
    for name in sorted(ALWAYS - {tree.name for tree in named}):
        main.tell(-1, f"there is no database {name!r}")
    yield from named


def _flipped(key: bytes) -> str:
    """Returns the database whose name has one bit other than this, or an empty text."""
    for name in _NAMES:
        if len(name) == len(key):
            bits = int.from_bytes(name.encode(), "big") ^ int.from_bytes(key, "big")
            if bits.bit_count() == 1:
                return name
    return ""


def _is_object(key: bytes, size: int) -> bool:
    return len(key) == ID_BYTES


_NAMES = {db.value for db in Db}
ALWAYS = {"chunks", "nodes", "snapshots", "refs", "sessions", "imports", "meta"}
"""The databases that a store of every format has."""
_FITS: dict[str, Fits] = {
    Db.CHUNKS.value: _is_object,
    Db.NODES.value: _is_object,
    Db.SNAPSHOTS.value: _is_object,
    Db.REFS.value: lambda key, size: key.isascii() and size == ID_BYTES,
    Db.SESSIONS.value: lambda key, _: key.isascii(),
}


def _add_free(used: bytearray, page: int, raw: bytes | None, tell: Tell) -> None:
    """Counts the pages of one list as free."""
    pages = freed_pages(page, raw)
    if isinstance(pages, str):
        tell(Flaw(FREE, page, pages))
        return
    before = len(used)
    for number in pages:
        if not 2 <= number < before:
            tell(Flaw(FREE, page, f"the list of free pages names page {number} out of order"))
        elif used[number]:
            state = "used" if used[number] == 1 else "free already"
            tell(Flaw(FREE, page, f"page {number} is listed as free and is {state}"))
        else:
            used[number] = 2
        before = min(before, number)
