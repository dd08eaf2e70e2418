"""The checkouts of a store: made, found again, compared, switched, committed.

What `Repository.checkouts` gives; the ways to do it are in `checkout`, `local_edits` and
`switching`. A checkout is worked on by one process at a time, which holds the lease
`checkout-<id>`; programs that write in the directory need none.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import msgspec

from engine.checkout import (
    CheckoutRefusedError,
    CheckoutReport,
    Progress,
    Rows,
    check_out,
    check_out_file,
)
from engine.checkout_records import (
    CheckoutRecord,
    NotACheckoutError,
    forget,
    is_at,
    load,
    mark_of,
    new_id,
    new_record,
    records,
    save,
)
from engine.ids import SnapshotId
from engine.leases import acquire
from engine.nodes import Entry, Kind
from engine.stat_cache import cache_key, cache_prefix
from engine.store import Db, Writer

if TYPE_CHECKING:
    from engine.repository import Repository


class Checkout(msgspec.Struct, frozen=True):
    """A checkout: its directory, and what it shows. `towards` is where a killed switch led."""

    path: str
    snapshot: SnapshotId | None
    within: bytes
    root: Entry
    towards: SnapshotId | None = None
    interrupted: bool = False


class CheckoutOptions(TypedDict, total=False):
    """How a checkout is made; `snapshot` and `within` say where the tree comes from."""

    snapshot: SnapshotId | None
    within: bytes
    outside_links: bool
    progress: Progress | None


class Checkouts:
    """The checkouts of one store."""

    def __init__(self, repository: "Repository") -> None:
        self._repository = repository
        self._store, self._objects = repository.store, repository.objects

    def make(
        self,
        root: Entry,
        target: str,
        **options: Unpack[CheckoutOptions],
    ) -> CheckoutReport:
        """Makes a tree, or a single file, at `target`; see `checkout`."""
        inside = os.path.realpath(target) + os.sep
        if inside.startswith(os.path.realpath(self._repository.path) + os.sep):
            raise CheckoutRefusedError(target, "it is inside of the store")
        if root.kind != Kind.DIRECTORY:
            return check_out_file(self._objects, root, target)
        identifier = new_id()
        path = os.path.realpath(target)

        def record(status: os.stat_result, marked: bool, rows: Rows) -> None:
            if not marked:
                return
            made = new_record(
                path, status, root, options.get("within", b""), options.get("snapshot")
            )
            prefix = cache_prefix(path)
            pairs = sorted((cache_key(prefix, folder), value) for folder, value in rows)

            def change(writer: Writer) -> None:
                save(writer, identifier, made)
                writer.put_many(Db.IMPORTS, pairs)

            self._store.write(change)

        try:
            return check_out(
                self._objects, root, target, identifier=identifier, record=record,
                outside_links=options.get("outside_links", False),
                progress=options.get("progress"),
            )  # fmt: skip
        except BaseException:
            with self._store.read() as reader:
                known = load(reader, identifier) is not None
            if known:
                self._store.write(lambda writer: forget(writer, identifier))
            raise
