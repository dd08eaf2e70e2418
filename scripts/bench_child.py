"""What the group `engine` does in processes of their own. Prints what it found as JSON.

commit STORE PATHS FORKS durable|behind SECONDS   when a line has come: forks that commit
collect STORE                                     a garbage collection
"""

import itertools
import json
import random
import sys
import threading
import time
from collections.abc import Callable

from engine.repository import Repository


def commit(store: str, paths: str, forks: str, mode: str, seconds: str) -> dict[str, float]:
    """Writes a file and commits, again and again, in so many forks of one workspace."""
    with open(paths, encoding="utf-8") as file:
        chosen = json.load(file)
    counts = [0] * int(forks)
    with Repository.open(store) as repository:
        workspace = repository.workspace("tree")
        workspaces = [workspace.fork() for _ in counts]

        def work(number: int) -> None:
            fork, mine = workspaces[number], random.Random()
            for at in itertools.count():
                if time.monotonic() > until:
                    return
                fork.write(mine.choice(chosen), b"/* %d %012d */" % (number, at))
                fork.commit(durable=mode == "durable")
                counts[number] += 1

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(counts))]
        print("ready", flush=True)
        sys.stdin.readline()
        began = time.monotonic()
        until = began + float(seconds)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        repository.flush()
        return {"began": began, "ended": time.monotonic(), "commits": sum(counts)}


def peak() -> float:
    """Returns the largest resident set in MB; the system's ru_maxrss counts a parent's."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))


def collect(store: str) -> dict[str, float]:
    """Collects garbage."""
    with Repository.open(store) as repository:
        began = time.monotonic()
        report = repository.collect()
        seconds = time.monotonic() - began
        snapshots = len(repository.snapshots())
    return {
        "seconds": seconds,
        "peak": peak(),
        "kept": report.kept_nodes + snapshots,
    }


if __name__ == "__main__":
    work: dict[str, Callable[..., dict[str, float]]] = {"commit": commit, "collect": collect}
    print(json.dumps(work[sys.argv[1]](*sys.argv[2:])))
