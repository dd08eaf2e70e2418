"""A mount whose log cannot be written: its disk is full, or nobody reads it any more."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from engine.host.leases import acquire, holder_of
from engine.storage.store import StoreError
from fsdriver import launch, messages
from fsdriver.mountpoint import check, our_mount
from tests.fsdriver.conftest import Mount, until
from tests.fsdriver.syscalls import refused
from tests.fsdriver.test_faults import as_root, fill, narrow  # noqa: F401  # a fixture

pytestmark = pytest.mark.fuse


@as_root
def test_a_mount_lives_on_when_its_log_has_no_room(narrow: Mount) -> None:  # noqa: F811
    session, log = narrow.sessions / "s", narrow.store / "log/mount.log"
    log.unlink()  # the next line needs a block
    filler = fill(narrow)
    for number in range(200):
        with refused(errno.ENOSPC), (session / f"{number}").open("wb", buffering=0) as file:
            file.write(bytes(100_000))
    assert (narrow.snapshots / "main/README").read_bytes() == b"read me\n"
    filler.unlink()
    (session / "more").write_bytes(bytes(100_000))
    narrow.commit("s")
    text = log.read_text() if log.exists() else ""
    assert "level=error" not in text
    assert len(text.splitlines()) < 20
    with narrow.repository() as repository:
        assert not repository.verify().damage


@as_root
def test_a_mount_that_begins_on_a_full_disk_is_found_and_ends(narrow: Mount) -> None:  # noqa: F811
    """There is no room for what it says of itself."""
    narrow.stop()
    (narrow.store / "locks/mount").unlink()
    filler = fill(narrow)
    narrow.start()
    assert (narrow.store / "locks/mount").stat().st_size == 0
    with narrow.client() as client:
        assert client.pid == narrow.pid
        status = client.ask(messages.GetStatus())
        assert isinstance(status, messages.Status)
        assert status.mountpoint == str(narrow.path)
    with refused(errno.ENOSPC), (narrow.sessions / "s/new").open("wb", buffering=0) as file:
        file.write(bytes(100_000))
    filler.unlink()


def test_what_a_holder_says_of_itself_takes_no_new_room(tmp_path: Path) -> None:
    with acquire(str(tmp_path), "mount", what="a long text of who holds it now") as lease:
        lease.describe(what="short")
        assert holder_of(str(tmp_path), "mount")["what"] == "short"
        lease.describe(what="a longer one again, longer than before, and longer than the first")
        assert "longer than before" in holder_of(str(tmp_path), "mount")["what"]


def test_a_mount_in_the_foreground_lives_on_when_nobody_reads_its_log(own: Mount) -> None:
    reading, writing = os.pipe()
    place = check(str(own.path), str(own.store))
    daemon = subprocess.Popen(
        launch.daemon_command(str(own.store), place), stderr=writing, stdin=subprocess.DEVNULL
    )
    os.close(writing)
    own.pid = daemon.pid
    os.read(reading, 10)
    os.close(reading)
    until(lambda: our_mount(str(own.path)) is not None and (own.snapshots / "main").exists())
    for number in range(20):
        (own.sessions / f"s/{number}").write_bytes(b"x")
    own.commit("s")
    own.ask(messages.Shutdown())
    assert daemon.wait(60) == 0
    own.pid = 0


def test_where_there_can_be_no_log_a_mount_begins_all_the_same(own: Mount) -> None:
    (own.store / "log").rmdir()
    (own.store / "log").write_bytes(b"not a directory")
    assert launch.why_no_log(str(own.store), None)
    own.start()
    (own.sessions / "s/new").write_bytes(b"x")
    (own.store / "log").unlink()
    own.commit("s")
    own.stop()
    assert "lines are missing here" in own.log()
    with pytest.raises(StoreError, match="cannot write the log"):
        launch.why_no_log(str(own.store), str(own.store / "db/data.mdb/log"))


@as_root
def test_a_mount_ends_though_its_stores_disk_became_read_only(own: Mount) -> None:
    own.start()
    store = str(own.store)
    subprocess.run(["mount", "--bind", store, store], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", store], check=True)
        assert (own.snapshots / "main/README").read_bytes() == b"read me\n"
        own.stop()
    finally:
        own.clear()
        subprocess.run(["umount", "-l", store], check=True)
