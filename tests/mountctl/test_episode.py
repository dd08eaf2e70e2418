"""`mountctl episode`, with real snapshots."""

import json
import os

import pytest
from click.testing import CliRunner

from mountctl.__main__ import cli


@pytest.fixture
def states(mountctl, tmp_path) -> list[str]:
    """Snapshots that no ref names: a root, and four that came from it."""
    source = tmp_path / "state"
    source.mkdir()
    (source / "file").write_bytes(os.urandom(40_000))
    root = mountctl.json("import", source, "-m", "root")["snapshot"]
    made: list[str] = [root]
    for n in range(4):
        (source / "file").write_bytes(os.urandom(40_000))
        words = ("import", source, "-m", f"state {n}", "--parent", root)
        made.append(mountctl.json(*words)["snapshot"])
    (source / "file").write_bytes(b"")
    mountctl("import", source, "--parent", root)  # so that no state is the last import
    return made


@pytest.fixture
def search(mountctl, states: list[str]) -> list[str]:
    """An episode of six steps; step 4 is the best."""
    root, *after = states
    mountctl("episode", "new", "search", "--root", root, "--meta", '{"seed": 7}')
    add = ("episode", "add", "search")
    assert mountctl(*add, "--action", "begin", "--snapshot", root[:10]).stdout == "1\n"
    mountctl(*add, "--parent", "last", "--action-json", '{"edit": "a.c"}', "--reward", "0.7",
             "--verdict", "pass", "--snapshot", after[0], "--", "make", "check")  # fmt: skip
    mountctl(*add, "--parent", 1, "--action", "rewrite\x1b[31m", "--reward", "0.2", "--verdict",
             "fail", "--snapshot", after[1], "--", "make", "all")  # fmt: skip
    mountctl(*add, "--parent", 2, "--action", "inline", "--reward", "0.9", "--snapshot", after[2])
    mountctl(*add, "--parent", 2, "--action", "unroll", "--reward", "-1", "--snapshot", after[3])
    mountctl(*add, "--parent", 2, "--", "cc", "--version")
    return states


def test_add_says_what_was_kept(mountctl, search):
    words = ("--action", "x", "--summary", '{"files": 2}', "--meta", '{"t": 0.5}', "--reward", "2")
    step = mountctl.json("episode", "add", "search", "--parent", "3", *words)
    assert step["step"] == 7
    assert step["parent"] == 3
    assert (step["summary"], step["metadata"], step["reward"]) == ({"files": 2}, {"t": 0.5}, 2.0)
    assert mountctl.json("episode", "show", "search", "7") == {**step, "observed": []}


def test_show_draws_the_tree(mountctl, search):
    result = mountctl("episode", "show", "search")
    assert result.stdout.splitlines() == [
        "o 6 -  cc --version",
        "| o 5 -1  unroll",
        "|/",
        "| * 4 0.9  inline",
        "|/",
        '* 2 0.7 pass  {"edit": "a.c"}',
        "| o 3 0.2 fail  rewrite\\033[31m",
        "|/",
        "* 1 -  begin",
    ]
    assert "the best is step 4" in result.stderr
    tree = mountctl.json("episode", "show", "search")
    assert tree["best_path"] == [1, 2, 4]
    assert (tree["steps"], len(tree["tree"]), tree["metadata"]) == (6, 6, {"seed": 7})


def test_show_of_one_step(mountctl, search):
    mountctl("episode", "observe", "search", 3, "--value", "0.5", "--visits", 2)
    mountctl("episode", "observe", "search", 3, "--reward", "0.3", "--meta", '{"late": 1}')
    shown = mountctl("episode", "show", "search", "3").stdout
    assert "reward    0.3\nverdict   fail\nvalue     0.5\nvisits    2\n" in shown
    assert "command   make all\n" in shown
    assert shown.endswith("observed  2 times\nlate      1\n")
    seen = mountctl.json("episode", "show", "search", "3")["observed"]
    assert [each["reward"] for each in seen] == [0.2, 0.3]


def test_the_best_way_is_green_on_a_terminal(mountctl, search):
    seen = mountctl.on_terminal("episode", "show", "search")
    assert "\x1b[32m4 0.9" in seen


def test_log_asks(mountctl, search):
    def numbers(*words: str) -> list[int]:
        return [step["step"] for step in mountctl.json("episode", "log", "search", *words)]

    assert numbers() == [1, 2, 3, 4, 5, 6]
    assert numbers("--ran", "make") == [2, 3]
    assert numbers("--ran", "make check") == [2]
    assert numbers("--verdict", "fail") == [3]
    assert numbers("--min-reward", "0.5") == [2, 4]
    assert numbers("--max-reward", "0") == [5]
    assert numbers("--children", "2") == [4, 5, 6]
    assert numbers("-n", "2") == [1, 2]
    lines = mountctl("episode", "log", "search", "--verdict", "pass").stdout.splitlines()
    assert lines[0].split() == ["STEP", "PARENT", "REWARD", "VERDICT", "SNAPSHOT", "ACTION"]
    assert lines[1].split()[:4] == ["2", "1", "0.7", "pass"]
    assert "no such steps" in mountctl("episode", "log", "search", "--ran", "rm").stderr


def test_best(mountctl, search):
    assert [s["step"] for s in mountctl.json("episode", "best", "search", "-n", 2)] == [4, 2]
    assert [s["step"] for s in mountctl.json("episode", "best", "search", "--path")] == [1, 2, 4]
    assert mountctl("episode", "best", "search", "--snapshot").stdout == search[3] + "\n"
    leaves = mountctl.json("episode", "best", "search", "-n", 2, "--leaves")
    assert [step["step"] for step in leaves] == [4, 3]
    mountctl("episode", "best", "search", "--path", "-n", 2, code=2)


def test_list(mountctl, search):
    mountctl("episode", "new", "empty")
    (empty, full) = mountctl.json("episode", "list")
    assert (empty["steps"], empty["best"], empty["root"]) == (0, None, None)
    assert (full["steps"], full["best"], full["best_reward"]) == (6, 4, 0.9)
    lines = mountctl("episode", "list").stdout.splitlines()
    assert lines[2].split()[:4] == ["search", "6", "4", "0.9"]
    assert "has a reward" in mountctl("episode", "best", "empty").stderr
    assert "has no steps" in mountctl("episode", "show", "empty").stderr


def test_a_held_snapshot_is_not_removed(mountctl, search):
    error = mountctl.fails(5, "snapshot", "rm", search[4])
    assert "in use by step 5 of 'search'" in error
    assert "in use by the root of episode 'search'" in mountctl.fails(
        5, "snapshot", "rm", search[0]
    )


def test_prune_and_gc(mountctl, search):
    words = ("episode", "prune", "search", "--below", "0.5")
    would = mountctl.json(*words, "--dry-run")
    assert would == {
        "dry_run": True, "removed": 2, "kept": 4, "snapshots": sorted([search[2], search[4]])
    }  # fmt: skip
    assert mountctl.json("gc")["chunks"] == 0
    assert mountctl.json(*words) == {**would, "dry_run": False}
    assert [s["step"] for s in mountctl.json("episode", "log", "search")] == [1, 2, 4, 6]
    left = {each["snapshot"] for each in mountctl.json("snapshot", "list")}
    assert not {search[2], search[4]} & left
    assert {search[0], search[1], search[3]} <= left
    collected = mountctl.json("gc")
    assert collected["bytes"] > 70_000
    assert mountctl.json("verify")["ok"]
    again = mountctl("episode", "prune", "search", "--keep-best", 1, "--unscored")
    assert again.stdout == "removed 1 step and 0 snapshots, kept 3 steps\n"


def test_a_pruned_snapshot_that_has_a_ref_stays(mountctl, search):
    mountctl("ref", "set", "kept", search[4])
    assert mountctl.json("episode", "prune", "search", "--below", "0")["snapshots"] == []
    assert mountctl.json("snapshot", "show", "kept")["snapshot"] == search[4]


def test_rm_takes_what_only_its_steps_held(mountctl, search):
    would = mountctl.json("episode", "rm", "search", "--dry-run")
    assert (would["removed"], sorted(would["snapshots"])) == (6, sorted(search[1:]))
    assert mountctl("episode", "rm", "search").stdout == (
        "removed 6 steps and 4 snapshots, kept 0 steps\n"
    )
    assert mountctl.json("episode", "list") == []
    assert mountctl.json("snapshot", "show", search[0])["message"] == "root"
    mountctl.fails(3, "episode", "rm", "search")


def test_lines(mountctl, states, tmp_path):
    mountctl("episode", "new", "search")
    lines = [
        {"action": "a", "reward": 1, "snapshot": states[0]},
        {"parent": -1, "action": [1, {"b": None}], "command": ["make", "x"], "metadata": None},
        {"parent": 1, "verdict": "fail", "summary": {}, "metadata": {"k": 1}},
    ]
    (tmp_path / "lines").write_text("\n".join(map(json.dumps, lines)))
    done = mountctl("episode", "add", "search", "--lines", tmp_path / "lines")
    assert done.stdout == "1\n2\n3\n"
    steps = mountctl.json("episode", "log", "search")
    assert [step["parent"] for step in steps] == [None, 1, 1]
    assert steps[1]["command"] == ["make", "x"]
    for line, why in [
        ("{", "line 2 is not JSON"), ("[]", "line 2 is no object"), ('{"acton": 1}', "is no object")
    ]:  # fmt: skip
        (tmp_path / "lines").write_text("{}\n" + line)
        result = mountctl("episode", "add", "search", "--lines", tmp_path / "lines", code=2)
        assert why in result.stderr
    (tmp_path / "lines").write_text('{}\n{"parent": 77}')
    mountctl.fails(3, "episode", "add", "search", "--lines", tmp_path / "lines")
    (tmp_path / "lines").write_text('{}\n{"reward": "x"}')
    mountctl.fails(2, "episode", "add", "search", "--lines", tmp_path / "lines")
    assert len(mountctl.json("episode", "log", "search")) == 3
    mountctl("episode", "add", "search", "--lines", tmp_path / "lines", "--reward", 1, code=2)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (2, ("new", "a b")), (2, ("new", "-", "--meta", "[1]")), (2, ("new", "x", "--meta", "{")),
        (3, ("new", "x", "--root", "nothing")), (4, ("new", "search")),
        (3, ("add", "nothing")), (3, ("add", "search", "--parent", "99")),
        (2, ("add", "search", "--parent", "x")), (2, ("add", "search", "--parent", "²")),
        (2, ("add", "search", "--reward", "nan")), (2, ("add", "search", "--action-json", "NaN")),
        (3, ("add", "search", "--parent", "9" * 30)),
        (2, ("add", "search", "--action", "a", "--action-json", "1")),
        (3, ("show", "search", "99")), (3, ("show", "nothing")), (2, ("show", "search", "0")),
        (3, ("observe", "search", "99")), (2, ("observe", "search", "1", "--value", "inf")),
        (3, ("log", "search", "--children", "99")), (3, ("log", "a\tb")), (3, ("best", "é")),
        (2, ("prune", "search")), (2, ("prune", "search", "--below", "nan")),
        (2, ("prune", "search", "--below", "1", "--keep-best", "1")), (3, ("rm", "nothing")),
    ],
)  # fmt: skip
def test_wrong_words_are_refused_and_change_nothing(mountctl, code, words):
    mountctl("episode", "new", "search")
    mountctl("episode", "add", "search", "--reward", "1")
    before = mountctl.json("episode", "log", "search")
    result = mountctl("episode", *words, code=code)
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("hint: ")
    assert mountctl.json("episode", "log", "search") == before


def test_a_name_on_a_terminal_is_harmless(mountctl):
    mountctl("episode", "new", "search")
    mountctl("episode", "add", "search", "--verdict", "\x1b]0;x\x07\nfail", "--", "\x1b[2J")
    for words in (["show", "search"], ["show", "search", "1"], ["log", "search"]):
        shown = mountctl("episode", *words).stdout
        assert "\x1b" not in shown
        assert "\x07" not in shown


def test_a_chain_needs_one_column(mountctl):
    mountctl("episode", "new", "chain")
    lines = "\n".join(json.dumps({"parent": -1} if n else {}) for n in range(200))
    done = CliRunner().invoke(
        cli, ["--store", str(mountctl.store), "episode", "add", "chain", "--lines", "-"],
        input=lines, prog_name="mountctl",
    )  # fmt: skip
    assert done.exit_code == 0
    shown = mountctl("episode", "show", "chain").stdout.splitlines()
    assert len(shown) == 200
    assert all(line.startswith("o ") for line in shown)
