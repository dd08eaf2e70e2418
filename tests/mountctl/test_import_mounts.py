"""Imports of what a mount shows: one tree can be imported, the mount as a whole cannot."""

import os
import subprocess
from pathlib import Path

import pytest

from engine import Repository
from mountctl.failures import SYSTEM, describe
from tests.mountctl.conftest import Program

REFUSED = 4


@pytest.fixture
def mounted(mountctl: Program, first: str, tmp_path: Path):
    """The place where the store is mounted, with a session."""
    place = tmp_path / "mnt"
    place.mkdir()
    mountctl("session", "create", "work", "main")
    mountctl("mount", place)
    yield place
    mountctl("umount")


@pytest.mark.fuse
def test_a_mount_is_not_imported_as_a_whole(mountctl, mounted, first):
    for path in ("", "snapshots", "sessions", "layers", "layers/work", ".amalgam"):
        assert "all its snapshots" in mountctl.fails(REFUSED, "import", mounted / path)
    assert len(mountctl.json("snapshot", "list")) == 1
    for path in ("snapshots/main", "sessions/work"):
        assert mountctl.json("import", mounted / path)["entries"] == 7
    assert mountctl.json("import", mounted / "snapshots/main/src", "--ref", "part")["changed"]
    # One in a directory is left out, by whatever way it is there.
    result = mountctl.json("import", mounted.parent / "tree")
    assert result["warnings"] == []
    found = mountctl.json("import", mounted.parent)["warnings"]
    assert any(f"{str(mounted)!r}: it is an AmalgamFS" in line for line in found)


@pytest.mark.fuse
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may bind")
def test_a_bind_of_a_mount_is_known_too(mountctl, mounted, tmp_path):
    bind = tmp_path / "bind"
    bind.mkdir()
    for what, refused in ((".", True), ("snapshots", True), ("sessions/work", False)):
        subprocess.run(["mount", "--bind", mounted / what, bind], check=True)
        try:
            if refused:
                assert "all its snapshots" in mountctl.fails(REFUSED, "import", bind)
            else:
                assert mountctl.json("import", bind)["entries"] == 7
        finally:
            subprocess.run(["umount", bind], check=True)


@pytest.mark.fuse
def test_a_session_that_somebody_else_holds_is_an_error_with_a_name(mountctl, mounted):
    path = mounted / "sessions/work"
    with (
        Repository.open(str(mountctl.store)) as repository,
        repository.sessions.hold("work", "a test"),
    ):
        result = mountctl.run("import", path, code=REFUSED)
    assert f"cannot import '{path}" in result.stderr


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (5, "descriptor 5: stale"), (None, "stale"), (b"/a\xff\x1b", '"/a\\377\\033": stale'),
        (Path("/a b"), "/a b: stale"), ("/x", "/x: stale"),
    ],
)  # fmt: skip
def test_an_error_may_name_its_file_in_any_way(name, shown):
    failure = describe(OSError(116, "stale", name))
    assert (failure.message, failure.exit_code) == (shown, SYSTEM)
