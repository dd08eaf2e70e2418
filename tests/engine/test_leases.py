"""Leases: one holder, or several who share; known to all; a dead holder has lost it."""

import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.host.leases import LeaseHeldError, acquire, holder_of, is_held
from tests.conftest import ROOT

HOLD = """
import sys
from engine.host.leases import acquire
lease = acquire(sys.argv[1], sys.argv[2], shared=sys.argv[3] == "shared", what="a test")
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path)


@pytest.fixture
def other(store: str) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds `mount`."""
    program = hold(store, "mount", "alone")
    yield program
    program.kill()
    program.communicate()


def hold(store: str, name: str, how: str) -> "subprocess.Popen[str]":
    program = subprocess.Popen(
        [sys.executable, "-c", HOLD, store, name, how],
        cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert program.stdout is not None
    assert program.stdout.readline() == "held\n"
    return program


def test_one_holder_at_a_time(store: str):
    with acquire(store, "mount", what="serving"):
        with pytest.raises(LeaseHeldError) as caught:
            acquire(store, "mount")
        with pytest.raises(LeaseHeldError):
            acquire(store, "mount", shared=True)
        acquire(store, "objects").release()  # another lease is another matter
    assert caught.value.holder == {"pid": os.getpid(), "what": "serving"}
    message = f"the store's mount is held by process {os.getpid()} (serving)"
    assert str(caught.value) == message
    acquire(store, "mount").release()


def test_several_share_and_keep_one_who_would_be_alone_out(store: str):
    first, second = (acquire(store, "objects", shared=True) for _ in range(2))
    for lease in [first, second]:
        with pytest.raises(LeaseHeldError, match="garbage collection is held"):
            acquire(store, "objects")
        lease.release()
    acquire(store, "objects").release()


def test_releasing_again_is_harmless(store: str):
    lease = acquire(store, "mount")
    lease.release()
    with acquire(store, "mount"):
        lease.release()
        assert is_held(store, "mount")


def test_whether_it_is_held(store: str):
    assert not is_held(store, "mount")
    with acquire(store, "mount"):
        assert is_held(store, "mount")
    assert not is_held(store, "mount")
    with acquire(store, "objects", shared=True):
        assert not is_held(store, "objects")  # asking is sharing: the one alone is meant


def test_another_process_holds_it(store: str, other: "subprocess.Popen[str]"):
    assert is_held(store, "mount")
    with pytest.raises(LeaseHeldError) as caught:
        acquire(store, "mount", wait=0.05)
    assert caught.value.holder == {"pid": other.pid, "what": "a test"}
    assert caught.value.what == "the store's mount"


def test_a_killed_holder_has_lost_it(store: str, other: "subprocess.Popen[str]"):
    other.kill()
    other.wait(120)
    assert not is_held(store, "mount")
    with acquire(store, "mount", what="the next"):
        assert holder_of(store, "mount") == {"pid": os.getpid(), "what": "the next"}


def test_a_killed_sharer_has_lost_it(store: str):
    program = hold(store, "objects", "shared")
    with pytest.raises(LeaseHeldError):
        acquire(store, "objects")
    program.kill()
    program.communicate()
    acquire(store, "objects").release()


def test_waiting_for_the_holder(store: str, other: "subprocess.Popen[str]"):
    taken = threading.Event()

    def wait() -> None:
        with acquire(store, "mount", wait=30):
            taken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    other.communicate("go\n", timeout=120)
    assert taken.wait(120)
    thread.join(120)


def test_a_child_does_not_inherit_it(store: str):
    lease = acquire(store, "mount")
    program = subprocess.Popen(
        [sys.executable, "-c", "print('ready', flush=True); input()"],
        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False,
    )  # fmt: skip
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    lease.release()
    assert not is_held(store, "mount")
    program.communicate("\n")


def test_what_the_holder_says_of_itself(store: str):
    with acquire(store, "mount", what="a long description of what is done") as lease:
        lease.describe(mountpoint="/m", what="x")
        said = {"pid": os.getpid(), "mountpoint": "/m", "what": "x"}
        assert holder_of(store, "mount") == said
        assert json.loads(Path(store, "locks/mount").read_text()) == said


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe", b'"text"'])
def test_what_cannot_be_read_is_an_unknown_holder(store: str, text: bytes):
    assert holder_of(store, "mount") == {}
    with acquire(store, "mount"):
        Path(store, "locks/mount").write_bytes(text)
        with pytest.raises(LeaseHeldError, match="held by another process") as caught:
            acquire(store, "mount")
    assert caught.value.holder == {}


def test_asking_whether_it_is_held_is_in_nobodys_way(store: str):
    acquire(store, "mount").release()
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            is_held(store, "mount")

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2000):
            acquire(store, "mount").release()
    finally:
        done.set()
        for thread in threads:
            thread.join(120)


def test_who_asks_and_is_kept_from_it_is_in_nobodys_way(store: str):
    """As on a machine with more to do than it can: between the two calls that asking is."""
    acquire(store, "mount").release()
    fd = os.open(Path(store, "locks/mount"), os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_SH)
    timer = threading.Timer(0.6, os.close, [fd])
    timer.start()
    acquire(store, "mount").release()
    timer.join()
