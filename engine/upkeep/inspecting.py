"""Verify and repair of a store by its path, whether or not LMDB can open it.

An open `Repository` verifies itself too; but who opens a damaged file may not get that far.
"""

import os
from contextlib import closing

from engine.progress import Progress
from engine.repository import Repository
from engine.storage.ownership import check_owner
from engine.upkeep.repairing import RepairReport
from engine.upkeep.salvaging import Salvage, examine, salvage, verify_pages
from engine.upkeep.verifying import VerifyReport


def verify_store(
    path: str, progress: Progress | None = None, *, trusted: bool = False
) -> VerifyReport:
    """Checks the frame of a store's file, then every object. Raises a StoreError.

    `trusted` is as in `Repository.open`.
    """
    path = os.path.abspath(path)
    check_owner(path, trusted=trusted)
    flaws = _flaws(path)
    if flaws:
        return verify_pages(path, flaws, progress)
    with closing(Repository.open(path, trusted=trusted, to_read=True)) as repository:
        return repository.verify(progress)


def repair_store(
    path: str,
    source: str | None = None,
    progress: Progress | None = None,
    *,
    trusted: bool = False,
    trusts_source: bool = False,
) -> tuple[RepairReport, Salvage | None]:
    """Puts right what can be, as `Repository.repair`; first makes a damaged file anew.

    `trusted` is as in `Repository.open`, `trusts_source` the same of a store that is the source.
    Raises a StoreError, LeaseHeldError, and what opening or reading the source raises.
    """
    path = os.path.abspath(path)
    check_owner(path, trusted=trusted)
    flaws = _flaws(path)
    done = None
    if flaws:
        is_store = source is not None and os.path.isdir(os.path.join(source, "db"))
        if source is not None and is_store:
            check_owner(source, trusted=trusts_source)
        done = salvage(path, flaws, source if is_store else None)
    with closing(Repository.open(path, trusted=trusted)) as repository:
        return repository.repair(source, progress, trusted=trusts_source), done


def _flaws(path: str) -> list[str]:
    try:
        return examine(path)
    except OSError:
        return []  # opening the store says what is wrong with it
