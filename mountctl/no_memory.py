"""What the system says in many ways when a process may not have more memory.

A limit of the address space (`ulimit -v`) shows wherever something is loaded, mapped or begun, and
not only as MemoryError.
"""

import errno
import os
import resource

HINT = "raise the limit: `ulimit -v unlimited`, or end what takes this process's memory"
THREADS_HINT = (
    "raise the limits of memory and of threads: `ulimit -v unlimited`, `ulimit -u $(ulimit -Hu)`"
)
MESSAGE = "not enough memory for this process"


def is_of_memory(error: BaseException) -> bool:
    """True if an error, or what it came from, is that there is no memory."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        if _is(each):
            return True
        each = each.__cause__ or each.__context__
    return False


def is_of_threads(error: BaseException) -> bool:
    """True if no thread could be begun, for which Python has no class."""
    return isinstance(error, RuntimeError) and str(error) == "can't start new thread"


def last_words(*, json: bool = False) -> None:
    """Says that there is no memory, with as good as none."""
    os.write(2, _JSON if json else _TEXT)


def _is(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, ImportError):  # the linker's words for what it cannot map
        return any(words in str(error) for words in _OF_THE_LINKER)
    # What a library in C makes of an allocation that it did not check.
    return isinstance(error, SystemError) and _is_limited()


def _is_limited() -> bool:
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


_OF_THE_LINKER = ("failed to map segment", "annot allocate memory", "cannot map zero-fill")
_TEXT = f"error: {MESSAGE}\nhint: {HINT}\n".encode()
_JSON = (
    f'{{"error": {{"kind": "MemoryError", "message": "{MESSAGE}", "hint": "{HINT}", '
    '"exit_code": 11}}\n'
).encode()
"""Made beforehand."""
