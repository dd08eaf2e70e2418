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
    """,
)
@click.argument("mountpoint", required=False, type=DIRECTORY, help="Where; else the store's.")
@pass_invocation
def command(invocation: Invocation, mountpoint: str | None) -> None:
    """End a mount.

    Returns when it is gone and its daemon has ended. Sessions keep what was written. A mount
    that a killed daemon left is removed, too.
    """
    from mountctl import mounts

    output = invocation.output
    path = mounts.end(invocation.store_path, mountpoint, output)
    if output.json:
        output.result({"mountpoint": path})
        return
    output.line(quoted(path))
    output.note("unmounted")
