"""A write(2) that comes in several messages is in a snapshot whole, or not at all."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from engine import Repository, SnapshotId
from engine.mounted.vfs import Vfs
from engine.storage.nodes import Owner
from engine.trees.directory import Directory, directory_id
from fsdriver.operations import Operations
from fsdriver.writes import ALL_SECONDS, HALF_SECONDS, Writes

PAGE, LARGEST = 4096, 1 << 20


@pytest.fixture
def vfs(repository: Repository, tmp_path: Path) -> Iterator[Vfs]:
    base = tmp_path / "base"
    base.mkdir()
    snapshot = SnapshotId(repository.import_directory(str(base)).snapshot)
    repository.sessions.create("s", (None, None, snapshot))
    made = Vfs(repository, Owner(os.getuid(), os.getgid()), {})
    yield made
    made.close()


async def test_a_commit_has_both_parts_of_a_write_and_nothing_that_began_later(
    vfs: Vfs, autojump_clock: trio.testing.MockClock
):
    operations = Operations(vfs)
    live = vfs.session("s")
    files = [
        vfs.refer(live.overlay.root.create(name, 0o100644, Owner(os.getuid(), os.getgid())))
        for name in (b"one", b"other")
    ]
    done: list[str] = []

    async def commit() -> None:
        await operations.writes.wait_until_whole()
        freeze = live.held.freeze(live.overlay)
        live.held.commit(freeze, "", None, "here", live.overlay)
        done.append("commit")

    async def write(file: int, offset: int, data: bytes, what: str) -> None:
        await operations.write(files[file].ino, offset, data)
        done.append(what)

    await write(0, 0, b"a" * 100, "before")
    await write(0, 100, b"b" * (PAGE - 100), "first part")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(commit)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(write, 1, 0, b"later", "later")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(write, 0, PAGE, b"b" * 50, "second part")
    assert done.index("second part") < done.index("commit") < done.index("later")
    root = vfs.repository.snapshot(vfs.repository.refs()["here"]).root
    sizes = {
        entry.name: entry.size for entry in Directory(vfs.repository.objects, directory_id(root))
    }
    assert sizes == {b"one": PAGE + 50, b"other": 0}


@pytest.mark.parametrize(
    ("offset", "size", "whole"),
    [
        (0, PAGE, True),
        (0, 100, True),
        (100, 100, True),
        (100, PAGE, True),
        (100, PAGE - 100, False),
        (100, 3 * PAGE - 100, False),
        (0, LARGEST, False),
        (8 * PAGE, LARGEST, False),
        (0, LARGEST - PAGE, True),
    ],
)
async def test_what_may_go_on_is_waited_for_and_no_longer(
    autojump_clock: trio.testing.MockClock, offset: int, size: int, whole: bool
):
    writes, began = Writes(), trio.current_time()
    writes.end(7, offset, size, LARGEST)
    await writes.wait_until_whole()
    assert trio.current_time() - began == pytest.approx(0 if whole else HALF_SECONDS)
    await writes.begin(8)
    assert trio.current_time() - began == pytest.approx(0 if whole else HALF_SECONDS)


async def test_a_write_that_never_ends_is_not_waited_for_for_ever(
    autojump_clock: trio.testing.MockClock,
):
    writes, began = Writes(), trio.current_time()

    async def go_on() -> None:
        while True:
            await writes.begin(7)
            writes.end(7, 0, LARGEST, LARGEST)
            await trio.sleep(HALF_SECONDS / 2)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(go_on)
        await trio.testing.wait_all_tasks_blocked()
        await writes.wait_until_whole()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - began == pytest.approx(ALL_SECONDS)
