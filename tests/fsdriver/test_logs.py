"""The daemon's log where it can be written, and where it cannot."""

import io
import os
from collections.abc import Iterator

import pytest
import structlog

from fsdriver.logs import Log, Repeats


@pytest.fixture
def fd() -> Iterator[int]:
    """A descriptor that stands for stderr."""
    fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    yield fd
    os.close(fd)


def test_lines_go_to_the_file_and_to_who_writes_to_the_descriptor(tmp_path, fd):
    log = Log(str(tmp_path / "made" / "log"), fd)
    assert log.write("one\ntw") == 6
    log.write("o\n")
    os.write(fd, b"a library's\n")
    assert (tmp_path / "made/log").read_text() == "one\ntwo\na library's\n"


@pytest.mark.parametrize("by", ["lines", "others"])
def test_a_log_has_a_bound(tmp_path, fd, by):
    path = tmp_path / "log"
    log = Log(str(path), fd, most=1000)
    for number in range(500):
        if by == "lines" or not number:
            log.write(f"line {number:04}\n")
        else:
            os.write(fd, b"line %04d\n" % number)
            log.check()
    assert path.stat().st_size <= 1010
    assert (tmp_path / "log.1").stat().st_size <= 1010
    kept = (tmp_path / "log.1").read_text() + path.read_text()
    assert kept.splitlines() == [f"line {n:04}" for n in range(500 - kept.count("\n"), 500)]
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1"]


def test_a_line_longer_than_the_log_is_cut(tmp_path, fd):
    log = Log(str(tmp_path / "log"), fd, most=1000)
    for _ in range(3):
        log.write("x" * 5000 + "\n")
    assert (tmp_path / "log").stat().st_size <= 1000


def test_a_log_that_cannot_be_written_is_no_failure_and_says_so_later(tmp_path, fd):
    place = tmp_path / "place"
    place.write_bytes(b"not a directory")
    log = Log(str(place / "log"), fd)
    for _ in range(3):
        log.write("lost\n")
    log.check()
    place.unlink()
    log.write("written\n")
    assert (place / "log").read_text().splitlines() == [
        'level=warning event="lines are missing here" count=3',
        "written",
    ]


def test_a_full_disk_is_no_failure(fd):
    log = Log("/dev/full", fd)
    for _ in range(3):
        log.write("lost\n")


def test_a_log_that_was_removed_is_made_again(tmp_path, fd):
    path = tmp_path / "log"
    log = Log(str(path), fd)
    log.write("one\n")
    path.unlink()
    log.write("two\n")
    assert path.read_text() == "two\n"


def test_a_reader_who_reads_no_more_is_not_waited_for():
    reading, writing = os.pipe()
    log = Log(None, writing)
    for _ in range(200):
        log.write("x" * 1000 + "\n")
    assert len(os.read(reading, 1 << 20)) < 200_000
    log.write("after\n")
    assert b"lines are missing here" in os.read(reading, 1 << 20)
    os.close(reading)
    log.write("nobody is there\n")
    os.close(writing)
    log.write("nor is this\n")


def test_lines_that_come_again_are_counted():
    out = io.StringIO()
    repeats = Repeats(seconds=0.0)
    structlog.configure(
        processors=[repeats, structlog.processors.KeyValueRenderer(sort_keys=True)],
        logger_factory=structlog.WriteLoggerFactory(out),
    )
    try:
        log = structlog.get_logger()
        for number in range(100):
            log.error("failed", operation="write")
            log.warning("other", number=number % 2)
        assert len(out.getvalue().splitlines()) == 3
        repeats.tell()
        lines = out.getvalue().splitlines()
        assert "event='failed' operation='write' repeated=99" in lines
        assert "event='other' number=1 repeated=49" in lines
        repeats.tell()
        assert len(lines) == 6
        log.error("failed", operation="write")
        assert len(out.getvalue().splitlines()) == 7
    finally:
        structlog.reset_defaults()


def test_few_lines_are_remembered():
    repeats = Repeats(most=10)
    for number in range(1000):
        repeats(None, "info", {"event": str(number)})
    assert repeats(None, "info", {"event": "0"})
    with pytest.raises(structlog.DropEvent):
        repeats(None, "info", {"event": "999"})
