"""What modes should take, what runs took, and what a machine costs."""

import json
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import Repository, SnapshotId
from engine.errors import NotFoundError
from fsdriver import calibration, messages
from fsdriver.calibration import calibrate
from fsdriver.choosing import Attempt, Moves, keep, moves_of, plan, tree_size
from fsdriver.cost_model import (
    ELSEWHERE,
    FULL,
    LAZY,
    MODES,
    OVERLAY,
    Costs,
    ModeCosts,
    Outcome,
    Tree,
    Work,
    added,
    estimate,
)
from fsdriver.run_records import KEPT, RunRecord, RunRecords, key_of, shown, this_machine
from tests.fsdriver.conftest import Mount

COSTS = Costs(
    10.0,
    {
        LAZY: ModeCosts(1.0, asked=0.1, made=1.0),
        OVERLAY: ModeCosts(2.0, asked=0.1, rewritten=0.5),
        FULL: ModeCosts(3.0, entry=0.01, byte=0.001, written=0.01),
    },
)
TREE = Tree(100, 1000)


NOTHING = Work()


def outcome(mode: str, seconds: float, work: Work = NOTHING, **more: object) -> Outcome:
    return msgspec.structs.replace(
        Outcome(mode=mode, seconds=seconds, tree=TREE, work=work), **more
    )


def modes(earlier: list[Outcome], mount: str = "m", tree: Tree = TREE) -> list[str]:
    return [each.mode for each in estimate(COSTS, tree, earlier, mount=mount, modes=MODES)]


# The model.


def test_what_a_mode_adds():
    work = Work(asked=20, made=3, rewritten=4, written=50)
    assert added(COSTS, LAZY, TREE, work, mounted=True) == {
        "start": 1.0, "reading": pytest.approx(2.0), "writing": pytest.approx(3.0),
    }  # fmt: skip
    assert added(COSTS, OVERLAY, TREE, work, mounted=False) == {
        "start": 2.0, "mount": 10.0, "reading": pytest.approx(2.0), "writing": pytest.approx(2.0),
    }  # fmt: skip
    assert added(COSTS, FULL, TREE, work, mounted=False) == {
        "start": 3.0, "tree": pytest.approx(2.0), "writing": pytest.approx(0.5),
    }  # fmt: skip


def test_a_first_run_is_judged_by_its_tree():
    # All of it read: lazy 1 + 10 + 5 made, overlay 2 + 10, full 3 + 2 + 0.5 of writing.
    assert modes([]) == [FULL, OVERLAY, LAZY]
    assert modes([], tree=Tree(1, 0)) == [LAZY, OVERLAY, FULL]
    assert modes([], tree=Tree(1, 0), mount="") == [FULL, LAZY, OVERLAY]
    (first, *_) = estimate(COSTS, TREE, [], mount="m", modes=[LAZY])
    assert (first.own, first.runs) == (None, 0)
    assert first.seconds == pytest.approx(sum(first.added.values()))


def test_what_overlayfs_showed_once_the_kernel_still_has():
    cold = outcome(OVERLAY, 30.0, Work(asked=200), mount="m")
    (warm, *_) = estimate(COSTS, TREE, [cold], mount="m", modes=[OVERLAY])
    (other, *_) = estimate(COSTS, TREE, [cold], mount="another", modes=[OVERLAY])
    assert warm.own == other.own == pytest.approx(8.0)
    assert [warm.seconds, other.seconds] == pytest.approx([10.0, 30.0])


def test_a_session_in_the_mount_asks_as_often_as_the_last_one():
    first = outcome(LAZY, 30.0, Work(asked=200), mount="m")
    again = outcome(LAZY, 12.0, Work(asked=20), mount="m")
    overlay = outcome(OVERLAY, 11.0, Work(), mount="m")

    def seconds(*earlier: Outcome) -> float:
        (found,) = estimate(COSTS, TREE, earlier, mount="m", modes=[LAZY])
        return found.seconds

    assert seconds(first) == pytest.approx(30.0)
    assert seconds(first, overlay) == pytest.approx(30.0)
    assert seconds(first, first, again, overlay) == pytest.approx(12.0)


def test_work_decides():
    writer = [outcome(OVERLAY, 12.0, Work(made=100))]
    assert modes(writer) == [OVERLAY, FULL, LAZY]
    rewriter = [outcome(OVERLAY, 52.0, Work(rewritten=100, written=10))]
    assert modes(rewriter)[0] == LAZY  # which has no cost for it here
    reader = [outcome(FULL, 10.0, Work(asked=1000), mount="")]
    assert modes(reader) == [FULL, LAZY, OVERLAY]


def test_a_mode_that_was_tried_is_judged_by_itself():
    tried = [outcome(LAZY, 5.0, mount="m"), outcome(OVERLAY, 100.0, mount="m")]
    found = {each.mode: each for each in estimate(COSTS, TREE, tried, mount="m", modes=MODES)}
    assert found[LAZY].seconds == pytest.approx(5.0)
    assert found[OVERLAY].seconds == pytest.approx(100.0)
    assert found[FULL].own == pytest.approx(4.0)  # the least of the others
    assert [found[mode].runs for mode in MODES] == [1, 1, 0]


@given(
    st.lists(
        st.builds(
            outcome, st.sampled_from(MODES), st.floats(0, 1e5),
            st.builds(Work, *[st.integers(0, 1 << 40)] * 6), mount=st.sampled_from(["", "m"]),
            fresh=st.booleans(),
        ),
        max_size=20,
    ),
    st.builds(Tree, st.integers(0, 1 << 40), st.integers(0, 1 << 60)),
    st.sampled_from(["", "m"]),
)  # fmt: skip
def test_estimates_are_ordered_complete_and_never_negative(earlier, tree, mount):
    found = estimate(ELSEWHERE, tree, earlier, mount=mount, modes=MODES)
    assert {each.mode for each in found} == set(MODES)
    assert [each.seconds for each in found] == sorted(each.seconds for each in found)
    assert all(each.seconds >= 0 and (each.own or 0) >= 0 for each in found)


# What is kept.


def record(command: list[str], base: str, **more: object) -> RunRecord:
    made = RunRecord(
        started_ns=1, key=key_of(command), command=shown(command), base=base, target="main",
        outcome=outcome(LAZY, 1.0), exit_code=0, asked="auto",
    )  # fmt: skip
    return msgspec.structs.replace(made, **more)


@pytest.fixture
def records(tmp_path: Path) -> RunRecords:
    return RunRecords(str(tmp_path))


def test_runs_of_the_same_command_on_the_same_tree(records: RunRecords):
    here, elsewhere = SnapshotId(b"\1" * 32), SnapshotId(b"\2" * 32)
    a, b = ["make", "check"], ["make", "check "]
    assert records.like(a, [here]) == []
    other = record(a, elsewhere.hex())
    records.add(other)
    assert records.like(a, [here]) == [other]  # better than nothing
    ours = [record(a, here.hex(), started_ns=number) for number in range(12)]
    for each in [record(b, here.hex()), *ours, record(a, here.hex(), exit_code=137)]:
        records.add(each)
    assert records.like(a, iter([here])) == ours
    assert len(records.like(b, [here])) == 1
    assert len(records.all()) == 15


def test_what_runs_say_of_renamed_directories():
    def run(moved: int | None, exit_code: int = 0) -> RunRecord:
        did = outcome(LAZY, 1.0, moved=moved)
        return record(["x"], "00", outcome=did, exit_code=exit_code)

    assert moves_of([]) is moves_of([run(None)]) is moves_of([run(0, 1)]) is Moves.UNKNOWN
    assert moves_of([run(0), run(None), run(0, 1)]) is Moves.NONE
    assert moves_of([run(0), run(2, 1), run(0)]) is Moves.SOME


def test_names_that_are_no_text_and_torn_lines(records: RunRecords, tmp_path: Path):
    command = ["cat", os.fsdecode(b"a\xff\n")]
    records.add(record(command, "00"))
    with (tmp_path / "runs").open("ab") as file:
        file.write(b'{"started_ns":1,"ke')  # as a full disk leaves it
    records.add(record(["true"], "00"))
    (tmp_path / "runs").write_bytes((tmp_path / "runs").read_bytes() + b"\xff\n[]\n\n")
    assert [each.command for each in records.all()] == ["cat 'a\ufffd\n'", "true"]
    assert len(records.like(command, [])) == 1


def test_the_oldest_go(records: RunRecords, tmp_path: Path):
    line = msgspec.json.encode(record(["x" * 1000], "00")) + b"\n"
    (tmp_path / "runs").write_bytes(line * 1500)
    last = record(["last"], "00")
    records.add(last)
    kept = records.all()
    assert (len(kept), kept[-1]) == (KEPT, last)
    assert sorted(os.listdir(tmp_path)) == ["locks", "runs"]


def test_costs_of_another_machine_do_not_count(records: RunRecords, tmp_path: Path):
    assert records.costs() == ELSEWHERE
    ours = msgspec.structs.replace(COSTS, machine=this_machine())
    records.set_costs(ours)
    assert records.costs() == ours
    for wrong in (
        msgspec.json.encode(msgspec.structs.replace(ours, machine="another")),
        msgspec.json.encode(msgspec.structs.replace(ours, modes={})), b"", b"{}", b"\xff",
    ):  # fmt: skip
        (tmp_path / "costs").write_bytes(wrong)
        assert records.costs() == ELSEWHERE


# For real.


@pytest.mark.fuse
def test_a_session_that_is_removed_meanwhile_is_named(own: Mount):
    own.start()
    with own.repository() as repository, Attempt(repository, "s", [LAZY]) as attempt:
        attempt.prepare("true")
        own.ask(messages.Remove("s"))
        with pytest.raises(NotFoundError, match="no session is called 's'"):
            attempt.start(["true"])


@pytest.mark.fuse
@pytest.mark.parametrize("mode", MODES)
def test_what_a_run_did_is_counted(own: Mount, mode: str):
    own.start()
    script = (
        "cat README src/lib/big >/dev/null; mkdir made; for i in 1 2 3; do echo $i > made/$i; done;"
        " echo more >> README; rm src/main.c"
    )
    with own.repository() as repository:
        session = repository.sessions.get("s")
        with Attempt(repository, "s", [mode]) as attempt:
            ended = attempt.start(["sh", "-c", script]).wait()
        kept = keep(
            repository, session, ["sh", "-c", script], attempt, ended, asked=mode, target="s"
        )
        work, took = kept.outcome.work, kept.outcome
        assert (took.mode, took.fresh) == (mode, False)
        assert bool(took.mount) == (mode != FULL)
        assert took.seconds == attempt.seconds > 0
        names = 1 if mode == OVERLAY else 3  # a linked file's; overlayfs breaks the links
        assert (work.made, work.rewritten, work.removed) == (4, names, 1)
        assert 5 < work.written < 100
        if mode != FULL or not os.statvfs(own.store).f_flag & os.ST_NOATIME:
            assert work.asked >= 2
        found = plan(
            repository, SnapshotId(session.parent), session.root, ["sh", "-c", script], place=None
        )
        assert [each.outcome for each in found.earlier] == [took]
        assert found.tree == tree_size(session.root)


def test_what_noise_hides_costs_what_it_does_elsewhere():
    assert calibration._each(1.0, 4, 0.5) == 0.25
    assert calibration._each(-1.0, 4, 0.5) == calibration._each(0.0, 0, 0.5) == 0.5


@pytest.mark.fuse
def test_calibration(tmp_path: Path, repository: Repository):
    costs = calibrate(repository.path)
    assert costs.machine == this_machine()
    assert set(costs.modes) == set(MODES)
    for mode in MODES:
        values = msgspec.to_builtins(costs.modes[mode])
        assert all(0 <= value < 10 for value in values.values()), values
        assert values["start"] >= 0
        assert costs.modes[mode] != ELSEWHERE.modes[mode]
    assert costs.modes[FULL].entry > 0
    assert costs.modes[LAZY].made > 0
    assert json.loads(msgspec.json.encode(costs))["mount"] > 0
    assert not [name for name in os.listdir(repository.path) if name.startswith("calibrating")]
