"""One repository in many threads, and in event loops."""

import asyncio
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

import pytest
import trio

from engine import Repository, SnapshotId
from engine.host.leases import LeaseHeldError, acquire, is_held
from engine.mounted.overlay_directory import open_overlay
from engine.storage.nodes import Owner
from engine.storage.store import StoreOpenError
from tests.conftest import PATIENCE


def elsewhere(do: Callable[[], object]) -> object:
    """Returns what a call returns in another thread, or raises what it raises."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(do).result(PATIENCE)


def commit(repository: Repository, number: int) -> SnapshotId:
    workspace = repository.workspace()
    workspace.write("a", f"{number}")
    return workspace.commit(f"{number}", durable=number % 2 == 0).snapshot


def test_threads_use_one_repository_at_the_same_time(repository: Repository):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: commit(repository, number), range(40)))
    assert set(made) == set(repository.snapshots())


def test_a_store_is_open_once_in_a_process(repository: Repository, first: SnapshotId):
    for use in (Repository.open, Repository.create):
        with pytest.raises(StoreOpenError, match="open in this process already"):
            use(repository.path)
    repository.set_ref("still", first)  # and it is none the worse for it
    repository.close()
    Repository.open(repository.path).close()


def test_a_generator_may_be_ended_by_another_thread(repository: Repository, first: SnapshotId):
    repository.set_ref("main", first)
    holders = repository.holders(repository.object_named("main:"))
    next(holders)
    assert isinstance(holders, Generator)
    elsewhere(holders.close)
    repository.set_ref("other", first)  # a thread that still read could not write
    holders = repository.holders(repository.object_named("main:"))
    elsewhere(lambda: next(holders))
    assert list(holders)
    elsewhere(lambda: repository.set_ref("third", first))
    repository.compact()  # which waits for every view


def test_a_session_is_held_once_and_used_by_one_thread_after_the_other(
    repository: Repository, session: str
):
    owner = Owner(0, 0)
    with repository.sessions.hold(session, "a test") as held:
        with pytest.raises(LeaseHeldError):
            repository.sessions.hold(session, "again")
        with pytest.raises(LeaseHeldError):
            elsewhere(lambda: repository.sessions.hold(session, "again"))
        view = open_overlay(repository.objects, held.upper(), held.session.root, b"key", owner)
        file = elsewhere(lambda: view.root.create(b"new", 0o644, owner))
        assert file is view.root.lookup(b"new")
        elsewhere(view.close)
        elsewhere(held.release)
    repository.sessions.hold(session, "then").release()


def test_a_lease_may_be_given_up_by_another_thread(repository: Repository):
    lease = acquire(repository.path, "mount")
    thread = threading.Thread(target=lease.release)
    thread.start()
    thread.join(PATIENCE)
    assert not is_held(repository.path, "mount")


def test_event_loops_use_it_in_threads(repository: Repository):
    async def with_asyncio() -> list[SnapshotId]:
        calls = (asyncio.to_thread(commit, repository, number) for number in range(6))
        return await asyncio.gather(*calls)

    async def with_trio() -> list[SnapshotId]:
        made: list[SnapshotId] = []

        async def one(number: int) -> None:
            made.append(await trio.to_thread.run_sync(commit, repository, number))

        async with trio.open_nursery() as nursery:
            for number in range(10, 16):
                nursery.start_soon(one, number)
        return made

    made = asyncio.run(with_asyncio()) + trio.run(with_trio)
    assert set(made) == set(repository.snapshots())


def test_a_cancelled_task_does_not_end_its_call(repository: Repository):
    begun, go_on = threading.Event(), threading.Event()

    def work() -> SnapshotId:
        begun.set()
        go_on.wait(PATIENCE)
        return commit(repository, 2)

    async def cancel() -> None:
        task = asyncio.create_task(asyncio.to_thread(work))
        await asyncio.to_thread(begun.wait, PATIENCE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    asyncio.run(cancel())  # which waits for its threads
    assert len(repository.snapshots()) == 1
