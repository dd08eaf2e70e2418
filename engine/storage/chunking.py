"""Where a file is cut: FastCDC with this format's parameters. The only user of fastcdc.

Boundaries are part of the format: the same bytes are cut the same way for ever, whatever the
size of the buffers they arrive in (golden vectors in the tests). A file of at most
SMALLEST_CHUNK bytes is one chunk and needs no chunker.

FastCDC: Xia et al., "FastCDC: a Fast and Efficient Content-Defined Chunking Approach for Data
Deduplication", USENIX ATC 2016; normalised chunking, level 1, as in fastcdc 1.7.0.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from engine.host.forks import ModuleLock

SMALLEST_CHUNK = 16 << 10
AVERAGE_CHUNK = 64 << 10
LARGEST_CHUNK = 256 << 10

_importing = ModuleLock()
"""Held while stdout is redirected: two threads at once would leave it redirected for ever."""


@cache
def compiled() -> bool:
    """Tells whether the chunker is machine code; the one in Python is 200 times slower."""
    with _importing, contextlib.redirect_stdout(sys.stderr):
        return importlib.util.find_spec("fastcdc.fastcdc_cy") is not None


def cut(data: bytes | memoryview, last: bool) -> Iterator[int]:
    """Yields the lengths of the chunks that `data` starts with.

    With `last` they cover all of `data`; otherwise only as far as more bytes could not change
    a boundary, which leaves at most LARGEST_CHUNK - 1 bytes for the next call.
    """
    total = len(data)
    if last and 0 < total <= SMALLEST_CHUNK:
        yield total
        return
    offset = 0
    for chunk in _chunker()(data, SMALLEST_CHUNK, AVERAGE_CHUNK, LARGEST_CHUNK):
        length = chunk.length
        offset += length
        if offset == total and not last and length < LARGEST_CHUNK:
            return  # it ends where the bytes do, not where a boundary was found
        yield length


@cache
def _chunker() -> Callable[..., Iterator[Any]]:
    """Imports the chunker when first needed.

    The package brings a command line's modules along and, without its compiled part, prints a
    line to stdout; who uses the slow one is told by the caller, who asks `compiled`.
    """
    with _importing, contextlib.redirect_stdout(sys.stderr):
        if compiled():
            module = importlib.import_module("fastcdc.fastcdc_cy")
            chunker: Callable[..., Iterator[Any]] = module.fastcdc_cy
        else:
            chunker = importlib.import_module("fastcdc.fastcdc_py").fastcdc_py
    return chunker
