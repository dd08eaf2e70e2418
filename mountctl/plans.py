"""What runs should take and what they took, for people and programs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from fsdriver.run_records import RunRecord
from mountctl.output import Output
from mountctl.text import count, size, visible, when

if TYPE_CHECKING:
    from fsdriver.choosing import Plan
    from fsdriver.cost_model import Estimate


def show_plan(output: Output, plan: "Plan") -> None:
    """Writes what each mode should take, and what that rests on."""
    if output.json:
        fields: dict[str, Any] = {
            "mode": plan.modes[0],
            "estimates": msgspec.to_builtins(plan.estimates),
            "runs": len(plan.earlier),
            "tree": msgspec.to_builtins(plan.tree),
            "mounted": plan.mounted,
            "calibrated": bool(plan.costs.machine),
            "moves": plan.moves.value,
        }
        output.result(fields)
        return
    names = [name for name in ("start", "mount", "tree", "reading", "writing")
             if any(name in each.added for each in plan.estimates)]  # fmt: skip
    output.table(
        ["mode", "seconds", "its own", *names, "runs"],
        [
            [
                each.mode,
                _seconds(each.seconds),
                "?" if each.own is None else _seconds(each.own),
                *(_seconds(each.added.get(name, 0.0)) for name in names),
                str(each.runs),
            ]
            for each in plan.estimates
        ],
    )
    output.note(_reason([each for each in plan.estimates if each.mode in plan.modes]))
    if left_out := _left_out(plan):
        output.note(left_out)
    output.note(_ground(plan))


def _left_out(plan: "Plan") -> str:
    """Returns why auto does not take overlay; empty if it may."""
    if len(plan.modes) == len(plan.estimates):
        return ""
    refuses = "overlayfs refuses to rename a directory of the base"
    if plan.moves.value == "some":
        return f"auto leaves overlay out: this command renames directories, and {refuses}"
    return (
        f"auto leaves overlay out: {refuses}, and no run in the mount (--mode lazy) "
        "has shown yet that this command does without"
    )


def _reason(estimates: "Sequence[Estimate]") -> str:
    best, *others = estimates
    if not others:
        return f"{best.mode} is the only mode"
    less = _seconds(others[0].seconds - best.seconds)
    return f"{best.mode} should be {less} s faster than {others[0].mode}"


def _ground(plan: "Plan") -> str:
    tree = f"a tree of {count(plan.tree.entries, 'entry')}, {size(plan.tree.bytes)}"
    if not plan.earlier:
        ground = "it never ran here: it is taken to read all of the tree and to write a twentieth"
    else:
        ground = f"it rests on {count(len(plan.earlier), 'earlier run')} of this command"
    costs = (
        "" if plan.costs.machine else "; `mountctl doctor --calibrate` would measure this machine"
    )
    return f"{tree}; {ground}{costs}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds < 10 else f"{seconds:.1f}"


def show_history(output: Output, records: Sequence[RunRecord]) -> None:
    """Writes runs, the latest last, with what was expected of the mode that was taken."""
    if output.json:
        output.result(msgspec.to_builtins(records))
        return
    output.table(
        ["when", "on", "mode", "expected", "took", "exit", "command"],
        [
            [
                when(record.started_ns),
                visible(record.target),
                record.outcome.mode
                + ("" if record.asked == record.outcome.mode else f" ({record.asked})"),
                _expected(record),
                _seconds(record.outcome.seconds),
                str(record.exit_code),
                visible(record.command),
            ]
            for record in records
        ],
    )
    if not records:
        output.note("nothing ran here yet: `mountctl run SESSION -- COMMAND`")


def _expected(record: RunRecord) -> str:
    seconds = record.estimates.get(record.outcome.mode)
    return "-" if seconds is None else _seconds(seconds)
