"""The same merges by git and by us, and what the difference between the two is, if there is one.

git merges commits that `git fast-import` makes, with `git merge-tree --write-tree` and no
configuration but our own. Each kind of difference has a name here and a paragraph in
docs/concepts/conflicts.md; one without a name is a fault.
"""

import os
import subprocess
from collections.abc import Iterable
from typing import NamedTuple

from engine.merging.merge_moves import moved_files
from engine.merging.merging import merge
from engine.storage.nodes import Kind
from scripts.merge_cases import Case
from tests.engine.plants import Garden, Leaf, Plant, link, without_times

_ENVIRONMENT = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "LC_ALL": "C.UTF-8",
}
_KINDS = {
    "CONFLICT (contents)": "content",
    "CONFLICT (binary)": "content",
    "CONFLICT (file/directory)": "type",
    "CONFLICT (distinct modes)": "type",
    "CONFLICT (modify/delete)": "modify/delete",
    "CONFLICT (rename/rename)": "rename/rename",
    "CONFLICT (rename/delete)": "rename/delete",
    "CONFLICT (rename involved in collision)": "rename/add",
}
_DIRECTORY_RENAMES = {
    "CONFLICT (directory rename suggested)", "CONFLICT(directory rename unclear split)",
    "CONFLICT(directory rename collision)", "CONFLICT (file in way of directory rename)",
    "Path updated due to directory rename",
    "Directory rename skipped since directory was renamed on both sides",
}  # fmt: skip


DIRECTORY_RENAMES = "new files of a moved directory"
OTHER_PARTNERS = "another file is the moved one"
UNCHANGED_IN_THE_WAY = "an unchanged file where a directory is now"
MOVED_AND_RETYPED = "moved here, another type there"
TAKEN = "moved here, changed there, and its new place is taken"


class Verdict(NamedTuple):
    """What came of a merge: the tree, None if there are conflicts, and the kinds of these.

    Of git's, `notes` are its guesses of where a directory went, `in_the_way` the paths of which it
    says that a directory is in their way.
    """

    tree: Plant | None
    kinds: frozenset[str]
    notes: frozenset[str] = frozenset()
    in_the_way: frozenset[bytes] = frozenset()


class Rival:
    """A repository of git's with the three commits of each case."""

    def __init__(self, directory: str, cases: Iterable[Case]) -> None:
        self._directory = directory
        self._run("init", "-q", "--bare", "-b", "main", directory)
        self._run("fast-import", "--quiet", "--force", data=b"".join(map(_commits, cases)))

    def _run(self, *words: str, data: bytes = b"", codes: tuple[int, ...] = (0,)) -> bytes:
        environment = {"PATH": os.environ["PATH"], "HOME": self._directory, **_ENVIRONMENT}
        done = subprocess.run(
            ["git", *words], cwd=self._directory, env=environment, input=data, capture_output=True,
            check=False, timeout=60,
        )  # fmt: skip
        if done.returncode not in codes:
            raise RuntimeError(f"git {words[0]}: {done.returncode}: {done.stderr.decode()}")
        return done.stdout

    def merge(self, case: Case, *, directory_renames: bool) -> Verdict:
        """Merges as git does by default, or without guessing where a directory went."""
        value = "conflict" if directory_renames else "false"
        out = self._run(
            "-c", f"merge.directoryRenames={value}", "merge-tree", "--write-tree", "-z",
            "--messages", f"{case.seed}-ours", f"{case.seed}-theirs", codes=(0, 1),
        )  # fmt: skip
        tree, _, rest = out.partition(b"\0")
        files = []
        while rest and not rest.startswith(b"\0"):
            file, _, rest = rest.partition(b"\0")
            files.append(file)
        messages = list(_messages(rest[1:]))
        types = {kind for kind, _ in messages}
        conflicts = {each for each in types if each.startswith("CONFLICT")}
        # What was moved here, removed there and edited as well is two conflicts to git, and so is
        # a file that was edited in a directory which is a file there.
        told = {
            path
            for kind, paths in messages
            if "rename/delete" in kind or "file/directory" in kind
            for path in paths
        }
        kinds = {
            _KINDS[kind]
            for kind, paths in messages
            if kind in conflicts - _DIRECTORY_RENAMES
            and not ("modify/delete" in kind and told & {*_above(paths[0])})
        }
        found = None if conflicts else self._tree(tree.decode())
        in_the_way = {path for kind, paths in messages if "/directory" in kind for path in paths}
        notes = types & _DIRECTORY_RENAMES
        return Verdict(found, frozenset(kinds), frozenset(notes), frozenset(in_the_way))

    def _tree(self, tree: str) -> Plant:
        """Reads a tree through one `git cat-file --batch`."""
        facts = []
        for line in self._run("ls-tree", "-r", "-z", tree).split(b"\0")[:-1]:
            before, _, path = line.partition(b"\t")
            mode, _, identifier = before.split()
            facts.append((path, mode, identifier))
        wanted = b"".join(identifier + b"\n" for _, _, identifier in facts)
        out = self._run("cat-file", "--batch", data=wanted)
        found: Plant = {}
        for path, mode, _ in facts:
            head, _, out = out.partition(b"\n")
            size = int(head.split()[2])
            found[path] = _leaf(mode, out[:size])
            out = out[size + 1 :]
        return found

    def renames(self, case: Case, side: str) -> dict[bytes, bytes]:
        """Returns {old path: new path} of a side."""
        out = self._run("diff-tree", "-r", "-z", "-M", "--no-rename-empty", "--name-status",
                        "--diff-filter=R", f"{case.seed}-base", f"{case.seed}-{side}")  # fmt: skip
        words = out.split(b"\0")
        return {words[at + 1]: words[at + 2] for at in range(0, len(words) - 2, 3)}


def _leaf(mode: bytes, data: bytes) -> Leaf:
    found = link(data) if mode == b"120000" else Leaf(data, int(mode[-3:], 8))
    return found._replace(mtime_ns=0)


def _above(path: bytes) -> Iterable[bytes]:
    """Yields a path and those of the directories above it."""
    while path:
        yield path
        path = path.rpartition(b"/")[0]


def _messages(rest: bytes) -> Iterable[tuple[str, list[bytes]]]:
    """Yields the type of each message and its paths: `N`, N paths, a type, a text."""
    words = rest.split(b"\0")
    at = 0
    while at < len(words) and words[at]:
        end = at + 1 + int(words[at])
        yield words[end].decode(), words[at + 1 : end]
        at = end + 2


def _commits(case: Case) -> bytes:
    parts = []
    for number, (name, plant) in enumerate(
        (("base", case.base), ("ours", case.ours), ("theirs", case.theirs))
    ):
        ref = b"refs/heads/%d-%s" % (case.seed, name.encode())
        parts.append(b"commit %s\nmark :%d\ncommitter C <c@x> 1500000000 +0000\ndata 2\nm\n\n"
                     % (ref, case.seed * 3 + number + 1))  # fmt: skip
        if number:
            parts.append(b"from :%d\n" % (case.seed * 3 + 1))
        parts.append(b"deleteall\n")
        for path, leaf in plant.items():
            mode = b"120000" if leaf.kind == Kind.SYMLINK else b"100%03o" % leaf.mode
            parts.append(b"M %s inline %s\ndata %d\n%s\n" % (mode, path, len(leaf.data), leaf.data))
    return b"".join(parts)


def ours(case: Case) -> tuple[Verdict, dict[str, dict[bytes, bytes]]]:
    """Merges with the engine; returns the renames that it sees on each side, too."""
    garden = Garden()
    base, mine, other = (garden.plant(each) for each in (case.base, case.ours, case.theirs))
    result = merge(garden.objects, garden.nodes, garden.sink.put, base, mine, other)
    garden.save()
    renames = {
        name: moved_files(garden.objects, base, side)[0]
        for name, side in (("ours", mine), ("theirs", other))
    }
    tree = None
    if result.root is not None:
        plant = without_times(garden.harvest(result.root))
        tree = {path: leaf for path, leaf in plant.items() if leaf.kind != Kind.DIRECTORY}
    # git calls all of these contents.
    same = {"add/add": "content", "mode": "content"}
    kinds = {same.get(found.kind.value, found.kind.value) for found in result.conflicts}
    return Verdict(tree, frozenset(kinds)), renames


def difference(rival: Rival, case: Case) -> str:
    """Returns "" if git and we say the same, a decision's name, or what nobody has decided.

    The last begins with a question mark.
    """
    mine, renames = ours(case)
    theirs = rival.merge(case, directory_renames=True)
    if _same(mine, theirs):
        return ""
    plain = rival.merge(case, directory_renames=False)
    if plain != theirs and _same(mine, plain):
        return DIRECTORY_RENAMES
    if any(rival.renames(case, side) != renames[side] for side in ("ours", "theirs")):
        return OTHER_PARTNERS
    if plain.kinds == mine.kinds | {"type"}:
        sides = (case.ours, case.theirs)
        left = {p for p in plain.in_the_way if p in case.base}
        if left and all(case.base[p] in [side.get(p) for side in sides] for p in left):
            return UNCHANGED_IN_THE_WAY
    if mine.tree is None and plain.tree is None:
        for moved, away in ((renames["ours"], case.theirs), (renames["theirs"], case.ours)):
            for old, new in moved.items():
                if old in away and away[old].kind != case.base[old].kind:
                    return MOVED_AND_RETYPED
                if old in away and away[old] != case.base[old] and _is_taken(away, new):
                    return TAKEN
    return f"? ours {_say(mine)}, git {_say(plain)}"


def _is_taken(plant: Plant, path: bytes) -> bool:
    return bool(plant.keys() & {*_above(path)}) or any(p.startswith(path + b"/") for p in plant)


def _say(verdict: Verdict) -> str:
    return "clean" if verdict.tree is not None else "+".join(sorted(verdict.kinds)) or "conflict"


def _same(mine: Verdict, theirs: Verdict) -> bool:
    if mine.tree is not None or theirs.tree is not None:
        return mine.tree == theirs.tree
    return mine.kinds == theirs.kinds and not theirs.notes
