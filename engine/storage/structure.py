"""The structure of a store's file: every page is used once or free, and every tree is in order.

What LMDB takes for granted while it reads and writes. A file without flaws can be handed to it.
A page that is used and also free would be written over by the next transaction.
"""

import struct
from collections.abc import Iterator

import msgspec

from engine.storage.pages import (
    FREE,
    MAIN,
    NAMED,
    NO_PAGE,
    BadMetaError,
    Flaw,
    Meta,
    Tell,
    Tree,
    read_metas,
    read_record,
)

MOST_FLAWS = 200
"""Flaws that are named; more of them tell nobody more."""


class Structure(msgspec.Struct):
    """What was found. `pages` is how many the file has."""

    pages: int = 0
    entries: dict[str, int] = {}
    flaws: list[Flaw] = []

    def tell(self, flaw: Flaw) -> None:
        """Adds a flaw, up to a number of them."""
        if len(self.flaws) < MOST_FLAWS:
            self.flaws.append(flaw)


def check(fd: int) -> Structure:
    """Checks the file as the last transaction left it. Blocks; reads each page of a tree once.

    Whoever lets others write meanwhile holds a view of the store, so that no page that is looked
    at is used again.
    """
    found = Structure()
    try:
        meta, _ = read_metas(fd)
    except BadMetaError as error:
        found.tell(error.flaw)
        return found
    found.pages = meta.last_page + 1
    used = bytearray(found.pages)
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


def trees(fd: int, meta: Meta, used: bytearray, tell: Tell) -> Iterator[Tree]:
    """Yields the main database, walked already, and then each one that it names, not walked."""
    main = Tree(fd, meta, MAIN, meta.main, used, tell)
    named = []
    for node in main.nodes():
        name = node.key.decode("ascii", errors="backslashreplace")
        if node.flags != NAMED or node.size != 48:
            main.tell(node.page, f"{name!r} is no database")
            continue
        record = read_record(node.value)
        if record.flags or record.pad or (record.root == NO_PAGE and any(record[2:7])):
            main.tell(node.page, f"what is said of the database {name!r} cannot be")
            continue
        named.append(Tree(fd, meta, name, record, used, tell))
    main.count()
    yield from named


def _add_free(used: bytearray, page: int, raw: bytes | None, tell: Tell) -> None:
    """Counts the pages of one list as free: their number, then they, the greatest first."""
    if raw is None or len(raw) < 8 or len(raw) % 8:
        tell(Flaw(FREE, page, f"a list of free pages on page {page} cannot be read"))
        return
    count, *pages = struct.unpack(f"={len(raw) // 8}Q", raw)
    if count > len(pages):
        tell(Flaw(FREE, page, f"a list of free pages on page {page} has {count} of {len(pages)}"))
        return
    before = len(used)
    for number in pages[:count]:
        if not 2 <= number < before:
            tell(Flaw(FREE, page, f"the list of free pages names page {number} out of order"))
        elif used[number]:
            state = "used" if used[number] == 1 else "free already"
            tell(Flaw(FREE, page, f"page {number} is listed as free and is {state}"))
        else:
            used[number] = 2
        before = min(before, number)
