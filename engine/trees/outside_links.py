"""Symbolic links that lead out of a tree, found before anything of it is written.

Called by checkout and by the switch of one; walks stored directories and touches no disk.
"""

import os

from engine.errors import EngineError
from engine.plain.surveying import Survey
from engine.storage.nodes import Entry, Kind
from engine.storage.objects import Objects
from engine.trees.directory import Directory, directory_id

_LINKS = 40


class OutsideLinkError(EngineError):
    """A symbolic link in the tree leads out of it."""

    def __init__(self, path: bytes, target: bytes) -> None:
        super().__init__(
            f"the link {os.fsdecode(path)!r} leads out of the tree, to {os.fsdecode(target)!r}"
        )
        self.path, self.target = path, target


def check_links(objects: Objects, root: Entry, survey: Survey) -> None:
    """Raises OutsideLinkError for the first link that leads out of the tree.

    Looks into those directories only in which the survey of the tree has seen links.
    """
    stack = [root]

    def visit(path: bytes) -> None:
        for entry in Directory(objects, directory_id(stack[-1])):
            child = path + b"/" + entry.name if path else entry.name
            if entry.kind == Kind.SYMLINK and isinstance(entry.content, bytes):
                if leads_out(objects, stack, entry.content):
                    raise OutsideLinkError(child, entry.content)
            elif entry.kind == Kind.DIRECTORY and survey.below(entry, len(stack)).links:
                stack.append(entry)
                visit(child)
                stack.pop()

    if survey.below(root, 0).links:
        visit(b"")


def leads_out(objects: Objects, directories: list[Entry], target: bytes) -> bool:
    """Tells whether a link in the last of `directories`, each inside the one before, leads out.

    Follows its target inside the tree, through other links, as the kernel would.
    """
    at: list[Entry | None] = list(directories)
    rest = [target]
    followed = 0
    while rest:
        path = rest.pop()
        if path.startswith(b"/"):
            return True
        for number, name in enumerate(parts := path.split(b"/")):
            if name in {b"", b"."}:
                continue
            if name == b"..":
                at.pop()
                if not at:
                    return True
                continue
            here = at[-1]
            entry = None
            if here is not None and here.kind == Kind.DIRECTORY:
                entry = Directory(objects, directory_id(here)).get(name)
            if (
                entry is not None
                and entry.kind == Kind.SYMLINK
                and isinstance(entry.content, bytes)
            ):
                followed += 1
                if followed > _LINKS:
                    return False  # the kernel answers ELOOP
                rest.append(b"/".join(parts[number + 1 :]).lstrip(b"/"))
                rest.append(entry.content)
                break
            at.append(entry)
    return False
