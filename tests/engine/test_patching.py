"""Patches: what is written is read by git, by patch and by us, and makes the same tree."""

import os
import random
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.patches.binary_patch import apply_delta, decoded_line, encoded, inflated
from engine.patches.patch_parsing import PatchFormatError, parse_patch
from engine.patches.patch_writing import is_lost, patch_lines
from engine.patches.patching import PatchRefusedError, apply_patch
from engine.patches.quoting import quoted, unquoted
from engine.storage.nodes import Entry, Kind
from engine.trees.diffing import Change, diff
from engine.trees.renames import diff_with_renames
from scripts.patches_main import differences
from tests.engine.plants import (
    DictTree,
    Garden,
    Leaf,
    Plant,
    link,
    make_directory,
    read_directory,
    without_times,
)
from tests.engine.trees import noise

GIT = {
    "PATH": os.environ["PATH"], "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CEILING_DIRECTORIES": "/", "LC_ALL": "C",
}  # fmt: skip

names = st.sampled_from(
    [b"a", b"b", b"c.txt", b"with space", b"tab\there", b'quo"te', b"new\nline", b"\xff\xfe",
     "ümlaut".encode(), b"back\\slash", b" ", b"a b b a", b"-dash", b"x.bin", b"end "]
)  # fmt: skip
plain_names = st.sampled_from([b"a", b"b", b"c.txt", b"with space", b"d", b"e.c"])
texts = st.one_of(
    st.just(b""),
    st.lists(st.sampled_from([b"one\n", b"two\n", b"three\n", b"\n", b"four\r\n", b"-- \n"]),
             min_size=1, max_size=14).map(b"".join),
    st.sampled_from([b"no end", b"one\ntwo\nno end", b"one\ntwo\n"]),
)  # fmt: skip
binaries = st.builds(
    lambda seed, size, tail: noise(size, seed) + b"\0" + tail,
    st.integers(0, 3), st.sampled_from([0, 20, 300, 40_000]), st.binary(max_size=5),
)  # fmt: skip


def leaves(contents: st.SearchStrategy[bytes]) -> st.SearchStrategy[Leaf]:
    return st.one_of(
        st.tuples(contents, st.sampled_from([0o644, 0o755])).map(lambda pair: Leaf(*pair)),
        st.builds(link, st.sampled_from([b"nowhere", b"to/where", b"line\nline", b"no\n"])),
    )


def plants(
    names: st.SearchStrategy[bytes], contents: st.SearchStrategy[bytes]
) -> st.SearchStrategy[Plant]:
    paths = st.lists(names, min_size=1, max_size=3).map(b"/".join)
    return st.dictionaries(paths, leaves(contents), max_size=7).map(rooted)


def rooted(plant: Plant) -> Plant:
    """Leaves out what is inside of a file."""
    files = set(plant)
    return {
        path: leaf
        for path, leaf in plant.items()
        if not any(path.startswith(other + b"/") for other in files)
    }


@st.composite
def pairs(
    draw: st.DrawFn, names: st.SearchStrategy[bytes], contents: st.SearchStrategy[bytes]
) -> tuple[Plant, Plant]:
    """Two trees of which the second has much of the first, some of it elsewhere."""
    old = draw(plants(names, contents))
    new = dict(draw(plants(names, contents)))
    for path, leaf in old.items():
        where = draw(st.sampled_from(["same", "same", "gone", "moved", "edited"]))
        if where == "moved":
            new[draw(names) + b"/" + path if draw(st.booleans()) else draw(names)] = leaf
        elif where == "edited" and leaf.kind == Kind.FILE:
            new[path] = leaf._replace(data=leaf.data + b"more\n")
        elif where != "gone":
            new[path] = leaf
    return old, rooted(new)


def patch_of(
    garden: Garden, old: Entry, new: Entry, *, renames: bool
) -> tuple[bytes, list[Change]]:
    changes = list(diff(garden.objects, old, new))
    if renames:
        changes = diff_with_renames(garden.objects, old, new, copies=True).changes
    lines = [line + b"\n" for change in changes for line in patch_lines(garden.objects, change)]
    return b"".join(lines), changes


many = settings(
    max_examples=80, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip


@given(pairs(names, st.one_of(texts, binaries)), st.booleans())
@many
def test_a_diff_applied_to_the_old_tree_is_the_new_one(pair, renames):
    old, new = pair
    garden = Garden()
    patch, changes = patch_of(garden, garden.plant(old), garden.plant(new), renames=renames)
    tree = DictTree(old)
    if patch:
        apply_patch(tree, patch)
    assert tree.plant() == without_times(new)
    lost = {change.path for change in changes if is_lost(change)}
    assert not lost & set(new)


def git_apply(folder: Path, patch: bytes, *words: str) -> None:
    (folder.parent / "patch").write_bytes(patch)
    done = subprocess.run(
        ["git", "apply", "--whitespace=nowarn", *words, "../patch"],
        cwd=folder, env=GIT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + patch.decode("utf-8", "backslashreplace")


@given(pairs(names, st.one_of(texts, binaries)), st.booleans())
@many
def test_git_applies_it_and_takes_it_back(tmp_path_factory, pair, renames):
    old, new = pair
    garden = Garden()
    patch, _ = patch_of(garden, garden.plant(old), garden.plant(new), renames=renames)
    target = tmp_path_factory.mktemp("git") / "tree"
    target.mkdir()
    make_directory(target, old)
    if not patch:
        return
    git_apply(target, patch)
    assert read_directory(target) == without_times(new)
    if b"\ncopy from " not in patch:  # git makes a copy's source again, and finds it there
        git_apply(target, patch, "--reverse")
        assert read_directory(target) == without_times(old)


@given(pairs(plain_names, texts))
@many
def test_patch_applies_it(tmp_path_factory, pair):
    """Files only, for it does not replace links, and none that are empty before: nor these."""
    old, new = ({p: leaf for p, leaf in plant.items() if leaf.kind == Kind.FILE} for plant in pair)
    old = {path: leaf for path, leaf in old.items() if leaf.data}
    above = {p for p in old if any(n.startswith(p + b"/") for n in new)}
    above |= {p for p in new if any(n.startswith(p + b"/") for n in old)}
    old, new = ({p: leaf for p, leaf in plant.items() if p not in above} for plant in (old, new))
    garden = Garden()
    patch, _ = patch_of(garden, garden.plant(old), garden.plant(new), renames=False)
    target = tmp_path_factory.mktemp("patch") / "tree"
    target.mkdir()
    make_directory(target, old)
    (target.parent / "patch").write_bytes(patch)
    command = ["patch", "-p1", "-s", "--binary", "--no-backup-if-mismatch", "-i", "../patch"]
    done = subprocess.run(command, cwd=target, env=GIT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "Only garbage" in done.stderr, done.stdout + done.stderr
    assert read_directory(target) == without_times(new)


@given(pairs(names, st.one_of(texts, binaries)), st.booleans())
@settings(many, max_examples=40)
def test_what_git_writes_is_applied(tmp_path_factory, pair, renames):
    old, new = pair
    folder = tmp_path_factory.mktemp("wrote")
    for side, plant in (("old", old), ("new", new)):
        (folder / side).mkdir()
        make_directory(folder / side, plant)
    words = ["-M", "-C", "--find-copies-harder"] if renames else ["--no-renames"]
    git = ["git", "-c", "core.autocrlf=false", "-c", "user.name=x", "-c", "user.email=x@x"]

    def run(*more: str) -> bytes:
        return subprocess.run([*git, *more], cwd=folder / "repo", env=GIT, check=True,
                              capture_output=True).stdout  # fmt: skip

    (folder / "repo").mkdir()
    run("init", "-q")
    trees = []
    for side in ("old", "new"):
        run("--work-tree", str(folder / side), "add", "-A")
        trees.append(run("write-tree").decode().strip())
    patch = run("diff", "--binary", *words, *trees)
    tree = DictTree(old)
    if patch:
        apply_patch(tree, patch)
    assert tree.plant() == without_times(new)


def test_one_of_each_kind(tmp_path):
    old: Plant = {
        b"text": Leaf(b"1\n2\n3\n"), b"gone": Leaf(b"x"), b"binary": Leaf(bytes(range(256)) * 300),
        b"tool": Leaf(b"#!/bin/sh\n"), b"empty": Leaf(), b"link": link(b"text"),
        b"file": Leaf(b"now a link\n"), b"moved/a": Leaf(b"content\n" * 9),
        b"moved/b": Leaf(noise(30_000, 1)), b"dir/in": Leaf(b"a directory, then a file\n"),
        b"swap-a": Leaf(b"a\n" * 20), b"swap-b": Leaf(b"b\n" * 20),
    }  # fmt: skip
    data = bytearray(bytes(range(256)) * 300)
    data[40_000:40_010] = b"changed"
    new: Plant = {
        b"text": Leaf(b"1\n2 too\n3"), b"binary": Leaf(bytes(data)),
        b"tool": Leaf(old[b"tool"].data, 0o755),
        b"link": link(b"else"), b"file": link(b"text"), b"to/here/a": old[b"moved/a"],
        b"to/here/b": old[b"moved/b"], b"dir": Leaf(b"a directory, then a file\n"),
        b"new empty": Leaf(), b"swap-a": old[b"swap-b"], b"swap-b": old[b"swap-a"],
        b"added": Leaf(noise(70_000, 2) + b"\0", 0o755),
    }  # fmt: skip
    garden = Garden()
    roots = garden.plant(old), garden.plant(new)
    patch, _ = patch_of(garden, *roots, renames=True)
    assert patch.count(b"GIT binary patch") == 2
    assert b"\ndelta " in patch
    assert len(patch) < 150_000
    assert b"rename from moved/a\nrename to to/here/a\n" in patch
    tree = DictTree(old)
    apply_patch(tree, patch)
    assert tree.plant() == without_times(new)
    (tmp_path / "tree").mkdir()
    make_directory(tmp_path / "tree", old)
    git_apply(tmp_path / "tree", patch)
    assert read_directory(tmp_path / "tree") == without_times(new)


def test_modes_keep_all_their_bits():
    garden = Garden()
    old, new = ({b"f": Leaf(b"x\n", mode), b"g": Leaf(b"y\n", mode)} for mode in (0o600, 0o4711))
    new[b"h"] = Leaf(b"", 0o640)
    patch, _ = patch_of(garden, garden.plant(old), garden.plant(new), renames=False)
    tree = DictTree(old)
    with pytest.raises(PatchRefusedError, match="set-id bits"):
        apply_patch(tree, patch)
    assert tree.plant() == without_times(old)
    apply_patch(tree, patch, set_id=True)
    assert tree.plant() == without_times(new)


# Reading.

TEXT = b"".join(b"line %d\n" % n for n in range(1, 21))


def plain(old: bytes, new: bytes, *hunks: str, stamp: str = "\t2020-02-02 02:02:02 +0000") -> bytes:
    text = f"--- {old.decode()}{stamp}\n+++ {new.decode()}{stamp}\n" + "".join(hunks)
    return text.encode()


HUNK = "@@ -9,5 +9,5 @@\n line 9\n line 10\n-line 11\n+line eleven\n line 12\n line 13\n"
DONE = TEXT.replace(b"11", b"eleven")


@pytest.mark.parametrize(
    ("patch", "strip"),
    [
        (plain(b"old/src/f", b"new/src/f", HUNK), None),
        (plain(b"src/f", b"src/f", HUNK), None),
        (plain(b"src/f.orig", b"src/f", HUNK), None),
        (plain(b"x/y/src/f", b"x/y/src/f", HUNK), 2),
        (b"mail\n\nSubject: x\n---\n src/f | 2 +-\n\n"
         + plain(b"a/src/f", b"b/src/f", HUNK, stamp="") + b"-- \n2.39\n", None),
        (b"diff --git a/src/f b/src/f\nindex 12..34 100644\n"
         + plain(b"a/src/f", b"b/src/f", HUNK, stamp=""), None),
        (b"diff --git src/f src/f\n" + plain(b"src/f", b"src/f", HUNK, stamp=""), 0),
        (plain(b"a/src/f", b"b/src/f", HUNK.replace("9,5", "2,5")), None),
        (plain(b"a/src/f", b"b/src/f", HUNK.replace("9,5", "12,5")), None),
        (plain(b"a/src/f", b"b/src/f", "@@ -11 +11 @@\n-line 11\n+line eleven\n"), None),
    ],
)  # fmt: skip
def test_forms_of_one_patch(patch, strip):
    tree = DictTree({b"src/f": Leaf(TEXT)})
    apply_patch(tree, patch, strip=strip)
    assert tree.plant() == without_times({b"src/f": Leaf(DONE)})


def test_plain_diffs_make_and_delete_files():
    epoch = "\t1970-01-01 00:00:00.000000000 +0000"
    made = b"--- old/n" + epoch.encode() + b"\n+++ new/n\t2020-02-02\n@@ -0,0 +1,2 @@\n+a\n+b\n"
    tree = DictTree({})
    apply_patch(tree, made)
    assert tree.plant() == without_times({b"n": Leaf(b"a\nb\n")})
    gone = b"--- old/n\t2020-02-02\n+++ /dev/null\n@@ -1,2 +0,0 @@\n-a\n-b\n"
    apply_patch(tree, gone)
    assert tree.plant() == {}


def test_hunks_are_found_where_lines_were_put_in_before_them():
    more = b"".join(b"more %d\n" % n for n in range(100))
    second = HUNK.replace("9,5", "16,3").splitlines(keepends=True)[:1]
    second += [" line 16\n", "-line 17\n", " line 18\n"]
    tree = DictTree({b"f": Leaf(more + TEXT)})
    hunks = [HUNK, "@@ -16,3 +16,2 @@\n line 16\n-line 17\n line 18\n"]
    report = apply_patch(tree, plain(b"a/f", b"b/f", *hunks))
    assert tree.files[b"f"].data == more + DONE.replace(b"line 17\n", b"")
    assert report.moved_hunks == 2


def test_fuzz():
    tree = DictTree({b"f": Leaf(TEXT.replace(b"line 9\n", b"other\n"))})
    patch = plain(b"a/f", b"b/f", HUNK)
    with pytest.raises(PatchRefusedError, match="hunk 1: its lines are not in the file"):
        apply_patch(tree, patch)
    apply_patch(tree, patch, fuzz=1)
    assert b"line eleven" in tree.files[b"f"].data


def test_a_hunk_that_is_there_twice():
    made = plain(b"a/n", b"b/n", *["@@ -0,0 +1 @@\n+a\n"] * 2)
    with pytest.raises(PatchRefusedError, match="hunk 2: it does not come after"):
        apply_patch(DictTree({}), made)
    with pytest.raises(PatchRefusedError, match="hunk 2: it does not come after"):
        apply_patch(
            DictTree({b"f": Leaf(TEXT)}), plain(b"a/f", b"b/f", *["@@ -2,0 +3 @@\n+a\n"] * 2)
        )


GOOD = b"diff --git a/good b/good\n" + plain(b"a/good", b"b/good", HUNK, stamp="")


@pytest.mark.parametrize(
    ("bad", "path", "why"),
    [
        (plain(b"a/f", b"b/f", HUNK.replace("line 10", "line x")), b"f", "hunk 1"),
        (plain(b"a/f", b"b/f", HUNK, HUNK.replace("9,5", "16,5")), b"f", "hunk 2"),
        (plain(b"a/none", b"b/none", HUNK), b"none", "not there"),
        (b"diff --git a/f b/f\nnew file mode 100644\n", b"f", "there already"),
        (b"diff --git a/f b/f\ndeleted file mode 100644\n", b"f", "more in it"),
        (b"diff --git a/f/x b/f/x\nnew file mode 100644\n", b"f/x", "no directory"),
        (b"diff --git a/link/x b/link/x\nnew file mode 100644\n", b"link/x", "no directory"),
        (b"diff --git a/d b/d\nnew file mode 100644\n", b"d", "a directory with files"),
        (b"diff --git a/n b/n\nnew file mode 120000\n", b"n", "target"),
        (b"diff --git a/f b/g\nrename from f\nrename to good\n", b"good", "there already"),
        (b"diff --git a/f b/g\ncopy from none\ncopy to g\n", b"none", "not there"),
        (b"diff --git a/f b/g\nrename from f\nrename to g\n"
         b"diff --git a/f b/h\nrename from f\nrename to h\n", b"f", "renamed twice"),
        (b"diff --git a/n b/n\nnew file mode 100644\n" * 2, b"n", "made twice"),
        (b"diff --git a/f b/f\nold mode 120000\nnew mode 120000\n", b"f", "not a link"),
        (b"diff --git a/d b/d\nold mode 100644\nnew mode 100755\n", b"d", "neither"),
        (b"diff --git a/f b/f\nindex " + b"1" * 40 + b".." + b"2" * 40
         + b"\nGIT binary patch\nliteral 0\nHcmV?d00001\n\n", b"f", "not the file"),
        (b"diff --git a/f b/f\nGIT binary patch\nliteral 9\nHcmV?d00001\n\n", b"f", "9 bytes"),
        (b"diff --git a/f b/f\nGIT binary patch\nliteral 999999999999\nHcmV?d00001\n\n",
         b"f", "may"),
    ],
)  # fmt: skip
def test_what_does_not_fit_changes_nothing(bad, path, why):
    plant = {b"good": Leaf(TEXT), b"f": Leaf(TEXT), b"d/x": Leaf(b"x"), b"link": link(b"d")}
    for patch in (GOOD + bad, bad + GOOD):
        tree = DictTree(plant)
        with pytest.raises(PatchRefusedError, match=why) as caught:
            apply_patch(tree, patch)
        assert caught.value.path == path
        assert tree.writes == 0
        assert tree.plant() == without_times(plant)


@pytest.mark.parametrize(
    "bad",
    [
        b"--- /etc/passwd\n+++ /etc/passwd\n@@ -1 +1 @@\n-a\n+b\n",
        b"--- a/../../x\n+++ b/../../x\n@@ -1 +1 @@\n-a\n+b\n",
        b"diff --git a/x/../../y b/x/../../y\nnew file mode 100644\n",
        b"diff --git a//y b//y\nnew file mode 100644\n--- /dev/null\n+++ /y\n@@ -0,0 +1 @@\n+b\n",
        b'diff --git "a/\\056\\056/x" "b/\\056\\056/x"\nnew file mode 100644\n',
        b'diff --git "a/x\\000" "b/x\\000"\nnew file mode 100644\n',
        b"diff --git a/f b/f\nrename from ../x\nrename to y\n",
        b"diff --git a/f b/f\nrename from x\n",
        b"diff --git a/f b/g\n--- a/f\n+++ b/g\n@@ -1 +1 @@\n-a\n+b\n",
        b"diff --git a/f b/f\nnew file mode 040000\n",
        b"diff --git a/f b/f\nnew file mode 99\n",
        b"diff --git a/f b/f\nBinary files a/f and b/f differ\n",
        b"Binary files a/f and b/f differ\n",
        b"diff --git a/f b/f\nGIT binary patch\n",
        b"diff --git a/f b/f\nGIT binary patch\nliteral 5\nHcmV\n",
        b"diff --git a/f b/f\nGIT binary patch\nliteral 5\n\xff\xff\n",
        b"diff --git a/f b/g\n",
        b"diff --git\ndiff --git a\n",
        b"--- a/f\n+++ b/f\n@@ -1,3 +1,3 @@\n a\n-b\n",
        b"--- a/f\n+++ b/f\n@@ -1,1 +1,1 @@\n-a\n-b\n+c\n",
        b"--- a/f\n+++ b/f\n@@ -1,2 +1,2 @@\n a\nrubbish\n",
        b"--- a/f\n+++ b/f\n@@ -1 +1 @@\n\\ No newline\n",
        b"--- f\n+++ f\n@@ -1 +1 @@\n-a\n+b\n@@@ rubbish\n@@ -3 +3 @@\n-a\n+b\n",
    ],
)
def test_what_is_no_patch_is_refused(bad):
    tree = DictTree({b"f": Leaf(b"a\n")})
    with pytest.raises(PatchFormatError):
        apply_patch(tree, plain(b"a/f", b"b/f", "@@ -1 +1 @@\n-a\n+c\n") + bad)
    with pytest.raises(PatchFormatError):
        apply_patch(tree, b"@@ -1 +1 @@\n-a\n+b\n" + bad)
    assert tree.writes == 0


@given(st.binary(max_size=200), st.data())
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_damaged_patches_are_refused_or_applied_whole(junk, data):
    """Whatever a patch says, the tree is as before or the patch was accepted."""
    old = {b"text": Leaf(TEXT), b"bin": Leaf(noise(400)), b"x": Leaf(b"")}
    new = {b"text": Leaf(DONE), b"bin": Leaf(noise(300)), b"y": link(b"text")}
    garden = Garden()
    patch = bytearray(patch_of(garden, garden.plant(old), garden.plant(new), renames=True)[0])
    at = data.draw(st.integers(0, len(patch)))
    patch[at : at + data.draw(st.integers(0, 20))] = junk[: data.draw(st.integers(0, 30))]
    tree = DictTree(old)
    try:
        apply_patch(tree, bytes(patch))
    except (PatchFormatError, PatchRefusedError):
        assert tree.writes == 0
        assert tree.plant() == without_times(old)


DIFF = GOOD.decode()
CONTEXT = """*** good\t2020-02-02
--- good\t2020-02-03
***************
*** 1,3 ****
  line 1
! line 2
  line 3
--- 1,3 ----
  line 1
! line two
  line 3
"""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "it is empty"),
        (b" \n\n", "it is empty"),
        (b"no patch at all\n", "no line in it begins a patch"),
        (b"<html>\n", "a page of HTML"),
        (b"\n<!DOCTYPE html>\n<body>404</body>", "a page of HTML"),
        (CONTEXT.encode(), "a context diff"),
        (b"diff -c a b\n" + CONTEXT.encode() + GOOD, "a context diff"),
        (b"2c2\n< line 2\n---\n> line two\n", "a plain diff without context"),
        (b"diff -r a/f b/f\r\n3d2\r\n< line 3\r\n", "a plain diff without context"),
        (b"2c\nline two\n.\n", "a script for an editor"),
        (b"d2 1\na2 1\nline two\n", "a script for an editor"),
        (DIFF.encode("utf-16"), "UTF-16"),
        (DIFF.encode("utf-16-be"), "UTF-16"),
        (b"\x1b[1m" + GOOD.replace(b"\n", b"\x1b[m\n\x1b[1m"), "colours"),
        (GOOD + b"\x1b[32m+added\x1b[m\n", "colours"),
        (GOOD + b"diff --cc f\n--- a/f\n+++ b/f\n@@@ -1,2 -1,2 +1,3 @@@\n", "combined diff"),
        (DIFF.replace("\n", "\n> ").encode()[16:], "something before it"),
        ("".join("    " + line for line in DIFF.splitlines(keepends=True)).encode(),
         "something before it"),
        (b"Subject: x\nContent-Transfer-Encoding: base64\n\nZGlmZiAtLWdpdCBhL2Y=\n",
         "a mail in base64"),
        (b"Content-Transfer-Encoding: quoted-printable\n\n" + GOOD, "a mail in quoted-printable"),
        (b"--- a/good\n+++ b/good\n", "a header without a hunk"),
        (GOOD + b"--- a/f\n+++ b/f\ntext\n", "a header without a hunk"),
        (b"diff --git a/good b/good\n", "a header without a hunk"),
        (GOOD + b"diff --git a/f b/f\nindex 1234567..89abcde 100644\n", "hunks are missing"),
        (b"diff --git a/n b/n\nnew file mode 100644\nindex 0000000..1234567\n",
         "hunks are missing"),
        (b"diff --git a/f b/g\nsimilarity index 90%\nrename from f\nrename to g\n"
         b"index 1234567..89abcde 100644\n", "hunks are missing"),
        (b"diff --git a/f b/f\nold mode 100644\n", "a header without a hunk"),
        (b"--- a/f\n+++ b/f\n@@ -1,3 +1,3\n a\n", "first line is damaged"),
        (b"--- a/f\n+++ b/f\n@@ -x +1 @@\n a\n", "first line is damaged"),
        (GOOD + b"@@ -20,2 +20,2\n line 20\n", "first line is damaged"),
        (GOOD + b" line 14\n", "goes on where it should end"),
        (GOOD + b"+more\n", "goes on where it should end"),
        (GOOD + b"text\n@@ -20 +20 @@\n-line 20\n+x\n", "without the name of a file"),
        (b"index 12..34\nGIT binary patch\nliteral 0\nHcmV?d00001\n\n", "without the name"),
    ],
)  # fmt: skip
def test_what_was_not_understood_is_refused(text, why):
    tree = DictTree({b"good": Leaf(TEXT), b"f": Leaf(TEXT)})
    with pytest.raises(PatchFormatError, match=why):
        apply_patch(tree, text)
    assert tree.writes == 0


@pytest.mark.parametrize(
    "frame",
    [
        "%s-- \n2.39.5\n\n",
        "From 12 Mon Sep 17\nSubject: [PATCH] x\n\n- a list\n+ of what\n  it does\n---\n"
        " good | 2 +-\n\n%s-- \n2.39.5\n\n\nFrom 34 Mon Sep 17\nSubject: [PATCH 2/2] y\n\n  more\n",
        "Index: good\n" + "=" * 67 + "\n%s\n",
        "\ufeff%s",
        "# HG changeset patch\n# User x\n\ndescription\n\n%s",
        "%s\n_______________________________________________\nlist mailing list\n",
    ],
)
def test_what_stands_around_patches(frame):
    tree = DictTree({b"good": Leaf(TEXT)})
    report = apply_patch(tree, (frame % DIFF).encode())
    assert tree.files[b"good"].data == DONE
    assert report.left_out == []


def test_what_a_patch_only_tells_of_is_named():
    text = b"Only in b: new\n" + GOOD + b"\nProperty changes on: good\n____\nAdded: svn:eol-style\n"
    report = apply_patch(DictTree({b"good": Leaf(TEXT)}), text)
    assert report.left_out == [b"Only in b: new", b"Property changes on: good"]


def test_ends_of_lines_are_named():
    unix, dos = (
        DictTree({b"good": Leaf(TEXT)}),
        DictTree({b"good": Leaf(TEXT.replace(b"\n", b"\r\n"))}),
    )
    with pytest.raises(PatchRefusedError, match="CR LF in the patch only"):
        apply_patch(unix, GOOD.replace(b"\n", b"\r\n"))
    with pytest.raises(PatchRefusedError, match="CR LF in the file only"):
        apply_patch(dos, GOOD)
    apply_patch(dos, GOOD.replace(b"\n", b"\r\n"))
    assert dos.files[b"good"].data == DONE.replace(b"\n", b"\r\n")


def test_a_bomb_is_refused_before_it_is_large():
    bomb = b"\n".join(encoded(b"literal", 5, [bytes(1 << 24)]))
    patch = b"diff --git a/f b/f\nnew file mode 100644\nGIT binary patch\n" + bomb
    with pytest.raises(PatchRefusedError, match="promises"):
        apply_patch(DictTree({}), patch)
    patch = patch.replace(b"literal 5", b"literal %d" % (1 << 24))
    with pytest.raises(PatchRefusedError, match="more bytes than it may"):
        apply_patch(DictTree({}), patch, largest=1 << 20)


def test_damaged_patches_get_the_verdict_of_git():
    found = differences([*range(9), 145, 307])
    undecided = {seed: (name, case.log) for seed, (name, case) in found.items() if name[:1] == "?"}
    assert undecided == {}


# Parts.


@given(st.binary(min_size=1, max_size=40))
def test_names_are_quoted_and_back(name):
    text = quoted(name)
    assert b"\n" not in text
    assert b"\t" not in text
    if text.startswith(b'"'):
        assert unquoted(text + b" rest") == (name, b" rest")
    else:
        assert text == name


@pytest.mark.parametrize("bad", [b"", b"x", b'"', b'"a', b'"\\', b'"\\x"', b'"\\8"', b'"\\12"'])
def test_wrong_quotes(bad):
    with pytest.raises(ValueError, match=r"quote|escape"):
        unquoted(bad)


@given(st.lists(st.binary(max_size=200), max_size=4))
def test_binary_lines_and_back(parts):
    data = b"".join(parts)
    lines = list(encoded(b"literal", len(data), parts))
    assert lines[0] == b"literal %d" % len(data)
    assert lines[-1] == b""
    deflated = b"".join(decoded_line(line) for line in lines[1:-1])
    assert inflated(deflated, len(data)) == data
    for wrong in (len(data) + 1, len(data) - 1):
        if wrong >= 0:
            with pytest.raises(ValueError, match="promises"):
                inflated(deflated, wrong)


@given(st.binary(max_size=60), st.binary(max_size=30))
@settings(max_examples=300)
def test_no_delta_is_a_crash(delta, old):
    try:
        assert len(apply_delta(delta, old, 1000)) <= 1000
    except ValueError:
        pass


def test_a_delta_of_a_large_file_is_as_large_as_the_change():
    garden = Garden()
    old = bytearray(noise(3_000_000))
    new = bytearray(old)
    new[1_000_000:1_000_003] = b"changed"
    new[2_500_000:2_500_000] = noise(200, 1)
    plants = ({b"f": Leaf(bytes(data))} for data in (old, new))
    roots = [garden.plant(plant) for plant in plants]
    patch, _ = patch_of(garden, *roots, renames=False)
    assert len(patch) < 2_000
    tree = DictTree({b"f": Leaf(bytes(old))})
    apply_patch(tree, patch)
    assert tree.files[b"f"].data == new


def test_parsing_large_patches_is_linear():
    chance = random.Random(1)
    lines = b"".join(b"+%d\n" % chance.randrange(10**6) for _ in range(200_000))
    patch = b"--- /dev/null\n+++ b/f\n@@ -0,0 +1,200000 @@\n" + lines
    (file,) = parse_patch(patch).files
    assert len(file.hunks[0].new) == 200_000
    spaces = b"diff --git a/" + b" " * 100_000 + b"x b/y\n"
    with pytest.raises(PatchFormatError):
        parse_patch(spaces)
