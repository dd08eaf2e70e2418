"""What a session was made of, and what is thrown away with it."""

import os
import stat
from pathlib import Path

import msgspec
import pytest

from engine import Repository, SnapshotId
from engine.errors import InUseError, NotFoundError
from engine.mounted.vfs import LAYERS, Vfs
from engine.sessions.changes import UncommittedChangesError
from engine.sessions.sessions import put_record
from engine.storage.nodes import Owner
from engine.upkeep.holders import Target
from tests.engine.trees import of_entry

Layers = tuple[SnapshotId, SnapshotId, SnapshotId]


@pytest.fixture
def layers(repository: Repository, tmp_path: Path) -> Layers:
    """Three layers, and a session `s` on them."""
    made = []
    for name, files in [
        ("low", {"a": b"low", "d/x": b"low", "linked": b"linked"}),
        ("mid", {"a": b"mid", "d/y": b"mid"}),
        ("top", {"c": b"top", "d/z": b"top"}),
    ]:
        for path, data in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_bytes(data)
        if name == "low":
            os.link(tmp_path / name / "linked", tmp_path / name / "d/linked")
        made.append(SnapshotId(repository.import_directory(str(tmp_path / name)).snapshot))
    low, mid, top = made
    repository.sessions.create("s", (low, mid, top))
    return low, mid, top


def files(repository: Repository, name: str = "@s") -> dict[bytes, bytes]:
    with repository.tree(name) as root:
        # Whiteouts that no overlay made: what is linked does not know that it lost a name.
        found = of_entry(repository.objects, root, counts=False)
    return {path: seen.data for path, seen in found.items() if seen.kind == 1}


def edit(repository: Repository, path: str, data: bytes | None) -> None:
    """Writes to the session, or removes a name."""
    with repository.sessions.hold("s", "a test") as held:
        upper = held.upper()
        where = Path(os.fsdecode(upper.root)) / path
        where.parent.mkdir(exist_ok=True)
        if data is None:
            upper.whiteout(os.fsencode(path))
        else:
            where.write_bytes(data)


def test_a_reset_after_a_commit_brings_nothing_back(repository: Repository, layers: Layers):
    """A lower layer has what the commit removed."""
    whole = files(repository)
    edit(repository, "a", None)
    edit(repository, "new", b"new")
    report = repository.commit("s")
    committed = files(repository)
    assert b"a" not in committed
    edit(repository, "c", b"edited")
    session = repository.reset_session("s", force=True)
    assert session.parent == report.snapshot
    assert files(repository) == committed
    assert session.root == repository.snapshot(SnapshotId(report.snapshot)).root
    # And the layers are still what they were.
    assert tuple(layer for _, layer in session.layers) == layers
    session = repository.reset_session("s", factory=True)
    assert (session.parent, files(repository)) == (layers[2], whole)
    assert not list(
        repository.diff(repository.sessions.stands_on(session), repository.sessions.get("s").root)
    )
    repository.collect()
    assert repository.verify().damage == []


def test_before_the_first_commit_a_reset_leads_to_the_stack(repository: Repository, layers: Layers):
    whole = files(repository)
    edit(repository, "a", None)
    edit(repository, "d/x", b"edited")
    repository.collect()
    with pytest.raises(UncommittedChangesError, match="2 uncommitted changes: 'a', 'd/x'"):
        repository.reset_session("s")
    repository.reset_session("s", force=True)
    assert files(repository) == whole
    # Another snapshot is taken as it is stored, without the layers below.
    repository.reset_session("s", layers[1])
    assert files(repository) == {b"a": b"mid", b"d/y": b"mid"}
    repository.reset_session("s")
    assert files(repository) == {b"a": b"mid", b"d/y": b"mid"}


def test_single_paths_come_back_from_the_layers(repository: Repository, layers: Layers):
    whole = files(repository)
    for path in ("a", "d/x", "d/y", "d/linked"):
        edit(repository, path, None)
    report = repository.commit("s")
    edit(repository, "c", b"edited")
    edit(repository, "new", b"new")
    session = repository.reset_session("s", factory=True, paths=[b"a", b"d/linked"])
    assert session.parent == report.snapshot
    assert files(repository) == {
        b"a": b"mid", b"c": b"edited", b"d/linked": b"linked", b"d/z": b"top",
        b"linked": b"linked", b"new": b"new",
    }  # fmt: skip
    repository.reset_session("s", factory=True, paths=[b"d/", b"c", b"new"])
    assert files(repository) == whole
    with repository.tree("@s") as root:
        found = of_entry(repository.objects, root)  # the counts of links are right
    assert found[b"linked"].names == (b"d/linked", b"linked")
    for wrong in (b"none", b"none/below", b"", b"../a", b"a/below"):
        with pytest.raises(NotFoundError):
            repository.reset_session("s", factory=True, paths=[wrong])
    assert files(repository) == whole
    # A directory on the way that went.
    edit(repository, "d", None)
    repository.reset_session("s", factory=True, paths=[b"d/x"])
    assert {path for path in files(repository) if path.startswith(b"d/")} == {b"d/x"}
    repository.collect()
    assert repository.verify().damage == []


def test_what_no_tree_carries_stays_when_paths_come_back(repository: Repository, layers: Layers):
    edit(repository, "a", b"edited")
    with repository.sessions.hold("s", "a test") as held:
        socket = os.path.join(os.fsdecode(held.upper().root), "socket")
        os.mknod(socket, stat.S_IFSOCK | 0o600)
    repository.reset_session("s", paths=[b"a"])
    assert files(repository)[b"a"] == b"mid"
    with repository.sessions.hold("s", "a test") as held:
        socket = os.path.join(os.fsdecode(held.upper().root), "socket")
        assert stat.S_ISSOCK(os.lstat(socket).st_mode)
    repository.reset_session("s", factory=True, force=True)
    with repository.sessions.hold("s", "a test") as held:
        assert os.listdir(held.upper().root) == []
        assert repository.sessions.left_over(held.session) == []


def test_what_a_session_was_made_of_is_kept_for_it(repository: Repository, layers: Layers):
    edit(repository, "a", b"edited")
    last = SnapshotId(repository.commit("s").snapshot)
    repository.fork("s", "t")
    assert tuple(each for _, each in repository.sessions.get("t").layers) == layers
    repository.sessions.remove(repository.sessions.hold("t", "a test"))
    for held in (*layers, last):
        with pytest.raises(InUseError, match="session 's'"):
            repository.remove_snapshot(held)
        assert [each.name for each in repository.holders(Target("snapshot", held))] == ["s"]
    vfs = Vfs(repository, Owner(os.getuid(), os.getgid()), {})
    stack = vfs.inode(LAYERS).lookup(b"s")
    assert stack is not None
    shown = {name: inode.readlink() for _, name, inode in stack.listing(0)}
    vfs.close()
    names = (b"0-infrastructure", b"1-global", b"2-blueprint")
    expected = {
        name: b"../../snapshots/" + layer.hex().encode()
        for name, layer in zip(names, layers, strict=True)
    }
    assert shown == expected | {b"3-session": b"../../sessions/s"}


def test_an_image_of_a_session_has_its_layers(repository: Repository, layers: Layers):
    edit(repository, "a", None)
    repository.commit("s")
    with repository.storing():
        states = repository.layers_of("@s")
    assert [label for label, _ in states] == [
        "0-infrastructure", "1-global", "2-blueprint", "commits",
    ]  # fmt: skip
    assert states[3][1] == repository.snapshot(repository.resolve("@s")).root
    assert states[2][1] != states[3][1]


def test_a_record_of_format_2_does_not_bring_back_what_its_commit_removed(
    repository: Repository, layers: Layers
):
    """A commit put itself in the place of the highest layer then."""
    edit(repository, "a", None)
    report = repository.commit("s")
    committed = files(repository)

    def become_old(knows: bool) -> None:
        session = repository.sessions.get("s")
        top = ((session.layers[-1][0], session.parent),)
        old = msgspec.structs.replace(
            session, layers=(*session.layers[:-1], *top), knows_layers=knows
        )
        repository.store.write(lambda writer: put_record(writer, old))

    become_old(False)
    assert repository.reset_session("s").parent == report.snapshot
    assert files(repository) == committed
    edit(repository, "c", b"edited")
    repository.commit("s")
    edited = files(repository)
    repository.reset_session("s")
    assert files(repository) == edited


# What would be lost.


def test_a_session_with_changes_is_not_thrown_away(repository: Repository, layers: Layers):
    edit(repository, "new", b"new")
    for name in ("b1", "b2", "b3"):
        edit(repository, name, b"")
    with pytest.raises(UncommittedChangesError) as caught:
        repository.remove_session("s")
    assert (caught.value.count, caught.value.paths) == (4, [b"b1", b"b2", b"b3"])
    assert str(caught.value) == "session 's' has 4 uncommitted changes: 'b1', 'b2', 'b3', …"
    with pytest.raises(UncommittedChangesError):
        repository.reset_session("s", layers[0])
    with pytest.raises(UncommittedChangesError):
        repository.reset_session("s", factory=True)
    assert files(repository)[b"new"] == b"new"
    repository.commit("s")
    repository.remove_session("s")
    assert repository.sessions.all() == []
    assert os.listdir(repository.path + "/sessions") == []


def test_a_full_tree_that_a_killed_holder_left_is_work_too(repository: Repository, layers: Layers):
    from engine.sessions.session_tree import SessionTree

    with repository.sessions.hold("s", "running") as held, repository.storing():
        tree = SessionTree(repository.store, repository.objects, held)
        tree.make()
        (Path(tree.path) / "made").write_bytes(b"in the tree")
    with pytest.raises(UncommittedChangesError, match="'made'"):
        repository.remove_session("s")
    repository.remove_session("s", force=True)
