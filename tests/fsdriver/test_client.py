"""The client's way in, without a daemon."""

import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fsdriver import client
from fsdriver.client import Client, DaemonLostError


@pytest.fixture
def full(tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A socket that listens and lets nobody in, with as many before it as it has room for."""
    path = str(tmp_path / "control")
    with socket.socket(socket.AF_UNIX) as listener:
        client.bind(listener, path)
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
            first.setblocking(False)
            second.setblocking(False)
            client.connect(first, path)
            with pytest.raises(BlockingIOError):
                client.connect(second, path)
            yield listener, path


def test_a_client_waits_its_turn(full):
    listener, path = full
    let_in: list[socket.socket] = []
    timer = threading.Timer(0.2, lambda: let_in.extend(listener.accept()[0] for _ in range(2)))
    timer.start()
    with Client(path, 1) as entered:
        timer.join()
        assert entered._socket.gettimeout() is None
        assert entered._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16) == bytes(16)
    for sock in let_in:
        sock.close()


def test_a_client_does_not_wait_for_ever(full, monkeypatch):
    monkeypatch.setattr(client, "_PATIENCE", struct.pack("@ll", 0, 20_000))
    with pytest.raises(DaemonLostError, match=r"process 1\) does not answer: .*others wait"):
        Client(full[1], 1)
