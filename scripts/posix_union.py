"""Mounts a session for unionmount-testsuite: what mount(8) calls by way of mount.fuse.

    posix_union.py DIR SIDE SOURCE MOUNTPOINT -o OPTIONS...

`lowerdir` is imported as the session's base, and what the suite has put into `upperdir`
beforehand is written into the session. The session is bound to MOUNTPOINT. Mounted again with
the same `workdir`, the session is the one that it was. Stores and mounts are made in DIR.

    posix_union.py hold SOCKET

is the command of `mountctl run` in the side of that name: it sends what it sees as the session
over a socket, because another mount namespace cannot bind it, and keeps it until it is ended.
"""

import ctypes
import glob
import os
import select
import shutil
import signal
import socket
import subprocess
import sys

from fsdriver.launch import wait_until_ended
from fsdriver.mountpoint import mounts, unmount
from scripts.bench_setting import PROGRAM, CannotError, mountctl, run
from scripts.posix_setting import mount

_OPEN_TREE, _MOVE_MOUNT = 428, 429
_AT_FDCWD, _OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = -100, 1, 4


def main(arguments: list[str]) -> None:
    """Mounts."""
    folder, side, _, mountpoint, *rest = arguments
    given = ",".join(word.removeprefix("-o") for word in rest)
    options = dict(option.partition("=")[::2] for option in given.split(","))
    end_holder(folder)
    for old in reversed(mounts()):
        if old.path.startswith(os.path.join(folder, "at-")):
            unmount(old.path)  # not `mountctl umount`: the next mount need not wait for the end
    seen = os.path.join(options["workdir"], "mounted")
    fresh = not os.path.lexists(seen)
    if fresh:
        os.symlink(str(len(glob.glob(os.path.join(folder, "store-*")))), seen)
    number = os.readlink(seen)
    store, at = os.path.join(folder, f"store-{number}"), os.path.join(folder, f"at-{number}")
    if fresh:
        os.mkdir(at)
        mountctl(store, "init")
        mountctl(store, "import", options["lowerdir"], "--ref", "main")
        mountctl(store, "session", "create", "union", "main")
    else:
        wait_until_ended(store, 60)
    mount(store, at, plain=side == "plain")
    session = os.path.join(at, "sessions", "union")
    if fresh:
        for name in os.listdir(options["upperdir"]):
            shutil.copy2(os.path.join(options["upperdir"], name), os.path.join(session, name))
    if side == "run":
        bind_of_run(folder, store, mountpoint)
    else:
        run("mount", "--bind", session, mountpoint)


def bind_of_run(folder: str, store: str, mountpoint: str) -> None:
    """Binds the session as `mountctl run` shows it, which goes on until `end_holder`."""
    ours, theirs = socket.socketpair()
    number = theirs.fileno()
    holder = subprocess.Popen(
        [PROGRAM, "--store", store, "run", "--mode", "overlay", "union", "--",
         sys.executable, "-P", "-m", "scripts.posix_union", "hold", str(number)],
        cwd="/", stdin=subprocess.DEVNULL, pass_fds=[number], start_new_session=True,
    )  # fmt: skip
    with open(os.path.join(folder, "holder"), "w", encoding="ascii") as file:
        file.write(str(holder.pid))
    holder.returncode = 0  # it outlives us: nobody waits for it
    theirs.close()
    _, sent, _, _ = socket.recv_fds(ours, 1, 1)
    if not sent:
        raise CannotError("mountctl run has ended, as it says above")
    place = os.fsencode(mountpoint)
    _system_call(_MOVE_MOUNT, sent[0], b"", _AT_FDCWD, place, _MOVE_MOUNT_F_EMPTY_PATH)


def hold(number: int) -> None:
    """Sends the mount that is the working directory over a socket, and waits to be ended."""
    tree = _system_call(_OPEN_TREE, _AT_FDCWD, b".", _OPEN_TREE_CLONE | os.O_CLOEXEC)
    with socket.socket(fileno=number) as to:
        socket.send_fds(to, [b"."], [tree])
    os.close(tree)
    signal.pause()


def end_holder(folder: str) -> None:
    """Ends the `mountctl run` that holds a session, if one does."""
    try:
        with open(os.path.join(folder, "holder"), encoding="ascii") as file:
            pid = int(file.read())
    except FileNotFoundError:
        return
    os.unlink(file.name)
    handle = os.pidfd_open(pid)
    signal.pidfd_send_signal(handle, signal.SIGTERM)
    if not select.select([handle], [], [], 30)[0]:
        raise CannotError("mountctl run does not end")


def _system_call(*arguments: object) -> int:
    result = int(ctypes.CDLL(None, use_errno=True).syscall(*arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


if __name__ == "__main__":
    if sys.argv[1] == "hold":
        hold(int(sys.argv[2]))
    else:
        main(sys.argv[1:])
