"""Values as people read them: names made safe for a terminal, ids, sizes, times.

Names and messages come from trees that anybody may have made, so nothing of them reaches a
terminal unescaped: no control characters, no escape sequences, no marks that turn text around.
"""

import base64
import os
from datetime import UTC, datetime
from typing import Any

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_SHORT_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", '"': '\\"', "\\": "\\\\"}


def lost_owners(number: int) -> str:
    """Says that a snapshot does not have the owners of so many files."""
    who = "1 file has" if number == 1 else f"{number:,} files have"
    return (
        f"{who} another owner or group; the snapshot does not keep that "
        "(a store made by `mountctl init --owners` does)"
    )


def short(identifier: bytes) -> str:
    """Returns the first 12 hexadecimal digits of an id."""
    return identifier.hex()[:12]


def quoted(name: object) -> str:
    r"""Returns a name as git writes it: plain, or in quotes with octal escapes where needed.

    `a\nb` becomes `"a\\nb"`, so that one name is one word of one line, and two different names
    never look the same. An error of the system names a file by its path or its descriptor: the
    latter becomes `descriptor 5`.
    """
    if isinstance(name, int):
        return f"descriptor {name}"
    text = os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else str(name)
    if text.isprintable() and '"' not in text and "\\" not in text:
        return text
    return '"' + "".join(_SHORT_ESCAPES.get(c) or _octal(c) for c in text) + '"'


def visible(text: str, keep: str = "") -> str:
    """Returns text with what a terminal could obey escaped; the characters in `keep` stay."""
    if text.isprintable():
        return text
    return "".join(c if c in keep else _SHORT_ESCAPES.get(c, "") if c in "\n\t\r" else _octal(c)
                   for c in text)  # fmt: skip


def _octal(character: str) -> str:
    if character.isprintable():
        return character
    return "".join(f"\\{byte:03o}" for byte in os.fsencode(character))


def size(number: int) -> str:
    """Returns a number of bytes in the unit that keeps it below 1024."""
    if number < 1024:
        return f"{number} B"
    value, unit = number / 1024, 0
    while value >= 1023.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}"


def count(number: int, noun: str) -> str:
    """Returns `1 file`, `2,048 files`, `3 entries`."""
    if number != 1:
        noun = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{number:,} {noun}"


def not_kept(message: str | None, metadata: object = None) -> list[str]:
    """Returns warnings of what was given for a snapshot, where none was made."""
    given = [option for option, value in (("--message", message), ("--meta", metadata)) if value]
    if not given:
        return []
    return [f"no snapshot was made, so {' and '.join(given)} went nowhere"]


def when(time_ns: int) -> str:
    """Returns a time in ISO 8601, in the zone of this machine."""
    try:
        moment = datetime.fromtimestamp(time_ns // 1_000_000_000, UTC).astimezone()
    except (OverflowError, OSError, ValueError):
        return f"{time_ns} ns"
    return moment.isoformat(sep=" ")


def path_fields(path: bytes) -> dict[str, str]:
    """Returns a path for JSON: `path`, and in base64 `path_bytes` if it is not UTF-8."""
    try:
        return {"path": path.decode()}
    except UnicodeDecodeError:
        return {
            "path": path.decode("utf-8", "backslashreplace"),
            "path_bytes": base64.b64encode(path).decode(),
        }


def plain(value: Any) -> Any:
    """Returns a value that JSON can carry: ids in hexadecimal, text without lone surrogates."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, str):
        return os.fsencode(value).decode("utf-8", "backslashreplace")
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
