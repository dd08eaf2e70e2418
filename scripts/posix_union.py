"""Mounts a session for unionmount-testsuite: what mount(8) calls by way of mount.fuse.

    posix_union.py DIR plain|- SOURCE MOUNTPOINT -o OPTIONS...

`lowerdir` is imported as the session's base, and what the suite has put into `upperdir`
beforehand is written into the session. The session is bound to MOUNTPOINT. Mounted again with
the same `workdir`, the session is the one that it was. Stores and mounts are made in DIR.
"""

import glob
import os
import shutil
import sys

from fsdriver.launch import wait_until_ended
from fsdriver.mountpoint import mounts, unmount
from scripts.bench_setting import mountctl, run
from scripts.posix_setting import mount


def main(arguments: list[str]) -> None:
    """Mounts."""
    folder, plain, _, mountpoint, *rest = arguments
    given = ",".join(word for word in rest if not word.startswith("-"))
    options = dict(option.partition("=")[::2] for option in given.split(","))
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
        wait_until_ended(store, 10)
    mount(store, at, plain=plain == "plain")
    session = os.path.join(at, "sessions", "union")
    if fresh:
        for name in os.listdir(options["upperdir"]):
            shutil.copy2(os.path.join(options["upperdir"], name), os.path.join(session, name))
    run("mount", "--bind", session, mountpoint)


if __name__ == "__main__":
    main(sys.argv[1:])
