"""Time in a report: where that of the run went, and that of a step."""

import math
from dataclasses import fields

from megatron_vlm.training.goodput import TimeSpent
from megatron_vlm.training.report_page import card, duration, mean, ratio, table
from megatron_vlm.training.run_records import RunRecords

_MEANING = {
    "steps": ("steps that count", "the goodput"),
    "lost_steps": ("lost steps", "done again after a fault, and from the last step to the end of a job that failed"),
    "start": ("start", "from the first start to the first step"),
    "restart": ("restart", "from the end of an attempt to the first step of the next, waiting for a machine included"),
    "save": ("saves", "the steps waited for them"),
    "validation": ("validation", ""),
    "other": ("other", "hooks, writing of metrics, the end of a job"),
}


def time_card(run: RunRecords) -> str:
    """Return a bar and a table of where the time of the run went; empty if it is not known."""
    spent = run.time_spent
    if spent is None or not spent.total:
        return ""
    parts = {one.name: getattr(spent, one.name) for one in fields(TimeSpent)}
    rows = [
        [
            f'<i class="{name}"></i>{_MEANING[name][0]}',
            duration(seconds),
            f"{seconds / spent.total:.1%}",
            _MEANING[name][1],
        ]
        for name, seconds in parts.items()
    ]
    bar = "".join(
        f'<i class="{name}" style="width:{100 * seconds / spent.total:.3f}%"></i>' for name, seconds in parts.items()
    )
    text = f"<p>{duration(spent.total)} from the first start to the last sign of life, over all attempts.</p>"
    return card("Goodput", f'{text}<div class="bar">{bar}</div>' + table(["", "time", "of all", ""], rows))


def phases_card(run: RunRecords) -> str:
    """Return a table of the time in each phase of a step; empty if no record has it."""
    rows, seconds_of = [], dict(zip(*run.series("seconds"), strict=True))
    for phase in run.names("seconds/"):
        iterations, values = run.series(f"seconds/{phase}")
        # The first steps of a run that an earlier version began have no phases.
        seconds = math.fsum(seconds_of.get(iteration, 0.0) for iteration in iterations)
        rows.append([phase.replace("_", " "), f"{mean(values):.3g} s", f"{ratio(math.fsum(values), seconds):.1%}"])
    text = "<p>Of the rank that reports. Reductions that overlap with the backward pass count as part of it.</p>"
    return card("Time in a step", text + table(["phase", "mean", "of all steps"], rows)) if rows else ""
