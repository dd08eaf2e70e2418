"""Patches for a tree: real ones by git and diff, in the frames they come in, and damaged ones.

A case is a tree, a patch and what was done to it, all from a seed. What git and diff write of two
trees is put into mails, gets other ends of lines, loses lines, has numbers changed, hunks
doubled or exchanged, or is in another format altogether.
"""

import os
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from scripts.merge_cases import make_case
from tests.engine.plants import Leaf, Plant, make_directory

ENVIRONMENT = {
    "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null",
    "GIT_AUTHOR_NAME": "A", "GIT_AUTHOR_EMAIL": "a@x", "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@x", "LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"],
    "GIT_AUTHOR_DATE": "1500000000 +0000", "GIT_COMMITTER_DATE": "1500000000 +0000",
}  # fmt: skip


class PatchCase(NamedTuple):
    """One patch for a tree; `log` says how it was made."""

    seed: int
    tree: Plant
    patch: bytes
    log: str


def make_patch(seed: int, directory: Path) -> PatchCase:
    """Makes the case of a seed in an empty directory, with the programs that write patches."""
    case = make_case(seed)
    dice = random.Random(seed ^ 0x5EED)
    old, new = case.base, _some_lines(dice, case.ours)
    make_directory(directory / "a", old)
    make_directory(directory / "b", new)
    (directory / "a").mkdir(exist_ok=True)
    (directory / "b").mkdir(exist_ok=True)
    name, write = dice.choice(_WRITERS)
    patch = write(directory)
    log = [name]
    for _ in range(dice.choice([0, 0, 1, 1, 1, 2])):
        damage = dice.choice(_DAMAGES)
        patch = damage(dice, patch)
        log.append(damage.__name__.strip("_"))
    return PatchCase(seed, old, patch, ", ".join(log))


def _some_lines(dice: random.Random, plant: Plant) -> Plant:
    """Takes the last end of a line from some files, and gives some empty ones."""
    found = dict(plant)
    for path, leaf in plant.items():
        if leaf.mode != 0o777 and dice.random() < 0.1:
            found[path] = leaf._replace(data=leaf.data.rstrip(b"\n"))
    if dice.random() < 0.1 and b"empty" not in found:
        found[b"empty"] = Leaf(b"")
    return found


def _run(directory: Path, *words: str) -> bytes:
    done = subprocess.run(words, cwd=directory, env=ENVIRONMENT, capture_output=True, check=False,
                          timeout=60)  # fmt: skip
    return done.stdout


def _repository(directory: Path) -> None:
    for words in (
        ["init", "-q"], ["--work-tree=a", "add", "-A"],
        ["commit", "-q", "--allow-empty", "-m", "x"], ["--work-tree=b", "add", "-A"],
        ["commit", "-q", "--allow-empty", "-m", "new\n\n- a list\n+ of things\n  and more"],
    ):  # fmt: skip
        _run(directory, "git", *words)


def _git(*words: str) -> Callable[[Path], bytes]:
    def write(directory: Path) -> bytes:
        _repository(directory)
        return _run(directory, "git", *words)

    return write


def _diff(*more: str) -> Callable[[Path], bytes]:
    return lambda directory: _run(directory, "diff", "-r", *more, "a", "b")


_COMPARE = ("diff", "--binary", "HEAD~", "HEAD")
_WRITERS: list[tuple[str, Callable[[Path], bytes]]] = [
    ("git diff", _git(*_COMPARE, "--no-renames")), ("git diff -M", _git(*_COMPARE, "-M")),
    ("git diff -C", _git(*_COMPARE, "-C")), ("git diff -U1", _git(*_COMPARE, "-U1")),
    ("git diff, coloured", _git(*_COMPARE, "--color=always")),
    ("git diff without binary files", _git("diff", "HEAD~", "HEAD")),
    ("git format-patch", _git("format-patch", "--binary", "--stdout", "-1")),
    ("git format-patch", _git("format-patch", "--binary", "--stdout", "-1")),
    ("diff -u", _diff("-u")), ("diff -uN", _diff("-uN")), ("diff -uN", _diff("-uN")),
    ("diff -c", _diff("-cN")), ("diff", _diff("-N")), ("diff -e", _diff("-e")),
]  # fmt: skip


def _cut(dice: random.Random, patch: bytes) -> bytes:
    lines = patch.splitlines(keepends=True)
    return b"".join(lines[: dice.randint(0, len(lines))])


def _cut_in_a_line(dice: random.Random, patch: bytes) -> bytes:
    return patch[: dice.randint(0, len(patch))]


def _lose_a_line(dice: random.Random, patch: bytes) -> bytes:
    lines = patch.splitlines(keepends=True)
    if lines:
        del lines[dice.randrange(len(lines))]
    return b"".join(lines)


def _double_a_line(dice: random.Random, patch: bytes) -> bytes:
    lines = patch.splitlines(keepends=True)
    if lines:
        at = dice.randrange(len(lines))
        lines.insert(at, lines[at])
    return b"".join(lines)


def _rubbish(dice: random.Random, patch: bytes) -> bytes:
    lines = patch.splitlines(keepends=True)
    what = dice.choice([b"rubbish\n", b"+rubbish\n", b" rubbish\n", b"-rubbish\n", b"\n", b"@@\n"])
    lines.insert(dice.randint(0, len(lines)), what)
    return b"".join(lines)


def _carriage_returns(_: random.Random, patch: bytes) -> bytes:
    return patch.replace(b"\n", b"\r\n")


def _mark(_: random.Random, patch: bytes) -> bytes:
    return b"\xef\xbb\xbf" + patch


def _counts(dice: random.Random, patch: bytes) -> bytes:
    found = list(re.finditer(rb"^@@ -(\d+)(?:,(\d+))?", patch, re.MULTILINE))
    if not found:
        return patch
    hunk = dice.choice(found)
    number = max(0, int(hunk[2] or b"1") + dice.choice([-2, -1, 1, 2]))
    return patch[: hunk.start()] + b"@@ -%s,%d" % (hunk[1], number) + patch[hunk.end() :]


def _starts(dice: random.Random, patch: bytes) -> bytes:
    found = list(re.finditer(rb"^@@ -(\d+)", patch, re.MULTILINE))
    if not found:
        return patch
    hunk = dice.choice(found)
    number = max(0, int(hunk[1]) + dice.choice([-7, -1, 1, 7]))
    return patch[: hunk.start()] + b"@@ -%d" % number + patch[hunk.end() :]


def _hunks(patch: bytes) -> list[bytes]:
    return re.split(rb"(?m)^(?=@@ -)", patch)


def _double_a_hunk(dice: random.Random, patch: bytes) -> bytes:
    parts = _hunks(patch)
    if len(parts) > 1:
        at = dice.randrange(1, len(parts))
        parts.insert(at, parts[at])
    return b"".join(parts)


def _exchange_hunks(dice: random.Random, patch: bytes) -> bytes:
    parts = _hunks(patch)
    if len(parts) > 2:
        at = dice.randrange(1, len(parts) - 1)
        parts[at : at + 2] = reversed(parts[at : at + 2])
    return b"".join(parts)


def _other_byte(dice: random.Random, patch: bytes) -> bytes:
    if not patch:
        return patch
    at = dice.randrange(len(patch))
    return patch[:at] + bytes([dice.randrange(32, 127)]) + patch[at + 1 :]


def _no_last_end(_: random.Random, patch: bytes) -> bytes:
    return patch.removesuffix(b"\n")


def _wide(_: random.Random, patch: bytes) -> bytes:
    return patch.decode("latin-1").encode("utf-16")


def _page(_: random.Random, patch: bytes) -> bytes:
    return b"<html>\n<body><pre>\n" + patch.replace(b"<", b"&lt;").replace(b"\n", b"<br>\n")


def _quote(_: random.Random, patch: bytes) -> bytes:
    return b"".join(b"> " + line for line in patch.splitlines(keepends=True))


def _index_lines(_: random.Random, patch: bytes) -> bytes:
    """Adds what svn writes before each file."""
    return re.sub(rb"(?m)^(?=--- )", b"Index: file\n" + b"=" * 67 + b"\n", patch)


_DAMAGES: list[Callable[[random.Random, bytes], bytes]] = [
    _cut, _cut_in_a_line, _lose_a_line, _double_a_line, _rubbish, _carriage_returns, _mark,
    _counts, _starts, _double_a_hunk, _exchange_hunks, _other_byte, _no_last_end, _wide, _page,
    _quote, _index_lines, _cut, _lose_a_line, _double_a_line, _rubbish, _counts, _starts,
]  # fmt: skip
