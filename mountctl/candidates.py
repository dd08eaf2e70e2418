"""What a word of the command line may become, for a shell that completes it.

Nothing here raises, writes, waits for anybody or asks a daemon: where a name cannot be looked up
there is none. The engine is loaded only when a name of the store is wanted.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from mountctl.invocation import Invocation
from mountctl.text import short, visible

if TYPE_CHECKING:
    from engine.ids import SnapshotId
    from engine.storage.names import Names

Items = list[CompletionItem[str]]

_MOST = 200
"""Ids that are offered at once, and refs that are explained."""
_LONGEST_HELP = 60


def refs(context: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """Returns the refs that begin so."""
    return _found(context, incomplete, _refs)


def sessions(context: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """Returns the sessions that begin so, as NAME, or as @NAME if that is how it begins."""
    mark = "@" if incomplete.startswith("@") else ""
    return _found(context, incomplete, lambda names, _: _sessions(names, mark))


def episodes(context: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """Returns the episodes that begin so."""
    return _found(
        context, incomplete, lambda names, _: [CompletionItem(name) for name in names.episodes()]
    )


def snapshots(context: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """Returns what may name a snapshot: refs, @sessions, and ids from their first digit on."""
    return _found(
        context,
        incomplete,
        lambda names, word: [*_refs(names, word), *_sessions(names, "@"), *_ids(names, word)],
    )


def grounds(context: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """Returns what a command may run on: sessions, as NAME too, and what names a snapshot."""
    bare = [] if incomplete.startswith("@") else sessions(context, parameter, incomplete)
    return [*bare, *snapshots(context, parameter, incomplete)]


def compressions(context: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """Returns ways to pack chunks."""
    words = ["off", *(f"zstd:{level}" for level in (1, 3, 9, 19))]
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def _found(
    context: click.Context,
    incomplete: str,
    find: "Callable[[Names, str], Iterable[CompletionItem[str]]]",
) -> Items:
    try:
        from engine.storage.names import look_up

        invocation = context.ensure_object(Invocation)
        path = invocation.store_path
        with look_up(path, trusted=invocation.trusts(path)) as names:
            return [item for item in find(names, incomplete) if item.value.startswith(incomplete)]
    except Exception:  # noqa: BLE001 - a shell that completes shows no error, it has no place for one
        return []


def _refs(names: "Names", incomplete: str) -> Items:
    found = [(name, target) for name, target in names.refs() if name.startswith(incomplete)]
    if len(found) > _MOST:  # their records would take longer than a Tab may
        return [CompletionItem(name) for name, _ in found]
    return [CompletionItem(name, help=_about(names, target)) for name, target in found]


def _sessions(names: "Names", mark: str) -> Items:
    return [CompletionItem(mark + name, help="a session") for name in names.sessions()]


def _ids(names: "Names", incomplete: str) -> Items:
    if not incomplete or set(incomplete) - set("0123456789abcdef"):
        return []
    return [
        CompletionItem(
            short(identifier) if len(incomplete) <= len(short(identifier)) else identifier.hex(),
            help=_about(names, identifier),
        )
        for identifier in names.snapshots(incomplete, _MOST)
    ]


def _about(names: "Names", identifier: "SnapshotId") -> str:
    """Returns the first line of a snapshot's message, or its id."""
    record = names.record(identifier)
    message = "" if record is None else visible(record.message.partition("\n")[0]).strip()
    return message[:_LONGEST_HELP] or f"snapshot {short(identifier)}"
