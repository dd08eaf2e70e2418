"""Files that commands read and write as streams; `-` is stdin or stdout."""

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import click

_BUFFER = 1 << 20
"""Members of archives are small, and a call of the kernel for each would take long."""


@contextmanager
def written(path: str) -> Iterator[IO[bytes]]:
    """Gives a stream to write a file that appears when it is whole; `-` is stdout.

    A device or a pipe is written to as it is, and a link stays one.
    """
    if path == "-":
        yield sys.stdout.buffer
        return
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb") as out:
                yield out
        else:
            with _appearing(os.path.realpath(path)) as out:
                yield out
    except OSError as error:
        if error.filename is None:
            error.filename = path
        raise


@contextmanager
def _appearing(path: str) -> Iterator[IO[bytes]]:
    parent, name = os.path.split(path)
    temporary = os.path.join(parent, f".{name[:50]}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb", buffering=_BUFFER) as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.rename(temporary, path)
    except BaseException as error:
        if os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename == temporary:
            error.filename = path  # what was asked for, not what it is called meanwhile
        raise


@contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
    """Gives a stream to read a file; `-` is stdin."""
    if path == "-":
        yield sys.stdin.buffer
        return
    with open(path, "rb") as stream:
        yield stream


def refuse_terminal(path: str) -> None:
    """Raises a usage error where bytes would be written to a terminal."""
    if path == "-" and sys.stdout.isatty():
        raise click.UsageError("stdout is a terminal: name a file, or write into a pipe")


@contextmanager
def compressing(out: IO[bytes], form: str) -> Iterator[IO[bytes]]:
    """Gives a stream that compresses into `out`, the same bytes for the same data."""
    if form == "gzip":
        import gzip

        with gzip.GzipFile("", "wb", 6, out, mtime=0) as packed:
            yield packed  # type: ignore[misc]  # all of IO that is written
    elif form == "xz":
        import lzma

        with lzma.LZMAFile(out, "wb") as stream:
            yield stream
    elif form == "zstd":
        import zstandard

        with zstandard.ZstdCompressor(level=3).stream_writer(out, closefd=False) as writer:
            yield writer
    else:
        yield out
    out.flush()
