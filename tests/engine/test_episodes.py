"""Episodes against a list of what was appended; and what happens to them when things go wrong."""

import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import engine.workspaces.committing
from engine import Repository, SnapshotId
from engine.episodes.steps import (
    CorruptStepError,
    InvalidStepError,
    NewStep,
    Seen,
    Step,
    reward_in,
    reward_key,
    step_key,
)
from engine.episodes.trajectories import Filter, append, snapshots_held
from engine.errors import (
    CorruptObjectError,
    InUseError,
    InvalidNameError,
    NameTakenError,
    NotFoundError,
)
from engine.ids import digest
from engine.storage.snapshots import encode_snapshot, make_snapshot
from engine.storage.store import Db, Writer
from engine.upkeep.holders import Target
from tests.conftest import ROOT

finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | finite | st.text(max_size=6),
    lambda below: (
        st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=4), below, max_size=3)
    ),
    max_leaves=6,
)
objects = st.dictionaries(st.text(max_size=3), json_values, max_size=2)
few = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0]) | finite
verdicts = st.sampled_from(["pass", "fail", "error"]) | st.text(max_size=4)
commands = st.lists(st.sampled_from(["make", "check", "-j2", "a b", "", "é"]), max_size=3)


def plant(repository: Repository, count: int) -> list[SnapshotId]:
    """Stores snapshots of an empty tree, each with a parent."""
    empty = Path(repository.path).parent / "empty"
    empty.mkdir()
    first = repository.import_directory(str(empty)).snapshot
    root = repository.snapshot(SnapshotId(first)).root
    made = [SnapshotId(first)]

    def change(writer: Writer) -> None:
        del made[1:]
        for n in range(count - 1):
            record = make_snapshot(root, (made[-1] if n % 2 else made[0],), f"number {n}")
            identifier, data = encode_snapshot(record)
            writer.put(Db.SNAPSHOTS, identifier, data)
            made.append(identifier)

    repository.store.write(change)
    return made


class EpisodesMachine(RuleBasedStateMachine):
    """What is asked of the episodes is what a list of all steps says."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="episodes"))
        self.repository = Repository.create(str(self.folder / "store"))
        self.snapshots = plant(self.repository, 6)
        self.model: dict[str, list[dict[str, Any]]] = {}
        self.last: dict[str, int] = {}

    @initialize()
    def begin(self) -> None:
        self.create("a", 0)

    @rule(name=st.sampled_from(["a", "aa", "a.b"]), root=st.integers(0, 5) | st.none())
    def create(self, name: str, root: int | None) -> None:
        snapshot = None if root is None else self.snapshots[root]
        if snapshot is not None and not self.repository.has_snapshot(snapshot):
            with pytest.raises((NotFoundError, NameTakenError)):
                self.repository.episodes.create(name, snapshot)
        elif name in self.model:
            with pytest.raises(NameTakenError):
                self.repository.episodes.create(name, snapshot)
        else:
            made = self.repository.episodes.create(name, snapshot, {"n": [name]})
            assert (made.name, made.root, made.metadata) == (name, snapshot, {"n": [name]})
            self.model[name], self.last[name] = [], 0

    @rule(
        data=st.data(),
        action=json_values,
        reward=few | st.none(),
        verdict=verdicts | st.none(),
        command=commands | st.none(),
        metadata=objects,
        count=st.integers(1, 3),
    )
    def append(self, data, action, reward, verdict, command, metadata, count) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        steps = self.model[name]
        known = [step["number"] for step in steps]
        parents = st.sampled_from([None, *known]) | st.integers(-3, 3)
        new: list[NewStep] = []
        expected: list[dict[str, Any]] = []
        fails = False
        for n in range(count):
            number = self.last[name] + 1 + n
            parent = data.draw(parents)
            snapshot = data.draw(st.sampled_from([None, *self.snapshots]))
            new.append(
                NewStep(
                    parent=parent, action=action, snapshot=snapshot, summary=[action],
                    reward=reward, verdict=verdict, metadata=metadata,
                    command=None if command is None else tuple(command),
                )
            )  # fmt: skip
            above = parent + number if parent is not None and parent < 0 else parent
            there = {*known, *(step["number"] for step in expected)}
            fails |= above is not None and above not in there
            fails |= snapshot is not None and not self.repository.has_snapshot(snapshot)
            expected.append(
                {
                    "number": number, "parent": above, "action": action, "snapshot": snapshot,
                    "summary": [action], "reward": reward, "verdict": verdict,
                    "command": new[-1].command, "metadata": metadata, "value": None,
                    "visits": None, "observations": 0,
                }
            )  # fmt: skip
        if fails:
            with pytest.raises(NotFoundError):
                self.repository.episodes.append_many(name, new)
            return
        made = self.repository.episodes.append_many(name, new)
        assert [facts(step) for step in made] == expected
        steps += expected
        self.last[name] += count

    @rule(
        data=st.data(),
        reward=few | st.none(),
        verdict=verdicts | st.none(),
        value=finite | st.none(),
        visits=st.integers(0, 2**63 - 1) | st.none(),
        metadata=objects,
    )
    def observe(self, data, reward, verdict, value, visits, metadata) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        number = data.draw(st.integers(-1, self.last[name] + 1))
        seen = Seen(reward=reward, verdict=verdict, value=value, visits=visits, metadata=metadata)
        known = {step["number"]: step for step in self.model[name]}
        if number not in known:
            with pytest.raises(NotFoundError):
                self.repository.episodes.observe(name, number, seen)
            return
        step = known[number]
        for field in ("reward", "verdict", "value", "visits"):
            if getattr(seen, field) is not None:
                step[field] = getattr(seen, field)
        step["metadata"] = step["metadata"] | metadata
        step["observations"] += 1
        assert facts(self.repository.episodes.observe(name, number, seen)) == step
        history = self.repository.episodes.observations(name, number)
        assert len(history) == step["observations"]
        assert history[-1].metadata == step["metadata"]

    @rule(
        data=st.data(), best=st.integers(0, 3), below=few, by_best=st.booleans(),
        unscored=st.booleans(), dry_run=st.booleans(),
    )  # fmt: skip
    def prune(self, data, best, below, by_best, unscored, dry_run) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        steps = self.model[name]
        scored = sorted(
            (step for step in steps if step["reward"] is not None),
            key=lambda step: (-step["reward"], step["number"]),
        )
        inner = {step["parent"] for step in steps}
        if by_best:
            kept = {step["number"] for step in scored[:best]}
        else:
            kept = {step["number"] for step in scored if step["reward"] >= below}
        if not unscored:
            kept |= {
                step["number"] for step in steps
                if step["reward"] is None and step["number"] not in inner
            }  # fmt: skip
        for step in reversed(steps):
            if step["number"] in kept and step["parent"] is not None:
                kept.add(step["parent"])
        report = self.repository.episodes.prune(
            name, keep_best=best if by_best else None, below=None if by_best else below,
            unscored=unscored, dry_run=dry_run,
        )  # fmt: skip
        going = [step for step in steps if step["number"] not in kept]
        assert (report.removed, report.kept) == (len(going), len(kept))
        self.after(name, going, list(report.snapshots), dry_run)
        if not dry_run:
            self.model[name] = [step for step in steps if step["number"] in kept]

    @rule(data=st.data())
    def remove(self, data) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        if len(self.model) == 1:
            return
        report = self.repository.episodes.remove(name)
        assert report.removed == len(self.model[name])
        self.after(name, self.model.pop(name), list(report.snapshots), dry_run=False)
        del self.last[name]

    def after(self, name, going, removed, dry_run) -> None:
        """Snapshots go if the steps held them and neither another nor a snapshot needs them."""
        numbers = {(name, step["number"]) for step in going}
        held = {
            step["snapshot"] for other, steps in self.model.items() for step in steps
            if (other, step["number"]) not in numbers
        } | {self.snapshots[0]}  # the last import of its directory  # fmt: skip
        held |= {each.root for each in self.repository.episodes.all()}
        candidates = {step["snapshot"] for step in going} - held - {None}
        there = [s for s in self.snapshots if self.repository.has_snapshot(s)] if dry_run else None
        if there is None:
            there = [s for s in self.snapshots if self.repository.has_snapshot(s) or s in removed]
        parents = {
            self.snapshots[n + 1]: self.snapshots[n] if n % 2 else self.snapshots[0]
            for n in range(5)
        }
        expected = set(candidates) & set(there)
        while True:
            needed = {parents.get(each) for each in there if each not in expected}
            if not expected & needed:
                break
            expected -= needed
        assert set(removed) == expected
        for each in removed:
            assert self.repository.has_snapshot(each) == dry_run

    @rule()
    def reopen(self) -> None:
        self.repository.close()
        self.repository = Repository.open(str(self.folder / "store"))

    @rule(
        data=st.data(), verdict=verdicts | st.none(), least=few | st.none(),
        most=few | st.none(), ran=st.sampled_from([None, "", "make", "check -j2", "é", "x", " "]),
    )  # fmt: skip
    def filter(self, data, verdict, least, most, ran) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        wanted = Filter(verdict=verdict, least=least, most=most, ran=ran)
        found = [step.number for step in self.repository.episodes.steps(name, wanted)]
        assert found == [
            step["number"]
            for step in self.model[name]
            if verdict in {None, step["verdict"]}
            and (least is None or (step["reward"] is not None and step["reward"] >= least))
            and (most is None or (step["reward"] is not None and step["reward"] <= most))
            and (ran is None or ran in " ".join(step["command"] or ()))
        ]

    @invariant()
    def all_is_as_the_list_says(self) -> None:
        episodes = self.repository.episodes
        assert [each.name for each in episodes.all()] == sorted(self.model)
        for name, steps in self.model.items():
            episode = episodes.get(name)
            assert (episode.steps, episode.last) == (len(steps), self.last[name])
            assert [facts(step) for step in episodes.steps(name)] == steps
            ranked = sorted(
                (step for step in steps if step["reward"] is not None),
                key=lambda step: (-step["reward"], step["number"]),
            )
            assert [facts(step) for step in episodes.best(name, 100)] == ranked
            parents = {step["parent"] for step in steps}
            leaves = [step["number"] for step in ranked if step["number"] not in parents]
            best = [step.number for step in episodes.best(name, 2, leaves_only=True)]
            assert best == leaves[:2]
            for number in [None, *(step["number"] for step in steps)]:
                below = [step["number"] for step in steps if step["parent"] == number]
                assert [step.number for step in episodes.children(name, number)] == below
            if steps:
                way = [steps[-1]]
                while way[0]["parent"] is not None:
                    way.insert(0, next(s for s in steps if s["number"] == way[0]["parent"]))
                assert [facts(step) for step in episodes.path(name, steps[-1]["number"])] == way
        assert self.repository.verify().damage == []

    def teardown(self) -> None:
        self.repository.close()
        shutil.rmtree(self.folder)


EpisodesMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("AMALGAMFS_EXAMPLES") or 15), stateful_step_count=20,
    deadline=None, derandomize="AMALGAMFS_EXAMPLES" not in os.environ,
)  # fmt: skip
TestEpisodes = EpisodesMachine.TestCase


def facts(step: Step) -> dict[str, Any]:
    return {
        field: getattr(step, field)
        for field in step.__struct_fields__
        if field not in {"episode", "time_ns"}
    }


@pytest.fixture
def snapshots(repository: Repository) -> list[SnapshotId]:
    return plant(repository, 6)


@given(few, few)
def test_rewards_are_ordered_by_their_keys(one: float, other: float):
    a, b = reward_key("e", one, 7), reward_key("e", other, 7)
    assert (a < b) == (one > other)
    assert (a == b) == (one == other)
    assert reward_in(a) == one


def test_a_held_snapshot_is_not_removed(repository: Repository, snapshots: list[SnapshotId]):
    episodes = repository.episodes
    episodes.create("search", snapshots[1])
    step = episodes.append("search", NewStep(snapshot=snapshots[3]))
    with pytest.raises(InUseError, match="the root of episode 'search'"):
        repository.remove_snapshot(snapshots[1])
    with pytest.raises(InUseError, match="step 1 of 'search'"):
        repository.remove_snapshot(snapshots[3])
    with repository.store.read() as reader:
        assert set(snapshots_held(reader)) == {snapshots[1], snapshots[3]}
    repository.remove_snapshot(snapshots[5])
    assert episodes.step("search", step.number).snapshot == snapshots[3]


def test_pruned_snapshots_are_freed_by_the_collection(repository: Repository, tmp_path: Path):
    source = tmp_path / "tree"
    source.mkdir()
    made = []
    for _ in range(4):
        (source / "file").write_bytes(os.urandom(50_000))
        made.append(SnapshotId(repository.import_directory(str(source), parents=()).snapshot))
    episodes = repository.episodes
    episodes.create("search")
    rewards = [0.1, 0.9, 0.2, 0.3]
    for n in (3, 1):  # import chains: 0 <- 1 <- 2 <- 3
        episodes.append("search", NewStep(snapshot=made[n], reward=rewards[n]))
    repository.set_ref("kept", made[1])
    (source / "file").write_bytes(b"")
    repository.import_directory(str(source), parents=(made[0],))
    report = episodes.prune("search", keep_best=1)
    assert report.snapshots == (made[3],)
    assert repository.has_snapshot(made[2])  # nobody's, but no step's either
    collected = repository.collect()
    assert collected.chunks > 0
    assert repository.verify().damage == []
    with pytest.raises(NotFoundError):
        repository.resolve(made[3].hex())


def test_a_snapshot_that_another_came_from_stays(
    repository: Repository, snapshots: list[SnapshotId]
):
    episodes = repository.episodes
    episodes.create("search")
    # 1 and 2 came from 0, 3 from 2... only what was pruned together goes together.
    chain = snapshots[:]
    parents = {each: repository.snapshot(each).parents for each in chain}
    child = next(each for each in chain if parents[each] and parents[each][0] != chain[0])
    parent = SnapshotId(parents[child][0])
    episodes.append("search", NewStep(snapshot=parent, reward=0.0))
    assert episodes.prune("search", keep_best=0).snapshots == ()
    episodes.append("search", NewStep(snapshot=parent, reward=0.0))
    episodes.append("search", NewStep(snapshot=child, reward=0.0))
    assert set(episodes.prune("search", keep_best=0).snapshots) == {parent, child}
    assert repository.verify().damage == []


def test_numbers_are_not_given_twice(repository: Repository):
    episodes = repository.episodes
    episodes.create("search")
    episodes.append_many("search", [NewStep(reward=0.0) for _ in range(3)])
    episodes.prune("search", keep_best=0)
    assert episodes.append("search", NewStep()).number == 4
    assert episodes.get("search").steps == 1


def test_a_batch_is_appended_whole_or_not_at_all(repository: Repository):
    episodes = repository.episodes
    episodes.create("search")
    steps = [NewStep(), NewStep(parent=-1), NewStep(parent=-1, reward=math.nan)]
    with pytest.raises(InvalidStepError, match="reward"):
        episodes.append_many("search", steps)
    assert list(episodes.steps("search")) == []
    made = episodes.append_many("search", steps[:2])
    assert [step.parent for step in made] == [None, 1]


def test_a_step_becomes_durable_with_its_snapshot(
    repository: Repository, snapshots: list[SnapshotId]
):
    root = repository.snapshot(snapshots[0]).root
    identifier, record = encode_snapshot(make_snapshot(root, (snapshots[0],), "with its step"))
    repository.episodes.create("search")

    def change(writer: Writer) -> Step:
        writer.put(Db.SNAPSHOTS, identifier, record)
        return append(writer, "search", NewStep(snapshot=identifier))

    assert repository.store.write(change).number == 1
    assert repository.has_snapshot(identifier)


DEEP: Any = "x"
for _ in range(5000):
    DEEP = [DEEP]
UP_TO_DEPTH: Any = "x"  # 390 deep
for _ in range(195):
    UP_TO_DEPTH = [{"a": UP_TO_DEPTH}]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reward", math.inf), ("reward", math.nan), ("reward", "much"), ("reward", "1"),
        ("reward", 10**400), ("action", {1: 2}), ("action", b"bytes"), ("action", {1}),
        ("action", [math.nan]), ("action", DEEP), ("summary", object()), ("verdict", 3),
        ("command", "make check"), ("command", (1,)), ("metadata", [1]), ("metadata", None),
        ("parent", "1"), ("parent", True), ("snapshot", b"short"), ("snapshot", "0" * 64),
        ("snapshot", b""), ("snapshot", b"x" * 600),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused(repository: Repository, field: str, value: Any):
    repository.episodes.create("search")
    repository.episodes.append("search", NewStep())
    with pytest.raises(InvalidStepError) as caught:
        repository.episodes.append("search", NewStep(**{field: value}))
    assert caught.value.field == field
    assert repository.episodes.get("search").steps == 1
    assert repository.verify().damage == []


@pytest.mark.parametrize("visits", [-1, 2**63, 1.5, True])
def test_visits_are_counted(repository: Repository, visits: Any):
    repository.episodes.create("search")
    repository.episodes.append("search", NewStep())
    with pytest.raises(InvalidStepError):
        repository.episodes.observe("search", 1, Seen(visits=visits))


def test_what_json_has_is_kept(repository: Repository):
    episodes = repository.episodes
    episodes.create("search", metadata={"é": [None, True, -0.0, 2**80, {"": "\ud800"}]})
    assert episodes.get("search").metadata == {"é": [None, True, 0.0, 2**80, {"": "\\ud800"}]}
    step = episodes.append("search", NewStep(action=UP_TO_DEPTH, command=("a\udcff", "\0")))
    assert episodes.step("search", 1) == step
    assert step.action == UP_TO_DEPTH
    assert step.command == ("a\\udcff", "\0")


@pytest.mark.parametrize(
    "name", ["", "a b", "../x", "a\0b", "a\0s\0\0\0\0\0\0\0\1", "é", "x" * 201, "0" * 64, "-a",
             "\n", "🙂" * 200, "a\udcff"],
)  # fmt: skip
def test_hostile_names(repository: Repository, name: str):
    episodes = repository.episodes
    episodes.create("a")
    episodes.append("a", NewStep())
    with pytest.raises(InvalidNameError):
        episodes.create(name)
    for ask in (
        lambda: episodes.get(name),
        lambda: episodes.append(name, NewStep()),
        lambda: episodes.step(name, 1),
        lambda: list(episodes.steps(name)),
        lambda: episodes.children(name, None),
        lambda: episodes.best(name),
        lambda: episodes.prune(name, keep_best=1),
        lambda: episodes.remove(name),
    ):
        with pytest.raises(NotFoundError):
            ask()
    assert episodes.get("a").steps == 1


def test_names_that_begin_with_each_other_are_apart(repository: Repository):
    episodes = repository.episodes
    longest = "x" * 200
    for name in ("a", "ab", "a.b", longest):
        episodes.create(name)
        episodes.append_many(name, [NewStep(action=name, reward=1.0)] * 2)
    episodes.remove("a")
    for name in ("ab", "a.b", longest):
        assert [step.action for step in episodes.steps(name)] == [name, name]
    with pytest.raises(NotFoundError):
        episodes.get("a")


# What is damaged.


def damage(repository: Repository, key: bytes, at: int) -> None:
    def change(writer: Writer) -> None:
        raw = writer.get(Db.EPISODES, key)
        assert raw is not None
        data = bytearray(raw)
        data[at % len(data)] ^= 0x01
        writer.put(Db.EPISODES, key, bytes(data))

    repository.store.write(change)


def put_row(repository: Repository, key: bytes, value: bytes | None) -> None:
    def change(writer: Writer) -> None:
        if value is None:
            writer.delete(Db.EPISODES, key)
        else:
            writer.put(Db.EPISODES, key, value)

    repository.store.write(change)


@pytest.mark.parametrize("at", range(0, 90, 5))
def test_a_corrupt_byte_is_found_and_the_rest_is_read(repository: Repository, at: int):
    episodes = repository.episodes
    episodes.create("search")
    episodes.append_many(
        "search", [NewStep(action="a" * 70, reward=float(n), parent=-1 if n else None)
                   for n in range(4)],
    )  # fmt: skip
    damage(repository, step_key("search", 3), at)
    with pytest.raises(CorruptStepError, match="step 3 of 'search'"):
        episodes.step("search", 3)
    with pytest.raises(CorruptObjectError):
        list(episodes.steps("search"))
    assert [step.number for step in episodes.path("search", 2)] == [1, 2]
    (found,) = repository.verify().damage
    assert "step 3 of 'search' is corrupt" in found.problem
    report = episodes.remove("search")
    assert report.removed == 4
    assert repository.verify().damage == []


def test_every_row_that_is_lost_or_strange_is_found(
    repository: Repository, snapshots: list[SnapshotId]
):
    episodes = repository.episodes
    episodes.create("search", snapshots[0])
    episodes.append("search", NewStep(reward=1.0, snapshot=snapshots[3]))
    episodes.append("search", NewStep(parent=1, reward=2.0))
    episodes.observe("search", 1, Seen(reward=3.0))
    episodes.observe("search", 1, Seen(reward=4.0))
    with repository.store.read() as reader:
        rows = [(key, bytes(raw)) for key, raw in reader.items(Db.EPISODES)]
    assert len(rows) == 1 + 2 + 2 + 2 + 2 + 2
    for key, raw in rows:
        put_row(repository, key, None)
        assert repository.verify().damage, key
        put_row(repository, key, raw)
    assert repository.verify().damage == []
    for key in (b"\0" + bytes(32) + b"none\0", b"search\0x", reward_key("search", 9.0, 1)):
        put_row(repository, key, b"")
        assert repository.verify().damage
        put_row(repository, key, None)
    put_row(repository, reward_key("search", 9.0, 1), b"")
    with pytest.raises(CorruptStepError, match="another reward"):
        episodes.best("search")


def test_a_record_of_another_step_is_not_taken(repository: Repository):
    episodes = repository.episodes
    episodes.create("search")
    episodes.append_many("search", [NewStep(action=1), NewStep(action=2)])

    def change(writer: Writer) -> None:
        raw = writer.get(Db.EPISODES, step_key("search", 1))
        assert raw is not None
        writer.put(Db.EPISODES, step_key("search", 2), bytes(raw))

    repository.store.write(change)
    with pytest.raises(CorruptStepError):
        episodes.step("search", 2)


@pytest.mark.parametrize(
    "encoding",
    [
        "8a01f6f6f6f6f6f6f600a0" + "00",  # something behind it
        "8a01f6f6f6f6f6f6f61800a0",  # an integer that is too long
        "8a01f6f6f6f6fb3ff0000000000000f6f600a0",  # a number that is too long
        "8a01f6f6f6f6f97e00f6f600a0",  # not a number
        "8a01f6f6f6f601f6f600a0",  # a reward that is an integer
        "8a02f6f6f6f6f6f6f600a0",  # of another version
        "8901f6f6f6f6f6f6f600",  # too short
        "8a01f64161f6f6f6f6f600a0",  # bytes, which JSON lacks
        "8a01f6f64161f6f6f6f600a0",  # a short id
        "a0", "", "ff", "8a",
    ],
)  # fmt: skip
def test_decoding_is_strict(repository: Repository, encoding: str):
    episodes = repository.episodes
    episodes.create("search")
    episodes.append("search", NewStep())
    key, data = step_key("search", 1), bytes.fromhex(encoding)
    value = digest(key + data)[:8] + data
    repository.store.write(lambda writer: writer.put(Db.EPISODES, key, value))
    with pytest.raises(CorruptStepError):
        episodes.step("search", 1)


# What is killed, and who writes at the same time.

APPENDS = """
import sys
from engine import Repository
from engine.episodes.steps import NewStep, Seen
with Repository.open(sys.argv[1]) as repository:
    for n in range(int(sys.argv[2])):
        step = repository.episodes.append("search", NewStep(parent=-1 if n else None,
                                                             reward=float(n), action=sys.argv[3]))
        print(step.number, flush=True)
        repository.episodes.observe("search", step.number, Seen(visits=n))
"""


@pytest.mark.parametrize("seen", [1, 7, 40])
def test_what_was_acknowledged_survives_a_kill(repository: Repository, seen: int):
    repository.episodes.create("search")
    child = subprocess.Popen(
        [sys.executable, "-c", APPENDS, repository.path, "100000", "a"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    acknowledged = [int(child.stdout.readline()) for _ in range(seen)]
    child.kill()
    acknowledged += [int(line) for line in child.stdout.read().splitlines() if line]
    child.wait()
    child.stdout.close()
    assert repository.verify().damage == []
    steps = list(repository.episodes.steps("search"))
    numbers = [step.number for step in steps]
    assert numbers == list(range(1, len(steps) + 1))
    assert len(acknowledged) <= len(steps) <= len(acknowledged) + 1
    assert all(step.observations == 1 for step in steps[:-2])
    assert repository.episodes.best("search")[0].number == numbers[-1]
    # A commit that was killed when all but LMDB's word to its readers was written is seen from the
    # next one on.
    appended = repository.episodes.append("search", NewStep()).number
    assert len(acknowledged) < appended <= len(acknowledged) + 2
    steps = list(repository.episodes.steps("search"))
    assert [step.number for step in steps] == list(range(1, appended + 1))


def test_two_writers_take_turns(repository: Repository):
    repository.episodes.create("search")
    children = [
        subprocess.Popen(
            [sys.executable, "-c", APPENDS, repository.path, "30", who],
            cwd=ROOT, stdout=subprocess.DEVNULL,
        )
        for who in "ab"
    ]  # fmt: skip
    while any(child.poll() is None for child in children):
        repository.episodes.prune("search", below=-1.0)  # removes nothing, and tries
    assert [child.returncode for child in children] == [0, 0]
    steps = list(repository.episodes.steps("search"))
    assert [step.number for step in steps] == list(range(1, 61))
    assert [step.action for step in steps].count("a") == 30
    assert repository.verify().damage == []


def test_a_long_episode(repository: Repository):
    episodes = repository.episodes
    episodes.create("search")
    count = 5_000
    rewards = [((n * 7919) % count) / count for n in range(count)]
    episodes.append_many(
        "search", [NewStep(parent=-1 if n else None, reward=rewards[n]) for n in range(count)]
    )
    assert len(list(episodes.steps("search"))) == count  # more than a page
    after = list(episodes.steps("search", after=count - 3))
    assert [step.number for step in after] == [count - 2, count - 1, count]
    (best,) = episodes.best("search")
    assert best.reward == max(rewards)
    assert len(episodes.path("search", count)) == count
    episodes.prune("search", keep_best=1)
    assert episodes.get("search").steps == best.number


def test_a_step_may_name_a_commit_that_is_not_written_yet(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine.workspaces.committing, "WRITE_BEHIND", 3600)
    workspace = repository.workspace()
    workspace.write("file", "one")
    first = workspace.commit(durable=False).snapshot
    repository.episodes.create("search", first)
    workspace.write("file", "two")
    second = workspace.commit(durable=False).snapshot
    repository.episodes.append("search", NewStep(action="edit", snapshot=second))
    workspace.write("file", "three")
    third = workspace.commit(durable=False).snapshot
    repository.episodes.append_many("search", [NewStep(action="edit", snapshot=third)])
    with repository.store.read() as reader:
        assert all(reader.has(Db.SNAPSHOTS, each) for each in (first, second, third))


def test_why_names_the_step_that_holds_a_snapshot(repository: Repository):
    workspace = repository.workspace()
    workspace.write("file", b"x" * 5000)
    made = workspace.commit().snapshot
    repository.episodes.create("search")
    repository.episodes.append("search", NewStep(action="edit", snapshot=made))
    found = [holder.kind for holder in repository.holders(Target("snapshot", made))]
    assert found == ["episode"]
    chunk = repository.object_named(f"{made.hex()}:file")
    assert {holder.kind for holder in repository.holders(chunk)} >= {"episode", "snapshot"}


def test_a_flipped_bit_in_a_row_of_an_index_is_mended(
    repository: Repository, snapshots: list[SnapshotId]
):
    """What the records say is enough for that: there is no other store."""
    episodes = repository.episodes
    episodes.create("search", snapshots[0])
    episodes.append("search", NewStep(reward=1.5, snapshot=snapshots[3]))
    episodes.append("search", NewStep(parent=1))
    with repository.store.read() as reader:
        before = {key: bytes(raw) for key, raw in reader.items(Db.EPISODES)}
    rows = [key for key, raw in before.items() if not raw]
    assert len(rows) == 2 + 2 + 1
    for key in rows:
        at = 5 if key[:1] == b"\0" else len(key) - 2
        put_row(repository, key, None)
        put_row(repository, key[:at] + bytes([key[at] ^ 0x40]) + key[at + 1 :], b"")
        assert repository.verify().damage
        report = repository.repair()
        assert report.left.damage == []
        assert report.repaired == 2
        with repository.store.read() as reader:
            assert {k: bytes(raw) for k, raw in reader.items(Db.EPISODES)} == before


@pytest.mark.parametrize("number", [1, 3])
def test_a_step_that_is_lost_stays_named(repository: Repository, number: int):
    repository.episodes.create("search", None)
    for _ in range(3):
        repository.episodes.append("search", NewStep())
    put_row(repository, step_key("search", number), None)
    assert repository.repair().left.damage


@pytest.mark.parametrize("at", [2, 6, 10])
def test_a_record_under_a_key_with_a_flipped_bit_is_mended(repository: Repository, at: int):
    repository.episodes.create("search", None)
    repository.episodes.append("search", NewStep(action="a"))
    key = step_key("search", 1)
    with repository.store.read() as reader:
        before = {key: bytes(raw) for key, raw in reader.items(Db.EPISODES)}
    put_row(repository, key, None)
    put_row(repository, key[:at] + bytes([key[at] ^ 8]) + key[at + 1 :], before[key])
    assert repository.verify().damage
    assert repository.repair().left.damage == []
    with repository.store.read() as reader:
        assert {k: bytes(raw) for k, raw in reader.items(Db.EPISODES)} == before
