"""Mounts a session for unionmount-testsuite: what mount(8) calls by way of mount.fuse.

    posix_union.py STORE AT plain|- SOURCE MOUNTPOINT -o OPTIONS...

`lowerdir` is imported as the session's base, and what the suite has put into `upperdir`
beforehand is written into the session. The session is bound to MOUNTPOINT. Mounted again with
the same `workdir`, the session is the one that it was.
"""

import os
import shutil
import sys

from fsdriver.launch import wait_until_ended
from scripts.bench_setting import mountctl, run
from scripts.posix_setting import mount


def main(arguments: list[str]) -> None:
    """Mounts."""
    store, at, plain, _, mountpoint, *rest = arguments
    given = ",".join(word for word in rest if not word.startswith("-"))
    options = dict(option.partition("=")[::2] for option in given.split(","))
    if os.path.ismount(at):
        mountctl(store, "umount", patient=True)
        wait_until_ended(store, 10)
    seen = os.path.join(options["workdir"], "mounted")
    fresh = not os.path.exists(seen)
    if fresh:
        shutil.rmtree(store, ignore_errors=True)
        mountctl(store, "init")
        mountctl(store, "import", options["lowerdir"], "--ref", "main")
        mountctl(store, "session", "create", "union", "main")
        os.mkdir(seen)
    os.makedirs(at, exist_ok=True)
    mount(store, at, plain=plain == "plain")
    session = os.path.join(at, "sessions", "union")
    if fresh:
        for name in os.listdir(options["upperdir"]):
            shutil.copy2(os.path.join(options["upperdir"], name), os.path.join(session, name))
    run("mount", "--bind", session, mountpoint)


if __name__ == "__main__":
    main(sys.argv[1:])
