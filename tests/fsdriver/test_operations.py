"""What the handlers leave to other threads, asked for without a kernel."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import Repository, SnapshotId
from engine.mounted.inodes import Inode
from engine.mounted.overlay_file import SessionFile
from engine.mounted.vfs import SESSIONS, Vfs
from engine.storage.nodes import Owner
from fsdriver.operations import COPY_IN_THREAD, Operations
from tests.engine.trees import noise


@pytest.fixture
def vfs(repository: Repository, tmp_path: Path) -> Iterator[Vfs]:
    """A session `s` on a directory with a large file of three names and a small one."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "large").write_bytes(noise(COPY_IN_THREAD + 1, 1))
    for name in ("second", "third"):
        os.link(base / "large", base / name)
    (base / "small").write_bytes(b"small")
    snapshot = SnapshotId(repository.import_directory(str(base)).snapshot)
    repository.sessions.create("s", (None, None, snapshot))
    made = Vfs(repository, Owner(os.getuid(), os.getgid()), {})
    yield made
    made.close()


def name_of(vfs: Vfs, *names: bytes) -> Inode:
    """Looks a path in the session up, as the kernel does before it uses a name."""
    at: Inode | None = vfs.inode(SESSIONS)
    for name in (b"s", *names):
        assert at is not None
        at = at.lookup(name)
        assert at is not None
        at = vfs.refer(at)
    assert at is not None
    return at


@pytest.mark.parametrize("act", ["unlink", "rename over"])
async def test_a_large_linked_file_that_loses_a_name_is_copied_in_a_thread(
    vfs: Vfs, monkeypatch: pytest.MonkeyPatch, act: str
):
    root, file = name_of(vfs), name_of(vfs, b"second")
    name_of(vfs, b"small")
    threads: list[threading.Thread] = []
    fill = SessionFile._fill

    def noted(self: SessionFile, *arguments: Any, **named: Any) -> bytes:
        if self is file:
            threads.append(threading.current_thread())
        return fill(self, *arguments, **named)

    monkeypatch.setattr(SessionFile, "_fill", noted)
    operations: Any = Operations(vfs)
    if act == "unlink":
        await operations.unlink(root.ino, b"second", None)
        assert root.lookup(b"second") is None
    else:
        await operations.rename(root.ino, b"small", root.ino, b"second", 0, None)
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()
    assert file.attributes().nlink == 2
    assert file.read(0, COPY_IN_THREAD + 9) == noise(COPY_IN_THREAD + 1, 1)
