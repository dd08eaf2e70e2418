"""Drafts: the directories of a merged tree before they are stored, and its hard links.

A draft is a stored directory with edits, or a new one; what is not in a draft is taken by id.
"""

from collections.abc import Iterator

import msgspec

from engine.storage.nodes import Entry, Kind, encode
from engine.storage.objects import NodeBuffer, Objects
from engine.trees.directory import Directory, directory_entry, directory_id
from engine.trees.directory_edit import edit_directory
from engine.trees.links import linked, number_groups


class Draft(msgspec.Struct):
    """A directory that is `stored` with `edits`, or new; `like` has its name and attributes."""

    stored: Entry | None
    like: Entry
    edits: "dict[bytes, Entry | Draft | None]"


def store_draft(objects: Objects, nodes: NodeBuffer, draft: Draft) -> Entry:
    """Stores a directory and those in it; returns its entry."""
    edits = {
        name: store_draft(objects, nodes, value) if isinstance(value, Draft) else value
        for name, value in draft.edits.items()
    }
    like = draft.like
    if draft.stored is None:
        entries = [entry for _, entry in sorted(edits.items()) if entry is not None]
        return directory_entry(
            nodes.put, entries, name=like.name, mode=like.mode, mtime_ns=like.mtime_ns,
            xattrs=like.xattrs, owner=like.owner,
        )  # fmt: skip
    return edit_directory(
        objects, nodes, draft.stored, edits, name=like.name, mode=like.mode,
        mtime_ns=like.mtime_ns, xattrs=like.xattrs, owner=like.owner,
    )  # fmt: skip


def relink(objects: Objects, root: Draft, keys: dict[bytes, object]) -> None:
    """Counts and names the hard links of a draft anew.

    Names with one key, by default their link group's id, that are the same in content and
    attributes share a file.
    """
    _Linker(objects, root, keys).relink()


class _Linker:
    def __init__(self, objects: Objects, root: Draft, keys: dict[bytes, object]) -> None:
        self._objects, self._root, self._keys = objects, root, keys

    def relink(self) -> None:
        groups: dict[tuple[object, bytes], list[tuple[bytes, Entry]]] = {}
        for path, entry in sorted(self._linked(b"", self._root), key=lambda member: member[0]):
            assert entry.link is not None
            common = encode(msgspec.structs.replace(entry, name=b"", link=None))
            key = self._keys.get(path, entry.link.group)
            groups.setdefault((key, common), []).append((path, entry))
        before = {path: entry for members in groups.values() for path, entry in members}
        for path, entry in number_groups(groups.values()):
            if entry.link != before[path].link:
                self._put(path, entry)

    def _linked(self, path: bytes, node: Entry | Draft) -> Iterator[tuple[bytes, Entry]]:
        """Yields what has a link; reads the directories that hold some."""
        if isinstance(node, Entry) and node.kind != Kind.DIRECTORY:
            if node.link is not None:
                yield path, node
            return
        stored = node.stored if isinstance(node, Draft) else node
        edits = node.edits if isinstance(node, Draft) else {}
        prefix = path + b"/" if path else b""
        for entry in linked(self._objects, stored) if stored is not None else ():
            if entry.name not in edits:
                yield from self._linked(prefix + entry.name, entry)
        for name, value in edits.items():
            if value is not None:
                yield from self._linked(prefix + name, value)

    def _put(self, path: bytes, entry: Entry) -> None:
        *above, name = path.split(b"/")
        draft = self._root
        for each in above:
            below = draft.edits.get(each)
            if below is None:
                assert draft.stored is not None
                below = Directory(self._objects, directory_id(draft.stored)).get(each)
            if isinstance(below, Entry):
                below = Draft(below, below, {})
            assert below is not None
            draft.edits[each] = below
            draft = below
        draft.edits[name] = entry
