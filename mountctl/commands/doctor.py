"""`mountctl doctor`."""

import click

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
    """,
)
@click.pass_context
@pass_invocation
def command(invocation: Invocation, context: click.Context) -> None:
    """Tell what this machine lacks, and what to do.

    Writes one line for each check: ok, warn (something costs speed or is not to be had) or
    fail (something that was promised cannot work), and then what to do. Ends with exit code 1
    if any check fails. Changes nothing.
    """
    from mountctl.checks import FAIL, run_checks

    output = invocation.output
    checks = list(run_checks(invocation.store_path))
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
