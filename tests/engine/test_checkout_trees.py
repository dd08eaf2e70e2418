"""Checkouts of any tree: what is written, switched, edited and read back is what it should be."""

import os
import tempfile
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings

from engine import Repository
from engine.plain import importing
from engine.plain.local_edits import LocalEditsError
from engine.storage.nodes import Entry, Kind
from engine.storage.store import Db, Writer
from tests.engine.planted import trees
from tests.engine.plants import Garden
from tests.engine.trees import Tree, of_directory, of_entry

many = settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.isdir("/dev/shm"),
    reason="only root reads files without permissions back, and only tmpfs keeps times before 1901",
)

Planted = Callable[[Garden], Entry]


class Place:
    """A real store on a disk in memory, and beside it a directory that each example has anew."""

    def __init__(self, path: str) -> None:
        self.path, self.number = path, 0
        self.repository = Repository.create(path + "/store")

    def plant(self, *drawn: Planted) -> list[Entry]:
        """Makes what Hypothesis drew, and returns the roots."""
        garden = Garden()
        roots = [each(garden) for each in drawn]

        def change(writer: Writer) -> None:
            with garden.store.read() as reader:
                for db in (Db.CHUNKS, Db.NODES):
                    writer.put_many(db, [(key, bytes(raw)) for key, raw in reader.items(db)])

        self.repository.store.write(change)
        return roots

    def fresh(self) -> str:
        self.number += 1
        os.mkdir(f"{self.path}/{self.number}")
        return f"{self.path}/{self.number}"

    def check_out(self, root: Entry, target: str, *, tracked: bool = True) -> None:
        self.repository.check_out(root, target, outside_links=True, set_id=True, tracked=tracked)

    def read(self, directory: str, *, use_cache: bool) -> Entry:
        return self.repository.import_directory(directory, use_cache=use_cache).root

    def described(self, root: Entry) -> Tree:
        return of_entry(self.repository.objects, root)


@pytest.fixture
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        made = Place(path)
        with made.repository:
            yield made


@given(trees())
@many
def test_a_tree_comes_back_with_the_same_id(place: Place, tree: Planted):
    (root,) = place.plant(tree)
    out = place.fresh()
    place.check_out(root, out)
    assert of_directory(out) == place.described(root)
    assert place.repository.checkouts.status(out) == []
    assert place.read(out, use_cache=False) == root
    assert place.read(out, use_cache=True) == root


@given(trees(), trees())
@many
def test_any_tree_becomes_any_other(place: Place, first: Planted, second: Planted):
    roots = place.plant(first, second)
    out, checkouts = place.fresh(), place.repository.checkouts
    place.check_out(roots[0], out)
    for root in [roots[1], roots[0], roots[1]]:
        checkouts.switch(out, root, outside_links=True, set_id=True)
        assert of_directory(out) == place.described(root)
        assert checkouts.status(out) == []
    assert place.read(out, use_cache=True) == roots[1]
    assert place.read(out, use_cache=False) == roots[1]


def exchange(directory: str, source: str, old: str) -> None:
    """Moves what is in a directory away, and what is in another one into it."""
    for above, below in [(directory, old), (source, directory)]:
        for name in os.listdir(os.fsencode(above)):
            os.rename(os.fsencode(above) + b"/" + name, os.fsencode(below) + b"/" + name)


@given(trees(), trees(), trees())
@many
def test_what_was_edited_is_never_overwritten_unasked(
    place: Place, first: Planted, second: Planted, edited: Planted
):
    """The edits are all that makes the first tree a third one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importing, "FRESH_NS", -(10**18))  # no test waits for time to pass
        roots = place.plant(first, second, edited)
        old, new, theirs = [place.described(root) for root in roots]
        out, checkouts = place.fresh(), place.repository.checkouts
        place.check_out(roots[0], out)
        place.check_out(roots[2], other := place.fresh(), tracked=False)
        exchange(out, other, place.fresh())
        mine = {
            path: seen.data
            for path, seen in theirs.items()
            if seen.kind != Kind.DIRECTORY
            and (path not in old or (old[path].kind, old[path].data) != (seen.kind, seen.data))
        }
        before = of_directory(out)
        edits = {edit.path for edit in checkouts.status(out)}
        assert mine.keys() <= edits
        try:
            checkouts.switch(out, roots[1], outside_links=True, set_id=True)
        except LocalEditsError:
            assert of_directory(out) == before
            checkouts.switch(out, roots[1], edits="keep", outside_links=True, set_id=True)
        after = of_directory(out)
        assert {path: after[path].data for path in mine} == mine

        checkouts.switch(out, roots[0], edits="overwrite", outside_links=True, set_id=True)
        checkouts.switch(out, roots[1], edits="overwrite", outside_links=True, set_id=True)
        after = of_directory(out)
        for path, seen in new.items():
            parts = path.split(b"/")
            above = {b"/".join(parts[:at]) for at in range(1, len(parts) + 1)}
            if not above & edits:  # what is in nobody's way stays
                assert (after[path].kind, after[path].data) == (seen.kind, seen.data)
        root = checkouts.commit(out).root
        assert checkouts.status(out) == []
        assert place.described(root) == of_directory(out)
