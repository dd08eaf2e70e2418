"""`mountctl git`: from a repository that git has made, and back into it."""

import json
import os
import re
from pathlib import Path

import pytest

from mountctl.failures import REFUSED, SYSTEM, UNKNOWN, USAGE
from tests.engine.git_repositories import Git
from tests.mountctl.test_progress import IMPATIENT, plain_text

WHO = "W Ho <who@example.com>"


@pytest.fixture
def git(tmp_path: Path) -> Git:
    made = Git(tmp_path / "source")
    made.write("src/main.c", b"int main;\n")
    made.commit("first")
    made("tag", "-a", "v1", "-m", "one")
    made("branch", "feature/x")
    return made


def test_import_names_the_refs_and_counts(mountctl, git):
    answer = mountctl.json("git", "import", git.path)
    assert answer["commits"] == 1
    assert answer["files"] == 1
    assert set(answer["refs"]) == {"main", "feature.x", "tags.v1"}
    assert answer["warnings"] == []
    result = mountctl("git", "import", git.path)
    assert "all commits were there already" in result.stderr
    assert "feature.x" in result.stdout
    log = mountctl.json("log", "main")
    assert [entry["message"] for entry in log] == ["first"]


def test_what_is_not_imported_is_counted(mountctl, git, tmp_path):
    git("notes", "add", "-m", "a note")
    git("update-ref", "refs/remotes/origin/x", "main")
    answer = mountctl.json("git", "import", git.path)
    assert answer["other_refs"] == {"refs/notes": 1, "refs/remotes": 1}
    result = mountctl("git", "import", git.path)
    assert "left out: 1 in refs/notes, 1 in refs/remotes" in result.stderr
    git.write("more", b"x")
    git.commit("second")
    git("clone", "-q", "--depth", "1", f"file://{git.path}", tmp_path / "shallow")
    words = ("git", "import", tmp_path / "shallow", "--prefix", "s.")
    assert mountctl.json(*words)["cut_commits"] == 1
    empty = Git(tmp_path / "empty")
    assert "there is nothing to import" in mountctl("git", "import", empty.path).stderr


def test_what_a_session_changed_becomes_a_branch(mountctl, git, tmp_path):
    mountctl("git", "import", git.path)
    mountctl("session", "create", "work", "main")
    upper = mountctl.json("session", "show", "work")["upper"]
    Path(upper, "new.c").write_bytes(b"int x;\n")
    answer = mountctl.json(
        "git", "export", git.path, "@work:feature/y", "-m", "A file", "--author", WHO
    )
    commit = answer["branches"]["refs/heads/feature/y"]
    assert git("rev-parse", "feature/y", "feature/y^") == f"{commit}\n{git('rev-parse', 'main')}"
    assert git("show", "-s", "--format=%an <%ae>: %s", commit) == f"{WHO}: A file"
    assert git("diff", "--name-status", "main", "feature/y") == "A\tnew.c"
    # The session is as it was, and can be committed: then its snapshot is what goes out.
    mountctl("commit", "work", "-m", "Committed", "--ref", "winner")
    result = mountctl("git", "export", git.path, "winner", "--author", WHO)
    assert "refs/heads/winner" in result.stdout
    assert git("show", "-s", "--format=%s", "winner") == "Committed"
    git("fsck", "--strict")
    assert git("status", "--porcelain") == ""


def test_everything_goes_back_under_its_own_name(mountctl, git, tmp_path):
    mountctl("git", "import", git.path, "--prefix", "up.")
    out = tmp_path / "out.git"
    answer = mountctl.json("git", "export", out, "--all")
    assert Git(out).refs() == git.refs() == answer["branches"]
    assert mountctl.json("git", "export", out, "--all")["commits"] == 0


def test_what_git_cannot_say_is_told(mountctl, tmp_path):
    tree = tmp_path / "tree"
    (tree / "empty\x1b").mkdir(parents=True)
    (tree / "a").write_bytes(b"1")
    mountctl("import", tree, "--ref", "main")
    result = mountctl("git", "export", tmp_path / "out.git", "main", "--author", WHO)
    assert 'git has no such thing: 1 empty directory ("empty\\033")' in result.stderr
    answer = mountctl.json("git", "export", tmp_path / "other.git", "main", "--author", WHO)
    lost = {each["kind"]: each["count"] for each in answer["lost"]}
    assert lost["empty directory"] == 1


def test_refusals_have_codes_and_hints(mountctl, git, tmp_path, monkeypatch):
    assert "nowhere" in mountctl.fails(REFUSED, "git", "import", tmp_path / "nowhere")
    assert "no commit" in mountctl.fails(REFUSED, "git", "import", git.path, "v7")
    mountctl("git", "import", git.path)
    assert "checked out" in mountctl.fails(
        REFUSED, "git", "export", tmp_path / "source", f"{commit(mountctl, tmp_path)}:main",
        "--author", WHO,
    )  # fmt: skip
    mountctl.fails(UNKNOWN, "git", "export", git.path, "nothing:x")
    mountctl.fails(USAGE, "git", "export", git.path)
    identifier = mountctl.json("log", "main")[0]["snapshot"]
    assert "needs a branch" in mountctl.fails(USAGE, "git", "export", git.path, identifier)
    assert "no branch" in mountctl.fails(USAGE, "git", "export", git.path, "main:")
    monkeypatch.setitem(__import__("sys").modules, "pygit2", None)
    assert "pygit2" in mountctl.fails(SYSTEM, "git", "import", git.path)


def commit(mountctl, tmp_path: Path) -> str:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a").write_bytes(b"2")
    found: str = mountctl.json("import", tree, "--parent", "main")["snapshot"]
    return found


def test_nobody_is_the_author_unless_somebody_says_who(mountctl, git, tmp_path):
    mountctl("git", "import", git.path)
    identifier = commit(mountctl, tmp_path)
    result = mountctl.run(
        "git", "export", git.path, f"{identifier}:x", code=REFUSED, GIT_CONFIG_NOSYSTEM="1"
    )
    assert "author" in result.stderr
    git("config", "user.name", "Con Fig")
    git("config", "user.email", "config@example.com")
    done = mountctl.run("git", "export", git.path, f"{identifier}:x", "--json")
    made = json.loads(done.stdout)["branches"]["refs/heads/x"]
    assert git("show", "-s", "--format=%an", made) == "Con Fig"


def test_a_bar_counts_commits(mountctl, git):
    shown = mountctl.on_terminal(
        "git", "import", git.path, program=IMPATIENT, HOME=os.fspath(mountctl.home),
    )  # fmt: skip
    assert "importing" in shown
    assert re.search(
        r"\d of \d+ commits, [0-9.]+ (B|KiB), [0-9.]+ (B|KiB|MiB)/s", plain_text(shown)
    )
