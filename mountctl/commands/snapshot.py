"""`mountctl snapshot`."""

import click

from mountctl.command import Group, pass_invocation, snapshot_argument
from mountctl.invocation import Invocation
from mountctl.text import short


@click.group(
    "snapshot",
    cls=Group,
    example="""
    $ mountctl snapshot list
    $ mountctl snapshot show main
    """,
)
def command() -> None:
    """List, show and remove snapshots."""


@command.command("list", example="$ mountctl snapshot list --json | jq -r '.[].snapshot'")
@pass_invocation
def list_snapshots(invocation: Invocation) -> None:
    """List all snapshots, latest first."""
    from mountctl.records import Names, show_snapshots, snapshot_fields

    output = invocation.output
    with invocation.open() as store:
        repository = store.repository
        names = Names(repository)
        records = [(each, repository.snapshot(each)) for each in repository.snapshots()]
        records.sort(key=lambda record: record[1].time_ns, reverse=True)
        if output.json:
            output.result([snapshot_fields(names, *record) for record in records])
            return
        show_snapshots(output, names, records)
        if not records:
            output.note("there are no snapshots yet: `mountctl import DIR` makes one")


@command.command("show", example="$ mountctl snapshot show main")
@snapshot_argument()
@pass_invocation
def show(invocation: Invocation, snapshot: str) -> None:
    """Show all that a snapshot's record says."""
    from mountctl.records import Names, show_snapshot, snapshot_fields

    output = invocation.output
    with invocation.open() as store:
        identifier = store.resolve(snapshot)
        record = store.repository.snapshot(identifier)
        names = Names(store.repository)
        if output.json:
            output.result(snapshot_fields(names, identifier, record))
        else:
            show_snapshot(output, names, identifier, record)


@command.command("rm", example="$ mountctl snapshot rm 4f1a && mountctl gc")
@snapshot_argument()
@pass_invocation
def remove(invocation: Invocation, snapshot: str) -> None:
    """Remove a snapshot that no ref names and no session stands on.

    What only it had goes with the next `mountctl gc`.
    """
    output = invocation.output
    with invocation.open() as store:
        identifier = store.resolve(snapshot)
        store.repository.remove_snapshot(identifier)
        store.refresh()
    if output.json:
        output.result({"removed": identifier})
    else:
        output.note(f"removed snapshot {short(identifier)}; `mountctl gc` frees its room")
