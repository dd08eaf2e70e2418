"""The manual pages: right for both programs that show them, and there in an installed wheel."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.docs_man import _prose, manual_pages, roff
from tests.conftest import ROOT

PAGES = sorted((ROOT / "docs" / "man").glob("*.1"))


def needs(program: str) -> None:
    if shutil.which(program) is None:
        assert os.environ.get("CI") != "true", f"scripts/setup --dev installs {program}"
        pytest.skip(f"{program} is not installed")


def run(*words: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    kept = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "MANWIDTH": "200", "HOME": "/"}
    return subprocess.run(
        [*map(str, words)], env={**kept, **environment}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def shown_by_man(page: Path) -> str:
    needs("man")
    done = run("man", "--warnings", "-E", "UTF-8", "-l", page)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def shown_by_mandoc(page: Path) -> str:
    needs("mandoc")
    done = run("mandoc", "-T", "utf8", "-O", "width=200", page)
    assert (done.returncode, done.stderr) == (0, "")
    return re.sub(".\b", "", done.stdout)  # bold is written twice


def test_no_page_is_missing_or_stale():
    pages = manual_pages(ROOT)
    assert [page.name for page in PAGES] == sorted(pages)
    for page in PAGES:
        assert page.read_text() == pages[page.name]
    assert "mountctl-commit.1" in pages


def test_mandoc_finds_nothing_to_complain_of():
    needs("mandoc")
    done = run("mandoc", "-T", "lint", "-W", "style", *PAGES)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_man_shows_the_page_without_a_warning(page):
    shown = shown_by_man(page)
    for title in ("NAME", "SYNOPSIS", "DESCRIPTION", "GLOBAL OPTIONS", "EXAMPLES"):
        assert f"\n{title}\n" in shown
    assert "--store DIR" in shown
    assert "-h, --help" in shown


HOSTILE = [
    ".SH nothing",
    "'br nothing",
    "\\fBno\\fR \\n(.x \\*(xx \\",
    "--option=\"a 'b' `c` ^d ~e\"",
    '"',
    "a \\(aq b",
    "…µ “ü”",
    "..",
    ".",
    "%d $1 #{} @work |&;",
]


@pytest.mark.parametrize("show", [shown_by_man, shown_by_mandoc])
def test_text_is_shown_as_it_is(tmp_path, show):
    page = tmp_path / "hostile.1"
    lines = ['.TH HOSTILE 1 2026-11-21 "x" "y"', ".SH NAME", "hostile \\- text", ".SH DESCRIPTION"]
    for text in HOSTILE:
        lines += [
            ".nf",
            roff(text),
            f"before {roff(text)}",
            ".fi",
            ".PP",
            f'.B "{roff(text)}"',
            ".PP",
        ]
    lines += [".SH END", "of it", ""]
    page.write_text("\n".join(lines))
    shown = [line.strip() for line in show(page).splitlines()]
    for text in HOSTILE:
        assert shown.count(text) == 2
        assert f"before {text}" in shown


def test_a_wrapped_line_is_no_command():
    words = " ".join(["words"] * 13)
    (first, second) = _prose(f"{words} .br 'sp and more")
    assert first == words
    assert second.startswith("\\&.br")
    (first, second) = _prose(f"{words} `.so /etc/passwd` and more")
    assert second == "\\fB\\&.so /etc/passwd\\fR and more"


def test_what_click_leaves_as_it_is_stays_so():
    assert list(_prose("One\ntwo.\n\n\b\n  a  b\n.c\n\nThree.")) == [
        "One two.", ".PP", ".nf", "  a  b", "\\&.c", ".fi", ".PP", "Three.",
    ]  # fmt: skip


def test_an_installed_wheel_has_them(tmp_path):
    needs("man")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"]
    # Of a copy: building writes beside what is built.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("engine", "fsdriver", "mountctl", "docs/man"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"),
        )  # fmt: skip
    shutil.copy(ROOT / "pyproject.toml", source)
    made = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index",
               "--wheel-dir", tmp_path, source, TMPDIR=str(tmp_path))  # fmt: skip
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("amalgamfs-*.whl")
    fresh = tmp_path / "fresh"
    assert run(sys.executable, "-m", "venv", "--without-pip", fresh).returncode == 0
    put = run(*pip, "--python", fresh, "install", "--no-deps", "--no-index", wheel,
              TMPDIR=str(tmp_path))  # fmt: skip
    assert put.returncode == 0, put.stderr
    shown = run("man", "-M", fresh / "share" / "man", "mountctl-commit")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "Store what a session changed as a snapshot." in shown.stdout
    installed = {page.name for page in (fresh / "share" / "man" / "man1").iterdir()}
    assert installed == {page.name for page in PAGES}
