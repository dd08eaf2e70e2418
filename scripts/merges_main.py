"""Merges random histories by git and by us, and counts where the two differ.

Each kind of difference is a decision that docs/concepts/conflicts.md has a paragraph on. The exit
status is 1 if there is one that nobody has decided; --show tells what happened there.
"""

import argparse
import sys
import tempfile
from collections import Counter

from scripts.merge_cases import Case, make_case
from scripts.merge_rivals import Rival, difference


def main() -> int:
    """Runs the cases that the command line asks for."""
    parser = argparse.ArgumentParser("scripts/merges", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first case's")
    parser.add_argument("--show", action="store_true", help="say what the sides of these did")
    options = parser.parse_args()
    cases = [make_case(options.seed + number) for number in range(options.cases)]
    found = differences(cases)
    for name, count in Counter(found.values()).most_common():
        print(f"{count:6,}  {name or 'the same'}")
    undecided = [case for case in cases if found[case.seed].startswith("?")]
    for case in undecided:
        print(f"seed {case.seed}: {found[case.seed]}")
        if options.show:
            print(*("    " + line for line in case.log), sep="\n")
    return 1 if undecided else 0


def differences(cases: list[Case]) -> dict[int, str]:
    """Returns what `difference` says of each case, by its seed."""
    with tempfile.TemporaryDirectory() as directory:
        rival = Rival(directory, cases)
        return {case.seed: difference(rival, case) for case in cases}


if __name__ == "__main__":
    sys.exit(main())
