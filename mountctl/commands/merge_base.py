"""`mountctl merge-base`."""

import click

from mountctl.command import Command, pass_invocation, snapshot_argument
from mountctl.failures import FOUND
from mountctl.invocation import Invocation


@click.command(
    "merge-base",
    cls=Command,
    example="""
    $ mountctl diff $(mountctl merge-base main try-1) try-1
    $ mountctl merge-base --is-ancestor v1 main && echo "main has v1"
    """,
)
@snapshot_argument("one", help="A snapshot: an id, the beginning of one, a ref, or @SESSION.")
@snapshot_argument("other", help="Another one.")
@click.option("--all", "everything", is_flag=True, help="Write all, where there are several.")
@click.option(
    "--is-ancestor", is_flag=True, help="Write nothing; end with 1 unless OTHER came from ONE."
)
@click.pass_context
@pass_invocation
def command(
    invocation: Invocation,
    context: click.Context,
    one: str,
    other: str,
    everything: bool,
    is_ancestor: bool,
) -> None:
    """Show the snapshot that two others both came from.

    Of all common ancestors the best: none that another one came from. Ends with exit code 1 if
    there is none. Where lines were merged crosswise there are several; the latest is first.
    """
    output = invocation.output
    with invocation.open() as store:
        asked = store.resolve(one), store.resolve(other)
        history = store.repository.history()
        if is_ancestor:
            found = history.is_ancestor(*asked)
            if output.json:
                output.result({"is_ancestor": found})
            if not found:
                context.exit(FOUND)
            return
        bases = history.merge_bases(*asked)
    if history.missing:
        output.note("snapshots on the way were removed; what came before them is not known")
    if output.json:
        output.result({"merge_bases": bases})
    else:
        for base in bases if everything else bases[:1]:
            output.line(base.hex())
    if not bases:
        context.exit(FOUND)
