"""A note about kernels whose time the estimate does not have: custom calls of other libraries."""

import collections
from collections.abc import Iterator

from zerojax.hlo import cost
from zerojax.hlo.program import Program
from zerojax.plan.finding import Finding
from zerojax.plan.reading import Reading

MOST = 5  # targets in the note


def of(reading: Reading) -> Iterator[Finding]:
    """Yields a note with the targets whose operations are not known, if the plan has a time."""
    calls = _calls(reading.program)
    if calls and reading.speed:
        named = [f"{target} ({n} x per step)" for target, n in calls.most_common(MOST)]
        rest = len(calls) - len(named)
        yield Finding(
            f"the estimated time has the bytes of these custom calls, but not their operations, "
            f"which are not known: {', '.join(named)}{f' and {rest} more' if rest else ''}. The "
            "step may take longer than estimated.")


def _calls(program: Program) -> collections.Counter:
    """Returns how often each target with unknown operations is called in a step."""
    calls = collections.Counter()
    for name, body in program.computations.items():
        for inst in body:
            if target := cost.uncounted(inst):
                calls[target] += program.times[name]
    return +calls
