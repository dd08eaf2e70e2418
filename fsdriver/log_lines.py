"""Lines of the daemon's log: what may stand in one.

A log holds names of files that anybody may have made, and is read on a terminal
(`mount --foreground`, `tail -f`): nothing in a line may be obeyed by one.
"""

from collections.abc import MutableMapping
from typing import Any


def escaped(logger: object, method: str, facts: MutableMapping[str, Any]) -> dict[str, Any]:
    """Returns what a line tells without control characters; a processor of structlog."""
    return {name: _safe(value) for name, value in facts.items()}


def _safe(value: Any) -> Any:
    if isinstance(value, bool | int | float) or value is None:
        return value
    text = value if isinstance(value, str) else str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
