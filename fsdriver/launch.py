"""Starts a mount's daemon and waits until it serves. Light; imports neither trio nor pyfuse3.

The daemon is a fresh interpreter in a session of its own, because a process with an open LMDB
environment or threads must not fork. It tells through a pipe that it serves, or why not.
"""

import errno
import json
import os
import select
import signal
import stat
import subprocess
import sys
import time
from typing import Any

from engine.errors import EngineError
from engine.host.leases import is_held
from engine.host.own_files import open_own, own_folder
from engine.storage.store import StoreError
from fsdriver.apart import is_inside

DEVICE = "/dev/fuse"
_FUSE = os.makedev(10, 229)
"""Its number, in the kernel's Documentation/admin-guide/devices.txt."""
START_SECONDS = 120.0
"""A disk that others keep busy has kept one waiting for 30 seconds."""
END_SECONDS = 30.0
"""How long a daemon that has not started may take to end; killed, it may leave a dead mount."""
KILLED_SECONDS = 5.0
"""How long a killed one is waited for."""


class LaunchError(EngineError):
    """The daemon could not serve. `kind` is the class of the error there."""

    def __init__(self, kind: str, message: str, log: str) -> None:
        super().__init__(message)
        self.kind, self.log = kind, log


def default_log(store_path: str) -> str:
    """Returns where a store's daemon logs."""
    return os.path.join(store_path, "log", "mount.log")


def open_log(path: str, store_path: str | None = None) -> int:
    """Opens a log to append to, and makes it and its directory if need be. Raises OSError.

    A pipe is not waited for. The log that a store has by default is one of its own files: raises
    StrangeFileError for what somebody has put there in its place.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
    if store_path is not None and path == default_log(store_path):
        own_folder(store_path, "log")
        return open_own(store_path, os.path.relpath(path, store_path), flags)
    os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
    return os.open(path, flags, 0o600)


def daemon_command(
    store_path: str,
    mountpoint: str,
    *,
    allow_other: bool = False,
    suid: bool = False,
    dev: bool = False,
    plain: bool = False,
    gc_every: float = 0.0,
    gc_below: float = 0.0,
) -> list[str]:
    """Returns the command that serves a checked mount point, in the foreground.

    It collects garbage every `gc_every` seconds, and when less than the share `gc_below` of the
    disk is free; 0 is never. Set-id bits and device nodes work there only with `suid` and `dev`.
    """
    # -P: what lies in the directory where it starts is no module of ours.
    command = [sys.executable, "-P", "-m", "fsdriver.daemon", store_path, mountpoint]
    if allow_other:
        command.append("--allow-other")
    if suid:
        command.append("--suid")
    if dev:
        command.append("--dev")
    if plain:
        command.append("--plain")
    if gc_every:
        command += ["--gc-every", str(gc_every)]
    if gc_below:
        command += ["--gc-below", str(gc_below)]
    return command


def is_below(mountpoint: str, path: str) -> bool:
    """Tells whether a path leads to what a mount point covers. Asked before it is mounted."""
    return is_inside(os.path.realpath(mountpoint), os.path.realpath(path))


def launch(
    store_path: str,
    mountpoint: str,
    *,
    allow_other: bool = False,
    suid: bool = False,
    dev: bool = False,
    plain: bool = False,
    log: str | None = None,
    life: int | None = None,
    gc_every: float = 0.0,
    gc_below: float = 0.0,
) -> int:
    """Starts a daemon for a checked mount point and returns its process id once it serves.

    With `life`, the reading end of a pipe, the mount ends when the other end is closed by all
    who have it, and the mount point is removed. Raises LaunchError; nothing is left running then.
    """
    _check_device(log or default_log(store_path))
    no_log = why_no_log(store_path, log)
    log = log or default_log(store_path)
    output = os.memfd_create("errors", os.MFD_CLOEXEC)  # until it has opened its log
    ready, told = os.pipe2(os.O_CLOEXEC)
    command = daemon_command(
        store_path, mountpoint,
        allow_other=allow_other, suid=suid, dev=dev, plain=plain,
        gc_every=gc_every, gc_below=gc_below,
    )  # fmt: skip
    command += ["--ready-fd", str(told), "--log", log]
    if life is not None:
        command += ["--life-fd", str(life)]
    try:
        daemon = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=output,
            pass_fds=(told,) if life is None else (told, life), start_new_session=True, cwd="/",
        )  # fmt: skip
    except BaseException:
        os.close(output)
        raise
    finally:
        os.close(told)
    try:
        answer = _wait(ready)
        answer.setdefault("message", _last_words(output))
    finally:
        os.close(ready)
        os.close(output)
    if "pid" in answer:
        daemon.returncode = 0  # it outlives us: nobody waits for it
        return int(answer["pid"])
    daemon.send_signal(signal.SIGTERM)
    try:
        daemon.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        daemon.kill()
        try:
            daemon.wait(KILLED_SECONDS)
        except subprocess.TimeoutExpired:
            daemon.returncode = -signal.SIGKILL  # it waits in the kernel; its lease tells
    where = f"none ({no_log})" if no_log else log
    raise LaunchError(str(answer.get("kind", "")), str(answer["message"]), where)


def why_no_log(store_path: str, log: str | None) -> str:
    """Returns why nothing can be logged for now; empty if it can.

    That fails no mount: the daemon writes once it can. Raises StoreError where a log that was
    asked for can never be.
    """
    try:
        os.close(open_log(log or default_log(store_path), store_path))
    except OSError as error:
        if log is not None and error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise StoreError(
                store_path, f"cannot write the log {log!r}: {error.strerror}"
            ) from error
        return error.strerror or str(error)
    return ""


def _last_words(output: int) -> str:
    """Returns why a daemon ended that did not tell."""
    text = os.pread(output, 1 << 16, 0).decode("utf-8", "replace").strip()
    return "the daemon ended at once" + (f": {text.splitlines()[-1]}" if text else "")


def _check_device(log: str) -> None:
    """Raises LaunchError where there can be no mount; a daemon would have to start to find out."""
    why = ""
    try:
        found = os.stat(DEVICE)
        if not stat.S_ISCHR(found.st_mode) or found.st_rdev != _FUSE:
            why = f"{DEVICE} is another device"
        elif os.geteuid() == 0:  # else fusermount3 opens it
            os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        why = f"cannot open {DEVICE}: {error.strerror}"
    if why:
        raise LaunchError("MountRefusedError", why, log)


def _wait(ready: int) -> dict[str, Any]:
    text = b""
    deadline = time.monotonic() + START_SECONDS
    while not text.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([ready], [], [], left)[0]:
            return {"message": f"the daemon was not ready after {START_SECONDS:.0f} seconds"}
        part = os.read(ready, 65536)
        if not part:
            break
        text += part
    try:
        answer = json.loads(text or b"{}")
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def wait_until_ended(store_path: str, seconds: float) -> bool:
    """Waits until no daemon serves the store; False if one still does after `seconds`."""
    deadline = time.monotonic() + seconds
    while is_held(store_path, "mount"):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
