"""`mountctl log --graph`, `merge-base` and `bisect`, with real snapshots and real commands."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def line(mountctl, tmp_path) -> list[str]:
    """Nine snapshots of a file with its number; from the sixth on there is also `broken`."""
    made = []
    source = tmp_path / "source"
    (source / "closed").mkdir(parents=True)
    (source / "closed" / "file").write_text("x")
    (source / "closed").chmod(0o555)
    for n in range(9):
        (source / "number").write_text(str(n))
        if n == 5:
            (source / "broken").write_text("")
        made.append(mountctl.json("import", source, "-m", f"number {n}")["snapshot"])
    mountctl("ref", "set", "main", made[-1])
    (source / "closed").chmod(0o755)
    return made


@pytest.fixture
def forked(mountctl, line, tmp_path) -> list[str]:
    """On top of the line two snapshots and one that merges them."""
    made: list[str] = []
    for n, parents in enumerate([[line[7]], [line[8]], ["0", "1"]]):
        (tmp_path / "source" / "number").write_text(f"fork {n}")
        above = [made[int(parent)] if len(parent) == 1 else parent for parent in parents]
        words = [word for parent in above for word in ("--parent", parent)]
        made.append(
            mountctl.json("import", tmp_path / "source", "-m", f"fork {n}", *words)["snapshot"]
        )
    return made


def left_behind(place: Path) -> list[str]:
    return [name for name in os.listdir(place) if name.startswith("amalgamfs-")]


def test_log_graph(mountctl, forked, line):
    shown = mountctl("log", "--graph", forked[2]).stdout.splitlines()
    assert shown[:7] == [
        f"* {forked[2][:12]} fork 2",
        "|\\",
        f"| * {forked[1][:12]} fork 1",
        f"| * {line[8][:12]} (main) number 8",
        f"* | {forked[0][:12]} fork 0",
        "|/",
        f"* {line[7][:12]} number 7",
    ]
    assert len(shown) == 2 + 3 + 9
    assert mountctl("log", "--graph", forked[2], "--limit", 2).stdout.splitlines() == shown[:3]
    records = mountctl.json("log", "--graph", forked[2])
    assert records[0]["parents"] == forked[:2]
    assert {each["snapshot"] for each in records} == {*forked, *line}
    assert mountctl("log", "--graph").stdout.splitlines()[0].endswith("(main) number 8")
    assert mountctl("log", "--graph", "--all").stdout.splitlines() == shown
    two = mountctl("log", "--graph", forked[0], forked[1]).stdout.splitlines()
    assert two[0] == f"* {forked[1][:12]} fork 1"
    mountctl("log", forked[0], forked[1], code=2)
    mountctl("log", "--all", code=2)


def test_the_lines_are_coloured_on_a_terminal_only(mountctl, forked):
    seen = mountctl.on_terminal("log", "--graph", forked[2])
    assert "\x1b[31m|" in seen
    plain = mountctl.on_terminal("log", "--graph", forked[2], NO_COLOR="1")
    assert "\x1b" not in plain
    assert "|\\" in plain


def test_a_long_table_is_written_as_it_comes_and_stays_aligned(capsys):
    from mountctl.output import Output

    taken = []

    def rows():
        for n in range(450):
            taken.append(n)
            yield (str(n), "x" * (n // 100), "end")

    output = Output(json=False, quiet=False)
    seen = []
    output.line = lambda text="": seen.append((text, len(taken)))  # type: ignore[method-assign]
    output.table(("A", "B", "C"), rows())
    assert seen[0] == ("A    B  C", 200)
    assert seen[200] == ("199  x  end", 200)
    assert seen[201][1] == 400
    assert [line for line, _ in seen[401:]] == [f"{n}  xxxx  end" for n in range(400, 450)]


def test_a_log_gives_its_first_line_at_once_and_may_be_cut(mountctl, forked):
    shell = f"{' '.join(mountctl.command('log', '--graph', forked[2]))} | head -n 1"
    done = subprocess.run(
        shell, shell=True, env=mountctl.environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == f"* {forked[2][:12]} fork 2\n"
    assert done.stderr == ""


def test_merge_base(mountctl, forked, line):
    assert mountctl("merge-base", forked[0], forked[1]).stdout == line[7] + "\n"
    assert mountctl.json("merge-base", forked[0], "main") == {"merge_bases": [line[7]]}
    mountctl("merge-base", "--is-ancestor", "main", forked[2])
    mountctl("merge-base", "--is-ancestor", forked[2], "main", code=1)
    assert mountctl.json("merge-base", "--is-ancestor", line[0], "main") == {"is_ancestor": True}


def test_merge_base_of_what_has_nothing_in_common(mountctl, line, tmp_path):
    (tmp_path / "other").mkdir()
    other = mountctl.json("import", tmp_path / "other")["snapshot"]
    assert mountctl("merge-base", "main", other, code=1).stdout == ""
    assert mountctl.json("merge-base", "main", other, code=1) == {"merge_bases": []}
    mountctl("snapshot", "rm", line[4])
    assert "were removed" in mountctl("merge-base", "main", line[2], code=1).stderr


TEST = "test ! -e broken && cat number >&2"


def test_bisect_finds_the_first_bad_snapshot(mountctl, line, tmp_path):
    done = mountctl.run("bisect", line[0], "main", "--", "sh", "-c", TEST, TMPDIR=str(tmp_path))
    assert done.stdout == line[5] + "\n"
    assert f"{line[5][:12]} is bad" in done.stderr
    assert "found with 3 tests" in done.stderr
    assert left_behind(tmp_path) == []


def test_bisect_under_json_and_what_the_command_is_told(mountctl, line, tmp_path):
    told = tmp_path / "told"
    script = f"echo out; echo $AMALGAMFS_SNAPSHOT $AMALGAMFS_STORE $PWD >> {told}; {TEST}"
    done = mountctl.run("bisect", line[0], "main", "--json", "--", "sh", "-c", script)
    answer = json.loads(done.stdout)
    assert answer["first_bad"] == line[5]
    assert answer["candidates"] == [line[5]]
    assert "out" in done.stderr
    seen = [row.split() for row in told.read_text().splitlines()]
    assert [each["snapshot"] for each in answer["tested"]] == [row[0] for row in seen]
    assert {row[1] for row in seen} == {str(mountctl.store)}
    assert all(row[2].endswith(row[0]) for row in seen)


def test_bisect_with_snapshots_that_cannot_be_tested(mountctl, line):
    script = "case $(cat number) in [456]) exit 125;; esac; " + TEST
    done = mountctl.run("bisect", line[0], "main", "--", "sh", "-c", script, code=1)
    shown = [row.split()[0] for row in done.stdout.splitlines()[1:]]
    assert shown == [each[:12] for each in line[7:3:-1]]
    answer = json.loads(
        mountctl.run("bisect", line[0], "main", "--json", "--", "sh", "-c", script, code=1).stdout
    )
    assert answer["first_bad"] is None
    assert answer["candidates"] == line[7:3:-1]


@pytest.mark.parametrize(
    ("script", "how"),
    [("exit 128", "exit code 128"), ("exit 255", "exit code 255"), ("kill -9 $$", "signal 9")],
)
def test_what_is_no_verdict_ends_the_search(mountctl, line, tmp_path, script, how):
    done = mountctl.run(
        "bisect", line[0], "main", "--", "sh", "-c", script, code=4, TMPDIR=str(tmp_path)
    )
    assert how in done.stderr
    assert done.stdout == ""
    assert left_behind(tmp_path) == []


def test_a_command_that_is_not_there_is_no_verdict(mountctl, line, tmp_path):
    mountctl.run("bisect", line[0], "main", "--", "no-such-program", code=127)
    mountctl.run("bisect", line[0], "main", "--", "./not-here", code=127, TMPDIR=str(tmp_path))
    mountctl.run("bisect", line[0], "main", "--", "./number", code=126, TMPDIR=str(tmp_path))
    assert left_behind(tmp_path) == []
    mountctl("bisect", line[0], "main", code=2)
    assert "wrong way round" in mountctl.fails(2, "bisect", "main", line[0], "--", "true")
    mountctl.fails(3, "bisect", "nothing", "main", "--", "true")


def test_a_removed_snapshot_is_told(mountctl, line):
    mountctl("snapshot", "rm", line[3])
    done = mountctl.run("bisect", line[0], "main", "--", "sh", "-c", TEST)
    assert done.stdout == line[5] + "\n"
    assert "warning: 1 snapshot on the way were removed" in done.stderr


WAITS = (
    "trap 'echo asked > {0}/asked; exit 1' TERM; echo $$ > {0}/pid; while :; do sleep 0.05; done"
)
PATIENT = "import mountctl.trial as t; t.PATIENCE = 120; from mountctl.__main__ import main; main()"
"""A busy disk may keep the command from ending in the seconds that it usually has."""
STUBBORN = "trap '' TERM; (trap '' TERM; sleep 600) & echo $! > {0}/pid; wait; wait; sleep 600"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_ends_the_command_and_leaves_nothing(mountctl, line, tmp_path, number):
    told = tmp_path / "told"
    told.mkdir()
    os.mkfifo(told / "pid")
    program = subprocess.Popen(
        [sys.executable, "-c", PATIENT, "bisect", line[0], "main", "--", "sh", "-c",
         WAITS.format(told)],
        env=mountctl.environment(TMPDIR=str(tmp_path)), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    pid = int((told / "pid").read_text())
    child = os.pidfd_open(pid)
    assert left_behind(tmp_path)
    program.send_signal(number)
    assert select.select([child], [], [], 120)[0]
    os.close(child)
    assert program.communicate(timeout=120)[0] == ""
    assert program.returncode == 130
    assert (told / "asked").exists()
    assert left_behind(tmp_path) == []


def test_a_command_that_will_not_end_is_killed_with_all_that_it_started(mountctl, line, tmp_path):
    told = tmp_path / "told"
    told.mkdir()
    os.mkfifo(told / "pid")
    program = subprocess.Popen(
        [sys.executable, "-c",
         "import mountctl.trial as t; t.PATIENCE = 0.2; from mountctl.__main__ import main; main()",
         "bisect", line[0], "main", "--", "sh", "-c", STUBBORN.format(told)],
        env=mountctl.environment(TMPDIR=str(tmp_path)),
    )  # fmt: skip
    below = os.pidfd_open(int((told / "pid").read_text()))
    program.send_signal(signal.SIGTERM)
    assert program.wait(timeout=120) == 130
    assert select.select([below], [], [], 120)[0]
    os.close(below)
    assert left_behind(tmp_path) == []


@pytest.mark.fuse
def test_bisect_in_the_mount(mountctl, line, tmp_path):
    script = (
        f"test $(basename $PWD) = $AMALGAMFS_SNAPSHOT || exit 200; ! touch x || exit 201; {TEST}"
    )
    done = mountctl.run(
        "bisect", line[0], "main", "--in-mount", "--", "sh", "-c", script, TMPDIR=str(tmp_path)
    )
    assert done.stdout == line[5] + "\n"
    assert mountctl.json("status")["mount"] is None
