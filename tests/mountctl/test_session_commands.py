import pytest

from engine.repository import Repository


def test_create_list_show(mountctl, first):
    result = mountctl("session", "create", "work", "main")
    assert result.stdout == ""
    assert f"@work stands on snapshot {first[:12]}" in result.stderr
    (listed,) = mountctl.json("session", "list")
    assert listed["session"] == "work"
    assert listed["snapshot"] == first
    assert listed["held_by"] is None
    shown = mountctl.json("session", "show", "@work")
    assert shown["layers"] == [{"layer": "2-blueprint", "snapshot": first}]
    assert shown["upper"].startswith(str(mountctl.store / "sessions"))
    text = mountctl("session", "show", "work").stdout
    assert f"session   work\nsnapshot  {first}\n" in text
    lines = mountctl("session", "list").stdout.splitlines()
    assert lines[1].split()[:2] == ["work", first[:12]]


def test_create_under_json(mountctl, first):
    assert mountctl.json("session", "create", "a", first[:4])["snapshot"] == first


def test_there_are_no_sessions(mountctl):
    result = mountctl("session", "list")
    assert result.stdout == ""
    assert "session create" in result.stderr


def test_create_on_layers(mountctl, first, tmp_path):
    (tmp_path / "low").mkdir()
    (tmp_path / "low" / "only-low").write_text("low")
    low = mountctl.json("import", tmp_path / "low")["snapshot"]
    words = ("--infrastructure", low[:6], "--global", low[:6])
    made = mountctl.json("session", "create", "stack", "main", *words)
    assert [layer["layer"] for layer in made["layers"]] == [
        "0-infrastructure", "1-global", "2-blueprint",
    ]  # fmt: skip
    assert "layer 0-infrastructure" in mountctl("session", "show", "stack").stdout
    mountctl("checkout", "@stack", tmp_path / "out")
    assert (tmp_path / "out" / "only-low").exists()
    assert (tmp_path / "out" / "src" / "main.c").exists()


def test_commit(mountctl, upper, first):
    (upper / "new").write_text("x" * 1000)
    made = mountctl.json("commit", "@work", "-m", "second", "--ref", "main")
    assert made["changed"] is True
    assert made["session"] == "work"
    assert made["new_bytes"] > 0
    shown = mountctl.json("snapshot", "show", "main")
    assert shown["snapshot"] == made["snapshot"]
    assert shown["parents"] == [first]
    assert shown["message"] == "second"
    assert mountctl.json("session", "show", "work")["snapshot"] == made["snapshot"]
    assert mountctl("status", "work").stdout == ""
    result = mountctl("commit", "work")
    assert result.stdout == made["snapshot"][:12] + "\n"
    assert "nothing has changed" in result.stderr
    assert mountctl.json("commit", "work")["changed"] is False
    result = mountctl("commit", "work", "-m", "third")
    assert "no snapshot was made, so --message went nowhere" in result.stderr


def test_facts_are_kept_with_a_snapshot(mountctl, upper, tree):
    (upper / "new").write_text("x")
    facts = ("--meta", "model=m=1", "--meta", "score:=0.75", "--meta", 'tags:=["a", {"b": null}]')
    mountctl("commit", "work", "--ref", "kept", *facts)
    shown = mountctl.json("snapshot", "show", "kept")["metadata"]
    assert shown == {"model": "m=1", "score": 0.75, "tags": ["a", {"b": None}]}
    (tree / "newer").write_text("x")
    mountctl("import", tree, "--ref", "imported", "--meta", "runs:=3")
    assert mountctl.json("snapshot", "show", "imported")["metadata"]["runs"] == 3


@pytest.mark.parametrize("wrong", ["alone", "=value", ":=1", "key:=text", "key:=NaN", "key:="])
def test_what_is_no_fact_is_refused(mountctl, upper, wrong):
    assert "give " in mountctl.fails(2, "commit", "work", "--meta", wrong)


def test_fork_is_apart(mountctl, upper):
    (upper / "new").write_text("x")
    result = mountctl("session", "fork", "work", "other")
    assert "@other begins where @work is now" in result.stderr
    assert mountctl("status", "other").stdout == "A new\n"
    (upper / "newer").write_text("x")
    assert mountctl("diff", "@other", "@work").stdout == "A newer\n"
    assert mountctl.json("session", "fork", "work", "third")["session"] == "third"


def test_rename(mountctl, upper):
    (upper / "new").write_text("x")
    mountctl("session", "rename", "work", "play")
    assert mountctl("status", "play").stdout == "A new\n"
    assert [each["session"] for each in mountctl.json("session", "list")] == ["play"]
    assert mountctl.json("session", "rename", "@play", "work")["session"] == "work"


def test_reset(mountctl, upper, first, tree):
    (upper / "new").write_text("x")
    assert "1 uncommitted change: 'new'" in mountctl.fails(4, "session", "reset", "work")
    assert mountctl("status", "work").stdout == "A new\n"
    mountctl("session", "reset", "work", "--force")
    assert mountctl("status", "work").stdout == ""
    (tree / "more").write_text("x")
    second = mountctl.json("import", tree)["snapshot"]
    assert mountctl.json("session", "reset", "work", "--to", second)["snapshot"] == second
    assert mountctl("diff", "main", "@work").stdout == "A more\n"


def test_reset_to_the_layers(mountctl, upper, first, tree):
    (upper / "new").write_text("x")
    second = mountctl.json("commit", "work")["snapshot"]
    shown = mountctl.json("session", "show", "work")
    assert (shown["snapshot"], shown["layers"][-1]["snapshot"]) == (second, first)
    assert "restored 1 path" in mountctl("session", "reset", "work", "--factory", "new").stderr
    assert mountctl("status", "work").stdout == "D new\n"
    assert "no path in the tree" in mountctl.fails(
        3, "session", "reset", "work", "--factory", "none"
    )
    mountctl("session", "reset", "work", "--force")
    done = mountctl("session", "reset", "work", "--factory")
    assert "@work is what it was made of" in done.stderr
    assert mountctl("status", "work").stdout == ""
    assert mountctl.json("session", "show", "work")["snapshot"] == first
    mountctl("session", "reset", "work", "new", code=2)
    mountctl("session", "reset", "work", "--factory", "--to", second, code=2)


def test_rm(mountctl, upper):
    (upper / "new").write_text("x")
    result = mountctl("session", "rm", "work", code=4)
    assert "'new'" in result.stderr
    assert "--force" in result.stderr.splitlines()[-1]
    assert (upper / "new").exists()
    assert "removed @work" in mountctl("session", "rm", "work", "--force").stderr
    assert not upper.exists()
    assert mountctl.json("session", "list") == []


def test_rm_under_json(mountctl, upper):
    assert mountctl.json("session", "rm", "@work") == {"removed": "work"}


@pytest.mark.parametrize(
    "words",
    [
        ["commit", "none"],
        ["status", "none"],
        ["diff", "@none"],
        ["session", "show", "none"],
        ["session", "fork", "none", "new"],
        ["session", "rename", "none", "new"],
        ["session", "reset", "none"],
        ["session", "rm", "none"],
        ["session", "create", "new", "@none"],
    ],
)
def test_an_unknown_session(mountctl, upper, words):
    assert mountctl.fails(3, *words) == "no session is called 'none'"


@pytest.mark.parametrize(
    "words",
    [
        ["session", "create", "work", "main"],
        ["session", "fork", "work", "work"],
        ["session", "rename", "work", "work"],
    ],
)
def test_a_taken_name(mountctl, upper, words):
    assert mountctl.fails(4, *words) == "a session called 'work' exists already"


@pytest.mark.parametrize("name", ["../x", ".hidden", "a b", "a/b", "", "ä", "x" * 201, "0" * 64])
def test_an_impossible_name(mountctl, upper, name):
    assert mountctl("session", "create", "--", name, "main", code=2)
    assert mountctl("session", "fork", "work", "--", name, code=2)
    assert mountctl("session", "rename", "work", "--", name, code=2)
    assert mountctl("ref", "set", "--", name, "main", code=2)


@pytest.mark.parametrize("words", [["commit"], ["session", "rm"], ["session", "reset"]])
def test_a_session_that_somebody_holds(mountctl, upper, words):
    with Repository.open(str(mountctl.store)) as repository:
        lease = repository.sessions.hold("work", "trying")
        assert "(trying)" in mountctl.run("session", "list").stdout
        error = mountctl.run(*words, "work", code=5).stderr
        lease.release()
    assert "trying" in error
    assert error.splitlines()[-1].startswith("hint: ")
