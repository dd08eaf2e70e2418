"""The control socket's end in the daemon, without a mount."""

import json
import os
import socket
from typing import Any, cast

import trio

from engine import Repository
from engine.mounted.vfs import Vfs
from engine.storage.nodes import Owner
from fsdriver import control
from fsdriver.messages import Status
from fsdriver.operations import Operations
from tests.fsdriver.conftest import PATIENCE


async def test_who_does_not_read_is_hung_up_on(repository: Repository, monkeypatch):
    """After a part of an answer no other may follow: the client would take them for one."""
    monkeypatch.setattr(control, "ANSWER_SECONDS", 0.05)
    vfs = Vfs(repository, Owner(os.getuid(), os.getgid()), {})
    large = Status(os.getpid(), repository.path, "x" * 5_000_000, "", 0, [])
    served = control.Control(vfs, Operations(vfs), cast(Any, None), large)
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(b'{"type":"GetStatus"}\n' * 2)
        with trio.fail_after(PATIENCE):
            await served._connection(trio.SocketStream(trio.socket.from_stdlib_socket(theirs)))
        answer = b""
        while part := ours.recv(1 << 20):
            answer += part
    assert json.dumps({"type": "Status"})[:-1].replace(" ", "").encode() in answer[:100]
    assert b"\n" not in answer
    vfs.close()
