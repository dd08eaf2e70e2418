"""Some guides, run as a person would type them, and as a program.

`python -m tests.test_guides [GUIDE]...` puts what the commands say now into them.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.test_readme import BLOCK, DOCS, plain, run_tour, tour

GUIDES = {
    "history": "[True] True\n",
    "episodes": "[1, 11] 0.9\n[10, 11]\n8 3\n",
    "interchange": "1 ['main']\n4\nTrue\nTrue\n",
    "git": "0 ['feature.x', 'feature.y', 'main', 'tags.v1']\n1 ['refs/heads/best']\n",
}
STORE = ".local/share/amalgamfs/store"


@pytest.mark.parametrize("guide", GUIDES)
def test_the_guide_shows_what_the_commands_say(tmp_path: Path, guide: str) -> None:
    page = (DOCS / f"guide/{guide}.md").read_text()
    assert plain(run_tour(page, str(tmp_path))) == plain(tour(page))
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    os.symlink(tmp_path / STORE, tmp_path / "store")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.startswith(GUIDES[guide])
    if guide == "history":
        lines = done.stdout.splitlines()
        assert lines[1].endswith(" 2 both")
        assert lines[-1] == "number 4 3"


def write(guide: str, folder: str) -> None:
    """Puts what the commands say now, in this folder, into a guide."""
    file = DOCS / f"guide/{guide}.md"
    page = file.read_text()
    blocks = iter(run_tour(page, folder))
    head, rest = page.split("<!-- tour:begin -->")
    body, tail = rest.split("<!-- tour:end -->")
    for block in BLOCK.findall(body):
        shown = "\n".join(next(blocks)) + "\n"
        body = body.replace(f"```console\n{block}```", f"```console\n{shown}```")
    file.write_text(f"{head}<!-- tour:begin -->{body}<!-- tour:end -->{tail}")


if __name__ == "__main__":
    for each in sys.argv[1:] or GUIDES:
        with tempfile.TemporaryDirectory() as place:
            write(each, place)
