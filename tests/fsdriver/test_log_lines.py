import structlog

from fsdriver.log_lines import escaped


def test_a_line_of_the_log_has_no_control_characters():
    facts = {"event": "failed\x1b[2J", "error": OSError(2, "no\nsuch\x9b", b"\xff\x07"), "n": 3}
    safe = escaped(None, "", facts)
    assert safe["event"] == r"failed\x1b[2J"
    assert safe["n"] == 3
    line = structlog.processors.LogfmtRenderer()(None, "", safe)
    assert line.isprintable()
    assert escaped(None, "", {"kind": None, "ok": True})["ok"] is True


def test_the_daemon_writes_such_lines(mount):
    """The daemon's own configuration has the processor: its log is printable, line by line."""
    log = mount.store / "log" / "mount.log"
    assert all(line.isprintable() for line in log.read_text().splitlines())
