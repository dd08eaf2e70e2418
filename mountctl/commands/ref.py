"""`mountctl ref`."""

import click

from mountctl.command import REF, Group, pass_invocation, snapshot_argument
from mountctl.invocation import Invocation
from mountctl.moved_refs import RefBefore
from mountctl.text import short, visible


@click.group(
    "ref",
    cls=Group,
    example="""
    $ mountctl ref set v1 4f1a
    $ mountctl ref list
    """,
)
def command() -> None:
    """Names for snapshots.

    A ref stands wherever a snapshot is asked for, and is a link in the mount's snapshots/.
    """


@command.command("list", example="$ mountctl ref list")
@pass_invocation
def list_refs(invocation: Invocation) -> None:
    """List all refs and what they name."""
    output = invocation.output
    with invocation.open() as store:
        refs = store.repository.refs()
    if output.json:
        output.result([{"ref": name, "snapshot": target} for name, target in refs.items()])
        return
    output.table(
        ("REF", "SNAPSHOT"),
        [
            (output.style(visible(name), "green"), output.style(short(target), "yellow"))
            for name, target in refs.items()
        ],
    )
    if not refs:
        output.note("there are no refs: `mountctl ref set NAME SNAPSHOT` makes one")


@command.command("set", example="$ mountctl ref set main 4f1a")
@click.argument("name", type=REF, help="The ref's name.")
@snapshot_argument()
@pass_invocation
def set_ref(invocation: Invocation, name: str, snapshot: str) -> None:
    """Make a ref, or move it to another snapshot."""
    output = invocation.output
    with invocation.open() as store:
        target = store.resolve(snapshot)
        before = RefBefore(store, name)
        store.repository.set_ref(name, target)
        store.refresh()
    if output.json:
        output.result({"ref": name, "snapshot": target, "was": before.target})
    else:
        output.note(f"{name} names snapshot {short(target)}")
        before.tell(output, target)


@command.command("rm", example="$ mountctl ref rm v1")
@click.argument("name", type=REF, help="The ref's name.")
@pass_invocation
def remove_ref(invocation: Invocation, name: str) -> None:
    """Remove a ref; the snapshot stays."""
    output = invocation.output
    with invocation.open() as store:
        before = RefBefore(store, name)
        store.repository.remove_ref(name)
        store.refresh()
    if output.json:
        output.result({"removed": name, "was": before.target})
    else:
        output.note(f"removed ref {name}; its snapshot stays")
        before.tell(output, None)
