"""`mountctl log`."""

import itertools

import click

from mountctl.command import Command, pass_invocation, snapshot_argument
from mountctl.invocation import Invocation


@click.command(
    "log",
    cls=Command,
    example="""
    $ mountctl log
    $ mountctl log @work -n 5
    """,
)
@snapshot_argument(required=False, help="Where to begin; else ref main, else the newest.")
@click.option("-n", "most", type=click.IntRange(min=1), metavar="N", help="Show at most N.")
@pass_invocation
def command(invocation: Invocation, snapshot: str | None, most: int | None) -> None:
    """Show a snapshot and those it came from.

    Latest first, each once. Parents that were removed are left out.
    """
    from mountctl.records import Names, show_snapshots, snapshot_fields

    output = invocation.output
    with invocation.open() as store:
        repository = store.repository
        if snapshot is not None:
            start = store.resolve(snapshot)
        elif "main" in repository.refs():
            start = repository.resolve("main")
        else:
            found = repository.snapshots()
            if not found:
                if output.json:
                    output.result([])
                output.note("there are no snapshots yet: `mountctl import DIR` makes one")
                return
            start = max(found, key=lambda each: repository.snapshot(each).time_ns)
        names = Names(repository)
        records = itertools.islice(repository.log(start), most)
        if output.json:
            output.result([snapshot_fields(names, *record) for record in records])
        else:
            show_snapshots(output, names, records)
