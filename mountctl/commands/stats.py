"""`mountctl stats`."""

from typing import Any

import click
import msgspec

from mountctl.command import SNAPSHOT, Command, pass_invocation
from mountctl.invocation import Invocation
from mountctl.text import count, short, size, visible


@click.command(
    "stats",
    cls=Command,
    example="""
    $ mountctl stats
    $ mountctl stats main 4f1a
    $ mountctl stats --json | jq .total.stored
    """,
)
@click.argument(
    "snapshots",
    nargs=-1,
    type=SNAPSHOT,
    metavar="[SNAPSHOT]...",
    help="Which ones; else the whole store.",
)
@pass_invocation
def command(invocation: Invocation, snapshots: tuple[str, ...]) -> None:
    """Show how many bytes trees have and take.

    Logical bytes are what files add up to; unique ones each chunk once; stored ones as packed,
    with the nodes. A snapshot's own bytes are what would go with it; the rest it shares.
    """
    from engine.storage.codec import name_compression

    output = invocation.output
    with invocation.open() as store, output.progress("counting", "objects") as progress:
        repository = store.repository
        chosen = list(dict.fromkeys(repository.resolve(name) for name in snapshots))
        usage = repository.usage(chosen, progress)
        compression = name_compression(repository.compression())
    if output.json:
        fields: dict[str, Any] = msgspec.to_builtins(usage)
        fields["compression"] = compression
        if chosen:
            names = {identifier.hex() for identifier in chosen}
            fields["trees"] = [
                tree for tree in fields["trees"]
                if tree["kind"] == "snapshot" and tree["name"] in names
            ]  # fmt: skip
        output.result(fields)
        return
    if chosen:
        by_name = {tree.name: tree for tree in usage.trees if tree.kind == "snapshot"}
        rows = []
        for identifier in chosen:
            tree = by_name[identifier.hex()]
            whole = tree.all or tree.own
            rows.append((
                output.style(short(identifier), "yellow"), f"{tree.entries:,}", size(tree.logical),
                size(whole.unique), size(whole.stored), size(tree.own.stored),
                size(whole.stored - tree.own.stored),
            ))  # fmt: skip
        output.table(("SNAPSHOT", "ENTRIES", "LOGICAL", "UNIQUE", "STORED", "OWN", "SHARED"), rows)
        return
    kinds = [tree.kind for tree in usage.trees]
    trees = ", ".join(count(kinds.count(kind), kind) for kind in dict.fromkeys(kinds))
    output.facts([
        ("trees", visible(trees) or "-"),
        ("logical", size(usage.logical)),
        ("unique", f"{size(usage.total.unique)} in {count(usage.total.chunks, 'chunk')}"),
        ("stored", f"{size(usage.total.stored)}, with {count(usage.total.nodes, 'node')}"),
        ("shared", f"{size(usage.shared.stored)} stored for more than one tree"),
        ("unreferenced", f"{count(usage.unreferenced, 'object')}, for `mountctl gc`"),
        ("file", f"{size(usage.file_bytes)}, of which {size(usage.free_bytes)} are free"),
        ("compression", compression),
    ])  # fmt: skip
