"""`mountctl umount`."""

import click

from mountctl.command import DIRECTORY, Command, pass_invocation
from mountctl.invocation import Invocation
from mountctl.text import quoted


@click.command(
    "umount",
    cls=Command,
    example="""
    $ mountctl umount
    $ mountctl umount ~/mnt
    $ mountctl umount --force
    """,
)
@click.argument("mountpoint", required=False, type=DIRECTORY, help="Where; else the store's.")
@click.option(
    "--force", is_flag=True,
    help="End it though it is in use, and though its daemon does not answer.",
)  # fmt: skip
@pass_invocation
def command(invocation: Invocation, mountpoint: str | None, force: bool) -> None:
    """End a mount.

    Returns when it is gone and its daemon has ended. Sessions keep what was written. A mount
    that a killed daemon left is removed, too.

    --force asks the daemon to end, then tells it to (SIGTERM), then cuts its mount off, and at
    last kills it, each step if the one before did not help within seconds; it says on stderr
    which. Programs that have files open in the mount get errors.
    """
    from mountctl import mounts

    output = invocation.output
    path = mounts.end(invocation.store_path, mountpoint, output, force=force)
    if output.json:
        output.result({"mountpoint": path})
        return
    output.line(quoted(path))
    output.note("unmounted")
