import os
import subprocess

import pytest

from tests.mountctl.conftest import Program


@pytest.fixture
def other(tmp_path) -> Program:
    made = Program(tmp_path / "other", tmp_path)
    made("init")
    return made


def test_create_inspect_apply(mountctl, other, first, tmp_path):
    file = tmp_path / "x.flpkg"
    made = mountctl.json("bundle", "create", file, "main")
    assert made["snapshots"] == [first]
    assert made["refs"] == {"main": first}
    assert made["bytes"] == file.stat().st_size
    seen = other.json("bundle", "inspect", file)
    assert seen["snapshots"][0]["snapshot"] == first
    assert seen["snapshots"][0]["refs"] == ["main"]
    assert seen["snapshots"][0]["message"] == "first"
    assert "main" in other("bundle", "inspect", file).stdout
    applied = other.json("bundle", "apply", file)
    assert applied["new_snapshots"] == [first]
    assert other.json("verify")["damage"] == []
    again = other.json("bundle", "apply", file)
    assert again["new_bytes"] == 0
    assert other("bundle", "apply", file).stdout == first[:12] + "\n"


def test_through_a_pipe_what_the_other_lacks(mountctl, other, first, tree, tmp_path):
    whole = tmp_path / "whole"
    size = mountctl.json("bundle", "create", whole)["bytes"]
    other("bundle", "apply", whole)
    (tree / "new").write_text("new\n")
    second = mountctl.json("import", tree, "--ref", "main")["snapshot"]
    theirs = tmp_path / "theirs"
    theirs.write_text(other("snapshot", "list", "--json").stdout)
    sender = subprocess.Popen(
        mountctl.command("bundle", "create", "-", "--have-file", theirs, "--json"),
        env=mountctl.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    done = subprocess.run(
        other.command("bundle", "apply", "-", "--move-refs", "--json"), env=other.environment(),
        stdin=sender.stdout, capture_output=True, check=True, text=True,
    )  # fmt: skip
    assert sender.stdout is not None
    sender.stdout.close()
    assert sender.stderr is not None
    said = sender.stderr.read()
    sender.stderr.close()
    assert sender.wait() == 0
    assert f'"snapshots": ["{second}"]'.encode() in said
    assert f'"new_snapshots": ["{second}"]' in done.stdout
    assert other.json("ref", "list") == [{"ref": "main", "snapshot": second}]
    delta = tmp_path / "delta"
    assert mountctl.json("bundle", "create", delta, "main", "--have", first)["bytes"] < size


def test_refs_that_differ_are_left(mountctl, other, first, tree, tmp_path):
    file = tmp_path / "x"
    mountctl("bundle", "create", file)
    mine = other.json("import", tree / "src", "--ref", "main")["snapshot"]
    said = other("bundle", "apply", file).stderr
    assert "names another snapshot here and was left" in said
    assert other.json("ref", "list") == [{"ref": "main", "snapshot": mine}]


def test_what_is_wrong_is_said(mountctl, other, first, tree, tmp_path):
    file = tmp_path / "x"
    mountctl("bundle", "create", file, first)
    data = file.read_bytes()
    file.write_bytes(data[:-9])
    assert "it ends there, inside of its end record" in other.fails(9, "bundle", "apply", file)
    file.write_bytes(b"PK" + data)
    assert "does not begin as a bundle" in other.fails(9, "bundle", "inspect", file)
    assert "No such file" in other.fails(11, "bundle", "apply", tmp_path / "none")
    assert other.json("snapshot", "list") == []
    (tree / "new").write_text("new\n")
    mountctl("import", tree, "--ref", "main")
    mountctl("bundle", "create", file, "main", "--have", first)
    assert first in other.fails(3, "bundle", "apply", file)
    mountctl.fails(3, "bundle", "create", file, "nothing")
    bad = tmp_path / "bad"
    bad.write_text('[{"no": 1}]')
    mountctl.fails(2, "bundle", "create", file, "main", "--have-file", bad)
    mountctl.fails(2, "bundle", "apply", file, "--no-refs", "--move-refs")


def test_a_file_that_cannot_be_written_is_not_there(mountctl, first, tmp_path):
    before = set(os.listdir(tmp_path))
    mountctl.fails(11, "bundle", "create", tmp_path / "none" / "x", "main")
    data = mountctl.store / "db" / "data.mdb"
    assert data.exists()
    assert set(os.listdir(tmp_path)) == before
