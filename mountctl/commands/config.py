"""`mountctl config`."""

import click

from mountctl.command import Command, completing, pass_invocation
from mountctl.invocation import Invocation


@click.command(
    "config",
    cls=Command,
    example="""
    $ mountctl config
    $ mountctl config compression zstd:9
    """,
)
@click.argument("setting", required=False, type=click.Choice(["compression"]),
                metavar="[SETTING]", help="What to show or to set: compression.")  # fmt: skip
@click.argument(
    "value",
    required=False,
    shell_complete=completing("compressions"),
    help="`off`, or `zstd:1` to `zstd:19`.",
)
@pass_invocation
def command(invocation: Invocation, setting: str | None, value: str | None) -> None:
    """Show or change a store's settings.

    `compression` is how new chunks are packed where it saves an eighth; those that are there
    stay as they are, and all can be read.
    """
    from engine.storage.codec import name_compression, parse_compression

    level = None if value is None else parse_compression(value)
    with invocation.open() as store:
        if level is not None:
            store.repository.set_compression(level)
        compression = name_compression(store.repository.compression())
    if invocation.output.json:
        invocation.output.result({"compression": compression})
    elif setting is None:
        invocation.output.facts([("compression", compression)])
    else:
        invocation.output.line(compression)
