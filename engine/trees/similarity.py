"""Similarity of files: what two files share, by chunks without reading them, or by lines.

Scores are between 0 and 1: the bytes that both files have, as a share of the larger one, as in
git's rename detection.
"""

from collections import Counter
from collections.abc import Iterator

from engine.storage import content
from engine.storage.nodes import Entry, Kind, Ref
from engine.storage.objects import Objects

LARGEST_TEXT = 32 << 20
"""A larger file is not read to be compared line by line."""
LARGEST_SPANS = 1 << 20
"""A larger file is compared by its chunks, others by their lines."""

_SPAN = 64
"""A longer line is compared in pieces of so many bytes."""


def read_text(objects: Objects, entry: Entry | None) -> bytes | None:
    """Returns the bytes of a file or link if it is a text, none for what has no lines, or None.

    A file with a zero byte is binary, and so is one larger than LARGEST_TEXT.
    """
    if entry is None or entry.kind not in {Kind.FILE, Kind.SYMLINK}:
        return b""
    if entry.kind == Kind.SYMLINK:
        assert isinstance(entry.content, bytes)
        return entry.content
    if entry.size > LARGEST_TEXT or looks_binary(objects, entry):
        return None
    data = content.read(objects, entry, 0, entry.size)
    return None if b"\0" in data else data


def looks_binary(objects: Objects, entry: Entry) -> bool:
    """Tells whether there is a zero byte among a file's first 8,000: git's rule."""
    return b"\0" in content.read(objects, entry, 0, 8000)


def shared_bytes(objects: Objects, old: Entry, new: Entry) -> int:
    """Returns how many bytes lie in chunks or holes that both files have; reads no chunk.

    Files without chunks share all of their bytes or none. Lists that both have stay unread,
    and each of the others is opened once, however often it is named.
    """
    if old.content == new.content:
        return min(old.size, new.size)
    if isinstance(old.content, bytes) or isinstance(new.content, bytes):
        return 0
    one, other = Counter(old.content), Counter(new.content)
    shared = 0
    while one and other:
        both = one & other
        shared += sum(ref.length * count for ref, count in both.items())
        one -= both
        other -= both
        levels = {ref.level for refs in (one, other) for ref in refs}
        if not levels or max(levels) == 0:
            break
        one, other = (_opened(objects, refs, max(levels)) for refs in (one, other))
    return shared


def _opened(objects: Objects, refs: Counter[Ref], level: int) -> Counter[Ref]:
    """Returns the refs with those of one level replaced by what is in their lists."""
    result: Counter[Ref] = Counter()
    for ref, count in refs.items():
        if ref.level < level:
            result[ref] += count
        else:
            for below in content.listed(objects, ref):
                result[below] += count
    return result


Spans = dict[bytes, int]
"""What a file consists of: how many of its bytes are in each span."""


def line_spans(data: bytes) -> Spans:
    """Returns the spans of a text: its lines, long ones in pieces."""
    spans: Spans = {}
    for line in data.split(b"\n"):
        for at in range(0, len(line), _SPAN):
            piece = line[at : at + _SPAN]
            spans[piece] = spans.get(piece, 0) + len(piece)
        spans[b""] = spans.get(b"", 0) + 1  # the line's end
    spans[b""] -= 1
    return spans


def chunk_spans(objects: Objects, entry: Entry) -> Spans:
    """Returns the spans of a file in chunks: the chunks. Opens each list once."""
    refs = Counter(entry.content) if isinstance(entry.content, tuple) else Counter()
    while refs and (level := max(ref.level for ref in refs)):
        refs = _opened(objects, refs, level)
    return {ref.id: ref.length * count for ref, count in refs.items() if ref.id is not None}


def score(one: Spans, other: Spans, largest: int) -> float:
    """Returns the bytes that both have as a share of `largest`, the larger file's size."""
    if len(one) > len(other):
        one, other = other, one
    shared = sum(min(size, other[span]) for span, size in one.items() if span in other)
    return min(shared / largest, 1.0) if largest else 1.0


class SpanIndex:
    """Finds among many files those that a file may be similar to, without comparing all pairs.

    Spans that many files have, such as empty lines, tell nothing and are left out here.
    """

    _COMMON = 16

    def __init__(self, files: list[Spans]) -> None:
        self._holders: dict[bytes, list[int]] = {}
        for number, spans in enumerate(files):
            for span in spans:
                holders = self._holders.setdefault(span, [])
                if len(holders) <= self._COMMON:
                    holders.append(number)

    def candidates(self, spans: Spans, most: int) -> Iterator[int]:
        """Yields the numbers of the files that share most with `spans`, the nearest first."""
        found: Counter[int] = Counter()
        for span, size in spans.items():
            holders = self._holders.get(span, ())
            if len(holders) <= self._COMMON:
                for number in holders:
                    found[number] += size
        for number, _ in found.most_common(most):
            yield number
