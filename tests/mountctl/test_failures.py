import copy
import errno
import importlib
import inspect
import json
import os
import pickle
import pkgutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import engine
import fsdriver
import mountctl
from engine.errors import EngineError, NotFoundError
from engine.host.removing import MovedMeanwhileError
from engine.storage.store import StoreFullError
from fsdriver.client import DaemonError, DaemonLostError
from fsdriver.launch import LaunchError
from mountctl import no_memory
from mountctl.failures import BUG, EXIT_CODES, ROWS, SYSTEM, describe


def all_errors() -> dict[str, type[EngineError]]:
    """Returns every class of error there is, by name."""
    for package in (engine, fsdriver, mountctl):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)

    def walk(cls: type[EngineError]) -> Iterator[type[EngineError]]:
        yield cls
        for below in cls.__subclasses__():
            yield from walk(below)

    ours = ("engine.", "fsdriver.", "mountctl.")
    found: dict[str, type[EngineError]] = {}
    for cls in walk(EngineError):
        if cls.__module__.startswith(ours):
            assert found.setdefault(cls.__name__, cls) is cls, "two classes of one name"
    return found


def test_every_error_has_a_row_and_every_row_an_error():
    assert set(ROWS) == set(all_errors())


def test_every_row_has_a_documented_code_and_a_hint():
    for name, row in ROWS.items():
        assert row.exit_code in EXIT_CODES, name
        assert row.exit_code not in {0, BUG}
        assert row.hint
        assert not row.hint.endswith(".")


def example(cls: type[EngineError]) -> EngineError:
    """Makes an error of a class as its annotations say, or as none of them says."""
    if cls.__init__ is Exception.__init__:
        return cls("a message")
    try:
        return cls(
            *[sample(each.annotation) for each in inspect.signature(cls).parameters.values()]
        )
    except (AttributeError, KeyError, TypeError, ValueError):  # it wants something special
        error = cls.__new__(cls)
        error.args = ("a message",)
        vars(error)["field"] = ["a", "field"]
        return error


def sample(kind: Any) -> object:
    text = getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else str(kind)
    if text.startswith("dict"):
        return {"pid": 7}
    one = b"\1" * 32 if "Id" in text or "bytes" in text else "text"
    if "[" in text:
        return [one, one]
    return 7 if text == "int" else one


def facts(error: BaseException) -> tuple[object, ...]:
    of_the_system = tuple(getattr(error, n, None) for n in ("errno", "strerror", "filename"))
    return type(error), str(error), error.args, vars(error), of_the_system


@pytest.mark.parametrize(
    "again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy]
)
def test_every_error_crosses_to_other_processes(again: Callable[[Any], Any]):
    for name, cls in all_errors().items():
        error = example(cls)
        error.add_note("a note")
        assert facts(again(error)) == facts(error), name
        group = ExceptionGroup("several", [error, ValueError("x")])
        assert facts(again(group).exceptions[0]) == facts(error), name


def test_an_error_of_the_host_crosses_to_other_processes():
    error = MovedMeanwhileError(b"/a/\xff")
    assert facts(pickle.loads(pickle.dumps(error))) == facts(error)


def test_an_error_of_the_daemon_is_what_it_was_there():
    here = describe(NotFoundError("session", "x"))
    assert describe(DaemonError("NotFoundError", str(NotFoundError("session", "x")))) == here
    full = StoreFullError("/store")
    there = describe(LaunchError("StoreFullError", str(full), "/log"))
    assert there == describe(full)


@pytest.mark.parametrize("error", [DaemonError, LaunchError])
def test_what_the_system_told_the_daemon_is_what_it_would_be_here(error):
    message = "[Errno 28] No space left on device: '/store/locks/mount'"
    told = error("OSError", message) if error is DaemonError else error("OSError", message, "/log")
    failure = describe(told)
    assert failure.exit_code == describe(OSError(errno.ENOSPC, "x")).exit_code == 8
    assert failure.message == "No space left on device: '/store/locks/mount'"
    assert "make room" in failure.hint


def test_stderr_that_cannot_be_written_changes_nothing(mountctl, tmp_path):
    (tmp_path / "tree").mkdir()
    for words, code in [(("import", tmp_path / "tree"), 0), (("snapshot", "show", "none"), 3)]:
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                mountctl.command(*words), env=mountctl.environment(), cwd=mountctl.home,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=full, check=False,
            )  # fmt: skip
        assert done.returncode == code


def test_an_error_of_the_daemon_that_has_no_row_points_to_its_log():
    failure = describe(LaunchError("RuntimeError", "it broke", "/store/log/mount.log"))
    assert failure.exit_code == 10
    assert failure.kind == "LaunchError"
    assert "/store/log/mount.log" in failure.hint
    assert describe(DaemonError("KeyError", "it broke")).exit_code == 10


def test_a_hint_may_name_fields():
    assert "process 4711" in describe(DaemonLostError(4711, "silence")).hint


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, 8),
        (errno.EDQUOT, 8),
        (errno.EACCES, 7),
        (errno.EROFS, 7),
        (errno.EIO, 9),
        (errno.ENOTCONN, 10),
        (errno.EMFILE, 11),
        (errno.EXDEV, 11),
    ],
)
def test_errors_of_the_operating_system(number, code):
    failure = describe(OSError(number, os.strerror(number), "/some/\x1bfile"))
    assert failure.exit_code == code
    assert failure.message == f'"/some/\\033file": {os.strerror(number)}'
    assert failure.hint


def _with_cause(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        ImportError("/x/backend.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        _with_cause(ValueError("no bytes"), MemoryError()),
        DaemonError("MemoryError", "the daemon has not enough memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_where_there_is_no_memory_it_is_said_and_is_no_bug(error: Exception):
    failure = describe(error)
    assert failure.exit_code == SYSTEM
    assert "memory" in failure.message + failure.hint
    assert "limit" in failure.hint


def test_a_module_that_is_not_there_and_an_error_of_a_library_are_bugs():
    assert describe(ImportError("no module named x")).exit_code == BUG
    assert describe(SystemError("returned NULL")).exit_code == BUG  # without a limit


def test_the_words_that_need_no_memory_are_those_of_every_error(capfd):
    expected = describe(MemoryError())
    no_memory.last_words(json=True)
    assert json.loads(capfd.readouterr().err)["error"] == expected._asdict()
    no_memory.last_words()
    assert capfd.readouterr().err == f"error: {expected.message}\nhint: {expected.hint}\n"


def test_an_unexpected_error_is_called_a_bug():
    failure = describe(ZeroDivisionError("division by zero"))
    assert failure.exit_code == BUG
    assert "ZeroDivisionError" in failure.message
    assert "report" in failure.hint


def test_an_unexpected_error_shows_where_it_struck(mountctl, monkeypatch):
    def strike(self: object) -> str:
        raise ZeroDivisionError("there")

    monkeypatch.setattr("mountctl.invocation.Invocation.store_path", property(strike))
    result = mountctl("status", code=BUG)
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("hint: ")


def test_no_other_codes_than_the_documented_are_used():
    folder = Path(mountctl.__file__).parent
    for file in folder.rglob("*.py"):
        assert ".exit(1" not in file.read_text(), file
