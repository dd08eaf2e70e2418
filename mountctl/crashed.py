"""What is said when the library LMDB ends the process: at some damage it aborts, or reads wild.

`arm` costs nothing until then. A signal handler makes the dying process, with its streams and
its pid, into this module's program, which reads the store's pages by itself: if they are damaged
it says so and ends with the exit code for that, else the process ends by the signal as it would
have. Locks and leases are gone by then, as with any death.
"""

import ctypes
import os
import signal
import sys
from typing import NoReturn

SIGNALS = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_armed: list[object] = []


def arm(store_path: str, as_json: bool) -> None:
    """Has this process tell of a damaged store when it dies of it; again changes the store.

    Signals that somebody else handles (`python -X faulthandler`) are left to them.
    """
    words = [sys.executable, "-P", "-m", "mountctl.crashed", store_path, "json" * as_json]

    def become(number: int) -> None:
        try:
            os.execv(words[0], [*words, str(number)])
        except OSError:
            os.kill(os.getpid(), signal.SIGKILL)  # the handler would be called for ever

    handler = _Handler(become)
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    ours = {ctypes.cast(old, ctypes.c_void_p).value for old in _armed}  # type: ignore[arg-type]
    for number in SIGNALS:
        before = libc.signal(ctypes.c_int(number), handler)
        if before and before not in ours:
            libc.signal(ctypes.c_int(number), ctypes.c_void_p(before))
    _armed.append(handler)  # for C has its address


def main() -> NoReturn:
    """Says why the process died that this one has become, or dies the same way."""
    from engine.storage.store import StoreDamagedError
    from engine.upkeep.salvaging import examine
    from mountctl.failures import describe
    from mountctl.output import Output

    store, as_json, number = sys.argv[1], bool(sys.argv[2]), int(sys.argv[3])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        flaws = examine(store)
    except OSError:
        flaws = []
    if flaws:
        failure = describe(StoreDamagedError(store, flaws[0]))
        Output(json=as_json, quiet=False).failure(failure)
        sys.exit(failure.exit_code)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise AssertionError  # nobody outlives it


if __name__ == "__main__":
    main()
