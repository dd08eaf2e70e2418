"""How the model machines are run: the same examples each time, unless AMALGAMFS_EXAMPLES asks for
so many new ones; AMALGAMFS_EXAMPLES_FEW for a quarter of the usual ones.
"""

import os

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

EXAMPLES = int(os.environ.get("AMALGAMFS_EXAMPLES") or 0)


def run_machine(machine: type[RuleBasedStateMachine], examples: int, steps: int) -> None:
    """Runs `examples` sequences of up to `steps` rules each."""
    if os.environ.get("AMALGAMFS_EXAMPLES_FEW"):
        examples //= 4
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES or examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=not EXAMPLES,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
