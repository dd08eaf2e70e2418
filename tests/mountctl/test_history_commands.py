import json
import os
import shutil
import subprocess

import pytest


@pytest.fixture
def second(mountctl, tree, first):
    """The id of a second snapshot, in which much has changed; main stays on the first."""
    (tree / "src" / "main.c").write_text("int main(void)\n{\n  return 1;\n}\n")
    (tree / "src" / "tool.sh").chmod(0o700)
    (tree / "data.bin").unlink()
    (tree / "link").unlink()
    (tree / "link").mkdir()
    (tree / "link" / "new file").write_text("no end")
    (tree / "src" / "empty").rmdir()
    return mountctl.json("import", tree, "-m", "second")["snapshot"]


CHANGES = ["D data.bin", "T link/", "A link/new file", "D src/empty/", "M src/main.c",
           "U src/tool.sh"]  # fmt: skip


def test_log_begins_at_main(mountctl, first, second):
    lines = mountctl("log").stdout.splitlines()
    assert lines[0].split() == ["SNAPSHOT", "TIME", "ENTRIES", "SIZE", "NAMES", "MESSAGE"]
    assert [line.split()[0] for line in lines[1:]] == [first[:12]]
    assert lines[1].endswith("main   first")


def test_log_begins_at_the_newest_without_main(mountctl, first, second):
    mountctl("ref", "rm", "main")
    assert [each["snapshot"] for each in mountctl.json("log")] == [second, first]
    assert [each["snapshot"] for each in mountctl.json("log", "-n", "1")] == [second]
    assert mountctl.json("log", second[:5])[0]["parents"] == [first]


def test_log_of_an_empty_store(mountctl):
    assert mountctl.json("log") == []
    result = mountctl("log")
    assert result.stdout == ""
    assert "mountctl import" in result.stderr


def test_log_goes_on_past_a_removed_parent(mountctl, first, second):
    mountctl("ref", "set", "main", second)
    mountctl("snapshot", "rm", first)
    assert [each["snapshot"] for each in mountctl.json("log")] == [second]


def test_a_snapshot_is_named_in_all_the_ways(mountctl, upper, first):
    for name in (first, first[:4], "main", "@work"):
        assert mountctl.json("snapshot", "show", name)["snapshot"] == first
    assert "stands on snapshot" in mountctl("snapshot", "show", "@work").stderr


def test_snapshot_list_is_latest_first(mountctl, first, second):
    assert [each["snapshot"] for each in mountctl.json("snapshot", "list")] == [second, first]
    lines = mountctl("snapshot", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["SNAPSHOT", second[:12], first[:12]]


def test_snapshot_show(mountctl, first, tree):
    shown = mountctl("snapshot", "show", "main").stdout
    assert f"snapshot  {first}\nnames     main\nparents   -\n" in shown
    assert f"source    {tree}\n" in shown
    assert shown.endswith("\n    first\n")


def test_snapshot_rm(mountctl, first, second):
    assert "removed" in mountctl("snapshot", "rm", second).stderr
    assert [each["snapshot"] for each in mountctl.json("snapshot", "list")] == [first]
    assert "ref 'main'" in mountctl.fails(5, "snapshot", "rm", first)
    mountctl("ref", "rm", "main")
    assert mountctl.json("snapshot", "rm", first) == {"removed": first}


def test_refs(mountctl, first, second):
    assert mountctl.json("ref", "set", "v2", second[:6]) == {
        "ref": "v2", "snapshot": second, "was": None,
    }  # fmt: skip
    assert mountctl.json("ref", "list") == [
        {"ref": "main", "snapshot": first},
        {"ref": "v2", "snapshot": second},
    ]
    mountctl("ref", "set", "v2", "main")
    lines = mountctl("ref", "list").stdout.splitlines()
    assert lines == ["REF   SNAPSHOT", f"main  {first[:12]}", f"v2    {first[:12]}"]
    assert mountctl.json("ref", "rm", "v2") == {"removed": "v2", "was": first}
    mountctl("ref", "rm", "main")
    assert "no refs" in mountctl("ref", "list").stderr
    assert mountctl.json("ref", "list") == []


def test_diff_names(mountctl, second):
    result = mountctl("diff", "main", second)
    assert result.stdout.splitlines() == CHANGES
    assert "6 changes from main" in result.stderr
    assert mountctl("diff", "--name-status", second).stdout.splitlines() == CHANGES
    assert mountctl("diff", "main", "main").stdout == ""


def test_diff_backwards(mountctl, second):
    lines = mountctl("diff", second, "main").stdout.splitlines()
    swapped = {"A": "D", "D": "A", "M": "M", "T": "T", "U": "U"}
    expected = [swapped[line[0]] + line[1:] for line in CHANGES]
    assert sorted(lines) == sorted([*expected[:1], "T link", *expected[2:]])


def test_diff_under_json(mountctl, second):
    answer = mountctl.json("diff", "main", second)
    changes = answer["entries"]
    assert [change["path"] for change in changes][-1] == "src/tool.sh"
    last = changes[-1]
    assert last["kind"] == "metadata"
    assert (last["old_mode"], last["new_mode"]) == ("0755", "0700")
    assert changes[0]["new_mode"] is None
    assert changes[0]["type"] == "file"
    assert answer["summary"]["lines_added"] == 2
    assert answer["summary"]["kinds"]["metadata"] == 1
    assert answer["renames_limited"] is False


def test_diff_with_renames(mountctl, first, tree):
    (tree / "src").rename(tree / "source")
    (tree / "data.bin").rename(tree / "moved.bin")
    second = mountctl.json("import", tree)["snapshot"]
    renames = ["R data.bin -> moved.bin", "R src/ -> source/"]
    assert mountctl("diff", second, "--renames").stdout.splitlines() == renames
    assert "A moved.bin" in mountctl("diff", second).stdout
    kinds = {each["path"]: each["kind"] for each in mountctl.json("diff", second)["entries"]}
    assert kinds == {"moved.bin": "renamed", "source": "renamed"}
    plain = mountctl.json("diff", second, "--no-renames")["entries"]
    assert {each["kind"] for each in plain} == {"added", "removed"}
    patch = mountctl("diff", second, "--renames", "--patch").stdout
    assert "rename from src/main.c\nrename to source/main.c\n" in patch
    assert "GIT binary patch" not in patch
    assert " data.bin -> moved.bin | " in mountctl("diff", second, "--renames", "--stat").stdout


def test_diff_of_a_snapshot_without_parent(mountctl, first):
    assert "no parent" in mountctl.fails(2, "diff", "main")


def test_diff_stat(mountctl, second):
    assert mountctl("diff", second, "--stat").stdout.splitlines() == [
        " data.bin      | Bin 51200 -> 0 bytes",
        " link/new file | 1 +",
        " src/main.c    | 2 +-",
        " src/tool.sh   | 0",
        " 4 files changed, 2 insertions(+), 1 deletion(-)",
    ]
    stat = {each["path"]: each for each in mountctl.json("diff", second, "--stat")["entries"]}
    assert (stat["src/main.c"]["lines_added"], stat["src/main.c"]["lines_removed"]) == (1, 1)
    assert stat["data.bin"]["lines_added"] is None


def test_diff_patch(mountctl, second):
    result = mountctl("diff", second, "--patch")
    binary, _, rest = result.stdout.partition("diff --git a/link b/link\n")
    assert binary.startswith(
        "diff --git a/data.bin b/data.bin\ndeleted file mode 100644\n"
        "index 52591d8017dc756be1b2fe2f209b03efab6c502c..0000000000000000000000000000000000000000\n"
        "GIT binary patch\nliteral 0\nHc$@<O00001\n\nliteral 51200\n"
    )
    assert rest == (
        "deleted file mode 120000\n--- a/link\n+++ /dev/null\n"
        "@@ -1 +0,0 @@\n-src/main.c\n\\ No newline at end of file\n"
        'diff --git "a/link/new file" "b/link/new file"\nnew file mode 100644\n--- /dev/null\n'
        "+++ b/link/new file\t\n@@ -0,0 +1 @@\n+no end\n\\ No newline at end of file\n"
        "diff --git a/src/main.c b/src/main.c\n--- a/src/main.c\n+++ b/src/main.c\n"
        "@@ -1,4 +1,4 @@\n int main(void)\n {\n-  return 0;\n+  return 1;\n }\n"
        "diff --git a/src/tool.sh b/src/tool.sh\nold mode 100755\nnew mode 100700\n"
    )
    assert "1 change that a patch cannot say" in result.stderr
    patches = mountctl.json("diff", second, "--patch", "--no-renames")["entries"]
    assert "".join(each["patch"] for each in patches) == result.stdout


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_applies_a_patch(mountctl, tmp_path):
    old, new, work = tmp_path / "old", tmp_path / "new", tmp_path / "work"
    for top in (old, new):
        top.mkdir()
        (top / "same").write_text("same\n")
    (old / 'a\tb"\n\\').write_text("1\n2\n3\n")
    (new / 'a\tb"\n\\').write_text("1\n2\n")
    (old / "größe").write_bytes(b"latin \xff\n")
    (new / "größe").write_bytes(b"latin \xfe\r\nmore")
    (old / "gone").write_text("")
    (new / "come").write_text("")
    (new / "with space.txt").write_text("x\n")
    (old / "to-link").write_text("text\n")
    (new / "to-link").symlink_to("same")
    (old / "run").write_text("x")
    (new / "run").write_text("x")
    (new / "run").chmod(0o755)
    os.mkdir(new / "deep")
    (new / "deep" / "er").write_text("\n\n")
    mountctl("import", old, "--ref", "old")
    mountctl("import", new, "--ref", "new")
    words = mountctl.command("diff", "old", "new", "-p")
    patch = subprocess.check_output(words, env=mountctl.environment())
    shutil.copytree(old, work)
    quiet = {**os.environ, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CEILING_DIRECTORIES": str(tmp_path)}
    subprocess.run(["git", "apply", "-"], input=patch, cwd=work, env=quiet, check=True)
    made = mountctl.json("import", work)["snapshot"]
    kinds = {c["path"]: c["kind"] for c in mountctl.json("diff", made, "new")["entries"]}
    assert {path for path, kind in kinds.items() if kind != "metadata"} == set()
    assert os.access(work / "run", os.X_OK)


def test_status_of_the_store(mountctl, upper, first):
    shown = mountctl("status").stdout
    assert f"store  {mountctl.store}\nholds  1 snapshot, 1 ref, 1 session, " in shown
    assert "mount  none\n" in shown
    assert shown.splitlines()[-1].startswith(f"work     {first[:12]}")
    report = mountctl.json("status")
    assert report["mount"] is None
    assert report["store"] == str(mountctl.store)
    assert (report["snapshots"], report["refs"]) == (1, 1)
    assert report["sessions"][0]["session"] == "work"


def test_status_of_a_session(mountctl, upper, first):
    (upper / "new").write_text("x")
    for name in ("work", "@work"):
        result = mountctl("status", name)
        assert result.stdout == "A new\n"
        assert f"1 change since snapshot {first[:12]}" in result.stderr
    report = mountctl.json("status", "work")
    assert report["snapshot"] == first
    assert [(c["path"], c["change"]) for c in report["changes"]] == [("new", "added")]


def test_diff_of_a_session(mountctl, upper):
    (upper / "new").write_text("x")
    assert mountctl("diff", "@work").stdout == "A new\n"
    assert mountctl("diff", "main", "@work").stdout == "A new\n"
    assert mountctl("diff", "@work", "main").stdout == "D new\n"
    assert mountctl("diff", "@work", "@work").stdout == ""


HOSTILE = ["red\x1b[31m", "two\nlines", "latin\udcff", 'quo"te', "\u202ereversed"]


def test_hostile_names_do_not_reach_the_terminal(mountctl, first, tree):
    for name in HOSTILE:
        (tree / name).write_text("x")
    second = mountctl.json("import", tree, "-m", "evil\x1b]0;title\x07\nmore\x1b[2J")["snapshot"]
    outputs = [
        mountctl("diff", second).output,
        mountctl("diff", second, "--stat").output,
        mountctl("log", second).output,
        mountctl("snapshot", "show", second).output,
        mountctl("snapshot", "list").output,
    ]
    for output in outputs:
        assert all(character.isprintable() or character == "\n" for character in output)
    assert sorted(mountctl("diff", second).stdout.splitlines()) == sorted(
        [
            'A "red\\033[31m"', 'A "two\\nlines"', 'A "latin\\377"', 'A "quo\\"te"',
            'A "\\342\\200\\256reversed"',
        ]
    )  # fmt: skip
    paths = {c["path"]: c.get("path_bytes") for c in mountctl.json("diff", second)["entries"]}
    assert paths["red\x1b[31m"] is None
    assert paths["latin\\xff"] == "bGF0aW7/"
    for line in (mountctl("diff", second, "--json").stdout, mountctl("log", "--json").stdout):
        assert line.isascii()
        assert json.loads(line)


def test_a_terminal_gets_patches_escaped_and_a_pipe_gets_them_exact(mountctl, first, tree):
    (tree / "evil").write_bytes(b"\x1b[31m\tred\xff\n")
    second = mountctl.json("import", tree)["snapshot"]
    piped = mountctl.run("diff", second, "--patch").stdout
    assert "+\x1b[31m\tred\udcff\n" in piped
    shown = mountctl.on_terminal("diff", second, "--patch", NO_COLOR="1")
    assert "+\\033[31m\tred\\377\r\n" in shown
    assert "\x1b" not in shown
    assert "\x1b[32m" in mountctl.on_terminal("diff", second, "--patch")
    assert "\x1b" not in mountctl.on_terminal("diff", second, "--patch", TERM="dumb")


def test_json_on_a_terminal_is_indented(mountctl):
    assert "{\r\n  " in mountctl.on_terminal("status", "--json")


def test_a_bar_is_for_terminals_and_long_work(mountctl, tree, tmp_path):
    impatient = "import mountctl.output; mountctl.output.PATIENCE = 0"
    assert "importing" in mountctl.on_terminal("import", tree, program=impatient)
    for words in (["--quiet"], ["--json"]):
        assert "importing" not in mountctl.on_terminal("import", tree, *words, program=impatient)
    assert "importing" not in mountctl.on_terminal("import", tree, TERM="dumb", program=impatient)
    assert "importing" not in mountctl.on_terminal("import", tree)
    assert "importing" not in mountctl.run("import", tree).stderr


def test_quiet_leaves_data_and_warnings(mountctl, tree):
    result = mountctl("import", tree, "--quiet")
    assert result.stderr == ""
    assert len(result.stdout.split()) == 1


def test_notes_under_json_are_json(mountctl, upper):
    lines = mountctl("snapshot", "show", "@work", "--json").stderr.splitlines()
    assert "stands on" in json.loads(lines[0])["note"]


def test_a_reader_that_goes_away_is_no_error(mountctl, first):
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        mountctl.command("log"), env=mountctl.environment(), stdout=theirs,
        stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    os.close(theirs)
    assert done.returncode == 141
    assert done.stderr == b""


def test_a_full_disk_behind_stdout_is_told(mountctl, first):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            mountctl.command("log"), env=mountctl.environment(), stdout=full,
            stderr=subprocess.PIPE, check=False, text=True,
        )  # fmt: skip
    assert done.returncode == 8
    assert done.stderr.startswith("error: No space left on device\nhint: ")
