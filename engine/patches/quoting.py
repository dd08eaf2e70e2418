r"""Names in patches: as git writes them, plain or in quotes with escapes, and back.

`a\nb` becomes `"a\nb"` in quotes, so that a name is one word of one line whatever its bytes.
"""

import os

_ESCAPES = {7: b"a", 8: b"b", 9: b"t", 10: b"n", 11: b"v", 12: b"f", 13: b"r", 34: b'"', 92: b"\\"}
_SPECIAL = {'"', "\\"}
_UNESCAPES = {escape[0]: byte for byte, escape in _ESCAPES.items()}


def quoted(name: bytes, *, spaces: bool = True) -> bytes:
    """Returns a name as it is if that is printable UTF-8, else in quotes.

    Without `spaces`, one with a space is in quotes too.
    """
    text = os.fsdecode(name)
    if text.isprintable() and not _SPECIAL & set(text) and (spaces or " " not in text):
        return name
    return b'"' + b"".join(_escaped(character) for character in text) + b'"'


def _escaped(character: str) -> bytes:
    data = os.fsencode(character)
    if data[0] in _ESCAPES:
        return b"\\" + _ESCAPES[data[0]]
    if character.isprintable():
        return data
    return b"".join(b"\\%03o" % byte for byte in data)


def unquoted(text: bytes) -> tuple[bytes, bytes]:
    """Returns the name that quoted text begins with, and what follows its closing quote.

    Raises ValueError for what is not in quotes, or not as git quotes.
    """
    if text[:1] != b'"':
        raise ValueError("no quote begins it")
    name = bytearray()
    at = 1
    while at < len(text):
        byte = text[at]
        at += 1
        if byte == 0x22:
            return bytes(name), text[at:]
        if byte != 0x5C:
            name.append(byte)
            continue
        octal = text[at : at + 3]
        if at < len(text) and text[at] in _UNESCAPES:
            name.append(_UNESCAPES[text[at]])
            at += 1
        elif len(octal) == 3 and octal[:1] in b"0123" and all(c in b"01234567" for c in octal):
            name.append(int(octal, 8))
            at += 3
        else:
            raise ValueError("an unknown escape")
    raise ValueError("no quote ends it")
