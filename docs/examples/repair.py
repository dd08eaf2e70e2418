"""Repairs a program by Monte Carlo tree search; every branch of the search is a workspace.

The program is toolz, from PyPI. Three edits at random let some of its tests fail. The search knows
only what the tests write: again and again it forks the most promising branch, makes one more edit
in a function that a traceback names, commits, and runs the tests in the folder in which the mount
shows the snapshot, so that nothing is copied. What comes of it is passed back up the tree (UCT,
Kocsis and Szepesvári 2006). All of it is kept as an episode, which is shown at the end.

    python -m docs.examples.repair [--seed N] [--store DIR] [--no-mount]

In the project's folder; needs pytest, which `scripts/setup --dev` installs. The calls are
explained in docs/guide/branching.md.
"""

import argparse
import math
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from docs.examples.edits import Edit, edits_of
from engine import Repository, SnapshotId, Workspace
from engine.episodes.steps import NewStep, Seen

SOURCES = "toolz/*toolz.py"
TESTS = ("toolz/tests",)
BUGS = 3
AT_ONCE = 2  # branches tried at a time, for as many processors
MOST = 200  # branches tried before the search gives up
CURIOSITY = 0.1  # UCT's constant: how much what was tried little is preferred
EPISODE = "repair"

# What tests say.


@dataclass(frozen=True)
class Result:
    """What the tests wrote."""

    passed: int
    failed: int
    output: str

    def suspects(self) -> Counter[str]:
        """Counts in how many places of the tracebacks a name stands."""
        shown = re.findall(r"^\S+\.py:\d+: in (\w+)\n +(.*)$", self.output, re.MULTILINE)
        return Counter(name for words in shown for name in set(re.findall(r"\w+", " ".join(words))))

    def files(self) -> tuple[str, ...]:
        """Returns the test files that have failures."""
        return tuple(sorted(set(re.findall(r"^FAILED (\S+?)::", self.output, re.MULTILINE))))


def command(tests: tuple[str, ...]) -> tuple[str, ...]:
    """Returns what runs the tests of the tree one is in, writing nothing there.

    Limits of processor time and memory end what an edit has made endless.
    """
    limits = ("prlimit", "--cpu=20", "--as=4000000000")
    pytest = (sys.executable, "-B", "-m", "pytest", "-c", "/dev/null", "--rootdir=.", "-q")
    kept_to = ("--confcutdir=.", "--disable-plugin-autoload", "-p", "no:cacheprovider")
    return (*limits, *pytest, *kept_to, "--assert=plain", "--tb=short", *tests)


def run_tests(folder: Path, tests: tuple[str, ...]) -> Result:
    done = subprocess.run(command(tests), cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode == 4 or (done.returncode > 0 and not done.stdout):
        raise RuntimeError(f"the tests cannot be run: {done.stdout}{done.stderr}")
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    return Result(counts.get("passed", 0), counts.get("failed", 0), done.stdout)


Show = Callable[[SnapshotId], Path]
"""Gives the folder in which a snapshot can be seen."""


@contextmanager
def mounted(store: Path, mount: Path) -> Iterator[Show]:
    """Mounts the store: what is in it is a folder there at once, and nothing is copied."""
    mount.mkdir()
    mountctl(store, "mount", str(mount))
    try:
        yield lambda snapshot: mount / "snapshots" / snapshot.hex()
    finally:
        mountctl(store, "umount", str(mount))


def checked_out(repository: Repository, work: Path) -> Show:
    """Does without a mount: copies what is to be seen."""

    def show(snapshot: SnapshotId) -> Path:
        folder = work / snapshot.hex()
        if not folder.exists():
            repository.check_out(repository.snapshot(snapshot).root, str(folder))
        return folder

    return show


def mountctl(store: Path, *arguments: str) -> str:
    """Runs a command of the command line and returns what it writes."""
    line = [sys.executable, "-m", "mountctl", "--store", str(store), "-q", *arguments]
    return subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout


# The search.


@dataclass
class Branch:
    """A node of the search: a tree that is one edit away from its parent's."""

    tree: Workspace
    snapshot: SnapshotId
    parent: "Branch | None" = None
    action: str = "begin"
    step: int = 0  # its number in the episode
    gain: float = 0.0  # which part of what failed passes now
    untried: list[Edit] = field(default_factory=list)  # the likeliest last
    children: list["Branch"] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0  # the sum of the gains found from here on

    def line(self) -> Iterator["Branch"]:
        """Yields this branch and those that it came from."""
        branch: Branch | None = self
        while branch is not None:
            yield branch
            branch = branch.parent

    def select(self) -> "Branch | None":
        """Returns the branch to go on from, by UCT; None if everything was tried.

        An edit that was not tried is taken to be worth what its branch is.
        """

        def score(value: float, visits: int) -> float:
            return value + CURIOSITY * math.sqrt(math.log(self.visits + 1) / (visits + 1))

        ways = [(score(self.gain, 0), self)] if self.untried else []
        ways += [
            (score(child.total / child.visits, child.visits), below)
            for child in self.children
            if (below := child.select())
        ]
        return max(ways, key=lambda way: way[0], default=(0.0, None))[1]


class Search:
    """A Monte Carlo tree search, kept as an episode."""

    def __init__(
        self, repository: Repository, broken: SnapshotId, show: Show, rng: random.Random
    ) -> None:
        self.repository, self.show, self.rng = repository, show, rng
        self.tests = run_tests(show(broken), TESTS).files()  # the others pass anyway
        self.first = run_tests(show(broken), self.tests)
        self.root = Branch(open_tree(repository, broken), broken)
        self.seen = {repository.snapshot(broken).root}
        repository.episodes.create(EPISODE, broken)
        self.learn([self.root], [self.first])

    def run(self) -> Branch | None:
        """Tries branches until all tests pass in one, and returns that."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            while len(self.seen) < MOST:
                new = [branch for _ in range(AT_ONCE) if (branch := self.expand())]
                if not new:
                    return None
                self.repository.flush()  # now other processes see what was committed
                folders = [self.show(branch.snapshot) for branch in new]
                self.learn(new, list(pool.map(run_tests, folders, [self.tests] * len(new))))
                for branch in new:
                    if branch.gain == 1:
                        return branch
        return None

    def expand(self) -> Branch | None:
        """Makes a branch that goes on from the most promising one."""
        while parent := self.root.select():
            edit = parent.untried.pop()
            tree = parent.tree.fork()
            tree.write(edit.path, edit.make(tree.read(edit.path)))
            made = tree.commit(str(edit), durable=False)
            if made.root in self.seen:  # the same edits in another order are the same tree
                continue
            self.seen.add(made.root)
            branch = Branch(tree, made.snapshot, parent, str(edit))
            for above in branch.line():
                above.visits += 1  # before the outcome is known: the next one may go elsewhere
            return branch
        return None

    def learn(self, branches: list[Branch], results: list[Result]) -> None:
        """Keeps what came of branches, and passes it back to those that they came from."""
        first, episodes = self.first, self.repository.episodes
        steps = []
        for branch, result in zip(branches, results, strict=True):
            branch.gain = max(0.0, (result.passed - first.passed) / first.failed)
            branch.untried = self.likely(branch.tree, result)
            if branch.parent:
                branch.parent.children.append(branch)
            for above in branch.line():
                above.total += branch.gain
            step = NewStep(
                parent=branch.parent.step if branch.parent else None,
                action=branch.action,
                snapshot=branch.snapshot,
                reward=result.passed / (first.passed + first.failed),
                verdict="pass" if branch.gain == 1 else "fail",
                command=command(self.tests),
            )
            steps.append(step)
        for branch, kept in zip(branches, episodes.append_many(EPISODE, steps), strict=True):
            branch.step = kept.number
        touched = {above.step: above for branch in branches for above in branch.line()}
        seen = [
            (number, Seen(visits=branch.visits, value=branch.total / max(branch.visits, 1)))
            for number, branch in touched.items()
        ]
        episodes.observe_many(EPISODE, seen)

    def likely(self, tree: Workspace, result: Result) -> list[Edit]:
        """Returns the edits of functions that tracebacks name, those named most often last."""
        suspects = result.suspects()
        edits = [edit for edit in all_edits(tree) if edit.function in suspects]
        self.rng.shuffle(edits)
        return sorted(edits, key=lambda edit: suspects[edit.function])


def open_tree(repository: Repository, snapshot: SnapshotId) -> Workspace:
    # As if time stood still, so that equal contents are equal trees, whenever they were written.
    return repository.workspace(snapshot, now_ns=lambda: 0)


def all_edits(tree: Workspace) -> list[Edit]:
    return [edit for path in tree.glob(SOURCES) for edit in edits_of(path, tree.read(path))]


def break_it(
    repository: Repository, snapshot: SnapshotId, show: Show, rng: random.Random
) -> SnapshotId:
    """Makes BUGS edits at random, each in another function; returns what that led to.

    Each lets a few more tests fail and is in a function that their tracebacks name: the search
    looks nowhere else.
    """
    tree, result = open_tree(repository, snapshot), run_tests(show(snapshot), TESTS)
    if result.failed or not result.passed:
        sys.exit(f"the tests of the project as it is do not pass here:\n{result.output}")
    broken = set[str]()
    while len(broken) < BUGS:
        edit = rng.choice(all_edits(tree))
        trial = tree.fork()
        trial.write(edit.path, edit.make(trial.read(edit.path)))
        made = trial.commit(f"bug: {edit}")
        now = run_tests(show(made.snapshot), TESTS)
        all_ran = now.passed + now.failed == result.passed + result.failed
        fits = edit.function in now.suspects() and edit.function not in broken
        if all_ran and fits and 0 < now.failed - result.failed <= 5:
            broken.add(edit.function)
            snapshot, tree, result = made.snapshot, trial, now
    return snapshot


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1, help="decides what is broken, and how")
    parser.add_argument("--store", type=Path, help="keep the store here, to look at it afterwards")
    parser.add_argument("--no-mount", action="store_true", help="run tests in copies of branches")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="repair-")))
        store = arguments.store or work / "store"
        fetch = Path(__file__).resolve().parents[2] / "scripts/fetch-project"
        if subprocess.run([fetch, work / "toolz", sys.executable], check=False).returncode:
            sys.exit(1)  # it has said why
        repository = stack.enter_context(Repository.create(str(store)))
        clean = repository.import_directory(str(work / "toolz"), ref="clean")
        show = checked_out(repository, work)
        if not arguments.no_mount:
            try:
                show = stack.enter_context(mounted(store, work / "mnt"))
            except subprocess.CalledProcessError:
                print("without a mount, as it says above: tests run in copies", file=sys.stderr)
        broken = break_it(repository, SnapshotId(clean.snapshot), show, rng)
        repository.set_ref("broken", broken)

        began = time.monotonic()
        search = Search(repository, broken, show, rng)
        print(f"{search.first.failed} tests fail in {', '.join(search.tests)}", flush=True)
        best = search.run()
        took = f"{len(search.seen)} branches in {time.monotonic() - began:.1f} s"
        if best is None:
            sys.exit(f"no repair was found: {took}")
        repository.set_ref("repaired", best.snapshot)
        print(f"repaired: {took}\n")
        print(mountctl(store, "episode", "show", EPISODE))
        print(mountctl(store, "episode", "best", EPISODE, "--path"))
        print(mountctl(store, "diff", "broken", "repaired", "--patch"))
        whole = run_tests(show(best.snapshot), TESTS)
        print(f"of all tests {whole.passed} pass and {whole.failed} fail")
        sys.exit(whole.failed > 0)


if __name__ == "__main__":
    main()
