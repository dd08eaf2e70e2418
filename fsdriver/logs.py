"""The log of a daemon: bounded, counted, and never in the way of what is logged.

A line that cannot be written is dropped and counted: a full disk, a disk that became read-only, a
terminal that is gone, and a reader who reads no more are no failure of a mount. The next line that
can be written says how many are missing.

A log of its own, at a path, has at most `MOST_BYTES`. Then it becomes `PATH.1`, in the place of the
one before, and begins anew; where it cannot be renamed it is emptied. So both together have at most
twice `MOST_BYTES`. What C libraries, tracebacks and other processes write to descriptor 2 goes to
the same file; its size is looked at once a second. A terminal or a pipe is written to as long as it
takes something at once.

The same line again within `AGAIN_SECONDS` is counted; it comes once more then, with
`repeated=N`.
"""

import contextlib
import io
import logging
import os
import select
import stat
import sys
import time
from collections.abc import MutableMapping
from typing import Any

import structlog

from engine.host.own_files import StrangeFileError
from fsdriver.launch import open_log
from fsdriver.log_lines import escaped

MOST_BYTES = 1 << 20
"""The size at which a log begins anew."""
AGAIN_SECONDS = 60.0
"""How long a line that came before is counted in the place of being written."""
MOST_LINES = 256
"""So many different lines at most are remembered."""
_ATOMIC = 4096
"""What a pipe that is ready to be written to takes without waiting: PIPE_BUF on Linux."""


class Log(io.TextIOBase):
    """Where a daemon's lines go; as a stream it takes the place of stderr. Raises nothing."""

    def __init__(
        self,
        path: str | None = None,
        descriptor: int = 2,
        most: int = MOST_BYTES,
        store: str | None = None,
    ) -> None:
        """Writes to the file `path` if it is given, to which `descriptor` then leads as well.

        `store` is the store whose log it is.
        """
        super().__init__()
        self._path, self._fd, self._most, self._store = path, descriptor, most, store
        self._opened = path is None
        self._part = ""
        self._torn = False
        self._lost = 0

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        """Returns the descriptor that others may write to."""
        return self._fd

    def write(self, text: str) -> int:
        """Writes the lines that are whole; the rest waits for its end."""
        whole, newline, rest = (self._part + text).rpartition("\n")
        self._part = rest[: self._most]
        if newline:
            self._write_lines(whole + newline)
        return len(text)

    def _write_lines(self, text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")[: self._most // 2]
        if self._lost:
            data = b'level=warning event="lines are missing here" count=%d\n%s' % (self._lost, data)
        if self._torn:
            data = b"\n" + data
        if self._put(data):
            self._lost, self._torn = 0, False
        else:
            self._lost += text.count("\n")

    def _put(self, data: bytes) -> bool:
        """Writes all, and tells whether that came to pass."""
        try:
            status = self._status()
            if not stat.S_ISREG(status.st_mode):
                return self._put_at_once(data)
            if self._path is not None and status.st_size + len(data) > self._most:
                self._begin_anew()
            done = os.write(self._fd, data)
            while done < len(data):  # a disk that became full takes a part, then refuses
                self._torn = True
                done += os.write(self._fd, data[done:])
        except (OSError, StrangeFileError):
            return False
        return True

    def _status(self) -> os.stat_result:
        """Opens the file if it was not, or if somebody has removed it. Raises OSError."""
        if not self._opened:
            self._open()
        status = os.fstat(self._fd)
        if self._path is not None and stat.S_ISREG(status.st_mode) and not status.st_nlink:
            self._open()
            status = os.fstat(self._fd)
        return status

    def _put_at_once(self, data: bytes) -> bool:
        """Writes to a terminal, a pipe or a socket what it takes without waiting."""
        for start in range(0, len(data), _ATOMIC):
            if not _takes_more(self._fd):
                return False
            os.write(self._fd, data[start : start + _ATOMIC])
        return True

    def _open(self) -> None:
        """Opens the file, or another one in its place, at the descriptor. Raises OSError."""
        if self._path is None:
            return
        fd = open_log(self._path, self._store)
        try:
            os.dup2(fd, self._fd)
        finally:
            os.close(fd)
        self._opened = True

    def _begin_anew(self) -> None:
        if self._path is None:
            return
        try:
            os.rename(self._path, self._path + ".1")
            self._open()
        except (OSError, StrangeFileError):
            os.ftruncate(self._fd, 0)

    def check(self) -> None:
        """Keeps what others write to the descriptor within the bound, too."""
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            status = os.fstat(self._fd)
            if stat.S_ISREG(status.st_mode) and status.st_size > self._most:
                if self._opened:
                    self._begin_anew()
                else:
                    os.ftruncate(self._fd, 0)


def _takes_more(fd: int) -> bool:
    ready = select.poll()
    ready.register(fd, select.POLLOUT)
    found = ready.poll(0)
    return bool(found and found[0][1] & select.POLLOUT)


class Repeats:
    """A processor of structlog that lets a line through once in a while, and counts the others."""

    def __init__(self, seconds: float = AGAIN_SECONDS, most: int = MOST_LINES) -> None:
        self._seconds, self._most = seconds, most
        self._seen: dict[tuple[str, ...], list[Any]] = {}
        """By line: when it was written last, how often it came since, and what it is."""

    def __call__(
        self, logger: Any, method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        """Returns the line to write. Raises structlog.DropEvent for one that is only counted."""
        if "repeated" in event:
            return event
        line = (method, *sorted(f"{key}={value}" for key, value in event.items()))
        found = self._seen.get(line)
        if found is not None:
            found[1] += 1
            raise structlog.DropEvent
        self._seen[line] = [time.monotonic(), 0, method, dict(event)]
        if len(self._seen) > self._most:
            del self._seen[next(iter(self._seen))]  # the one written longest ago
        return event

    def tell(self, *, all_of_them: bool = False) -> None:
        """Writes the lines that were counted for long enough, with how often they came."""
        until = time.monotonic() - (0 if all_of_them else self._seconds)
        for line, (at, count, method, event) in list(self._seen.items()):
            if at > until:
                break  # they are in the order of their times
            del self._seen[line]
            if count:
                facts = {key: value for key, value in event.items() if key != "level"}
                getattr(structlog.get_logger(), method)(**facts, repeated=count)


class _ToStructlog(logging.Handler):
    """Passes on what pyfuse3 and other libraries tell Python's `logging`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Makes a line of a record."""
        level = "error" if record.levelno >= logging.ERROR else "warning"
        tell = getattr(structlog.get_logger(), level)
        tell(record.getMessage(), logger=record.name, exc_info=record.exc_info)


class Logging:
    """The way of a process to its log."""

    def __init__(self, path: str | None, store: str) -> None:
        """Sends all lines of structlog and `logging`, and all of stderr, to one log.

        It is the file `path`, or descriptor 2 as it is.
        """
        self.log, self._repeats = Log(path, store=store), Repeats()
        sys.stderr = sys.stdout = self.log
        structlog.configure(
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.format_exc_info,
                self._repeats,
                structlog.processors.TimeStamper(fmt="iso"),
                escaped,
                structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
            ],
            logger_factory=structlog.WriteLoggerFactory(self.log),  # type: ignore[arg-type]  # all that is written
        )
        logging.captureWarnings(True)
        logging.getLogger().addHandler(_ToStructlog(logging.WARNING))

    def check(self) -> None:
        """Does what is due about once a second."""
        self._repeats.tell()
        self.log.check()

    def end(self) -> None:
        """Writes what was only counted so far."""
        self._repeats.tell(all_of_them=True)
