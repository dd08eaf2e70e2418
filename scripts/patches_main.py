"""Applies patches by `git apply`, `patch` and us, and counts where the verdicts differ.

Where git and we take a patch, the trees are the same, byte for byte. Each kind of difference is a
decision that docs/guide/diff-and-merge.md tells of. The exit status is 1 if there is one that
nobody has decided; --show writes the patch.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from engine.errors import EngineError
from engine.patches.patching import apply_patch
from engine.storage.nodes import Kind
from scripts.patch_cases import ENVIRONMENT, PatchCase, make_patch
from tests.engine.plants import DictTree, Plant, make_directory, read_directory, without_times


class Verdict(NamedTuple):
    """The tree that a patch makes, None if it is refused, and the words of the refusal."""

    tree: Plant | None
    why: str = ""


def ours(case: PatchCase) -> Verdict:
    """Applies a patch with the engine."""
    tree = DictTree(case.tree)
    try:
        apply_patch(tree, case.patch)
    except EngineError as error:
        assert tree.writes == 0
        return Verdict(None, str(error))
    return Verdict(tree.plant())


def by_program(case: PatchCase, directory: Path, *words: str) -> Verdict:
    """Applies a patch with a program, in a directory that has the tree."""
    target = directory / "tree"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    make_directory(target, case.tree)
    (directory / "patch").write_bytes(case.patch)
    done = subprocess.run(
        words, cwd=target, env={**ENVIRONMENT, "GIT_CEILING_DIRECTORIES": str(directory)},
        stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    if done.returncode:
        return Verdict(None, (done.stderr or done.stdout).decode("utf-8", "replace"))
    return Verdict(read_directory(target))


GIT = ("git", "apply", "--whitespace=nowarn", "../patch")
PATCH = ("patch", "-p1", "-s", "-f", "--binary", "--no-backup-if-mismatch", "-F0", "-i", "../patch")


def difference(case: PatchCase, directory: Path) -> str:
    """Returns "" if git and we say the same, a decision's name, or one with a question mark."""
    mine = ours(case)
    git = by_program(case, directory, *GIT)
    same = None if mine.tree is None else _files(mine.tree)
    if same == git.tree:
        return ""
    if mine.tree is None:
        for words, name in _STRICTER.items():
            if words in mine.why:
                return name
    elif not case.patch.endswith(b"\n"):
        return NO_LAST_END
    elif git.tree is None:
        if "dev/null: No such file" in git.why:
            return NO_MODE
        if same == by_program(case, directory, *PATCH).tree:
            return LIKE_PATCH
    return f"? ours {mine.why or 'applied'}, git {git.why or 'applied'}"


_UNNAMED = "refused: a header that stands for nothing, or for one side"
_STRICTER = {
    "the content of a binary file": "refused: a binary file is named without its content",
    "goes on where it should end": "refused: more lines follow a hunk than it says",
    "a hunk's first line is damaged": "refused: a hunk's first line is damaged",
    "a header without a hunk": _UNNAMED,
    "hunks are missing": _UNNAMED,
    "does not name both files": _UNNAMED,
    "does not name one file": _UNNAMED,
    "without the name of a file": _UNNAMED,
}
"""What we say of a patch that git takes a part of, by the decision."""
NO_MODE = "taken: `/dev/null` says that a file is new, its mode is missing"
NO_LAST_END = "taken: the patch's last line has no end"
LIKE_PATCH = "taken, as `patch` takes it"


def _files(plant: Plant) -> Plant:
    files = {path: leaf for path, leaf in plant.items() if leaf.kind != Kind.DIRECTORY}
    return without_times(files)


def differences(seeds: Iterable[int]) -> dict[int, tuple[str, PatchCase]]:
    """Returns what `difference` says of each case."""
    found = {}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as directory:
            case = make_patch(seed, Path(directory))
            found[seed] = difference(case, Path(directory)), case
    return found


def main() -> int:
    """Runs the cases that the command line asks for."""
    parser = argparse.ArgumentParser("scripts/patches", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first case's")
    parser.add_argument("--show", action="store_true", help="write these patches")
    options = parser.parse_args()
    found = differences(range(options.seed, options.seed + options.cases))
    for name, count in Counter(name for name, _ in found.values()).most_common():
        if not name.startswith("?"):
            print(f"{count:6,}  {name or 'the same'}")
    undecided = {seed: each for seed, each in found.items() if each[0].startswith("?")}
    for seed, (name, case) in undecided.items():
        print(f"seed {seed} ({case.log}): {name}")
        if options.show:
            sys.stdout.flush()
            sys.stdout.buffer.write(case.patch)
    return 1 if undecided else 0


if __name__ == "__main__":
    sys.exit(main())
