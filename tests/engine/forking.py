"""Calls in a child of fork(), with what came of them."""

import os
import pickle
import select
import signal
import time
import warnings
from collections.abc import Callable

from tests.conftest import PATIENCE


def in_child(do: Callable[[], object], meanwhile: Callable[[], object] = bool) -> object:
    """Returns what a call returns in a child of this process, or the error that it raises.

    `meanwhile` is called here once the child is there.
    """
    ours, theirs = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: since 3.12
        pid = os.fork()
    if pid == 0:
        try:
            try:
                result = do()
            except BaseException as error:  # noqa: BLE001 - it is the result
                result = error
            os.write(theirs, pickle.dumps(result))
        finally:
            os._exit(0)
    os.close(theirs)
    meanwhile()
    data, until = b"", time.monotonic() + PATIENCE / 10
    while select.select([ours], [], [], max(0.0, until - time.monotonic()))[0]:
        part = os.read(ours, 65536)
        if not part:
            break
        data += part
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(ours)
    os.waitpid(pid, 0)
    assert data, "the child hung, or could not say what came of it"
    return pickle.loads(data)
