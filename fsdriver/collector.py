"""Collects a store's garbage in a process of its own, out of everybody's way.

`python -m fsdriver.collector STORE`, started by a mount's daemon: marking decodes nodes for
seconds, and a thread of the daemon would make the kernel's requests wait for the interpreter.
The lowest priority for the processor and the disk. Writes the report, or the error, as JSON.
"""

import ctypes
import json
import os
import platform
import sys

import msgspec

from engine import EngineError, Repository

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IDLE = 3 << 13
"""Who has it gets the disk when nobody else wants it."""


def main(argv: list[str]) -> int:
    """Collects and tells; returns the exit status."""
    os.nice(19)
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None).syscall(number, 1, 0, _IDLE)  # fails without harm
    try:
        with Repository.open(argv[0], trusted=True) as repository:
            report = repository.collect()
    except (EngineError, OSError) as error:
        sys.stdout.write(json.dumps({"kind": type(error).__name__, "message": str(error)}))
        return 1
    sys.stdout.write(json.dumps(msgspec.to_builtins(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
