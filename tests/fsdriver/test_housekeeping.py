"""A mount that looks after its store: collections when they are due, and room given back."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine import Repository, SnapshotId
from engine.storage.store import Db
from fsdriver import daemon, launch, messages
from fsdriver.client import DaemonError
from tests.conftest import ROOT
from tests.engine.trees import noise
from tests.fsdriver.conftest import Mount, until

pytestmark = pytest.mark.fuse


def fill(mount: Mount, size: int = 3_000_000) -> SnapshotId:
    """Makes a store with a snapshot, and the garbage of another."""
    source = mount.store.parent / "source"
    source.mkdir()
    with Repository.create(str(mount.store)) as repository:
        (source / "kept").write_bytes(noise(100_000, 1))
        kept = SnapshotId(repository.import_directory(str(source), ref="main").snapshot)
        (source / "gone").write_bytes(noise(size, 2))
        gone = SnapshotId(repository.import_directory(str(source)).snapshot)
        repository.remove_snapshot(gone)
    return kept


def chunks(mount: Mount) -> int:
    with mount.repository() as repository, repository.store.read() as reader:
        return reader.count(Db.CHUNKS)


@pytest.fixture
def scheduled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Starts daemons that look every tenth of a second."""
    mount = Mount(tmp_path)
    command = launch.daemon_command

    def often(*words: str, **options: object) -> list[str]:
        return [*command(*words, **options), "--gc-look", "0.1"]  # type: ignore[arg-type]

    monkeypatch.setattr(launch, "daemon_command", often)
    yield mount
    mount.clear()


def start(mount: Mount, **options: float) -> None:
    mount.pid = launch.launch(str(mount.store), str(mount.path), **options)  # type: ignore[arg-type]


def test_garbage_goes_when_it_is_time(scheduled: Mount):
    kept = fill(scheduled)
    start(scheduled, gc_every=0.5)
    until(lambda: "collected" in scheduled.log(), 30)
    until(lambda: chunks(scheduled) < 5)
    assert (scheduled.snapshots / kept.hex() / "kept").read_bytes() == noise(100_000, 1)
    scheduled.stop()


def test_garbage_goes_when_there_is_little_room(scheduled: Mount):
    """Every disk has less than all of it free. The file becomes smaller if that is worth it."""
    kept = fill(scheduled, 90 << 20)
    before = (scheduled.store / "db/data.mdb").stat().st_size
    start(scheduled, gc_below=1.0)
    until(lambda: "compacted" in scheduled.log(), 60)
    assert (scheduled.store / "db/data.mdb").stat().st_size < before / 10
    assert (scheduled.snapshots / kept.hex() / "kept").read_bytes() == noise(100_000, 1)
    logged = scheduled.log().count("collecting")
    time.sleep(2.5)  # nothing has changed: there is nothing to collect again
    assert scheduled.log().count("collecting") <= logged + 1
    with scheduled.repository() as repository:
        assert repository.verify().damage == []
    scheduled.stop()


def test_without_a_schedule_nothing_goes(scheduled: Mount):
    fill(scheduled)
    before = chunks(scheduled)
    start(scheduled)
    os.listdir(scheduled.snapshots)
    time.sleep(0.5)
    assert "collecting" not in scheduled.log()
    assert chunks(scheduled) == before
    scheduled.stop()


def test_the_collector_tells_why_it_cannot(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "fsdriver.collector", str(tmp_path / "nothing")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert json.loads(done.stdout)["kind"] == "NotAStoreError"


def test_a_mount_is_compacted_while_it_is_read_and_written(tmp_path: Path):
    mount = Mount(tmp_path)
    kept = fill(mount, 20 << 20)
    mount.start()
    try:
        session = mount.create("s", kept)
        with mount.repository() as repository:
            repository.collect()
        stop = threading.Event()
        waits: list[float] = []

        def use() -> None:
            number = 0
            while not stop.is_set():
                began = time.monotonic()
                (session / "file").write_text(str(number))
                assert (session / "kept").stat().st_size == 100_000
                assert (session / "file").read_text() == str(number)
                waits.append(time.monotonic() - began)
                number += 1

        thread = threading.Thread(target=use)
        thread.start()
        commits = 0
        while commits < 5 or (len(waits) < 20 and thread.is_alive()):
            reply = mount.ask(messages.Compact(), 30)
            assert isinstance(reply, messages.Compacted)
            if not commits:
                assert reply.bytes_after < reply.bytes_before / 4
            mount.commit("s")
            commits += 1
        stop.set()
        thread.join()
        assert len(waits) >= 20
        with mount.repository() as repository:
            with pytest.raises(DaemonError, match=f"process {os.getpid()}"):
                mount.ask(messages.Compact(), 30)
            assert repository.verify().damage == []
            assert len(repository.snapshots()) >= 5
        mount.stop()
    finally:
        mount.clear()


def test_the_daemon_knows_its_options():
    options = daemon._parser().parse_args(["s", "m", "--gc-every", "60", "--gc-below", "0.05"])
    assert (options.gc_every, options.gc_below) == (60.0, 0.05)
