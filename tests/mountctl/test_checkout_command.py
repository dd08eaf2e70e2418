"""`mountctl checkout` and `commit --from`: a directory that is made, switched and committed."""

import os
import shutil
from pathlib import Path

import pytest

from tests.engine.trees import age


@pytest.fixture
def out(mountctl, tree: Path, first: str, tmp_path: Path) -> Path:
    (tree / "added").write_text("second")
    age(tree)
    mountctl("import", tree, "--ref", "second", "--parent", "main")
    mountctl("checkout", "main", tmp_path / "out")
    return tmp_path / "out"


def test_switch_and_status(mountctl, out: Path, first: str):
    assert mountctl("checkout", "--status", out).stdout == ""
    result = mountctl("checkout", "--switch", "second", out)
    assert result.stdout == ""
    assert (out / "added").read_text() == "second"
    assert mountctl("checkout", "--status", out).stdout == ""
    done = mountctl.json("checkout", "--switch", "main", out)
    assert (done["snapshot"], done["directory"], done["removed"]) == (first, str(out), 1)
    assert not (out / "added").exists()


def test_edits_in_the_way(mountctl, out: Path):
    (out / "added").write_text("mine")
    (out / "odd\nname").write_text("mine")
    assert mountctl("checkout", "--status", out).stdout == 'A added\nA "odd\\nname"\n'
    found = mountctl.json("checkout", "--status", out)
    assert found["edits"] == [
        {"path": "added", "change": "added"}, {"path": "odd\nname", "change": "added"}
    ]  # fmt: skip
    assert "local edits in the way: 'added'" in mountctl.fails(
        4, "checkout", "--switch", "second", out
    )
    assert mountctl("checkout", "--switch", "--keep", "second", out).stdout == "A added\n"
    assert (out / "added").read_text() == "mine"
    assert mountctl("checkout", "--status", out).stdout == 'M added\nA "odd\\nname"\n'
    mountctl("checkout", "--switch", "main", out, code=4)
    done = mountctl.json("checkout", "--switch", "--force", "main", out)
    assert done["overwritten"] == [{"path": "added", "change": "modified"}]
    assert sorted(set(os.listdir(out)) & {"added", "odd\nname"}) == ["odd\nname"]


def test_commit_from_a_directory(mountctl, out: Path, first: str):
    assert mountctl.json("commit", "--from", out)["changed"] is False
    (out / "mine").write_text("mine")
    done = mountctl.json("commit", "--from", out, "-m", "by hand", "--ref", "mine")
    assert done["changed"] is True
    assert mountctl.json("snapshot", "show", "mine")["parents"] == [first]
    assert mountctl("checkout", "--status", out).stdout == ""
    mountctl("checkout", "--switch", "main", out)
    assert not (out / "mine").exists()


def test_a_path_in_a_snapshot(mountctl, out: Path, tree: Path, tmp_path: Path):
    (directory,) = [each for each in tree.iterdir() if each.is_dir() and any(each.iterdir())][:1]
    mountctl("checkout", f"main:{directory.name}", tmp_path / "part")
    assert sorted(os.listdir(tmp_path / "part")) == sorted(os.listdir(directory))
    mountctl("checkout", "--switch", "second", tmp_path / "part")
    mountctl("checkout", "second:added", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "second"
    mountctl.fails(4, "checkout", "second:added", tmp_path / "file")
    mountctl.fails(3, "checkout", "main:none", tmp_path / "none")
    mountctl.fails(4, "commit", "--from", tmp_path / "part")


def test_all_checkouts(mountctl, out: Path, first: str, tmp_path: Path):
    mountctl("session", "create", "work", "main")
    mountctl("checkout", "@work", tmp_path / "work")
    found = {each["directory"]: each for each in mountctl.json("checkout", "--list")}
    assert found[str(out)]["snapshot"] == first
    assert found[str(tmp_path / "work")]["snapshot"] is None
    assert found[str(tmp_path / "work")]["base"] == first
    text = mountctl("checkout", "--list").stdout
    assert f"{out}  " in text
    assert f"a session's tree on {first[:12]}" in text
    shutil.rmtree(out)
    assert len(mountctl.json("checkout", "--list")) == 1
    (tmp_path / "work/mine").write_text("mine")
    done = mountctl.json("commit", "--from", tmp_path / "work", "--meta", "by=hand")
    shown = mountctl.json("snapshot", "show", done["snapshot"])
    assert (shown["parents"], shown["metadata"]["by"]) == ([first], "hand")
    shutil.rmtree(tmp_path / "work")
    mountctl("gc")
    assert mountctl.json("checkout", "--list") == []
    assert mountctl("checkout", "--list").stderr.startswith("there are none")


def test_wrong_words(mountctl, out: Path, tree: Path):
    mountctl.fails(4, "checkout", "--status", tree)
    mountctl.fails(4, "checkout", "--switch", "main", tree)
    mountctl.fails(4, "commit", "--from", tree)
    wrong: list[list[str | Path]] = [
        ["checkout", out],
        ["checkout", "--status", "main", out],
        ["checkout", "--keep", "main", out],
        ["checkout", "--switch", "--keep", "--force", "main", out],
        ["checkout", "--switch", out],
        ["checkout"],
        ["checkout", "--status"],
        ["checkout", "--list", out],
        ["checkout", "--list", "--status"],
        ["commit"],
        ["commit", "work", "--from", out],
    ]
    for words in wrong:
        mountctl.fails(2, *words)
