"""What a text is that is no unified diff: an error page, a context diff, a patch with colours.

Asked before a patch is read for what would be read wrong, and after it where nothing was found.
"""

import codecs
import re

_COLOURS = re.compile(rb"^(?:\x1b\[[0-9;]*m)+(?:diff |index |--- |\+\+\+ |@@ |[-+])", re.MULTILINE)
_CONTEXT = re.compile(rb"^\*\*\* [^\n]*\n--- [^\n]*\n\*{15}", re.MULTILINE)
_COMBINED = re.compile(rb"^@@@+ -\d", re.MULTILINE)
_ENCODED = re.compile(
    rb"^Content-Transfer-Encoding:[ \t]*(base64|quoted-printable)", re.MULTILINE | re.IGNORECASE
)
_NORMAL = re.compile(rb"^\d+(?:,\d+)?[acd]\d+(?:,\d+)?\r?\n(?:[<>] |[<>]\r?$)", re.MULTILINE)
_SCRIPT = re.compile(rb"^(?:\d+(?:,\d+)?[acd]|[acd]\d+ \d+)\r?$", re.MULTILINE)
_PAGE = re.compile(rb"\s*<(?:!doctype|html|head|body|\?xml|[a-z]+>)", re.IGNORECASE)
_SHIFTED = re.compile(rb"^([ \t]+|(?:> ?)+)(?:diff --git |--- [^\n]*\n\1\+\+\+ )", re.MULTILINE)
_WIDE = (
    codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE,
    b"d\0i\0f\0", b"-\0-\0-\0", b"\0d\0i\0f", b"\0-\0-\0-",
)  # fmt: skip

Foreign = tuple[int, str]
"""The line where it shows, from 1, and what the text is."""


def misleading(data: bytes) -> Foreign | None:
    """Returns what a text is of which a part may look like a patch, and is not all of it."""
    if data.startswith(_WIDE):
        return 1, "it is in UTF-16, not in the bytes of the files"
    for pattern, why in (
        (_COLOURS, "it has colours in it"),
        (_CONTEXT, "it is a context diff, not a unified one"),
        (_COMBINED, "it is a merge's combined diff, which fits no single tree"),
    ):
        if found := pattern.search(data):
            return _line(data, found), why
    encoded = _ENCODED.search(data)
    if encoded and not re.search(rb"^(?:diff |--- )", data[: encoded.start()], re.MULTILINE):
        how = encoded[1].decode("ascii").lower()
        return _line(data, encoded), f"it is a mail in {how}, to be decoded first"
    return None


def foreign(data: bytes) -> Foreign:
    """Returns what a text is in which no patch was found."""
    if not data.strip():
        return 1, "it is empty"
    if _PAGE.match(data):
        return 1, "it is a page of HTML or XML, not a patch"
    for pattern, why in (
        (_NORMAL, "it is a plain diff without context, not a unified one"),
        (_SHIFTED, "each line has something before it, as in a quoted mail"),
        (_SCRIPT, "it is a script for an editor, not a unified diff"),
    ):
        if found := pattern.search(data):
            return _line(data, found), why
    return 1, "no line in it begins a patch"


def _line(data: bytes, found: re.Match[bytes]) -> int:
    return data.count(b"\n", 0, found.start()) + 1
