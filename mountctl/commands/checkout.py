"""`mountctl checkout`."""

import os

import click

from mountctl.command import Command, pass_invocation, snapshot_argument
from mountctl.invocation import Invocation
from mountctl.text import count, quoted, size


@click.command(
    "checkout",
    cls=Command,
    example="""
    $ mountctl checkout main /tmp/lua
    $ mountctl checkout @work /tmp/work
    """,
)
@snapshot_argument()
@click.argument("directory", metavar="DIR", type=click.Path(), help="A new or empty directory.")
@click.option("--outside-links", is_flag=True, help="Make links that lead out of the tree, too.")
@pass_invocation
def command(invocation: Invocation, snapshot: str, directory: str, outside_links: bool) -> None:
    """Write a snapshot out as a real directory.

    DIR appears when all of it is written, or not at all. A tree with a symbolic link that
    leads out of it is refused unless you allow it. @SESSION is written as it is now.
    """
    output = invocation.output
    with (
        invocation.open() as store,
        store.tree(snapshot) as root,
        output.progress("writing files") as progress,
    ):
        report = store.repository.check_out(
            root, directory, outside_links=outside_links, progress=progress
        )
    path = os.path.abspath(directory)
    if output.json:
        output.result({"directory": path, "entries": report.entries, "bytes": report.bytes})
        return
    output.line(quoted(path))
    output.note(f"wrote {count(report.entries, 'entry')}, {size(report.bytes)}")
