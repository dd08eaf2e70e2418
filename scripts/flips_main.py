"""Flips single bits of a store's file and runs every command on each.

Each flip is made in a copy of one small store, in memory where the system has room for that. Then
every command runs on a copy of its own, in a process of its own: a child of this one, which has
loaded all modules and opens no store. A command must end as documented: no signal, no traceback,
no hang, and what it writes out is what was stored. `verify` must name what another command
stumbled on or left out, and `verify --repair --from` must mend it from a second store.

The exit status is 0 if all of that held, else 1.
"""

import argparse
import collections
import gc
import importlib
import os
import pkgutil
import random
import shutil
import signal
import sys
import tempfile
import time
from typing import NamedTuple

from engine.storage.pages import BRANCH, LEAF, META, OVERFLOW
from mountctl.__main__ import cli

PAGE = 4096
SECONDS = 60
"""How long a command may take."""
KINDS = ("meta", "header", "pointers", "nodes", "overflow header", "data", "unused")

COMMANDS: dict[str, list[str]] = {
    "verify": ["verify", "-q"],
    "snapshot list": ["snapshot", "list", "-q"],
    "session list": ["session", "list", "-q"],
    "ref list": ["ref", "list", "-q"],
    "log": ["log", "main", "-q"],
    "diff": ["diff", "first", "main", "--name-status", "-q"],
    "stats": ["stats", "-q"],
    "episode log": ["episode", "log", "search", "-q"],
    "checkout": ["checkout", "main", "{out}/tree", "-q"],
    "import": ["import", "{home}/more", "--ref", "more", "-q"],
    "commit": ["commit", "work", "-m", "changed", "-q"],
    "ref set": ["ref", "set", "again", "main", "-q"],
    "gc": ["gc", "-q"],
    "gc --compact": ["gc", "--compact", "-q"],
}
"""What runs on each flip; `{out}` is an empty directory, `{home}` where the sources are."""
READS = ("snapshot list", "session list", "ref list", "log", "diff", "episode log")
"""Commands that say what is stored, and nothing else: the same from every copy."""


class Outcome(NamedTuple):
    """How a command ended: its exit code, or what no command may do."""

    code: int
    wrong: str
    said: str


def load() -> None:
    """Loads all modules of the program, so that children need not."""
    for name in ("mountctl", "engine"):
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    for name in ("difflib", "lmdb._envid"):  # what click and LMDB load when they are used
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def call(arguments: list[str], said: str, seconds: float = SECONDS) -> Outcome:
    """Runs `mountctl` in a child; returns how it ended."""
    pid = os.fork()
    if not pid:
        code = 99
        try:
            fd = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            sys.stdout, sys.stderr = (
                open(stream, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - till it ends
                for stream in (1, 2)
            )
            sys.argv = ["mountctl", *arguments]
            cli(arguments, prog_name="mountctl")
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return Outcome(-1, "hangs", "")
        time.sleep(0.002)
    with open(said, encoding="utf-8", errors="replace") as file:
        text = file.read()
    if os.WIFSIGNALED(status):
        return Outcome(-1, signal.Signals(os.WTERMSIG(status)).name, text)
    code = os.WEXITSTATUS(status)
    if "Traceback" in text or code in {70, 99}:
        return Outcome(code, "traceback", text)
    return Outcome(code, "", text)


def contents(path: str) -> dict[str, bytes]:
    """Returns the files below a directory."""
    found = {}
    for directory, _, names in os.walk(path):
        for name in names:
            file = os.path.join(directory, name)
            with open(file, "rb") as opened:
                found[os.path.relpath(file, path)] = opened.read()
    return found


def make(home: str) -> None:
    """Makes the sources and two stores that hold the same in different pages."""
    rng = random.Random(7)
    tree = os.path.join(home, "tree")
    for number in range(120):
        path = os.path.join(tree, f"d{number % 12:02}", f"f{number:03}")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        size = (300, 900, 1500, 5000)[number % 4]
        with open(path, "wb") as file:
            file.write(rng.randbytes(size))
    os.makedirs(os.path.join(home, "more"))
    with open(os.path.join(home, "more", "x"), "wb") as file:
        file.write(rng.randbytes(20_000))
    store = os.path.join(home, "store")

    def run(*arguments: str) -> None:
        outcome = call([*arguments, "-q", "--store", store], os.path.join(home, "said"))
        assert outcome.code == 0, (arguments, outcome)

    run("init")
    run("import", tree, "--ref", "first")
    for number in range(4):
        with open(os.path.join(tree, "d00", f"n{number}"), "wb") as file:
            file.write(rng.randbytes(9000))
        run("import", tree, "--ref", f"step{number}")
    for number in range(15):
        run("ref", "set", f"name-{number:02}", "step3")
    run("import", tree, "--ref", "main")
    run("session", "create", "work", "main")
    run("session", "create", "idle", "first")
    run("episode", "new", "search", "--root", "main")
    for number in range(3):
        run("episode", "add", "search", "main", "--reward", str(number))
    for number in range(4):
        run("ref", "rm", f"name-{number:02}")
    run("gc")
    for session in os.listdir(os.path.join(store, "sessions")):
        upper = os.path.join(store, "sessions", session, "upper.0")
        with open(os.path.join(upper, "new"), "wb") as file:
            file.write(b"written in the session\n" * 100)
    shutil.copytree(store, os.path.join(home, "other"))
    store = os.path.join(home, "other")
    run("gc", "--compact")  # the same in other pages


def places(data: bytes) -> dict[str, list[int]]:
    """Returns the offsets of a file's bytes by what stands there."""
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    number, pages = 0, len(data) // PAGE
    while number < pages:
        at = number * PAGE
        flags = int.from_bytes(data[at + 10 : at + 12], sys.byteorder)
        lower = int.from_bytes(data[at + 12 : at + 14], sys.byteorder)
        upper = int.from_bytes(data[at + 14 : at + 16], sys.byteorder)
        count = 1
        if flags == META:
            found["meta"].extend(range(at, at + 152))
        elif flags == OVERFLOW:
            count = int.from_bytes(data[at + 12 : at + 16], sys.byteorder)
            found["overflow header"].extend(range(at, at + 16))
            found["data"].extend(range(at + 16, at + count * PAGE))
        elif flags in {BRANCH, LEAF}:
            found["header"].extend(range(at, at + 16))
            found["pointers"].extend(range(at + 16, at + lower))
            found["unused"].extend(range(at + lower, at + upper))
            for pointer in range(at + 16, at + lower, 2):
                node = at + int.from_bytes(data[pointer : pointer + 2], sys.byteorder)
                found["nodes"].extend(range(node, min(node + 60, at + PAGE)))
        number += max(1, count)
    return found


def choose(data: bytes, count: int, seed: int) -> list[tuple[str, int, int]]:
    """Returns kind, offset and bit of flips: half of them by kind, half anywhere."""
    rng = random.Random(seed)
    by_kind = {kind: where for kind, where in places(data).items() if where}
    flips = [(rng.choice(list(by_kind)), -1, rng.randrange(8)) for _ in range(count // 2)]
    flips = [(kind, rng.choice(by_kind[kind]), bit) for kind, _, bit in flips]
    for _ in range(count - len(flips)):
        flips.append(("anywhere", rng.randrange(len(data)), rng.randrange(8)))
    return flips


class Flipping:
    """One flip after another; keeps what was wrong."""

    def __init__(self, home: str, commands: list[str], repair: bool) -> None:
        self.home, self.commands, self.repair = home, commands, repair
        self.store, self.other = os.path.join(home, "store"), os.path.join(home, "other")
        with open(os.path.join(self.store, "db", "data.mdb"), "rb") as file:
            self.data = file.read()
        self.place = os.path.join(home, "place")
        self.right = contents_of(home, self.store)
        self.table: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self.wrong: list[str] = []
        self.words: dict[str, str] = {}
        self.words = {name: self.run(name, self.data).said for name in READS}

    def run(self, name: str, flipped: bytes, fresh: bool = True) -> Outcome:
        out = os.path.join(self.home, "out")
        shutil.rmtree(out, ignore_errors=True)
        os.mkdir(out)
        if fresh:
            self.fresh(flipped)
        words = [word.format(out=out, home=self.home) for word in COMMANDS.get(name, name.split())]
        outcome = call([*words, "--store", self.place], os.path.join(self.home, "said"))
        tree = os.path.join(out, "tree")
        if os.path.isdir(tree) and not outcome.wrong and contents(tree) != self.right:
            return outcome._replace(wrong="wrong bytes")
        return outcome

    def fresh(self, flipped: bytes) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.store, self.place, symlinks=True)
        with open(os.path.join(self.place, "db", "data.mdb"), "wb") as file:
            file.write(flipped)

    def flip(self, kind: str, offset: int, bit: int) -> None:
        flipped = bytearray(self.data)
        flipped[offset] ^= 1 << bit
        ends = {name: self.run(name, bytes(flipped)) for name in self.commands}
        what = f"{kind} {offset}:{bit} page {offset // PAGE}"
        other: list[str] = []  # words of a snapshot that cannot be found are not said
        for name, outcome in ends.items():
            self.table[kind, name, outcome.wrong or f"exit {outcome.code}"] += 1
            if outcome.wrong:
                said = outcome.said.strip().splitlines()[-1:] or [""]
                self.wrong.append(f"{what}: {name}: {outcome.wrong}: {said[0][:160]}")
            if name in self.words and not outcome.code and outcome.said != self.words[name]:
                other.append(name)
                self.table[kind, name, "other words"] += 1
        stumbled = [name for name, outcome in ends.items() if outcome.code] + other
        if "verify" in ends and stumbled and not ends["verify"].code:
            self.wrong.append(f"{what}: {stumbled} stumbled, verify did not: "
                              f"{ends[stumbled[0]].said.strip()[:200]}")  # fmt: skip
        if self.repair and stumbled:
            self.mend(what, bytes(flipped))

    def mend(self, what: str, flipped: bytes) -> None:
        mended = self.run(f"verify --repair --from {self.other}", flipped)
        again = self.run("verify", flipped, fresh=False)
        tree = self.run("checkout", flipped, fresh=False)
        self.table["", "repair", mended.wrong or f"exit {mended.code}"] += 1
        for name, outcome in (
            ("repair", mended),
            ("verify after", again),
            ("checkout after", tree),
        ):
            if outcome.wrong or outcome.code:
                self.wrong.append(f"{what}: {name}: {outcome.wrong or outcome.code}: "
                                  f"{outcome.said.strip()[:300]}")  # fmt: skip


def contents_of(home: str, store: str) -> dict[str, bytes]:
    """Returns what a checkout of `main` should hold."""
    out = os.path.join(home, "right")
    outcome = call(["checkout", "main", out, "-q", "--store", store], os.path.join(home, "said"))
    assert outcome.code == 0, outcome
    return contents(out)


def main() -> int:
    """Runs the matrix and prints a table."""
    parser = argparse.ArgumentParser(
        prog="scripts/flips", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--flips", type=int, default=1000, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="which (%(default)s)")
    parser.add_argument("--command", action="append", choices=COMMANDS, help="only these")
    parser.add_argument("--seconds", type=float, default=3600, help="at most (%(default)s)")
    parser.add_argument("--no-repair", action="store_true", help="mend nothing")
    asked = parser.parse_args()
    began = time.monotonic()
    load()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="afs-flips.", dir=memory) as home:
        make(home)
        flipping = Flipping(home, asked.command or list(COMMANDS), not asked.no_repair)
        done = 0
        for flip in choose(flipping.data, asked.flips, asked.seed):
            if time.monotonic() - began > asked.seconds:
                break
            told = len(flipping.wrong)
            flipping.flip(*flip)
            done += 1
            for line in flipping.wrong[told:]:
                print(line, flush=True)
    kinds = sorted({(name, end) for _, name, end in flipping.table})
    for name, end in kinds:
        counts = {k: n for (k, c, e), n in flipping.table.items() if (c, e) == (name, end)}
        each = ", ".join(f"{kind} {n}" for kind, n in sorted(counts.items()))
        print(f"{name:16} {end:12} {sum(counts.values()):6}   {each}")
    print(f"{done} flips in {len(flipping.data):,} bytes, {time.monotonic() - began:.0f} s: "
          f"{len(flipping.wrong)} wrong")  # fmt: skip
    return 1 if flipping.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
