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
    $ mountctl log --graph main try-1
    """,
)
@snapshot_argument(
    "snapshots", nargs=-1, metavar="[SNAPSHOT]...",
    help="Where to begin; else ref main, else the newest. Several with --graph only.",
)  # fmt: skip
@click.option(
    "-n", "--limit", "most", type=click.IntRange(min=1), metavar="N", help="Show at most N."
)
@click.option("--graph", is_flag=True, help="Draw how they came from each other.")
@click.option("--all", "everything", is_flag=True, help="Begin at all snapshots; with --graph.")
@pass_invocation
def command(
    invocation: Invocation,
    snapshots: tuple[str, ...],
    most: int | None,
    graph: bool,
    everything: bool,
) -> None:
    """Show a snapshot and those it came from.

    Latest first, each once. Parents that were removed are left out. With --graph, each stands
    above all its parents, whatever their times say, and the lines lead from it to them.
    """
    from mountctl.records import Names, show_graph, show_snapshots, snapshot_fields

    if not graph and (everything or len(snapshots) > 1):
        raise click.UsageError("several snapshots and --all are for --graph")
    if everything and snapshots:
        raise click.UsageError("--all and SNAPSHOT exclude each other")
    output = invocation.output
    with invocation.open() as store:
        repository = store.repository
        starts = [store.resolve(snapshot) for snapshot in snapshots]
        if everything:
            starts = repository.snapshots()
        elif not starts and "main" in repository.refs():
            starts = [repository.resolve("main")]
        elif not starts:
            found = repository.snapshots()
            starts = sorted(found, key=lambda each: repository.snapshot(each).time_ns)[-1:]
        if not starts:
            if output.json:
                output.result([])
            output.note("there are no snapshots yet: `mountctl import DIR` makes one")
            return
        names = Names(repository)
        history = repository.history()
        records = itertools.islice(
            repository.graph_log(history, *starts) if graph else repository.log(starts[0]), most
        )
        if output.json:
            output.result([snapshot_fields(names, *record) for record in records])
        elif graph:
            show_graph(output, names, history, records)
        else:
            show_snapshots(output, names, records)
