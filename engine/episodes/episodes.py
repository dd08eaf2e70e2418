"""Episodes: what a search did, step by step, and what came of it.

An episode is a tree of steps that only grows. What is learned of a step after it was appended,
a reward that comes late or a value that was passed back, is appended as an observation. Steps
leave only when they are pruned. A snapshot that a step names, and the root of an episode, is
held: it cannot be removed while the step is there.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile

from engine.episodes.pruning import Keep, PruneReport, prune, remove
from engine.episodes.steps import (
    CorruptStepError,
    NewStep,
    Observation,
    Seen,
    Step,
    decode_observation,
    describe,
    observation_key,
)
from engine.episodes.trajectories import (
    Episode,
    Filter,
    append,
    append_all,
    child_numbers,
    create_episode,
    episode_of,
    observe,
    path_to,
    read_episode,
    read_step,
    rewards,
    steps_with,
)
from engine.errors import NotFoundError
from engine.ids import SnapshotId
from engine.storage.store import Db, Store, Writer

PAGE = 1000
"""Steps read in one transaction while many are listed."""


class Episodes:
    """The episodes of a store. What it changes is durable when it returns.

    So are the commits before it: `flush` writes those that wait, for a step may name them.
    """

    def __init__(self, store: Store, flush: Callable[[], None]) -> None:
        self._store, self._flush = store, flush

    def create(
        self,
        name: str,
        root: SnapshotId | None = None,
        metadata: dict[str, object] | None = None,
    ) -> Episode:
        """Makes an episode; `root` is the snapshot that its first steps began with.

        Raises InvalidNameError, NameTakenError, NotFoundError, InvalidStepError.
        """

        def change(writer: Writer) -> Episode:
            create_episode(writer, name, root, metadata or {})
            return episode_of(writer, name)

        self._flush()
        return self._store.write(change)

    def get(self, name: str) -> Episode:
        """Returns an episode. Raises NotFoundError, CorruptStepError."""
        with self._store.read() as reader:
            return episode_of(reader, name)

    def all(self) -> list[Episode]:
        """Returns all episodes by name; costs nothing per step. Raises CorruptStepError."""
        found: list[Episode] = []
        begin = b"\x01"  # behind the held snapshots
        with self._store.read() as reader:
            while (key := next(reader.keys(Db.EPISODES, begin), None)) is not None:
                name = key.partition(b"\0")[0]
                found.append(episode_of(reader, name.decode("utf-8", "replace")))
                begin = name + b"\x01"
        return found

    def append(self, name: str, new: NewStep) -> Step:
        """Appends a step. Raises NotFoundError, InvalidStepError."""
        self._flush()
        return self._store.write(lambda writer: append(writer, name, new))

    def append_many(self, name: str, steps: Iterable[NewStep]) -> list[Step]:
        """Appends steps in one transaction: all, or none if one cannot be. Raises as `append`."""
        steps = list(steps)
        self._flush()
        return self._store.write(lambda writer: append_all(writer, name, steps))

    def observe(self, name: str, number: int, seen: Seen) -> Step:
        """Appends what was learned of a step. Raises NotFoundError, InvalidStepError."""
        return self._store.write(lambda writer: observe(writer, name, number, seen))

    def observe_many(self, name: str, seen: Sequence[tuple[int, Seen]]) -> list[Step]:
        """Appends what was learned of steps in one transaction, as when a value is passed back."""
        return self._store.write(
            lambda writer: [observe(writer, name, number, each) for number, each in seen]
        )

    def step(self, name: str, number: int) -> Step:
        """Returns a step. Raises NotFoundError, CorruptStepError."""
        with self._store.read() as reader:
            return read_step(reader, name, number)

    def steps(self, name: str, wanted: Filter | None = None, *, after: int = 0) -> Iterator[Step]:
        """Yields the steps that fit, in the order of their numbers, from behind `after`.

        Reads a page at a time, so what changes meanwhile may show. Raises NotFoundError,
        CorruptStepError.
        """
        self.get(name)
        return self._steps(name, wanted or Filter(), after)

    def _steps(self, name: str, wanted: Filter, after: int) -> Iterator[Step]:
        if wanted.least is not None:  # the index knows which; the rest need not be read
            with self._store.read() as reader:
                least = wanted.least
                within = takewhile(
                    lambda pair: pair[0] >= least, rewards(reader, name, wanted.most)
                )
                numbers = sorted(number for _, number in within if number > after)
            for number in numbers:
                try:
                    step = self.step(name, number)
                except NotFoundError:
                    continue  # pruned meanwhile
                if wanted.fits(step):
                    yield step
            return
        at: int | None = after
        while at is not None:
            with self._store.read() as reader:
                page, at = steps_with(reader, name, wanted, at, PAGE)
            yield from page

    def children(self, name: str, number: int | None) -> list[Step]:
        """Returns a step's children, or with None the steps without a parent, by number."""
        with self._store.read() as reader:
            if number is None:
                read_episode(reader, name)
            else:
                read_step(reader, name, number)
            return [read_step(reader, name, each) for each in child_numbers(reader, name, number)]

    def path(self, name: str, number: int) -> list[Step]:
        """Returns the steps that lead to one, the first one first and itself last."""
        with self._store.read() as reader:
            return path_to(reader, name, number)

    def best(self, name: str, count: int = 1, *, leaves_only: bool = False) -> list[Step]:
        """Returns the steps with the greatest rewards, of equals the earliest first.

        A step that was gone on from may be the best; not with `leaves_only`. Costs what it
        returns. Raises NotFoundError, CorruptStepError.
        """
        found: list[Step] = []
        with self._store.read() as reader:
            read_episode(reader, name)
            for reward, number in rewards(reader, name):
                if len(found) >= count:
                    break
                if leaves_only and next(child_numbers(reader, name, number), None) is not None:
                    continue
                step = read_step(reader, name, number)
                if step.reward != reward:
                    raise CorruptStepError(describe(name, number), "the index has another reward")
                found.append(step)
        return found

    def observations(self, name: str, number: int) -> list[Observation]:
        """Returns all that was known of a step, from its first observation on."""
        with self._store.read() as reader:
            step = read_step(reader, name, number)
            found = []
            for which in range(1, step.observations + 1):
                raw = reader.get(Db.EPISODES, observation_key(name, number, which))
                if raw is None:
                    raise CorruptStepError(describe(name, number), f"observation {which} is gone")
                found.append(decode_observation(name, number, which, raw))
            return found

    def prune(
        self,
        name: str,
        *,
        keep_best: int | None = None,
        below: float | None = None,
        unscored: bool = False,
        dry_run: bool = False,
    ) -> PruneReport:
        """Removes steps by reward, and the snapshots that only they held.

        Either all but the `keep_best` best steps go, or those with a reward under `below`; steps
        that lead to one that stays, stay. So do leaves that have no reward yet, unless `unscored`.
        `collect` frees what the snapshots had. Raises NotFoundError, ValueError.
        """
        return prune(self._store, name, Keep(keep_best, below, unscored), dry_run=dry_run)

    def remove(self, name: str, *, dry_run: bool = False) -> PruneReport:
        """Removes an episode, and the snapshots that only its steps held; its root stays.

        Works on a damaged episode, too. Raises NotFoundError.
        """
        return remove(self._store, name, dry_run=dry_run)
