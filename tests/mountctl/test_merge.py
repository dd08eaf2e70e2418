"""`mountctl merge` and `mountctl apply`."""

import shutil
import subprocess
from pathlib import Path

import pytest

from engine import Repository, SnapshotId
from engine.storage.nodes import encode
from engine.trees.directory import find

LINES = "".join(f"{n}\n" for n in range(1, 10))


@pytest.fixture
def sides(mountctl, tmp_path):
    """Makes snapshots of trees of texts: `sides(base, ours, theirs)`; returns their ids."""

    def make(*trees: dict[str, str]) -> list[str]:
        ids: list[str] = []
        with Repository.open(str(mountctl.store)) as repository:
            for number, tree in enumerate(trees):
                top = tmp_path / "sides"
                shutil.rmtree(top, ignore_errors=True)
                for path, text in tree.items():
                    (top / path).parent.mkdir(parents=True, exist_ok=True)
                    (top / path).write_text(text)
                parents = (SnapshotId(bytes.fromhex(ids[0])),) if ids else ()
                ref = ("base", "ours", "theirs")[number]
                made = repository.import_directory(str(top), ref=ref, parents=parents)
                ids.append(made.snapshot.hex())
        return ids

    return make


def texts(mountctl, snapshot: str, target: Path) -> dict[str, str]:
    shutil.rmtree(target, ignore_errors=True)
    mountctl("checkout", snapshot, target)
    files = [path for path in target.rglob("*") if path.is_file()]
    return {str(path.relative_to(target)): path.read_text() for path in files}


def edited(old: str, new: str) -> str:
    return LINES.replace(old + "\n", new + "\n")


def test_merge(mountctl, sides, tmp_path):
    _, ours, theirs = sides(
        {"f": LINES, "g": "g"}, {"f": edited("1", "one"), "g": "g"},
        {"f": edited("9", "nine"), "g": "g", "new/h": "h"},
    )  # fmt: skip
    result = mountctl("merge", "ours", "theirs", "--ref", "merged", "-m", "both")
    assert "merged, 1 file by lines" in result.stderr
    shown = mountctl.json("snapshot", "show", "merged")
    assert shown["snapshot"].startswith(result.stdout.strip())
    assert (shown["parents"], shown["message"]) == ([ours, theirs], "both")
    both = edited("1", "one").replace("9", "nine")
    assert texts(mountctl, "merged", tmp_path / "out") == {"f": both, "g": "g", "new/h": "h"}
    assert mountctl.json("verify")["damage"] == []


def test_conflicts_make_no_snapshot(mountctl, sides):
    sides({"f": LINES, "d": "d"}, {"f": edited("5", "x"), "d": "e"}, {"f": edited("5", "y")})
    before = mountctl.json("snapshot", "list")
    result = mountctl("merge", "ours", "theirs", "--ref", "merged", code=12)
    assert result.stdout.splitlines() == ["modify/delete d", "content f"]
    assert "2 conflicts: no snapshot was made" in result.stderr
    answer = mountctl.json("merge", "ours", "theirs", "--ref", "merged", code=12)
    assert (answer["outcome"], answer["snapshot"], answer["ref"]) == ("conflicts", None, None)
    gone, content = answer["conflicts"]
    assert (gone["kind"], gone["theirs"]) == ("modify/delete", None)
    assert (content["path"], content["regions"]) == ("f", 1)
    assert content["ours"]["size"] == len(LINES)
    assert mountctl.json("snapshot", "list") == before
    mountctl.fails(3, "log", "merged")


def test_conflicts_are_written_where_asked_for(mountctl, sides, tmp_path):
    base, ours, theirs = sides({"f": LINES}, {"f": edited("5", "x")}, {"f": edited("5", "y")})
    words = ("merge", "ours", "theirs", "--write-conflicts", "--diff3", "--ref", "merged")
    result = mountctl(*words, code=12)
    assert "warning: conflict: content f" in result.stderr
    marked = f"<<<<<<< {ours[:12]}\nx\n||||||| {base[:12]}\n5\n=======\ny\n>>>>>>> {theirs[:12]}"
    assert texts(mountctl, "merged", tmp_path / "out") == {"f": edited("5", marked)}
    (conflict,) = mountctl.json("snapshot", "show", "merged")["metadata"]["conflicts"]
    assert {side: conflict[side]["size"] for side in ("base", "ours", "theirs")} == {
        "base": 18, "ours": 18, "theirs": 18
    }  # fmt: skip
    with Repository.open(str(mountctl.store)) as repository:
        root = repository.snapshot(SnapshotId(bytes.fromhex(theirs))).root
        stored = find(repository.objects, root, b"f")
    assert stored is not None
    assert conflict["theirs"]["entry"] == encode(stored).hex()


@pytest.mark.parametrize(("favor", "expected"), [("ours", "x"), ("theirs", "y"), ("union", "x\ny")])
def test_favor(mountctl, sides, tmp_path, favor, expected):
    sides({"f": LINES}, {"f": edited("5", "x")}, {"f": edited("5", "y")})
    mountctl("merge", "ours", "theirs", "--favor", favor, "--ref", "merged")
    assert texts(mountctl, "merged", tmp_path / "out") == {"f": edited("5", expected)}


def test_a_moved_file_is_followed_unless_told_not_to(mountctl, sides, tmp_path):
    sides({"f": LINES, "k": "k"}, {"g/f": LINES, "k": "k"}, {"f": edited("5", "y"), "k": "k"})
    mountctl("merge", "ours", "theirs", "--no-renames", code=12)
    mountctl("merge", "ours", "theirs", "--ref", "merged")
    assert texts(mountctl, "merged", tmp_path / "out") == {"g/f": edited("5", "y"), "k": "k"}


def test_fast_forward_and_already_merged(mountctl, sides):
    base, ours, _ = sides({"f": "1"}, {"f": "2"}, {"f": "3"})
    result = mountctl("merge", "base", "ours", "--ref", "moved")
    assert "fast forward" in result.stderr
    assert mountctl.json("snapshot", "show", "moved")["snapshot"] == ours
    answer = mountctl.json("merge", "ours", "base")
    assert (answer["outcome"], answer["snapshot"]) == ("already merged", ours)
    assert len(mountctl.json("snapshot", "list")) == 3
    assert answer["warnings"] == []
    (warning,) = mountctl.json("merge", "ours", "base", "-m", "lost")["warnings"]
    assert "--message" in warning
    answer = mountctl.json("merge", "base", "ours", "--no-ff")
    assert (answer["outcome"], answer["bases"]) == ("merged", [base])
    assert mountctl.json("snapshot", "show", answer["snapshot"])["parents"] == [base, ours]


def test_without_a_common_ancestor(mountctl, sides, tree):
    base, _, _ = sides({"f": "1\n"}, {"f": "2\n"}, {"f": "1\n", "g": "3"})
    mountctl("import", tree, "--ref", "other")
    assert "no common ancestor" in mountctl.fails(4, "merge", "ours", "other")
    mountctl("merge", "ours", "other", "--base", base, "--favor", "theirs")


def test_merge_of_what_is_not_there(mountctl, sides):
    sides({"f": "1"}, {"f": "2"}, {"f": "3"})
    mountctl.fails(3, "merge", "ours", "nothing")
    mountctl.fails(3, "merge", "ours", "theirs", "--base", "nothing")
    mountctl.fails(2, "merge", "ours", "theirs", "--ref", "a/b", "--favor", "ours")
    mountctl.fails(2, "merge", "base", "theirs", "--ref", "a/b")


# apply


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    path = tmp_path / "fix.patch"
    path.write_text(
        "--- a/src/main.c\n+++ b/src/main.c\n@@ -1,4 +1,4 @@\n int main(void)\n {\n"
        "-  return 0;\n+  return 1;\n }\n"
    )
    return path


def test_apply(mountctl, first, patch, tmp_path):
    result = mountctl("apply", patch, "--on", "main", "--ref", "fixed", "-m", "fixed it")
    assert "1 path changed" in result.stderr
    shown = mountctl.json("snapshot", "show", "fixed")
    assert (shown["parents"], shown["message"]) == ([first], "fixed it")
    assert mountctl("diff", "main", "fixed", "--name-status").stdout == "M src/main.c\n"
    again = mountctl("diff", "main", "fixed", "--patch").stdout
    answer = mountctl.json("apply", patch, "--on", "main")
    assert answer["paths"] == [{"path": "src/main.c"}]
    assert answer["moved_hunks"] == 0
    (tmp_path / "again").write_text(again)
    made = mountctl.json("apply", tmp_path / "again", "--on", "main")["snapshot"]
    assert "no change" in mountctl("diff", "fixed", made, "--patch").stderr or (
        mountctl("diff", "fixed", made, "--patch").stdout == ""
    )


def test_apply_what_is_piped_in(mountctl, first, patch):
    words = mountctl.command("apply", "-", "--on", "main", "--json")
    done = subprocess.run(
        words, input=patch.read_bytes(), env=mountctl.environment(), capture_output=True,
        check=True,
    )  # fmt: skip
    assert b'"changed": true' in done.stdout


def test_a_patch_that_does_not_fit_makes_nothing(mountctl, first, patch):
    before = mountctl.json("snapshot", "list")
    patch.write_text(patch.read_text().replace("return 0", "return 2"))
    error = mountctl.fails(4, "apply", patch, "--on", "main", "--ref", "fixed")
    assert error == "the patch does not fit 'src/main.c', hunk 1: its lines are not in the file"
    patch.write_text("--- a/../../x\n+++ b/../../x\n@@ -1 +1 @@\n-a\n+b\n")
    assert "no path inside of a tree" in mountctl.fails(2, "apply", patch, "--on", "main")
    mountctl.fails(2, "apply", "/does/not/exist", "--on", "main")
    mountctl.fails(2, "apply", patch)
    assert mountctl.json("snapshot", "list") == before


@pytest.mark.parametrize("text", ["", "<html>", "\x1b[1mdiff --git a/f b/f\x1b[m\n"])
def test_what_is_no_patch_makes_nothing(mountctl, first, patch, text):
    before = mountctl.json("snapshot", "list")
    patch.write_text(text)
    mountctl.fails(2, "apply", patch, "--on", "main", "--ref", "out")
    assert mountctl.json("snapshot", "list") == before
    assert [found["ref"] for found in mountctl.json("ref", "list")] == ["main"]


def test_what_a_patch_does_not_hold_is_told(mountctl, first, patch):
    patch.write_text("Only in b: x\n" + patch.read_text())
    assert "not in the patch: Only in b: x" in mountctl("apply", patch, "--on", "main").stderr
    assert mountctl.json("apply", patch, "--on", "main")["warnings"] == [
        "not in the patch: Only in b: x"
    ]


def test_all_of_a_tree_goes_through_a_patch(mountctl, first, tree, tmp_path):
    (tree / "src" / "main.c").rename(tree / "src" / "moved.c")
    (tree / "data.bin").write_bytes(bytes(range(255)) * 300)
    (tree / "link").unlink()
    (tree / "link").symlink_to("elsewhere")
    (tree / "name with\nnewline").write_text("x")
    second = mountctl.json("import", tree)["snapshot"]
    words = mountctl.command("diff", first, second, "--patch", "--renames")
    made = subprocess.check_output(words, env=mountctl.environment())
    (tmp_path / "patch").write_bytes(made)
    third = mountctl.json("apply", tmp_path / "patch", "--on", first)["snapshot"]
    entries = mountctl.json("diff", second, third)["entries"]
    assert {(each["kind"], *each["metadata"]) for each in entries} <= {("metadata", "mtime")}
