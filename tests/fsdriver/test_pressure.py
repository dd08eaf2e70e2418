"""Memory pressure: what the kernel says is understood, and what is shed comes back by itself."""

import os
from pathlib import Path

import pytest

from fsdriver import messages
from fsdriver.pressure import Pressure, sources

TEXT = """\
some avg10=1.53 avg60=0.87 avg300=0.20 total={some}
full avg10=1.23 avg60=0.40 avg300=0.10 total={full}
"""


def say(path: Path, some: int, full: int = 0) -> None:
    path.write_text(TEXT.format(some=some, full=full))


def test_waiting_is_pressure(tmp_path):
    path = tmp_path / "memory.pressure"
    say(path, 1_000_000)
    pressure = Pressure([str(path)])
    assert not pressure.is_high()
    say(path, 100_000_000)
    assert pressure.is_high()
    assert not pressure.is_high()


def test_what_all_have_waited_for_does_not_count_twice(tmp_path):
    path = tmp_path / "memory.pressure"
    say(path, 5, full=10)
    pressure = Pressure([str(path)])
    say(path, 5, full=100_000_000)
    assert not pressure.is_high()


@pytest.mark.parametrize("text", ["", "some", "some avg10=1 total=x\n", "\0\xff"])
def test_a_kernel_that_says_something_else_says_nothing(tmp_path, text):
    path = tmp_path / "memory.pressure"
    path.write_text(text)
    pressure = Pressure([str(path), str(tmp_path / "missing")])
    assert not pressure.is_high()


def test_this_kernel_is_asked():
    paths = sources()
    if os.access("/proc/pressure/memory", os.R_OK):
        assert "/proc/pressure/memory" in paths
    Pressure(paths).is_high()  # only the kernel knows the answer


@pytest.mark.fuse
def test_a_daemon_that_sheds_goes_on(own):
    own.start()
    home = own.sessions / "s"
    (home / "new").write_bytes(b"new")
    names = sorted(os.listdir(home))
    assert own.statistics()["objects"]["cached_nodes"]
    own.ask(messages.Shed())
    assert own.statistics()["pressure"]["sheds"] == 1
    assert own.statistics()["objects"]["cached_entries"] == 0
    assert sorted(os.listdir(home)) == names
    assert (home / "new").read_bytes() == b"new"
    assert (own.snapshots / "main" / "README").read_bytes()
