"""`mountctl init`."""

import click

from mountctl.command import Command, pass_invocation
from mountctl.invocation import Invocation
from mountctl.text import quoted


@click.command(
    "init",
    cls=Command,
    example="""
    $ mountctl init
    $ mountctl init --store /srv/trees
    """,
)
@pass_invocation
def command(invocation: Invocation) -> None:
    """Make an empty store.

    It is made where the other commands look for it: at --store, $AMALGAMFS_STORE, or in the
    XDG data directory.
    """
    from engine.repository import Repository

    path, output = invocation.store_path, invocation.output
    Repository.create(path).close()
    if output.json:
        output.result({"store": path})
        return
    output.line(quoted(path))
    output.note("made an empty store; next: `mountctl import DIR --ref main`")
