"""What the group `engine` does in processes of their own. Prints what it found as JSON.

commit STORE PATHS FORKS durable|behind SECONDS   when a line has come: forks that commit
collect STORE                                     a garbage collection
"""

import itertools
import json
import random
import resource
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


def collect(store: str) -> dict[str, float]:
    """Collects garbage."""
    with Repository.open(store) as repository:
        began, spent = time.monotonic(), time.process_time()
        report = repository.collect()
        seconds, spent = time.monotonic() - began, time.process_time() - spent
        snapshots = len(repository.snapshots())
    return {
        "seconds": seconds,
        "processor": spent,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "kept": report.kept_nodes + report.kept_chunks + snapshots,
        "removed": report.nodes + report.chunks,
    }


if __name__ == "__main__":
    work: dict[str, Callable[..., dict[str, float]]] = {"commit": commit, "collect": collect}
    print(json.dumps(work[sys.argv[1]](*sys.argv[2:])))
