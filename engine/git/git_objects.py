"""Git's objects as bytes: trees and commits taken apart, and put together again the same.

A commit becomes a snapshot's message and, in its metadata under `git`, all else that it says:

    commit, tree          ids in hexadecimal
    author, committer     the lines as git has them: `Name <address> seconds zone`
    extra                 [[header, value], ...] in their order: encoding, gpgsig, mergetag, ...
    newline               false if the message does not end in a newline, which is left out of it
    parents               ids of all parents, where a parent was left out of the import
    raw                   the whole commit in base64, where the fields do not give its bytes again

Source: Documentation/gitformat-commit-graph has none of it; git's commit.c and tree-walk.c do.
"""

import base64
import binascii
import hashlib
import re
from typing import Any, NamedTuple

from engine.storage.nodes import EARLIEST_NS, LATEST_NS

GIT = "git"
"""The key in a snapshot's metadata."""

TREE_MODE, LINK_MODE, MODULE_MODE = b"40000", b"120000", b"160000"
FILE_MODES = {b"100644": 0o644, b"100755": 0o755}

MODULE_ATTRIBUTE, MODE_ATTRIBUTE = b"user.git.submodule", b"user.git.mode"
"""An empty directory that stands for a submodule: its commit, in hexadecimal. The mode of an
entry that git would write otherwise today, in octal digits."""

LFS_HEAD = b"version https://git-lfs.github.com/spec/v1\n"

_ENTRY = re.compile(rb"([0-7]+) ([^\0]+)\0(.{20})", re.DOTALL)
_PERSON = re.compile(rb"[^\n\0]* (-?[0-9]{1,19}) [+-][0-9]{4}")
_HEX = re.compile(r"[0-9a-f]{40}")
_HEADER = re.compile(r"[^ \n\0]+")

TreeEntry = tuple[bytes, bytes, bytes]
"""mode in octal digits, name, id."""


class Commit(NamedTuple):
    """What a commit says. `extra` are the headers after the committer, in their order."""

    tree: bytes
    parents: tuple[bytes, ...]
    author: bytes
    committer: bytes
    extra: tuple[tuple[bytes, bytes], ...]
    message: bytes


def object_id(kind: str, data: bytes) -> bytes:
    """Returns the id that git gives an object."""
    head = b"%s %d\0" % (kind.encode(), len(data))
    return hashlib.sha1(head + data, usedforsecurity=False).digest()


def parse_tree(data: bytes) -> list[TreeEntry]:
    """Returns the entries of a tree. Raises ValueError."""
    entries: list[TreeEntry] = _ENTRY.findall(data)
    if sum(len(mode) + len(name) + 22 for mode, name, _ in entries) != len(data):
        raise ValueError("it is no tree")
    return entries


def format_tree(entries: list[TreeEntry]) -> bytes:
    """Returns a tree of entries in any order; directories sort as if they ended in a slash."""
    ordered = sorted(entries, key=lambda e: e[1] + b"/" if e[0].endswith(b"40000") else e[1])
    return b"".join(b"%s %s\0%s" % entry for entry in ordered)


def parse_commit(data: bytes) -> Commit:
    """Returns what a commit says. Raises ValueError."""
    head, _, message = data.partition(b"\n\n")
    headers: list[tuple[bytes, bytes]] = []
    for line in head.removesuffix(b"\n").split(b"\n"):
        if line.startswith(b" ") and headers:
            key, value = headers[-1]
            headers[-1] = key, value + b"\n" + line[1:]
        else:
            key, _, value = line.partition(b" ")
            headers.append((key, value))
    parents = []
    tree = author = committer = None
    extra = []
    for key, value in headers:
        if key == b"tree" and tree is None:
            tree = _identifier(value)
        elif key == b"parent":
            parents.append(_identifier(value))
        elif key == b"author" and author is None:
            author = value
        elif key == b"committer" and committer is None:
            committer = value
        else:
            extra.append((key, value))
    if tree is None:
        raise ValueError("it is no commit")
    return Commit(tree, tuple(parents), author or b"", committer or b"", tuple(extra), message)


def _identifier(text: bytes) -> bytes:
    if len(text) != 40:
        raise ValueError(f"{text[:60]!r} is no id")
    return bytes.fromhex(text.decode("ascii", "replace"))


def format_commit(commit: Commit) -> bytes:
    """Returns the bytes of a commit as git writes them."""
    lines = [b"tree " + commit.tree.hex().encode()]
    lines += [b"parent " + parent.hex().encode() for parent in commit.parents]
    lines += [b"author " + commit.author, b"committer " + commit.committer]
    lines += [key + b" " + value.replace(b"\n", b"\n ") for key, value in commit.extra]
    return b"\n".join(lines) + b"\n\n" + commit.message


def time_of(commit: Commit) -> int:
    """Returns the committer's time in ns, 0 if there is none."""
    found = _PERSON.fullmatch(commit.committer)
    time = int(found[1]) * 1_000_000_000 if found else 0
    return max(EARLIEST_NS, min(LATEST_NS, time))


def to_record(identifier: bytes, data: bytes, commit: Commit) -> tuple[str, dict[str, Any]]:
    """Returns message and metadata that a commit can be made of again."""
    encoding = dict(commit.extra).get(b"encoding", b"utf-8").decode("ascii", "replace")
    fields: dict[str, Any] = {
        "commit": identifier.hex(),
        "tree": commit.tree.hex(),
        "author": _text(commit.author, encoding),
        "committer": _text(commit.committer, encoding),
    }
    if commit.extra:
        fields["extra"] = [[_text(key), _text(value)] for key, value in commit.extra]
    message = _text(commit.message, encoding)
    if not message.endswith("\n"):
        fields["newline"] = False
    message = message.removesuffix("\n")
    again = _from_fields(message, fields, commit.tree, commit.parents)
    if again != data or not _is_commit(fields):
        fields["raw"] = base64.b64encode(data).decode()
    return message, fields


def from_record(
    message: str, metadata: dict[str, Any], tree: bytes, parents: tuple[bytes, ...]
) -> tuple[bytes, bool] | None:
    """Returns the commit that a snapshot was imported from, and whether it is the same again.

    It is another one if its tree or its parents are others. None if the metadata has no commit,
    or one that git would not take.
    """
    fields = metadata.get(GIT)
    if not isinstance(fields, dict):
        return None
    data = _raw(fields.get("raw"), tree, parents)
    if data is None:
        if not _is_commit(fields):
            return None
        data = _from_fields(message, fields, tree, parents)
    return data, object_id("commit", data).hex() == fields.get("commit")


def _raw(text: object, tree: bytes, parents: tuple[bytes, ...]) -> bytes | None:
    """Returns the commit that was kept as a whole, if it is one of that tree and parents."""
    if not isinstance(text, str):
        return None
    try:
        data = base64.b64decode(text, validate=True)
        kept = parse_commit(data)
    except (ValueError, binascii.Error):
        return None
    return data if (kept.tree, kept.parents) == (tree, parents) else None


def commit_id(metadata: dict[str, Any]) -> bytes | None:
    """Returns the id of the commit that metadata speaks of."""
    fields = metadata.get(GIT)
    if isinstance(fields, dict) and _HEX.fullmatch(str(fields.get("commit"))):
        return bytes.fromhex(fields["commit"])
    return None


def _is_commit(fields: dict[str, Any]) -> bool:
    extra = fields.get("extra", [])
    people = [fields.get("author"), fields.get("committer")]
    return (
        isinstance(fields.get("commit"), str)
        and all(isinstance(p, str) and _PERSON.fullmatch(p.encode()) for p in people)
        and isinstance(extra, list)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in extra)
        and all(isinstance(text, str) and "\0" not in text for pair in extra for text in pair)
        and all(_HEADER.fullmatch(key) and key not in _OWN for key, _ in extra)
    )


_OWN = {"tree", "parent", "author", "committer"}


def _from_fields(
    message: str, fields: dict[str, Any], tree: bytes, parents: tuple[bytes, ...]
) -> bytes:
    end = "" if fields.get("newline") is False else "\n"
    extra = tuple((key.encode(), value.encode()) for key, value in fields.get("extra", []))
    return format_commit(
        Commit(tree, parents, fields["author"].encode(), fields["committer"].encode(), extra,
               (message + end).encode())
    )  # fmt: skip


def _text(data: bytes, encoding: str = "utf-8") -> str:
    """Returns bytes as text that CBOR carries; where it does not give them again, `raw` does."""
    try:
        return data.decode(encoding).encode().decode()
    except (UnicodeError, LookupError):
        return data.decode("utf-8", "backslashreplace")
