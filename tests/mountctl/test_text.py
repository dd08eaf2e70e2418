import os
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mountctl.text import count, path_fields, plain, quoted, size, visible, when

names = st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"plain name", "plain name"),
        ("größe".encode(), "größe"),
        (b"a\nb", '"a\\nb"'),
        (b"\x1b[31mred", '"\\033[31mred"'),
        (b'say "hi"', '"say \\"hi\\""'),
        (b"back\\slash", '"back\\\\slash"'),
        (b"latin\xff", '"latin\\377"'),
        ("turned\u202e".encode(), '"turned\\342\\200\\256"'),
        ("\x9b31m".encode(), '"\\302\\23331m"'),
    ],
)
def test_names_are_written_as_git_writes_them(name, shown):
    assert quoted(name) == shown


@given(names)
def test_a_name_is_printable_and_can_be_read_back(name):
    shown = quoted(name)
    assert shown.isprintable()
    if shown.startswith('"'):
        inner = shown[1:-1].encode().decode("unicode_escape")
        # What was printable beyond ASCII stands for itself, so it is its UTF-8 read as Latin-1.
        assert inner.encode("latin-1") == name
    else:
        assert os.fsencode(shown) == name


@given(names, names)
def test_two_names_never_look_the_same(one, other):
    assert (quoted(one) == quoted(other)) == (one == other)


@given(st.text())
def test_visible_text_is_printable(text):
    assert visible(text).isprintable()
    assert visible(text, keep="\n").replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (5 * 1024**3, "5.0 GiB"),
        (2**70, "1024.0 EiB"),
    ],
)
def test_sizes(number, shown):
    assert size(number) == shown


def test_counts():
    assert count(1, "entry") == "1 entry"
    assert count(2048, "entry") == "2,048 entries"
    assert count(0, "file") == "0 files"


def test_times_are_iso_and_never_fail():
    assert shlex.split(when(0))[0].count("-") == 2
    assert when(2**63 - 1)
    assert when(10**30) == f"{10**30} ns"
    assert when(-(10**30))


def test_json_says_when_a_path_is_not_utf8():
    assert path_fields("größe".encode()) == {"path": "größe"}
    assert path_fields(b"a\xff") == {"path": "a\\xff", "path_bytes": "Yf8="}
    assert plain({"a\udcff": [b"\x01\x02", ("\udcfe",)]}) == {"a\\xff": ["0102", ["\\xfe"]]}
