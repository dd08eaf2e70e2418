"""Snapshots from git and back, with repositories that the real git has made and judges."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import Repository
from engine.git.git_export import ToExport
from engine.git.git_repository import GitMissingError, GitRefusedError, GitSourceError
from engine.git.git_trees import TIME_NS
from engine.ids import SnapshotId
from engine.storage.content import read
from engine.storage.nodes import Kind
from engine.storage.store import Db
from engine.trees.directory import find, walk
from tests.engine.git_repositories import ENVIRONMENT, Git, stream

WHO = "W Ho <who@example.com>"


@pytest.fixture
def git(tmp_path: Path) -> Git:
    return Git(tmp_path / "source")


def contents(repository: Repository, name: str) -> dict[bytes, tuple[int, int, bytes]]:
    """Returns {path: (kind, mode, bytes)} of all but directories."""
    root = repository.snapshot(repository.resolve(name)).root
    found = {}
    for path, entry in walk(repository.objects, root):
        assert entry.mtime_ns == TIME_NS
        if entry.kind == Kind.FILE:
            found[path] = (entry.kind, entry.mode, read(repository.objects, entry, 0, entry.size))
        elif entry.kind == Kind.SYMLINK:
            assert isinstance(entry.content, bytes)
            found[path] = (entry.kind, entry.mode, entry.content)
    return found


def wanted(repository: Repository, *refs: str) -> list[ToExport]:
    names = repository.git_names()
    return [ToExport(names[ref], repository.resolve(ref), ref) for ref in refs or names]


def commit_in_workspace(
    repository: Repository, base: str, changes: dict[str, bytes], ref: str
) -> SnapshotId:
    workspace = repository.workspace(base)
    for path, data in changes.items():
        workspace.write(path, data)
    return workspace.commit("by a workspace", ref=ref).snapshot


def test_files_links_modes_names_messages_people_times_and_parents_come_over(repository, git):
    git.write("src/a.c", b"int a;\n" * 5000)
    git.write("tiny", b"1")
    git.write("empty", b"")
    git.write(b'n\xffme \n"', b"bytes")
    git.write("run", b"#!/bin/sh\n")
    (git.path / "run").chmod(0o755)
    (git.path / "link").symlink_to("src/a.c")
    git.write("big", random.Random(1).randbytes(700_000))
    first = git.commit("first\n\nwith a body\nof two lines")
    git("checkout", "-q", "-b", "side/one")
    git.write("src/b.c", b"int b;\n")
    side = git.commit("on the side: \u00fc")
    git("checkout", "-q", "main")
    git.write("src/a.c", b"int aa;\n")
    git.commit()
    git("merge", "-q", "--no-edit", "side/one")
    git("tag", "-a", "v1", "-m", "version one")
    report = repository.import_git(str(git.path))
    assert report.commits == 4
    assert set(report.refs) == {"main", "side.one", "tags.v1"}
    assert report.warnings == []
    expected = {}
    for mode, _, identifier, path in git.listing("main"):
        data = git.raw("cat-file", "blob", identifier)
        kind = Kind.SYMLINK if mode == "120000" else Kind.FILE
        expected[path] = (kind, {"120000": 0o777}.get(mode, int(mode[3:], 8)), data)
    assert contents(repository, "main") == expected
    head = repository.snapshot(repository.resolve("main"))
    assert [repository.snapshot(SnapshotId(p)).message for p in head.parents] == [
        "change", "on the side: \u00fc",
    ]  # fmt: skip
    assert head.parents[1] == report.refs["side.one"]
    record = repository.snapshot(report.refs["side.one"])
    assert record.metadata["git"]["commit"] == side
    when = int(git("show", "-s", "--format=%ct", side))
    assert record.time_ns == when * 10**9
    assert record.metadata["git"]["author"].startswith("A U Thor <author@example.com> ")
    below = repository.snapshot(SnapshotId(record.parents[0]))
    assert below.message == "first\n\nwith a body\nof two lines"
    assert below.metadata["git"]["commit"] == first
    assert repository.verify().damage == []


def test_the_same_refs_and_ids_come_back_annotated_tags_too(repository, git, tmp_path):
    odd = [
        b"tree %s\nauthor A <a@x> 5 +0000\ncommitter A <a@x> 5 -0930\n\nno newline at the end",
        b"tree %s\nauthor  <> 0 +0000\ncommitter \xfc <a@x> 7 +0000\nencoding latin1\n\nf\xfcr\n",
        b"tree %s\nauthor A <a@x> 5 +0000\ncommitter A <a@x> 9 +0000\n"
        b"gpgsig -----BEGIN\n \n abc\n -----END\nHG:extra x y\n\nsigned\n\n\n",
        b"tree %s\nauthor A <a@x> 99999999999999999 +0000\ncommitter nobody\n\n",
        b"tree %s\nauthor A <a@x> 5 +0000\ncommitter A <a@x> 5 +0000\n\n\xff\xfe not UTF-8",
    ]
    git.write("a", b"1")
    git.commit()
    tree = git("rev-parse", "HEAD^{tree}").encode()
    for at, text in enumerate(odd):
        made = git("hash-object", "-t", "commit", "-w", "--stdin", "--literally", data=text % tree)
        git("update-ref", f"refs/heads/odd/{at}", made)
    git("tag", "-a", "v1", "-m", "version\n\none")
    git("tag", "light")
    repository.import_git(str(git.path))
    report = repository.export_git(str(tmp_path / "out.git"), wanted(repository))
    out = Git(tmp_path / "out.git", bare=True)
    assert report.others == []
    assert report.lost == {}
    assert out.refs() == git.refs()
    out("fsck", "--connectivity-only")


PATHS = st.sampled_from([b"a", b"b", b"d/a", b"d/b", b"d/e/f", b"d.c", b"d-", b"\xff x", b"z/y/x"])
CHANGES = st.dictionaries(PATHS, st.one_of(st.none(), st.binary(max_size=300)), max_size=4)


@st.composite
def graphs(draw) -> list[tuple[str, list[int], dict[bytes, bytes | None]]]:
    commits = []
    for number in range(1, draw(st.integers(1, 12)) + 1):
        many = min(number - 1, draw(st.integers(0, 3)))
        known = st.integers(1, max(1, number - 1))
        parents = draw(st.lists(known, min_size=many, max_size=many, unique=True))
        branch = draw(st.sampled_from(["main", "f/x", "old"]))
        commits.append((branch, parents, draw(CHANGES)))
    return commits


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(graphs=graphs(), cut=st.integers(1, 12))
def test_any_graph_comes_back_the_same_however_many_imports_it_took(tmp_path_factory, graphs, cut):
    folder = tmp_path_factory.mktemp("graph")
    git = Git(folder / "in.git", bare=True)
    with Repository.create(str(folder / "store")) as repository:
        git.fast_import(stream(graphs[:cut]))
        repository.import_git(str(git.path), force=True)
        if graphs[cut:]:
            git.fast_import(stream(graphs))
            repository.import_git(str(git.path), force=True)
        repository.export_git(str(folder / "out.git"), wanted(repository))
        out = Git(folder / "out.git", bare=True)
        assert out.refs() == git.refs()
        with Repository.create(str(folder / "other")) as other:  # ids depend on commits alone
            other.import_git(str(git.path))
            assert other.refs() == repository.refs()
            for target in set(other.refs().values()):
                assert other.snapshot(target) == repository.snapshot(target)
        assert repository.verify().damage == []


def test_a_second_import_reads_what_is_new_only(repository, git):
    for number in range(30):
        git.write(f"d{number % 3}/f{number}", bytes([number]) * 1000)
    git.commit()
    first = repository.import_git(str(git.path))
    assert (first.commits, first.blobs) == (1, 30)
    git.write("d1/f1", b"new")
    git.commit()
    second = repository.import_git(str(git.path))
    assert (second.commits, second.known, second.blobs) == (1, 1, 1)
    third = repository.import_git(str(git.path))
    assert (third.commits, third.known, third.blobs) == (0, 1, 0)
    assert third.refs == second.refs
    git.commit("nothing changed")
    git.write("d2/f2", b"newer")
    git.commit()
    fourth = repository.import_git(str(git.path))
    assert (fourth.commits, fourth.known, fourth.blobs) == (2, 1, 1)


def test_without_its_rows_an_import_makes_the_same_snapshots(repository, git):
    git.write("a", b"1")
    git.commit()
    before = repository.import_git(str(git.path)).refs

    def forget(writer):
        for key in list(writer.keys(Db.IMPORTS)):
            writer.delete(Db.IMPORTS, key)

    repository.store.write(forget)
    report = repository.import_git(str(git.path))
    assert report.commits == 1
    assert report.refs == before
    assert len(repository.snapshots()) == 1


def test_garbage_collection_keeps_what_imports_need_and_forgets_the_rest(repository, git):
    git.write("a", b"1" * 1000)
    git.commit()
    repository.import_git(str(git.path))
    repository.collect()
    assert repository.import_git(str(git.path)).known == 1
    target = repository.resolve("main")
    repository.remove_ref("main")
    repository.remove_snapshot(target)
    repository.collect()
    with repository.store.read() as reader:
        assert reader.count(Db.IMPORTS) == 0
    report = repository.import_git(str(git.path))
    assert report.commits == 1
    assert report.refs == {"main": target}
    assert repository.verify().damage == []


def test_a_large_directory_is_the_one_that_import_of_a_directory_makes(repository, git, tmp_path):
    for number in range(900):
        git.write(f"many/{number}", b"%d" % number)
    git.commit()
    repository.import_git(str(git.path))
    git.write("many/500", b"other")
    git.write("many/new", b"new")
    (git.path / "many/7").unlink()
    git.commit()
    repository.import_git(str(git.path))
    git("worktree", "add", "-q", "--detach", str(tmp_path / "plain"))
    (tmp_path / "plain/.git").unlink()
    for path, folders, files in os.walk(tmp_path / "plain", topdown=False):
        for name in folders + files:
            os.utime(os.path.join(path, name), ns=(TIME_NS, TIME_NS))
            Path(path, name).chmod(0o755 if name in folders else 0o644)
    result = repository.import_directory(str(tmp_path / "plain"))
    root = repository.snapshot(repository.resolve("main")).root
    assert root.content == result.root.content
    assert root.totals == result.root.totals
    assert root.size == result.root.size


def test_a_range_has_the_commits_of_the_range_and_says_what_it_left_out(repository, git, tmp_path):
    ids = []
    for number in range(5):
        git.write("a", b"%d" % number)
        ids.append(git.commit(f"number {number}"))
    report = repository.import_git(str(git.path), [f"{ids[1]}..main"])
    assert report.commits == 3
    chain = [record for _, record in repository.log(report.refs["main"])]
    assert [record.message for record in chain] == ["number 4", "number 3", "number 2"]
    assert chain[-1].parents == ()
    assert chain[-1].metadata["git"]["parents"] == [ids[1]]
    # The same again is there already; all of it is other snapshots, the whole history.
    assert repository.import_git(str(git.path), [f"{ids[1]}..main"]).commits == 0
    report = repository.import_git(str(git.path))
    assert report.commits == 5
    assert len(list(repository.log(report.refs["main"]))) == 5
    # What goes out has the parents that it had, where the repository has them.
    done = repository.export_git(str(git.path), [ToExport("copy", report.refs["main"])])
    assert done.branches == {"refs/heads/copy": ids[-1]}


def test_a_shallow_clone_is_imported_as_far_as_it_goes(repository, git, tmp_path):
    for number in range(4):
        git.write("a", b"%d" % number)
        git.commit()
    git("clone", "-q", "--depth", "2", f"file://{git.path}", tmp_path / "shallow")
    report = repository.import_git(str(tmp_path / "shallow"))
    assert report.commits == 2
    git("-C", tmp_path / "shallow", "fetch", "-q", "--unshallow")
    assert repository.import_git(str(tmp_path / "shallow")).commits == 4


def test_submodules_lfs_pointers_and_old_modes_are_named_and_come_back(repository, git, tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 5\n" % (b"a" * 64)
    git.write("big.bin", pointer)
    git.write("a", b"1")
    git.commit()
    blob = git("rev-parse", "HEAD:a")
    module = "1" * 40
    lines = f"100664 blob {blob}\told\n160000 commit {module}\tsub\n040000 tree "
    inner = git("mktree", "--missing", data=f"160000 commit {module}\tx\n".encode())
    pointer_id = git("rev-parse", "HEAD:big.bin")
    lines += f"{inner}\td\n100644 blob {pointer_id}\tbig.bin\n"
    tree = git("mktree", "--missing", data=lines.encode())
    commit = git("commit-tree", "-m", "modules", tree)
    git("update-ref", "refs/heads/main", commit)
    report = repository.import_git(str(git.path))
    assert report.submodules == [(b"d/x", module), (b"sub", module)]
    assert report.lfs_pointers == [b"big.bin"]
    root = repository.snapshot(report.refs["main"]).root
    sub = find(repository.objects, root, b"sub")
    assert sub is not None
    assert dict(sub.xattrs)[b"user.git.submodule"] == module.encode()
    assert contents(repository, "main")[b"big.bin"][2] == pointer
    repository.export_git(str(tmp_path / "out.git"), wanted(repository))
    assert Git(tmp_path / "out.git", bare=True).refs() == {"refs/heads/main": commit}


def test_names_that_no_tree_may_have_are_left_out_and_named(repository, git):
    blob = git("hash-object", "-w", "--stdin", data=b"x")
    raw = bytes.fromhex(blob)
    names = [b".git", b"..", b"a/b", b"n" * 300, b"good"]
    data = b"".join(b"100644 " + name + b"\0" + raw for name in sorted(names))
    data += b"100644 good\0" + raw + b"60000 device\0" + raw
    tree = git("hash-object", "-t", "tree", "-w", "--stdin", "--literally", data=data)
    commit = git("commit-tree", "-m", "hostile", tree)
    git("update-ref", "refs/heads/main", commit)
    report = repository.import_git(str(git.path))
    assert list(contents(repository, "main")) == [b"good"]
    assert len(report.warnings) == 6
    assert repository.verify().damage == []


def test_trees_that_are_too_deep_are_refused_and_nothing_is_lost(repository, git):
    tree = git("mktree", data=b"")
    for _ in range(600):
        tree = git("mktree", data=f"040000 tree {tree}\td\n".encode())
    git("update-ref", "refs/heads/main", git("commit-tree", "-m", "deep", tree))
    with pytest.raises(GitSourceError, match="512 directories"):
        repository.import_git(str(git.path))
    assert repository.refs() == {}
    assert repository.verify().damage == []


def test_as_deep_as_a_tree_may_be_goes_both_ways(repository, git, tmp_path):
    tree = git("mktree", data=b"")
    blob = git("hash-object", "-w", "--stdin", data=b"x")
    tree = git("mktree", data=f"100644 blob {blob}\tx\n".encode())
    for _ in range(511):
        tree = git("mktree", data=f"040000 tree {tree}\td\n".encode())
    git("update-ref", "refs/heads/main", git("commit-tree", "-m", "deep", tree))
    repository.import_git(str(git.path))
    repository.export_git(str(tmp_path / "out.git"), wanted(repository))
    assert Git(tmp_path / "out.git", bare=True).refs() == git.refs()
    git("update-ref", "refs/heads/main", git("commit-tree", "-p", "main", "-m", "again", tree))
    assert repository.import_git(str(git.path)).commits == 1


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_a_damaged_repository_gives_what_is_whole_and_an_error(repository, git, harm):
    git.write("a", b"1" * 500)
    git.commit()
    git("branch", "whole")
    git.write("a", b"2" * 500)
    git.commit()
    blob = git("rev-parse", "HEAD:a")
    file = git.path / ".git/objects" / blob[:2] / blob[2:]
    file.chmod(0o644)
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-8] + bytes(8))
    with pytest.raises(GitSourceError, match=blob):
        repository.import_git(str(git.path))
    assert repository.refs() == {}
    assert repository.import_git(str(git.path), ["whole"]).refs.keys() == {"whole"}


def test_what_is_no_repository_or_no_revision_is_said(repository, git, tmp_path):
    with pytest.raises(GitSourceError, match="nowhere"):
        repository.import_git(str(tmp_path / "nowhere"))
    git.commit()
    with pytest.raises(GitSourceError, match="no commit"):
        repository.import_git(str(git.path), ["nothing"])
    with pytest.raises(GitSourceError, match="three dots"):
        repository.import_git(str(git.path), ["main...main"])
    assert repository.import_git(str(Git(tmp_path / "empty").path)).commits == 0


def test_refs_of_others_are_moved_forward_only(repository, git):
    git.commit()
    own = commit_in_workspace(repository, repository.import_git(str(git.path)).refs["main"].hex(),
                              {"mine": b"1"}, "main")  # fmt: skip
    git.commit()
    report = repository.import_git(str(git.path))
    assert report.kept.keys() == {"main"}
    assert repository.resolve("main") == own
    assert repository.import_git(str(git.path), prefix="up.").refs.keys() == {"up.main"}
    assert repository.import_git(str(git.path), force=True).kept == {}
    # What an import has set, the next one moves, also after a rebase.
    git("commit", "-q", "--amend", "--allow-empty", "-m", "otherwise")
    report = repository.import_git(str(git.path))
    assert report.kept == {}
    assert repository.snapshot(repository.resolve("main")).message == "otherwise"


def test_two_branches_that_would_have_one_ref_are_named(repository, git):
    git.commit()
    for name in ("a/b", "a.b", "\u00fc"):
        git("branch", name)
    report = repository.import_git(str(git.path))
    assert set(report.refs) == {"a.b", "main", "_"}
    assert report.warnings == ["no ref for refs/heads/a/b: the ref a.b is refs/heads/a.b already"]


def test_new_snapshots_become_commits_on_top(repository, git, tmp_path):
    git.write("src/a", b"1")
    git.write("src/run", b"#!/bin/sh\n")
    (git.path / "src/run").chmod(0o755)
    base = git.commit()
    repository.import_git(str(git.path))
    target = commit_in_workspace(repository, "main", {"src/b": b"new"}, "winner")
    report = repository.export_git(str(git.path), [ToExport("winner", target)], author=WHO)
    assert (report.commits, report.known) == (1, 1)
    assert git("rev-parse", "winner^") == base
    assert git("show", "-s", "--format=%an <%ae> %s", "winner") == f"{WHO} by a workspace"
    assert git("diff", "--name-status", "main", "winner") == "A\tsrc/b"
    assert git("status", "--porcelain") == ""
    # Again is nothing; and imported again it is the snapshot that it was.
    again = repository.export_git(str(git.path), [ToExport("winner", target)], author="O <o@x>")
    assert (again.commits, again.branches) == (0, report.branches)
    assert repository.import_git(str(git.path)).refs["winner"] == target
    git("fsck", "--strict")


def test_what_git_cannot_say_is_counted_and_named(repository, tmp_path):
    source = tmp_path / "tree"
    (source / "empty").mkdir(parents=True)
    (source / "kept").mkdir()
    (source / "kept/a").write_bytes(b"1")
    os.setxattr(source / "kept/a", "user.x", b"1")
    (source / "private").write_bytes(b"2")
    (source / "private").chmod(0o600)
    os.link(source / "private", source / "second")
    os.mkfifo(source / "fifo")
    (source / ".git").mkdir()
    (source / ".git/config").write_bytes(b"[core]\n")
    target = SnapshotId(repository.import_directory(str(source)).snapshot)
    out = tmp_path / "out.git"
    report = repository.export_git(str(out), [ToExport("main", target)], author=WHO)
    assert {kind: loss.paths for kind, loss in report.lost.items() if kind != "time"} == {
        "name that git reserves": [b".git"],
        "empty directory": [b"empty"],
        "fifo": [b"fifo"],
        "extended attribute": [b"kept/a"],
        "hard link": [b"private", b"second"],
        "permission bits": [b"private", b"second"],
    }
    names = [path for _, _, _, path in Git(out).listing("main")]
    assert names == [b"kept/a", b"private", b"second"]


def test_a_branch_goes_forward_only_and_never_under_a_work_tree(repository, git):
    git.write("a", b"1")
    git.commit()
    repository.import_git(str(git.path))
    one = commit_in_workspace(repository, "main", {"b": b"1"}, "one")
    two = commit_in_workspace(repository, "main", {"b": b"2"}, "two")
    path = str(git.path)
    with pytest.raises(GitRefusedError, match="checked out"):
        repository.export_git(path, [ToExport("main", one)], author=WHO, force=True)
    repository.export_git(path, [ToExport("try", one)], author=WHO)
    before = git.refs()
    with pytest.raises(GitRefusedError, match="lost"):
        repository.export_git(
            path, [ToExport("other", one), ToExport("try", two)], author=WHO
        )  # fmt: skip
    assert git.refs() == before
    repository.export_git(path, [ToExport("try", two)], author=WHO, force=True)
    assert git.refs() != before
    with pytest.raises(GitRefusedError, match="cannot name"):
        repository.export_git(path, [ToExport("a..b", two)], author=WHO)
    assert git("status", "--porcelain") == ""


def test_names_that_two_would_have_are_told_before_anything_is_written(repository, git, tmp_path):
    other = Git(tmp_path / "other")
    for each, data in ((git, b"1"), (other, b"2")):
        each.write("a", data)
        each.commit()
        each("branch", "same")
        repository.import_git(str(each.path), prefix=f"{each.path.name}.")
    out = tmp_path / "out.git"
    with pytest.raises(GitRefusedError, match=r"other\.main and source\.main would both be"):
        repository.export_git(str(out), wanted(repository))
    assert not out.exists()
    one = repository.resolve("source.main")
    with pytest.raises(GitRefusedError, match="'refs/heads/a' and 'refs/heads/a/b' cannot both"):
        repository.export_git(str(out), [ToExport("a/b", one), ToExport("a", one)])
    assert not out.exists()
    repository.export_git(str(out), [ToExport("a/b", one), ToExport("a/b", one)])
    with pytest.raises(GitRefusedError, match="cannot both be there"):
        repository.export_git(str(out), [ToExport("b", one), ToExport("a/b/c", one)])
    assert list(Git(out).refs()) == ["refs/heads/a/b"]


def test_branches_move_all_or_none(repository, git, tmp_path):
    git.write("a", b"1")
    git.commit()
    one = repository.import_git(str(git.path)).refs["main"]
    two = commit_in_workspace(repository, "main", {"b": b"1"}, "two")
    path = tmp_path / "out.git"
    repository.export_git(str(path), [ToExport("a", one), ToExport("b", one)])
    before = Git(path).refs()
    (path / "refs" / "heads" / "b.lock").write_bytes(b"")  # somebody else moves it just now
    with pytest.raises(GitRefusedError, match="lock"):
        repository.export_git(str(path), [ToExport("a", two), ToExport("b", two)], author=WHO)
    assert Git(path).refs() == before
    (path / "refs" / "heads" / "b.lock").unlink()
    repository.export_git(str(path), [ToExport("a", two), ToExport("b", two)], author=WHO)
    assert len(set(Git(path).refs().values()) - set(before.values())) == 1


def test_a_snapshot_that_lies_about_its_commit_is_written_as_what_it_is(repository, git, tmp_path):
    git.write("a", b"1")
    commit = git.commit()
    record = repository.snapshot(repository.import_git(str(git.path)).refs["main"])
    source = tmp_path / "tree"
    source.mkdir()
    (source / "a").write_bytes(b"evil")
    fields = {**record.metadata["git"], "author": "X <x> 1 +0000\nparent 0"}
    for claim in (record.metadata["git"], fields):
        lie = SnapshotId(
            repository.import_directory(str(source), metadata={"git": claim}).snapshot
        )  # fmt: skip
        done = repository.export_git(str(git.path), [ToExport("lie", lie)], author=WHO, force=True)
        assert done.branches["refs/heads/lie"] != commit
        assert git("show", "lie:a") == "evil"
        git("fsck", "--strict")


def test_without_its_library_the_error_says_so(repository, git, monkeypatch):
    monkeypatch.setitem(sys.modules, "pygit2", None)
    with pytest.raises(GitMissingError, match="pygit2 is not installed"):
        repository.import_git(str(git.path))
    with pytest.raises(GitMissingError):
        repository.export_git(str(git.path), [])


def test_a_long_file_goes_both_ways(repository, git, tmp_path):
    git.write("long", random.Random(3).randbytes(9 << 20))
    git.commit()
    repository.import_git(str(git.path))
    repository.export_git(str(tmp_path / "out.git"), wanted(repository))
    assert Git(tmp_path / "out.git", bare=True).refs() == git.refs()


def test_an_import_that_is_killed_is_whole_and_goes_on(tmp_path):
    git = Git(tmp_path / "in.git", bare=True)
    dice = random.Random(5)
    commits: list[tuple[str, list[int], dict[bytes, bytes | None]]] = [
        ("main", [n] if n else [], {b"d%d/f%d" % (n % 7, n % 91): dice.randbytes(900)})
        for n in range(1500)
    ]
    git.fast_import(stream(commits))
    with Repository.create(str(tmp_path / "whole")) as whole:
        expected = whole.import_git(str(git.path)).refs
    Repository.create(str(tmp_path / "store")).close()
    code = (
        "import sys, engine.git.git_import as g; from engine import Repository\n"
        "g._BATCH_COMMITS = 50\n"
        "flush = g._GitImport._flush\n"
        "def when_let(self): sys.stdin.readline(); flush(self)\n"
        "g._GitImport._flush = when_let\n"
        "Repository.open(sys.argv[1]).import_git(sys.argv[2])"
    )
    counts = []
    for _ in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "store"), str(git.path)],
            env={**os.environ, **ENVIRONMENT}, stdin=subprocess.PIPE, text=True,
        )  # fmt: skip
        with Repository.open(str(tmp_path / "store")) as store:
            before = len(store.snapshots())
            assert child.stdin is not None
            child.stdin.write("\n" * 3)  # batches; it is killed while it is at the third
            child.stdin.flush()
            while child.poll() is None and len(store.snapshots()) < before + 100:
                time.sleep(0.002)
            child.send_signal(signal.SIGKILL)
            child.wait()
            child.stdin.close()
            # A write: LMDB tells readers of what was killed at the end of a commit from then on.
            store.collect()
            counts.append(len(store.snapshots()))
            assert store.refs() == {}
            assert store.verify().damage == []
    assert 0 < counts[0] < counts[-1] < 1500
    with Repository.open(str(tmp_path / "store")) as store:
        report = store.import_git(str(git.path))
        assert report.commits == 1500 - counts[-1]
        assert report.refs == expected
        assert store.verify().damage == []
