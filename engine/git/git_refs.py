"""What branches and tags of git are called here, and what is remembered of them.

`refs/heads/a/b` becomes the ref `a.b`, `refs/tags/v1` becomes `tags.v1`, both after a prefix. A
character that no ref may have becomes `_`. The database `meta` keeps under `git-ref:` + ref, as
MessagePack, [repository's path, git's name, snapshot, tag object or null]: what an import has
set may be moved by the next one, what somebody else has set only forward.
"""

import re

import msgspec

from engine.errors import InvalidNameError
from engine.git.git_repository import HEADS, TAGS
from engine.ids import check_name
from engine.storage.store import Db, Reader, Writer

_PREFIX = b"git-ref:"
_IMPOSSIBLE = re.compile(r"[^A-Za-z0-9_.+-]")


class KnownRef(msgspec.Struct, array_like=True, frozen=True):
    """What an import has set a ref to."""

    path: str
    name: str
    snapshot: bytes
    tag: bytes | None = None


def local_name(name: str, prefix: str) -> str:
    """Returns the ref for a branch or tag of git's. Raises InvalidNameError."""
    if name.startswith(TAGS):
        plain = "tags/" + name.removeprefix(TAGS)
    else:
        plain = name.removeprefix(HEADS)
    local = prefix + _IMPOSSIBLE.sub("_", plain.replace("/", "."))
    return check_name("ref", local)


def local_names(names: list[str], prefix: str) -> tuple[dict[str, str], list[str]]:
    """Returns {git's name: ref}, and why some have none: their ref is another one's, or too long.

    Of several names with one ref, the first that is a branch has it.
    """
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    refused: list[str] = []
    for name in sorted(names):
        try:
            local = local_name(name, prefix)
        except InvalidNameError as error:
            refused.append(f"{name}: {error}")
            continue
        if local in taken:
            refused.append(f"{name}: the ref {local} is {taken[local]} already")
            continue
        taken[local] = name
        found[name] = local
    return found, refused


def known_ref(reader: Reader, ref: str) -> KnownRef | None:
    """Returns what an import has set a ref to last."""
    raw = reader.get(Db.META, _PREFIX + ref.encode())
    if raw is None:
        return None
    try:
        return msgspec.msgpack.decode(raw, type=KnownRef)
    except msgspec.DecodeError:
        return None


def remember_ref(writer: Writer, ref: str, known: KnownRef) -> None:
    """Notes what an import sets a ref to."""
    writer.put(Db.META, _PREFIX + ref.encode(), msgspec.msgpack.encode(known))
