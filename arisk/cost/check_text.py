"""What `arisk check` prints: model, data, rows as the model sees them, and the plan of work."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from arisk.base.tables import table
from arisk.base.terminal import clock, columns, wrapped

__all__ = ["check_text", "shortened"]

#: Data sets whose rows are printed; the JSON has all.
PRINTED = ("safety", "finetune")
#: Characters of a row in a pipe, and the least in a narrow terminal.
IN_A_PIPE, LEAST = 400, 40
HEADER = ("data", "rows", "repeated", "tokens (longest)", "response (shortest)", "cut")


def check_text(report: Mapping[str, Any]) -> str:
    """The report of `arisk check` for people; wrapped to the terminal, unbroken in a pipe.

    Args:
        report: `model`, `data`, `warnings`, `work`, and the `plan` of `arisk.cost.estimate`.
    """
    width = columns(sys.stdout) - 1 if sys.stdout.isatty() else None
    lines = [f"{key}: {value}" for key, value in report["model"].items()]
    lines += ["", *_data_lines(report["data"], width)]
    lines += [_said(f"warning: {warning}") for warning in report.get("warnings", ())]
    if "plan" in report:
        lines += ["", *_plan_lines(report, width)]
    return "\n".join(lines)


def shortened(text: str, width: int) -> str:
    """At most `width` characters: the head and the tail, where a chat's response stands.

    >>> shortened("one two three four five", 13)
    'one t … five'
    """
    if len(text) <= width:
        return text
    tail = (width - 3) // 2
    head = max(0, width - 3 - tail)
    return f"{text[:head].rstrip()} … {text[len(text) - tail :].lstrip()}"


def _said(text: str) -> str:
    return wrapped(text, sys.stdout, indent=" " * 9)


def _data_lines(data: Mapping[str, Any], width: int | None) -> list[str]:
    """Counts of every data set, then the first rows; a Python task tells only how many rows there are."""
    counted = {name: facts for name, facts in data.items() if isinstance(facts, Mapping)}
    if not counted:
        return [f"{name}: {rows} rows" for name, rows in data.items()]
    rows = [[name, *_cells(facts)] for name, facts in counted.items()]
    lines = [table(rows, HEADER, width=width)]
    lines += ["(tokens of a row and of its response in the mean; rows cut to max_length)", ""]
    lines.append("rows as the model sees them, the part that carries loss in « »:")
    room = IN_A_PIPE if width is None else max(LEAST, 2 * width - 2)
    for name in PRINTED:
        for row in counted.get(name, {}).get("rendered rows", ()):
            lines.append(f"- {name}: {shortened(row, room - len(name) - 4)}")
    return lines


def _cells(facts: Mapping[str, Any]) -> list[str]:
    """One data set's row of the table."""
    return [
        str(facts["rows"]),
        str(facts["duplicates"]),
        f"{facts['tokens_mean']:.1f} ({facts['tokens_max']})",
        f"{facts['response_tokens_mean']:.1f} ({facts['response_tokens_min']})",
        str(max(facts["prompts_truncated"], facts["responses_truncated"])),
    ]


def _plan_lines(report: Mapping[str, Any], width: int | None) -> list[str]:
    """The stages to come with their estimated time, memory and disk."""
    plan, work = report["plan"], report.get("work", {})
    device = any(cost.get("device_gb") for cost in plan["stages"].values())
    header = ["stage", "time", "peak memory", *(["on the device"] if device else [])]
    header += ["disk", "operations", "passes of the model"]
    rows = [
        [
            stage,
            clock(cost["seconds"]),
            f"{cost['memory_gb']:.2f} GB",
            *([f"{cost['device_gb']:.2f} GB" if cost["device_gb"] else "–"] if device else []),
            f"{cost['disk_gb']:.2f} GB" if cost["disk_gb"] else "–",
            f"{cost['flop'] / 1e12:.2g} TFLOP" if cost.get("flop") else "–",
            cost["work"],
        ]
        for stage, cost in plan["stages"].items()
    ]
    facts = [f"rollout: {work['rollout']}"] if "rollout" in work else []
    facts += [f"store: {plan['store']}"] if "store" in plan else []
    return [
        "plan of work (estimated here):",
        table(rows, header, width=width),
        *facts,
        "verify, screen and guard have their own commands; screen takes that at most",
        f"arisk run: about {clock(plan['seconds'])}, peak memory about {plan['memory_gb']:.2f} GB",
        *[_said(f"warning: {warning}") for warning in plan["warnings"]],
    ]
