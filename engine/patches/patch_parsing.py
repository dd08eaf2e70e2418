"""Reading patches: what a unified diff says to do, file by file.

Takes git's format, with its extended headers and binary hunks, and plain `diff -u`; text before
the first file and between files, as in mail, is skipped. What looks like a part of a patch and
was not understood is refused, and so is a text without a patch. A patch is somebody else's text:
paths that are absolute or lead upwards are refused, and no number in it makes anything large.
"""

import codecs
import re
import stat
from collections.abc import Iterator

from engine.errors import EngineError
from engine.patches.binary_patch import decoded_line
from engine.patches.file_patches import Action, BinaryHunk, FilePatch, Hunk, Patch
from engine.patches.patch_forms import foreign, misleading
from engine.patches.quoting import unquoted
from engine.storage.nodes import check_file_name


class PatchFormatError(EngineError):
    """A text is no patch, or a damaged one, or one that may not be applied anywhere."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(f"the patch is wrong in line {line:,}: {why}")
        self.line, self.why = line, why


_HUNK = re.compile(rb"@@ -(\d{1,15})(?:,(\d{1,15}))? \+(\d{1,15})(?:,(\d{1,15}))? @@")
_INDEX = re.compile(rb"([0-9a-f]{4,64})\.\.([0-9a-f]{4,64})(?: ([0-7]{1,6}))?\s*")
_BINARY = re.compile(rb"(literal|delta) (\d{1,15})\s*")
_EPOCH = re.compile(rb"(1969-12-31|1970-01-01)[ T]\d\d:\d\d:00(\.0+)?( ?[-+]\d\d:?\d\d|Z)?\s*")
_FULL_BLOB = 40
_EMPTY_BLOBS = (
    b"e69de29bb2d1d6434b8b29ae775ad8c2e48c5391",
    b"473a0f4c3be8a93681a267e3b1e9a7dcda1185436fe141f7749120a303721813",
)
_NOT_APPLIED = (b"Only in ", b"Property changes on: ", b"Submodule ")
"""Lines between files that tell of a change which the patch does not hold."""
_MOST_SPACES = 100
"""In a header of two names with so many spaces, where the first ends is not looked for further."""


def parse_patch(data: bytes, *, strip: int | None = None) -> Patch:
    """Returns what a patch does, which is something.

    `strip` directories are taken from the front of each path: one if not given, or in plain
    diffs what fits the tree. Raises PatchFormatError.
    """
    data = data.removeprefix(codecs.BOM_UTF8)
    if found := misleading(data):
        raise PatchFormatError(*found)
    parser = _Parser(data, strip)
    files = list(parser.files())
    if not files:
        raise PatchFormatError(*foreign(data))
    return Patch(files, parser.left_out)


def _is_nothing(blob: bytes) -> bool:
    """Tells whether a blob's id, or its beginning, is that of no file or of an empty one."""
    return not blob.strip(b"0") or any(empty.startswith(blob) for empty in _EMPTY_BLOBS)


class _Parser:
    def __init__(self, data: bytes, strip: int | None) -> None:
        self._lines = data.split(b"\n")
        if not self._lines[-1]:
            self._lines.pop()
        self._strip = strip
        self._at = 0
        self.left_out: list[bytes] = []

    def _line(self) -> bytes | None:
        return self._lines[self._at] if self._at < len(self._lines) else None

    def _error(self, why: str, line: int | None = None) -> PatchFormatError:
        return PatchFormatError(self._at + 1 if line is None else line, why)

    def files(self) -> Iterator[FilePatch]:
        while (line := self._line()) is not None:
            if line.startswith(b"diff --git "):
                yield self._git()
            elif line.startswith(b"--- ") and self._names_follow():
                yield self._plain()
            elif line.startswith(b"@@ -"):
                raise self._error("a hunk without the name of a file")
            elif line.startswith(b"Binary files ") and line.rstrip().endswith(b" differ"):
                raise self._error("it does not have the content of a binary file")
            elif line.rstrip() == b"GIT binary patch" or _BINARY.fullmatch(line):
                raise self._error("a binary patch without the name of a file")
            else:
                if line.startswith(_NOT_APPLIED):
                    self.left_out.append(line)
                self._at += 1

    def _names_follow(self) -> bool:
        """Tells whether a file's header is here: two names."""
        following = self._lines[self._at + 1 : self._at + 2]
        return bool(following) and following[0].startswith(b"+++ ")

    # Headers.

    def _git(self) -> FilePatch:
        start = self._at
        first = self._lines[start]
        found = FilePatch(start + 1, hunks=[])
        self._at += 1
        names: dict[bytes, bytes] = {}
        while (line := self._line()) is not None and self._extended(found, names, line):
            self._at += 1
        moved = b"from" in names or b"to" in names
        if moved:
            if found.action not in {Action.RENAME, Action.COPY} or len(names) != 2:
                raise self._error("a rename or copy without both names", start + 1)
            found.old_path, found.new_path = names[b"from"], names[b"to"]
        line = self._line()
        if line is not None and line.startswith(b"--- "):
            old, new = self._names()
            if not moved:
                found.old_path = None if old is None else self._path(old, 1)
                found.new_path = None if new is None else self._path(new, 1)
                self._check_absent(found, start + 1)
            found.hunks = self._hunks()
        else:
            if not moved:
                path = self._git_path(first[len(b"diff --git ") :], start + 1)
                found.old_path = None if found.action == Action.CREATE else path
                found.new_path = None if found.action == Action.DELETE else path
            if line is not None and line.rstrip() == b"GIT binary patch":
                self._at += 1
                found.binary = self._binary()
                if found.binary is None:
                    raise self._error("a binary patch without content")
                self._binary()  # how to undo it
            elif line is not None and line.startswith((b"@@", b"+++ ")):
                raise self._error("a header that does not name both files")
            elif line is not None and line.startswith(b"Binary files "):
                raise self._error("it does not have the content of a binary file")
        if found.old_path == found.new_path is None:
            raise self._error("a file that is neither before nor after it", start + 1)
        self._check_whole(found, start)
        return found

    def _check_whole(self, found: FilePatch, start: int) -> None:
        """Raises if a header stands for nothing, or for a content that does not follow it."""
        if found.hunks or found.binary is not None:
            return
        for line in self._lines[start + 1 : self._at]:
            match = _INDEX.fullmatch(line.removeprefix(b"index "))
            blobs = [] if match is None else [match[1], match[2]]
            if len(set(blobs)) == 2 and not all(map(_is_nothing, blobs)):
                raise self._error("a header whose hunks are missing", start + 1)
        if found.action == Action.MODIFY and None in {found.old_mode, found.new_mode}:
            raise self._error("a header without a hunk", start + 1)

    def _extended(self, found: FilePatch, names: dict[bytes, bytes], line: bytes) -> bool:
        """Takes one line of a git header; tells whether it is one."""
        for word in (b"old mode ", b"new mode ", b"deleted file mode ", b"new file mode "):
            if line.startswith(word):
                mode = self._mode(line[len(word) :])
                if b"old" in word or b"deleted" in word:
                    found.old_mode = mode
                else:
                    found.new_mode = mode
                if b"file" in word:
                    found.action = Action.DELETE if b"deleted" in word else Action.CREATE
                return True
        for word in (b"rename ", b"copy "):
            for end in (b"from ", b"to "):
                if line.startswith(word + end):
                    found.action = Action.RENAME if word == b"rename " else Action.COPY
                    name = self._name(line[len(word + end) :])
                    names[end.strip()] = self._path(name, 1, prefixed=False)
                    return True
        if line.startswith(b"index "):
            match = _INDEX.fullmatch(line[len(b"index ") :])
            if match and len(match[1]) == len(match[2]) == _FULL_BLOB:
                found.old_blob, found.new_blob = match[1], match[2]
            return True
        return line.startswith((b"similarity index ", b"dissimilarity index "))

    def _check_absent(self, found: FilePatch, line: int) -> None:
        if found.old_path is None and found.new_path is not None:
            found.action = Action.CREATE
        elif found.new_path is None and found.old_path is not None:
            found.action = Action.DELETE
        elif found.old_path != found.new_path:
            raise self._error("two names, and no word of a rename", line)
        elif found.action in {Action.CREATE, Action.DELETE}:
            raise self._error("a file that is made or deleted has a name on both sides", line)

    def _mode(self, text: bytes) -> int:
        mode = int(text.strip(), 8) if re.fullmatch(rb"[0-7]{1,6}\s*", text) else 0
        if stat.S_IFMT(mode) not in {stat.S_IFREG, stat.S_IFLNK}:
            raise self._error(f"mode {text[:20]!r} is that of no file and no link")
        return mode

    def _plain(self) -> FilePatch:
        line = self._at + 1
        old, new = self._names()
        found = FilePatch(line, hunks=self._hunks())
        strips = [self._strip] if self._strip is not None else [1, 0]
        for name in [name for name in (new, old) if name is not None]:
            for strip in strips:
                path = self._stripped(name, strip)
                if path is not None and path not in found.paths:
                    found.paths.append(self._checked(path, line))
        if not found.paths:
            raise self._error("a header that names no file", line)
        found.loose = True
        found.old_path = found.new_path = found.paths[0]
        if old is None:
            found.action, found.old_path = Action.CREATE, None
        elif new is None:
            found.action, found.new_path = Action.DELETE, None
        return found

    def _names(self) -> tuple[bytes | None, bytes | None]:
        """Reads the lines `---` and `+++`. None where there is no file."""
        names = []
        for sign in (b"--- ", b"+++ "):
            line = self._line()
            if line is None or not line.startswith(sign):
                raise self._error("a header that names one file only")
            text = line[4:]
            name = self._name(text)
            stamp = text.partition(b"\t")[2]
            absent = name == b"/dev/null" or _EPOCH.fullmatch(stamp) is not None
            names.append(None if absent else name)
            self._at += 1
        return names[0], names[1]

    def _name(self, text: bytes) -> bytes:
        if text.startswith(b'"'):
            try:
                return unquoted(text)[0]
            except ValueError as error:
                raise self._error(f"a name in quotes: {error}") from error
        return text.partition(b"\t")[0].removesuffix(b"\r")

    def _git_path(self, text: bytes, line: int) -> bytes:
        """Returns the one path that a header `a/PATH b/PATH` names."""
        text = text.removesuffix(b"\r")
        if text.startswith(b'"') or text.endswith(b'"'):
            try:
                if text.startswith(b'"'):
                    old, rest = unquoted(text)
                    new = unquoted(rest.lstrip(b" "))[0] if b'"' in rest else rest.lstrip(b" ")
                else:
                    old, _, rest = text.partition(b' "')
                    new = unquoted(b'"' + rest)[0]
            except ValueError as error:
                raise self._error(f"a name in quotes: {error}", line) from error
            pairs = [(old, new)]
        else:
            half = len(text) // 2
            spaces = [at for at, byte in enumerate(text) if byte == 0x20]
            spaces = [half] * (half in spaces) + spaces[:_MOST_SPACES]
            pairs = [(text[:at], text[at + 1 :]) for at in spaces]
        strip = 1 if self._strip is None else self._strip
        for old, new in pairs:
            path = self._stripped(old, strip)
            if path is not None and path == self._stripped(new, strip):
                return self._checked(path, line)
        raise self._error("a header that does not name one file", line)

    def _path(self, name: bytes, strip: int, *, prefixed: bool = True) -> bytes:
        strip = strip if self._strip is None else self._strip
        path = self._stripped(name, strip if prefixed else max(strip - 1, 0))
        if path is None:
            raise self._error(f"{name[:200]!r} has fewer than {strip} directories to strip")
        return self._checked(path, self._at + 1)

    @staticmethod
    def _stripped(name: bytes, strip: int) -> bytes | None:
        """Returns a name without its first directories; None if it has not so many."""
        if name.startswith(b"/"):
            return name  # refused where it is checked
        parts = re.split(rb"/+", name)
        return b"/".join(parts[strip:]) if len(parts) > strip else None

    def _checked(self, path: bytes, line: int) -> bytes:
        """Returns a path that stays inside of the tree."""
        try:
            for name in path.split(b"/"):
                check_file_name(name)
        except ValueError as error:
            raise self._error(
                f"{path[:300]!r} is no path inside of a tree: {error}", line
            ) from None
        return path

    # Hunks.

    def _hunks(self) -> list[Hunk]:
        found = []
        while (line := self._line()) is not None and (match := _HUNK.match(line)):
            counts = [1 if text is None else int(text) for text in match.group(2, 4)]
            self._at += 1
            found.append(self._hunk(int(match[1]), counts))
        if line is not None and line.startswith(b"@@"):
            raise self._error("a hunk's first line is damaged")
        if not found:
            raise self._error("a header without a hunk")
        if line is not None and line[:1] in {b" ", b"+", b"-", b"\\"} and not self._is_mail(line):
            raise self._error(f"the hunk of line {found[-1].line} goes on where it should end")
        return found

    def _is_mail(self, line: bytes) -> bool:
        """Tells whether a line after a hunk is the next header, or a mail's signature."""
        return line.rstrip() == b"--" or (line.startswith(b"--- ") and self._names_follow())

    def _hunk(self, old_start: int, counts: list[int]) -> Hunk:
        start = self._at
        sides: tuple[list[bytes], list[bytes]] = ([], [])
        signs = bytearray()
        while len(sides[0]) < counts[0] or len(sides[1]) < counts[1]:
            line = self._line()
            if line is None:
                raise self._error(f"the hunk of line {start} ends early")
            sign, text = line[:1] or b" ", line[1:] + b"\n"
            if sign == b"\\":
                self._unend(sides, signs)
            elif sign in b" -+":
                signs += sign
                for side in {b" ": (0, 1), b"-": (0,), b"+": (1,)}[sign]:
                    if len(sides[side]) == counts[side]:
                        raise self._error(f"the hunk of line {start} is longer than it says")
                    sides[side].append(text)
            else:
                raise self._error(f"the hunk of line {start} ends early")
            self._at += 1
        if (line := self._line()) is not None and line.startswith(b"\\ "):
            self._unend(sides, signs)
            self._at += 1
        leading, trailing = (
            len(signs) - len(rest) for rest in (signs.lstrip(b" "), signs.rstrip(b" "))
        )
        return Hunk(old_start, sides[0], sides[1], leading, trailing, start)

    def _unend(self, sides: tuple[list[bytes], list[bytes]], signs: bytearray) -> None:
        """Takes the end from the line before: `\\ No newline at end of file`."""
        if not signs:
            raise self._error("no line is before this one")
        last = signs[-1:]
        for side in {b" ": (0, 1), b"-": (0,), b"+": (1,)}[bytes(last)]:
            sides[side][-1] = sides[side][-1].removesuffix(b"\n")

    def _binary(self) -> BinaryHunk | None:
        line = self._line()
        match = _BINARY.fullmatch(line) if line is not None else None
        if match is None:
            return None
        self._at += 1
        parts = []
        while (line := self._line()) is not None and line.rstrip(b"\r"):
            try:
                parts.append(decoded_line(line.rstrip(b"\r")))
            except ValueError as error:
                raise self._error(f"a line of a binary patch: {error}") from error
            self._at += 1
        self._at += 1
        return BinaryHunk(match[1] == b"delta", int(match[2]), b"".join(parts))
