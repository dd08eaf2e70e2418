"""`mountctl top`."""

import time
from typing import TYPE_CHECKING, Any

import click

from mountctl.command import Command, pass_invocation
from mountctl.invocation import Invocation
from mountctl.text import count, size

if TYPE_CHECKING:
    from fsdriver.client import Client
    from fsdriver.messages import Statistics
    from mountctl.output import Output

ANSWER_SECONDS = 10.0


@click.command(
    "top",
    cls=Command,
    example="""
    $ mountctl top
    $ mountctl top --interval 5 --times 1
    """,
)
@click.option(
    "--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True,
    metavar="SECONDS", help="How long to watch for each picture.",
)  # fmt: skip
@click.option(
    "--times", type=click.IntRange(1), metavar="N", help="End after N pictures; else on Ctrl-C."
)
@pass_invocation
def command(invocation: Invocation, interval: float, times: int | None) -> None:
    """Show what a mount is doing.

    Operations per second with how long they take inside the daemon, the kernel's requests, caches,
    memory. The same numbers since the mount began are in `.amalgam/metrics` of the mount, for
    Prometheus. With --json, one object a line for each picture.
    """
    from engine.storage.ownership import check_owner
    from fsdriver.client import find_daemon
    from mountctl.mounts import NotMountedError

    output = invocation.output
    store = invocation.store_path
    check_owner(store, trusted=invocation.trusts(store))
    client = find_daemon(store, ANSWER_SECONDS)
    if client is None:
        raise NotMountedError(f"the store at {store!r}")
    with client:
        before, began = _ask(client), time.monotonic()
        taken = 0
        try:
            while times is None or taken < times:
                time.sleep(interval)
                now, ended = _ask(client), time.monotonic()
                if output.json:
                    output.record(_fields(before, now, ended - began))
                else:
                    if times != 1:
                        output.clear()
                    _show(output, before, now, ended - began)
                before, began = now, ended
                taken += 1
        except KeyboardInterrupt:
            return  # as it is meant to end


def _ask(client: "Client") -> "Statistics":
    from fsdriver.messages import GetStatistics, Statistics

    reply = client.ask(GetStatistics())
    if not isinstance(reply, Statistics):
        raise TypeError(f"asked for statistics, got {type(reply).__name__}")
    return reply


def _rates(before: dict[str, int], now: dict[str, int], seconds: float) -> dict[str, float]:
    """Returns what grew, per second, the most first."""
    grown = {name: (value - before.get(name, 0)) / seconds for name, value in now.items()}
    return dict(sorted(((n, v) for n, v in grown.items() if v > 0), key=lambda pair: -pair[1]))


def _fields(before: "Statistics", now: "Statistics", seconds: float) -> dict[str, Any]:
    """Returns one picture for JSON: rates per second, times in ns, everything else as it is."""
    from fsdriver.metrics import Timing

    operations = {}
    for name, rate in _rates(
        before.groups["operations"], now.groups["operations"], seconds
    ).items():
        done = now.timings[name].since(before.timings.get(name, Timing()))
        operations[name] = {
            "per_second": rate, "mean_ns": done.total // done.count, "p99_ns": done.quantile(0.99)
        }  # fmt: skip
    used = now.groups["process"]["processor_ms"] - before.groups["process"]["processor_ms"]
    return {
        "seconds": seconds,
        "operations": operations,
        "messages_per_second": _rates(before.groups["messages"], now.groups["messages"], seconds),
        "processor": used / 1000 / seconds,
        "process": now.groups["process"],
        "vfs": now.groups["vfs"],
        "objects": now.groups["objects"],
    }


def _show(output: "Output", before: "Statistics", now: "Statistics", seconds: float) -> None:
    picture = _fields(before, now, seconds)
    process, vfs, objects = picture["process"], picture["vfs"], picture["objects"]
    asked = picture["messages_per_second"]
    most = ", ".join(f"{name} {rate:,.0f}" for name, rate in list(asked.items())[:4])
    output.facts(
        [
            ("daemon", f"{picture['processor']:.0%} of a processor, {size(process['resident'])}, "
                       f"{count(process['descriptors'], 'descriptor')}"),
            ("kernel", f"{sum(asked.values()):,.0f} messages/s" + (f": {most}" if most else "")),
            ("holds", f"{count(vfs['inodes'], 'inode')}, {count(vfs['sessions'], 'session')}, "
                      f"{count(vfs['open_files'], 'open file')}, "
                      f"{count(vfs['orphans'], 'removed file')} in use"),
            ("caches", f"{count(objects['cached_nodes'], 'directory')} "
                       f"({_share(objects['node_hits'], objects['node_misses'])}), "
                       f"{size(objects['cached_chunk_bytes'])} of chunks "
                       f"({_share(objects['chunk_hits'], objects['chunk_misses'])})"),
        ]
    )  # fmt: skip
    output.line()
    rows = [
        [name, f"{o['per_second']:,.0f}", _time(o["mean_ns"]), "< " + _time(o["p99_ns"])]
        for name, o in picture["operations"].items()
    ]
    output.table(["OPERATION", "PER SECOND", "MEAN", "99 %"], rows)
    if not rows:
        output.line("nothing is asked of the daemon")


def _share(hits: int, misses: int) -> str:
    return f"{hits / (hits + misses):.0%} found there" if hits + misses else "not used yet"


def _time(nanoseconds: int) -> str:
    if nanoseconds < 1_000_000:
        return f"{nanoseconds / 1000:.0f} µs"
    return f"{nanoseconds / 1e6:.1f} ms"
