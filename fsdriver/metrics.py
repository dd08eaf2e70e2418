"""What a mount has done since it began: counts and durations, for people and for Prometheus.

Durations are kept as a histogram whose bounds double: bucket `i` counts those below `2**i` µs
and not below the bound before; the last one has no bound. Light: the command line reads the
same buckets.
"""

import os
import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

BUCKETS = 22
"""Bounds of 1 µs to 1.05 s, and one without."""


class Timing(msgspec.Struct):
    """How often something was done, and how long it took. `total` in ns."""

    count: int = 0
    total: int = 0
    buckets: list[int] = msgspec.field(default_factory=lambda: [0] * BUCKETS)

    def add(self, nanoseconds: int) -> None:
        """Counts one."""
        self.count += 1
        self.total += nanoseconds
        at = (nanoseconds // 1000).bit_length()
        self.buckets[at if at < BUCKETS else -1] += 1

    def since(self, earlier: "Timing") -> "Timing":
        """Returns what came after `earlier` was taken."""
        return Timing(
            self.count - earlier.count, self.total - earlier.total,
            [now - then for now, then in zip(self.buckets, earlier.buckets, strict=True)],
        )  # fmt: skip

    def quantile(self, share: float) -> int:
        """Returns a bound, in ns, below which `share` of the durations lie; 0 if there are none."""
        wanted, seen = share * self.count, 0
        for at, number in enumerate(self.buckets):
            seen += number
            if number and seen >= wanted:
                return 1000 << at
        return 0


class Process(msgspec.Struct, frozen=True):
    """What a process uses: memory in bytes, processor time in ms."""

    resident: int
    processor_ms: int
    descriptors: int
    threads: int


def of_this_process() -> Process:
    """Returns what this process uses."""
    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * resource.getpagesize()
    used = resource.getrusage(resource.RUSAGE_SELF)
    return Process(
        resident,
        int((used.ru_utime + used.ru_stime) * 1000),
        len(os.listdir("/proc/self/fd")) - 1,
        len(os.listdir("/proc/self/task")),
    )


GAUGES = {
    "vfs": {"inodes", "sessions", "open_files", "orphans", "open_directories"},
    "objects": {"cached_nodes", "cached_entries", "cached_chunk_bytes"},
    "ahead": {"waiting"},
    "process": {"resident", "descriptors", "threads"},
}
"""What goes up and down; everything else only grows."""


def exposition(
    groups: Mapping[str, Mapping[str, int]], timings: Mapping[str, Timing]
) -> Iterator[str]:
    """Yields the lines of Prometheus's text format, version 0.0.4."""
    for group, values in groups.items():
        if group == "messages":
            yield from _labelled("amalgamfs_messages_total", "kind", values)
            continue
        for name, value in values.items():
            gauge = name in GAUGES.get(group, ())
            metric = f"amalgamfs_{group}_{name}" + ("" if gauge else "_total")
            yield f"# TYPE {metric} {'gauge' if gauge else 'counter'}"
            yield f"{metric} {value}"
    metric = "amalgamfs_operation_seconds"
    yield f"# TYPE {metric} histogram"
    for name, timing in sorted(timings.items()):
        below = 0
        for bound, number in zip(_bounds(), timing.buckets, strict=True):
            below += number
            yield f'{metric}_bucket{{operation="{name}",le="{bound}"}} {below}'
        yield f'{metric}_sum{{operation="{name}"}} {timing.total / 1e9}'
        yield f'{metric}_count{{operation="{name}"}} {timing.count}'


def _bounds() -> Sequence[str]:
    return [*(f"{(1 << at) / 1e6:.6f}" for at in range(BUCKETS - 1)), "+Inf"]


def _labelled(metric: str, label: str, values: Mapping[str, int]) -> Iterable[str]:
    yield f"# TYPE {metric} counter"
    for name, value in sorted(values.items()):
        yield f'{metric}{{{label}="{name}"}} {value}'
