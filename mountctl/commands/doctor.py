"""`mountctl doctor`."""

import click
import msgspec

from fsdriver.cost_model import ModeCosts
from mountctl.command import Command, pass_invocation
from mountctl.failures import FOUND
from mountctl.invocation import Invocation
from mountctl.text import visible

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command(
    "doctor",
    cls=Command,
    example="""
    $ mountctl doctor
    $ mountctl doctor --json | jq '.checks[] | select(.status != "ok")'
    $ mountctl doctor --calibrate
    """,
)
@click.option(
    "--calibrate", is_flag=True,
    help="Measure what the modes of `run` cost here, on the store's disk, in up to 20 seconds.",
)  # fmt: skip
@click.pass_context
@pass_invocation
def command(invocation: Invocation, context: click.Context, calibrate: bool) -> None:
    """Tell what this machine lacks, and what to do.

    Writes one line for each check: ok, warn (something costs speed or is not to be had) or
    fail (something that was promised cannot work), and then what to do. Ends with exit code 1
    if any check fails. Changes nothing.

    --calibrate checks nothing: it measures, and keeps what it found in the store, for `run --mode
    auto` to choose by. Do it once, on a machine that is doing nothing else.
    """
    if calibrate:
        _calibrate(invocation)
        return
    from mountctl.checks import FAIL, run_checks

    output, store = invocation.output, invocation.store_path
    checks = list(run_checks(store, trusted=invocation.trusts(store)))
    failed = any(check.status == FAIL for check in checks)
    if output.json:
        fields = [{**check._asdict(), "hint": check.hint or None} for check in checks]
        output.result({"ok": not failed, "checks": fields})
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            status = output.style(check.status.ljust(4), _COLOURS[check.status])
            output.line(f"{status}  {check.name.ljust(width)}  {visible(check.message)}")
            if check.hint:
                output.line(f"{'':{width + 8}}{visible(check.hint)}")
        output.note("something is missing" if failed else "everything needed is there")
    if failed:
        context.exit(FOUND)


def _calibrate(invocation: Invocation) -> None:
    from fsdriver.calibration import calibrate
    from fsdriver.run_records import RunRecords

    output = invocation.output
    with invocation.open() as store:
        path = store.repository.path
        with output.progress("measuring"):
            costs = calibrate(path)
        RunRecords(path).set_costs(costs)
    if output.json:
        output.result(msgspec.to_builtins(costs))
        return
    names = msgspec.structs.fields(ModeCosts)
    output.table(
        ["mode", *(_HEADINGS[field.name] for field in names)],
        [
            [mode, *(_figure(field.name, getattr(each, field.name)) for field in names)]
            for mode, each in costs.modes.items()
        ],
    )
    output.note(f"making and ending a mount takes {costs.mount:.2f} s")


_HEADINGS = {
    "start": "start ms", "entry": "entry µs", "byte": "MB ms", "asked": "request µs",
    "read": "read MB ms", "made": "new µs", "rewritten": "changed µs",
    "written": "written MB ms", "removed": "removed µs",
}  # fmt: skip


def _figure(name: str, seconds: float) -> str:
    """Returns a cost in the unit of its column."""
    if name == "start":
        return f"{seconds * 1e3:.0f}"
    if name in {"byte", "read", "written"}:
        return f"{seconds * 1e9:.2f}"
    return f"{seconds * 1e6:.0f}"
