"""`mountctl init`."""

import click

from mountctl.command import Command, completing, pass_invocation
from mountctl.invocation import Invocation
from mountctl.text import quoted


@click.command(
    "init",
    cls=Command,
    example="""
    $ mountctl init
    $ mountctl init --store /srv/trees --compression zstd:9
    """,
)
@click.option(
    "--compression", default="zstd:3", show_default=True, metavar="HOW",
    shell_complete=completing("compressions"),
    help="How chunks are packed: zstd:1 to zstd:19, or off.",
)  # fmt: skip
@click.option(
    "--owners", is_flag=True,
    help="Keep whose files are: snapshots then have the numbers of users and groups.",
)  # fmt: skip
@pass_invocation
def command(invocation: Invocation, compression: str, owners: bool) -> None:
    """Make an empty store.

    It is made where the other commands look for it: at --store, $AMALGAMFS_STORE, or in the
    XDG data directory.
    """
    from engine.repository import Repository
    from engine.storage.codec import parse_compression

    path, output = invocation.store_path, invocation.output
    level = parse_compression(compression)
    with Repository.create(path, trusted=invocation.trusts(path)) as repository:
        if level != repository.compression():
            repository.set_compression(level)
        if owners:
            repository.keep_owners()
    if output.json:
        output.result({"store": path, "owners": owners})
        return
    output.line(quoted(path))
    output.note("made an empty store; next: `mountctl import DIR --ref main`")
