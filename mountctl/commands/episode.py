"""`mountctl episode`."""

import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from mountctl.command import (
    COMMAND,
    EPISODE,
    SNAPSHOT,
    TEXT,
    Function,
    Group,
    pass_invocation,
)
from mountctl.invocation import Invocation
from mountctl.text import count

if TYPE_CHECKING:
    from engine.episodes.pruning import PruneReport
    from engine.episodes.steps import NewStep
    from mountctl.access import StoreAccess
    from mountctl.output import Output

_FIELDS = {"parent", "action", "snapshot", "summary", "reward", "verdict", "command", "metadata"}


class _Json(click.ParamType[Any]):
    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            self.fail(f"{value!r} is not JSON; a text is in double quotes", param, ctx)


class _Parent(click.ParamType[int]):
    name = "step"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value == "last":
            return -1
        if not value.isdecimal() or not value.isascii():
            self.fail("give the number of a step, or `last`", param, ctx)
        return int(value[:20])


JSON = _Json()
STEP = click.IntRange(min=1)


def _name(kind: click.ParamType[str] = EPISODE) -> Callable[[Function], Function]:
    return click.argument("name", type=kind, help="The episode's name.")


@click.group(
    "episode",
    cls=Group,
    example="""
    $ mountctl episode new search --root main
    $ mountctl episode best search --path
    """,
)
def command() -> None:
    """What a search did, step by step, and what came of it.

    An episode is a tree of steps: what was done, the snapshot that it led to, the command that
    was run there, its reward and verdict. Steps are only added; a snapshot that a step names
    stays until the step is pruned.
    """


@command.command("new", example="$ mountctl episode new search --root main")
@_name(TEXT)
@click.option("--root", type=SNAPSHOT, help="What the first steps begin with.")
@click.option("--meta", "metadata", type=JSON, metavar="JSON", help="Facts to keep, an object.")
@pass_invocation
def new(invocation: Invocation, name: str, root: str | None, metadata: Any) -> None:
    """Make an episode."""
    from mountctl.steps import episode_fields

    output = invocation.output
    with invocation.open() as store:
        start = None if root is None else store.resolve(root)
        made = store.repository.episodes.create(name, start, {} if metadata is None else metadata)
    if output.json:
        output.result(episode_fields(made, None))
    else:
        output.note(f"made episode {name}; `mountctl episode add {name}` adds a step")


@command.command(
    "add",
    example="""
    $ mountctl episode add search --action 'inline f' --snapshot @try-1 --reward 0.7 -- make check
    $ mountctl episode add search --parent last --action-json '{"edit": "a.c"}' --verdict fail
    $ agent | mountctl episode add search --lines -
    """,
)
@_name()
@click.argument(
    "command", nargs=-1, type=COMMAND, metavar="[-- COMMAND [ARG]...]",
    help="The command that was run; nothing is run now.",
)  # fmt: skip
@click.option(
    "--parent", type=_Parent(), metavar="STEP", help="The step that it goes on from, or `last`."
)
@click.option("--action", type=TEXT, metavar="TEXT", help="What was done.")
@click.option("--action-json", type=JSON, metavar="JSON", help="What was done, as JSON.")
@click.option("--snapshot", type=SNAPSHOT, help="What it led to.")
@click.option("--summary", type=JSON, metavar="JSON", help="What it changed, in short.")
@click.option("--reward", type=float, metavar="NUMBER", help="How good that is.")
@click.option("--verdict", type=TEXT, metavar="WORD", help="What came of it: pass, fail, error.")
@click.option("--meta", "metadata", type=JSON, metavar="JSON", help="More facts, an object.")
@click.option(
    "--lines", type=click.File("rb"), metavar="FILE",
    help="Add a step for each line, a JSON object; - is a pipe. All are added, or none.",
)  # fmt: skip
@pass_invocation
def add(
    invocation: Invocation,
    name: str,
    command: tuple[str, ...],
    parent: int | None,
    action: str | None,
    action_json: Any,
    snapshot: str | None,
    summary: Any,
    reward: float | None,
    verdict: str | None,
    metadata: Any,
    lines: Any,
) -> None:
    """Add a step to an episode.

    Writes the step's number. With --lines, the objects have the names parent (below zero: so many
    steps before this one), action, snapshot, summary, reward, verdict, command and metadata.
    """
    from engine.episodes.steps import NewStep
    from mountctl.steps import step_fields

    if action is not None and action_json is not None:
        raise click.UsageError("--action and --action-json exclude each other")
    given = (action, action_json, parent, snapshot, summary, reward, verdict, metadata)
    if lines is not None and (command or any(value is not None for value in given)):
        raise click.UsageError("with --lines everything stands in the lines")
    output = invocation.output
    with invocation.open() as store:
        if lines is not None:
            steps = [_from_line(store, at + 1, line) for at, line in enumerate(lines)]
        else:
            steps = [
                NewStep(
                    parent=parent,
                    action=action if action_json is None else action_json,
                    snapshot=None if snapshot is None else store.resolve(snapshot),
                    summary=summary,
                    reward=reward,
                    verdict=verdict,
                    command=command or None,
                    metadata={} if metadata is None else metadata,
                )
            ]
        made = store.repository.episodes.append_many(name, steps)
    if output.json:
        fields = [step_fields(step) for step in made]
        output.result(fields if lines is not None else fields[0])
    else:
        for step in made:
            output.line(str(step.number))


def _from_line(store: "StoreAccess", number: int, line: bytes) -> "NewStep":
    from engine.episodes.steps import NewStep

    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"line {number} is not JSON: {error}") from error
    if not isinstance(fields, dict) or not fields.keys() <= _FIELDS:
        raise click.UsageError(f"line {number} is no object with {', '.join(sorted(_FIELDS))}")
    if fields.get("snapshot") is not None:
        fields["snapshot"] = store.resolve(str(fields["snapshot"]))
    if fields.get("metadata", {}) is None:
        del fields["metadata"]
    return NewStep(**fields)


@command.command(
    "observe", example="$ mountctl episode observe search 7 --reward 0.9 --verdict pass"
)
@_name()
@click.argument("step", type=STEP, help="The step's number.")
@click.option("--reward", type=float, metavar="NUMBER", help="How good it is, as known now.")
@click.option("--verdict", type=TEXT, metavar="WORD", help="What came of it.")
@click.option("--value", type=float, metavar="NUMBER", help="What the search expects from here.")
@click.option("--visits", type=click.IntRange(min=0), metavar="N", help="How often it was here.")
@click.option("--meta", "metadata", type=JSON, metavar="JSON", help="More facts, an object.")
@pass_invocation
def observe(
    invocation: Invocation,
    name: str,
    step: int,
    reward: float | None,
    verdict: str | None,
    value: float | None,
    visits: int | None,
    metadata: Any,
) -> None:
    """Add to a step what was learned later.

    What is not given stays as it was. What was known before is kept, too.
    """
    from engine.episodes.steps import Seen
    from mountctl.steps import step_fields

    output = invocation.output
    seen = Seen(
        reward=reward, verdict=verdict, value=value, visits=visits,
        metadata={} if metadata is None else metadata,
    )  # fmt: skip
    with invocation.open() as store:
        known = store.repository.episodes.observe(name, step, seen)
    if output.json:
        output.result(step_fields(known))
    else:
        output.note(f"step {step} of {name} was observed {count(known.observations, 'time')}")


@command.command("list", example="$ mountctl episode list")
@pass_invocation
def list_episodes(invocation: Invocation) -> None:
    """List all episodes, each with its best step."""
    from mountctl.steps import episode_fields, show_episodes

    output = invocation.output
    with invocation.open() as store:
        episodes = store.repository.episodes
        found = [
            (episode, next(iter(episodes.best(episode.name)), None)) for episode in episodes.all()
        ]
    if output.json:
        output.result([episode_fields(*pair) for pair in found])
        return
    show_episodes(output, found)
    if not found:
        output.note("there are no episodes: `mountctl episode new NAME` makes one")


@command.command(
    "log", example="$ mountctl episode log search --verdict fail --ran 'make check' -n 20"
)
@_name()
@click.option("--verdict", type=TEXT, metavar="WORD", help="Only steps with this verdict.")
@click.option("--min-reward", "least", type=float, metavar="NUMBER", help="Not less good.")
@click.option("--max-reward", "most", type=float, metavar="NUMBER", help="Not better.")
@click.option("--ran", type=TEXT, metavar="TEXT", help="Only those whose command has this in it.")
@click.option("--children", type=STEP, metavar="STEP", help="Only those that went on from it.")
@click.option("-n", "--limit", type=click.IntRange(min=1), metavar="N", help="Show at most N.")
@pass_invocation
def log(
    invocation: Invocation,
    name: str,
    verdict: str | None,
    least: float | None,
    most: float | None,
    ran: str | None,
    children: int | None,
    limit: int | None,
) -> None:
    """List the steps of an episode in the order they were added."""
    import itertools

    from engine.episodes.trajectories import Filter
    from mountctl.steps import show_steps, step_fields

    output = invocation.output
    wanted = Filter(verdict=verdict, least=least, most=most, ran=ran)
    with invocation.open() as store:
        episodes = store.repository.episodes
        if children is None:
            steps = episodes.steps(name, wanted)
        else:
            steps = filter(wanted.fits, episodes.children(name, children))
        found = itertools.islice(steps, limit)
        if output.json:
            output.result([step_fields(step) for step in found])
            return
        first = list(itertools.islice(found, 1))
        show_steps(output, itertools.chain(first, found))
    if not first:
        output.note("there are no such steps")


@command.command(
    "show",
    example="""
    $ mountctl episode show search
    $ mountctl episode show search 7
    """,
)
@_name()
@click.argument("step", type=STEP, required=False, help="Show all that is known of this step.")
@pass_invocation
def show(invocation: Invocation, name: str, step: int | None) -> None:
    """Draw the tree of steps, or show one.

    A step stands above the one that it went on from; the marks of the way to the best step are
    `*`, those of others `o`. Then come number, reward, verdict and action.
    """
    from mountctl.steps import episode_fields, show_step, show_tree, step_fields

    output = invocation.output
    with invocation.open() as store:
        episodes = store.repository.episodes
        if step is not None:
            found = episodes.step(name, step)
            if output.json:
                seen = [
                    {"time_ns": each.time_ns, "reward": each.reward, "verdict": each.verdict,
                     "value": each.value, "visits": each.visits, "metadata": each.metadata}
                    for each in episodes.observations(name, step)
                ]  # fmt: skip
                output.result({**step_fields(found), "observed": seen})
            else:
                show_step(output, found)
            return
        episode = episodes.get(name)
        steps = list(episodes.steps(name))
        best = next(iter(episodes.best(name)), None)
        way = [] if best is None else episodes.path(name, best.number)
    if output.json:
        output.result(
            {
                **episode_fields(episode, best),
                "best_path": [each.number for each in way],
                "tree": [step_fields(each) for each in steps],
            }
        )
        return
    show_tree(output, steps, {each.number for each in way})
    if best is not None:
        output.note(f"the best is step {best.number}, on the way marked with *")
    elif not steps:
        output.note(f"{name} has no steps: `mountctl episode add {name}` adds one")


@command.command(
    "best",
    example="""
    $ mountctl episode best search -n 5
    $ mountctl episode best search --snapshot | xargs -I{} mountctl checkout {} best
    """,
)
@_name()
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Show at most N.",
)
@click.option("--leaves", is_flag=True, help="Only steps that nothing went on from.")
@click.option("--path", is_flag=True, help="Show the way to the best one instead.")
@click.option("--snapshot", is_flag=True, help="Write only the ids of their snapshots.")
@pass_invocation
def best(
    invocation: Invocation, name: str, limit: int, leaves: bool, path: bool, snapshot: bool
) -> None:
    """Show the steps with the greatest rewards, of equals the earliest first."""
    from mountctl.steps import show_steps, step_fields

    if path and limit != 1:
        raise click.UsageError("--path is of one step")
    output = invocation.output
    with invocation.open() as store:
        episodes = store.repository.episodes
        found = episodes.best(name, limit, leaves_only=leaves)
        if path and found:
            found = episodes.path(name, found[0].number)
    if output.json:
        output.result([step_fields(step) for step in found])
    elif snapshot:
        for step in found:
            if step.snapshot is not None:
                output.line(step.snapshot.hex())
    else:
        show_steps(output, found)
    if not found:
        output.note(f"no step of {name} has a reward")


@command.command(
    "prune",
    example="""
    $ mountctl episode prune search --below 0.5 --dry-run
    $ mountctl episode prune search --keep-best 10 && mountctl gc
    """,
)
@_name()
@click.option("--keep-best", type=click.IntRange(min=0), metavar="N", help="Keep the N best.")
@click.option("--below", type=float, metavar="NUMBER", help="Remove those with less reward.")
@click.option("--unscored", is_flag=True, help="Remove also what has no reward yet.")
@click.option("--dry-run", is_flag=True, help="Tell what would go, and remove nothing.")
@pass_invocation
def prune(
    invocation: Invocation,
    name: str,
    keep_best: int | None,
    below: float | None,
    unscored: bool,
    dry_run: bool,
) -> None:
    """Remove steps by reward, and the snapshots that only they held.

    What leads to a step that stays, stays, and so does a snapshot that a ref names, a session
    stands on or a later snapshot came from. `mountctl gc` then frees the room.
    """
    if (keep_best is None) == (below is None):
        raise click.UsageError("give either --keep-best or --below")
    if below is not None and math.isnan(below):
        raise click.UsageError("--below is no number")
    output = invocation.output
    with invocation.open() as store:
        report = store.repository.episodes.prune(
            name, keep_best=keep_best, below=below, unscored=unscored, dry_run=dry_run
        )
        if report.snapshots and not dry_run:
            store.refresh()
    _tell(output, report, dry_run)


@command.command("rm", example="$ mountctl episode rm search && mountctl gc")
@_name()
@click.option("--dry-run", is_flag=True, help="Tell what would go, and remove nothing.")
@pass_invocation
def remove(invocation: Invocation, name: str, dry_run: bool) -> None:
    """Remove an episode, and the snapshots that only its steps held.

    Its root stays. `mountctl gc` then frees the room.
    """
    output = invocation.output
    with invocation.open() as store:
        report = store.repository.episodes.remove(name, dry_run=dry_run)
        if report.snapshots and not dry_run:
            store.refresh()
    _tell(output, report, dry_run)


def _tell(output: "Output", report: "PruneReport", dry_run: bool) -> None:
    if output.json:
        output.result(
            {
                "dry_run": dry_run,
                "removed": report.removed,
                "kept": report.kept,
                "snapshots": report.snapshots,
            }
        )
        return
    done = "would remove" if dry_run else "removed"
    output.line(
        f"{done} {count(report.removed, 'step')} and {count(len(report.snapshots), 'snapshot')}, "
        f"kept {count(report.kept, 'step')}"
    )
