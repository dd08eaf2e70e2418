"""Merging snapshots: two lines of history become one snapshot with two parents.

The base is where the two came from each other (see `history`); the trees merge as in `merging`.
Conflicts make no snapshot, unless they are to be written: then the snapshot has them marked in
its texts, and in its metadata under `conflicts` with the entries of all three sides. What these
name is kept by the snapshots that were merged, and by the base.
"""

from enum import Enum
from typing import TYPE_CHECKING, Any, TypedDict

import msgspec

from engine.errors import EngineError
from engine.ids import SnapshotId, check_name
from engine.merging.conflicts import Conflict, conflict_fields
from engine.merging.merging import merge
from engine.merging.text_merging import Favor, Style
from engine.storage.snapshots import make_snapshot
from engine.trees.directory import directory_id
from engine.workspaces.committing import Batch

if TYPE_CHECKING:
    from engine.repository import Repository

CONFLICTS = "conflicts"
"""The key in a snapshot's metadata that has the conflicts which it was made with."""


class NoMergeBaseError(EngineError):
    """Two snapshots have nothing that both came from."""

    def __init__(self, one: SnapshotId, other: SnapshotId) -> None:
        names = f"{one.hex()[:12]} and {other.hex()[:12]}"
        super().__init__(f"snapshots {names} have no common ancestor")
        self.one, self.other = one, other


class Outcome(Enum):
    """What came of a merge."""

    MERGED = "merged"
    FAST_FORWARD = "fast-forward"
    ALREADY_MERGED = "already merged"
    CONFLICTS = "conflicts"


class MergeReport(msgspec.Struct, frozen=True):
    """What came of merging snapshots. `snapshot` is None if conflicts were not to be written.

    `bases` are all best common ancestors; the first was compared with. `renames_limited` as in
    `MergeResult`.
    """

    outcome: Outcome
    snapshot: SnapshotId | None
    bases: list[SnapshotId]
    conflicts: list[Conflict]
    merged_texts: list[bytes]
    renames_limited: bool = False


class MergeOptions(TypedDict, total=False):
    """What `merge_snapshots` takes besides the snapshots."""

    base: SnapshotId | None
    ref: str | None
    message: str
    metadata: dict[str, Any] | None
    favor: Favor | None
    style: Style
    write_conflicts: bool
    fast_forward: bool
    renames: bool


def merge_snapshots(
    repository: "Repository",
    ours: SnapshotId,
    theirs: SnapshotId,
    *,
    base: SnapshotId | None = None,
    ref: str | None = None,
    message: str = "",
    metadata: dict[str, Any] | None = None,
    favor: Favor | None = None,
    style: Style = Style.MERGE,
    write_conflicts: bool = False,
    fast_forward: bool = True,
    renames: bool = True,
) -> MergeReport:
    """Merges two snapshots and moves `ref`; see `merging.merge` for what the options do.

    If one came from the other, the later one is what they make together, and without
    `fast_forward` a snapshot of its tree. Durable when it returns. Raises NoMergeBaseError,
    InvalidNameError for `ref`, and what `merge` and the store raise.
    """
    if ref is not None:
        check_name("ref", ref)
    repository.flush()  # what is merged is in the store before a ref or a snapshot names it
    bases = [base] if base is not None else repository.history().merge_bases(ours, theirs)
    if not bases:
        raise NoMergeBaseError(ours, theirs)
    done: tuple[Outcome, SnapshotId] | None = None
    if bases[0] == theirs:
        done = Outcome.ALREADY_MERGED, ours
    elif bases[0] == ours and fast_forward:
        done = Outcome.FAST_FORWARD, theirs
    if done is not None:
        if ref is not None:
            repository.set_ref(ref, done[1])
        return MergeReport(*done, bases, [], [])
    with repository.storing():  # what is read may belong to nobody by now
        roots = [repository.snapshot(each).root for each in (bases[0], ours, theirs)]
        batch = Batch()
        result = merge(
            repository.objects, batch, batch.put_chunk, *roots, favor=favor, style=style,
            names=(_label(bases[0]), _label(ours), _label(theirs)),
            write_conflicts=write_conflicts, renames=renames,
        )  # fmt: skip
        conflicts = result.conflicts
        if result.root is None:
            return MergeReport(
                Outcome.CONFLICTS, None, bases, conflicts, result.merged_texts,
                result.renames_limited,
            )  # fmt: skip
        facts = dict(metadata or {})
        if conflicts:
            facts[CONFLICTS] = [conflict_fields(conflict) for conflict in conflicts]
        pin = repository.pins.pin(directory_id(result.root))
        record = make_snapshot(result.root, (ours, theirs), message, facts)
        identifier = batch.conclude(record, ref, (pin,))
    repository.commits.submit(batch, durable=True)
    outcome = Outcome.CONFLICTS if conflicts else Outcome.MERGED
    return MergeReport(
        outcome, identifier, bases, conflicts, result.merged_texts, result.renames_limited
    )


def _label(identifier: SnapshotId) -> bytes:
    return identifier.hex()[:12].encode()
