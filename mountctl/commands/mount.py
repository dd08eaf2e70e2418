"""`mountctl mount`."""

import os

import click

from mountctl.command import DIRECTORY, DURATION, SHARE, Command, pass_invocation
from mountctl.invocation import Invocation
from mountctl.text import quoted


@click.command(
    "mount",
    cls=Command,
    example="""
    $ mkdir ~/mnt
    $ mountctl mount ~/mnt
    $ ls ~/mnt/snapshots/main ~/mnt/sessions
    """,
)
@click.argument("mountpoint", type=DIRECTORY, help="An empty directory.")
@click.option("--foreground", is_flag=True, help="Stay, and log to the terminal, until Ctrl-C.")
@click.option("--allow-other", is_flag=True, help="Let other users in (see fuse.conf(5)).")
@click.option("--suid", is_flag=True, help="Let set-user-ID and set-group-ID bits work; root only.")
@click.option("--dev", is_flag=True, help="Let device nodes work; root only.")
@click.option("--plain", is_flag=True, help="Let pyfuse3 have the device; slower, see the docs.")
@click.option(
    "--log", type=click.Path(), metavar="FILE",
    help="Where the daemon logs; else log/mount.log in the store.",
)  # fmt: skip
@click.option(
    "--gc-every", type=DURATION, default="24h", show_default=True, metavar="TIME",
    help="Collect garbage so often, when the mount is idle: 30m, 24h, 7d, or off.",
)  # fmt: skip
@click.option(
    "--gc-below", type=SHARE, default="5%", show_default=True, metavar="SHARE",
    help="Collect garbage when less of the disk is free: 5%, or off.",
)  # fmt: skip
@pass_invocation
def command(
    invocation: Invocation,
    mountpoint: str,
    foreground: bool,
    allow_other: bool,
    suid: bool,
    dev: bool,
    plain: bool,
    log: str | None,
    gc_every: float,
    gc_below: float,
) -> None:
    """Show the store as a filesystem.

    Returns once the mount is there; a daemon serves it until `mountctl umount`. Snapshots are
    in snapshots/ by id and ref, sessions to work in are in sessions/. A mount that a killed
    daemon left is removed first.

    Set-id bits and device nodes have no effect in a mount, unless root asks for them: a program
    with such a bit would run as whoever mounts, whoever wrote it.
    """
    from fsdriver.launch import default_log, is_below
    from mountctl import mounts

    output = invocation.output
    if (suid or dev) and os.geteuid() != 0:
        raise click.UsageError("--suid and --dev are for root; fusermount3 lets nobody else")
    store = invocation.store_path
    prepared = mounts.prepare(store, mountpoint, output, trusted=invocation.trusts(store))
    if log is not None:
        log = os.path.abspath(log)
        if is_below(prepared.mountpoint, log):
            raise click.UsageError(
                "--log is below the mount point, where the daemon would wait for itself; "
                "name a file elsewhere"
            )
    service = mounts.Service(allow_other, suid, dev, plain, gc_every, gc_below)
    if foreground:
        mounts.become_daemon(prepared, service, log)
    pid = mounts.start(prepared, service, log, output)
    if output.json:
        output.result(
            {
                "mountpoint": prepared.mountpoint,
                "store": prepared.store,
                "pid": pid,
                "log": log or default_log(prepared.store),
            }
        )
        return
    output.line(quoted(prepared.mountpoint))
    output.note("snapshots/ has every snapshot, sessions/ the trees to work in")
    output.note("end it with `mountctl umount`")
