"""Episodes and steps as commands list and draw them, for people and for JSON."""

import json
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from engine.episodes.steps import Step
from engine.episodes.trajectories import Episode
from mountctl.graph import Graph, show_node
from mountctl.output import Output
from mountctl.text import plain, short, visible, when

_LONGEST = 60
BEST, OTHER = "*", "o"
"""The marks of a step that leads to the best one, and of the others."""


def show_episodes(output: Output, episodes: Sequence[tuple[Episode, Step | None]]) -> None:
    """Writes episodes, each with its best step, as a table."""
    output.table(
        ("EPISODE", "STEPS", "BEST", "REWARD", "ROOT", "TIME"),
        [
            (
                output.style(visible(episode.name), "green"),
                f"{episode.steps:,}",
                "-" if best is None else str(best.number),
                "-" if best is None else _number(best.reward),
                "-" if episode.root is None else output.style(short(episode.root), "yellow"),
                when(episode.time_ns),
            )
            for episode, best in episodes
        ],
    )


def episode_fields(episode: Episode, best: Step | None) -> dict[str, Any]:
    """Returns an episode for JSON."""
    return {
        "episode": episode.name,
        "root": episode.root,
        "time": when(episode.time_ns),
        "time_ns": episode.time_ns,
        "metadata": episode.metadata,
        "steps": episode.steps,
        "last": episode.last,
        "best": None if best is None else best.number,
        "best_reward": None if best is None else best.reward,
    }


def step_fields(step: Step) -> dict[str, Any]:
    """Returns a step for JSON."""
    return {
        "episode": step.episode,
        "step": step.number,
        "parent": step.parent,
        "action": step.action,
        "snapshot": step.snapshot,
        "summary": step.summary,
        "reward": step.reward,
        "verdict": step.verdict,
        "value": step.value,
        "visits": step.visits,
        "command": step.command,
        "time": when(step.time_ns),
        "time_ns": step.time_ns,
        "metadata": step.metadata,
        "observations": step.observations,
    }


def show_steps(output: Output, steps: Iterable[Step]) -> None:
    """Writes steps as a table, in the order they come."""
    output.table(
        ("STEP", "PARENT", "REWARD", "VERDICT", "SNAPSHOT", "ACTION"),
        (
            (
                str(step.number),
                "-" if step.parent is None else str(step.parent),
                _number(step.reward),
                _cut(step.verdict or "-"),
                "-" if step.snapshot is None else output.style(short(step.snapshot), "yellow"),
                _doing(step),
            )
            for step in steps
        ),
    )


def show_step(output: Output, step: Step) -> None:
    """Writes all that is known of a step."""
    facts = [
        ("step", f"{step.number} of {visible(step.episode)}"),
        ("parent", "-" if step.parent is None else str(step.parent)),
        ("action", _json(step.action)),
        ("snapshot", "-" if step.snapshot is None else output.style(step.snapshot.hex(), "yellow")),
        ("summary", _json(step.summary)),
        ("reward", _number(step.reward)),
        ("verdict", visible(step.verdict or "-")),
        ("value", _number(step.value)),
        ("visits", "-" if step.visits is None else f"{step.visits:,}"),
        ("command", "-" if step.command is None else visible(shlex.join(step.command))),
        ("time", when(step.time_ns)),
        ("observed", f"{step.observations:,} times"),
    ]
    facts += [(visible(key), _json(value)) for key, value in step.metadata.items()]
    output.facts(facts)


def show_tree(output: Output, steps: Sequence[Step], best: set[int]) -> None:
    """Draws steps, given by number, the last one first, with lines that lead to their parents.

    Steps in `best` have another mark.
    """
    graph: Graph[int] = Graph()
    shown = {step.number: step for step in steps}
    for number in _lines_together(steps):
        step = shown[number]
        above = [] if step.parent is None or step.parent not in shown else [step.parent]
        words = [str(number), _number(step.reward)]
        if step.verdict is not None:
            words.append(_cut(step.verdict))
        colour = "green" if number in best else "bright_black"
        text = f"{output.style(' '.join(words), colour)}  {_doing(step)}".rstrip()
        show_node(output, graph, number, above, text, BEST if number in best else OTHER)


def _lines_together(steps: Sequence[Step]) -> Iterable[int]:
    """Yields numbers, each after its children, so that few lines are open at a time."""
    waiting = {step.number: 0 for step in steps}
    parents = {step.number: step.parent for step in steps}
    for parent in parents.values():
        if parent in waiting:
            waiting[parent] += 1
    ready = sorted(number for number, children in waiting.items() if not children)
    while ready:
        number = ready.pop()
        yield number
        parent = parents[number]
        if parent is not None and parent in waiting:
            waiting[parent] -= 1
            if not waiting[parent]:
                ready.append(parent)


def _doing(step: Step) -> str:
    """Returns what a step did, in a few words."""
    if step.action is not None:
        return _cut(step.action if isinstance(step.action, str) else _json(step.action))
    return _cut(shlex.join(step.command)) if step.command else ""


def _cut(text: str) -> str:
    text = visible(text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _json(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return visible(value)
    return visible(json.dumps(plain(value), ensure_ascii=False))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
