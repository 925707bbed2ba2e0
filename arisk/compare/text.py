"""A comparison for the terminal, for machines and for pull requests.

A comparison in words and cells: what is shown of each run, and findings made by rules.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arisk.base.terminal import table
from arisk.compare.record import Ranked, RankedRun, rule_of
from arisk.forecast.probes_page import probe_summary
from arisk.forecast.text import GENERAL, NO_RISE, collapse_text
from arisk.report.text import NOT_MEASURED, bounded, chance, literal, number

__all__ = [
    "COLUMNS",
    "MEANING",
    "Comparative",
    "cells",
    "compare_findings",
    "compare_json",
    "compare_markdown",
    "compare_text",
    "headline",
    "rank_text",
    "refused_text",
]


#: Heading of the change of the safety loss, in a terminal.
DRIFT = "safety drift (nats/token)"


def compare_text(told: Comparative, page: str) -> str:
    """The ranked table, what was measured beside it, findings and notes; the page's path as the last line."""
    return "\n".join(
        [
            headline(told),
            "",
            table(
                [_outcome(entry) for entry in told.ranked],
                ["rank", "run", "verdict", "refused at the end", "safe steps", "collapse", "P", DRIFT],
            ),
            "",
            table(
                [_measured(entry) for entry in told.ranked],
                ["run", "control drift", "overlap", "gradients", "time", "data"],
            ),
            "",
            *[f"- {sentence}" for sentence in compare_findings(told)],
            *[f"care: {sentence}" for sentence in told.notes],
            f"ranking: {rule_of(told.runs)}",
            f"report: {page}",
        ]
    )


def _outcome(entry: Ranked) -> list[str]:
    """The row of one run in the first table; a collapse step never without its horizon."""
    row = cells(entry)
    if entry.run.curve is not None:
        step = entry.run.collapse_step
        row[5] = f"none in {entry.run.horizon}" if step is None else f"{step} of {entry.run.horizon}"
    return row[:8]


def _measured(entry: Ranked) -> list[str]:
    run = entry.run
    _, name, *_, control, overlap, _, data = cells(entry)
    spent = f"{run.seconds:.0f} s" + (f" + {run.shared_seconds:.0f} s shared" if run.shared_seconds else "")
    share = f"{run.gradient_evaluations} of {run.planned_evaluations}"
    return [name, control, overlap, share if run.gradient_evaluations else "no rollout", spent, data]


def compare_json(told: Comparative) -> dict[str, Any]:
    """Plain values: the runs in their order, findings, notes, settings. None: not measured."""
    return {
        "title": told.title,
        "headline": headline(told),
        "rule": rule_of(told.runs),
        "runs": [_run_json(entry) for entry in told.ranked],
        "findings": compare_findings(told),
        "notes": list(told.notes),
        "settings": {
            key: {run.name: value for run, value in zip(told.runs, values, strict=True)}
            for key, values in told.settings.items()
        },
        "command": told.command,
    }


def _run_json(entry: Ranked) -> dict[str, Any]:
    run = entry.run
    values = {
        field.name: getattr(run, field.name)
        for field in dataclasses.fields(run)
        if field.name not in ("curve", "refusals", "probes")
    }
    final = None if run.final is None else dict(zip(("median", "lower", "upper"), run.final, strict=True))
    curve = None if run.curve is None else dataclasses.asdict(run.curve)
    rows = run.finetune_rows or None
    return {
        "rank": entry.rank,
        "place": run.place,
        **values,
        "finetune_rows": rows,
        "final": final,
        "curve": curve,
        "refusals": _refusals_json(run),
        "probes": probe_summary(run.probes),
    }


def _refusals_json(run: RankedRun) -> dict[str, Any] | None:
    """Refusals at the end of the plan; None where none were counted."""
    said = run.refusals
    if said is None or said.status != "measured":
        return None
    end, fewest, most = said.at_end
    return {
        "prompts": said.prompts,
        "today": said.today,
        "at_end": end,
        "at_end_interval": [fewest, most],
        "threshold": said.threshold,
        "lost_step": said.lost_steps.get(f"{said.threshold:g}"),
    }


def compare_markdown(told: Comparative) -> str:
    """A short Markdown text, fit for a pull-request comment."""
    rows = [f"| {' | '.join(map(literal, cells(entry)))} |" for entry in told.ranked]
    lines = [
        f"### arisk: {literal(told.title)}",
        "",
        literal(headline(told)),
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"| {' | '.join('---' for _ in COLUMNS)} |",
        *rows,
        "",
        *[f"- {literal(sentence)}" for sentence in compare_findings(told)],
        *[f"- care: {literal(sentence)}" for sentence in told.notes],
        "",
        f"{MEANING} {rule_of(told.runs)}",
        "",
    ]
    return bounded(lines, "Curves and differences are in `compare.html`, beside this text.")


#: What the columns of the ranked table mean, and their units.
MEANING = (
    "Refused at the end: safety prompts forecast to be refused after the last planned step, with the "
    "interval at the run's confidence, and those refused today. Safe steps: the largest number of optimizer "
    "steps up to which refusals and loss stay within their limits. Drifts: changes of mean losses at the end "
    "of the plan, in nats per token, with the interval at the run's confidence. Overlap: of the first update "
    "with the safety subspace, in multiples of a random direction's. Cost: gradients of the rollout against "
    "those of the planned run, and wall time."
)
#: Columns of the ranked table.
COLUMNS = (
    "rank",
    "run",
    "verdict",
    "refused at the end",
    "safe steps",
    "collapse",
    "P(collapse)",
    "safety drift",
    "control drift",
    "overlap / random",
    "cost",
    "data",
)


@dataclass(frozen=True)
class Comparative:
    """Everything a comparison shows.

    Attributes:
        title: heading.
        ranked: the runs, safest first.
        settings: values that are not the same in all plans, by dotted key, in that order.
        notes: sentences on what makes the numbers less comparable.
        command: what makes the comparison again.
    """

    title: str
    ranked: Sequence[Ranked]
    settings: Mapping[str, Sequence[str]]
    notes: Sequence[str]
    command: str

    @property
    def runs(self) -> list[RankedRun]:
        """The runs in that order."""
        return [entry.run for entry in self.ranked]


def rank_text(entry: Ranked) -> str:
    """The rank, or a dash: a run without one is not placed among the others."""
    return "–" if entry.rank is None else str(entry.rank)


def cells(entry: Ranked) -> list[str]:
    """The row of one run, under `COLUMNS`."""
    run = entry.run
    return [
        rank_text(entry),
        run.name,
        run.level if run.place != "not measured" else NOT_MEASURED,
        refused_text(run),
        NOT_MEASURED if run.safe_steps is None else f"{run.safe_steps} of {run.horizon}",
        collapse_text(run.curve) if run.curve else NOT_MEASURED,
        chance(run.probability),
        final_text(run),
        signed(run.control_change),
        NOT_MEASURED if run.overlap_to_random is None else f"{number(run.overlap_to_random)} ×",
        cost_text(run),
        f"{run.finetune}, {run.finetune_rows or 'unknown number of'} rows",
    ]


def refused_text(run: RankedRun) -> str:
    """Prompts refused at the end of the plan with their interval, and today."""
    said = run.refusals
    if said is None or said.status != "measured":
        return NOT_MEASURED
    end, fewest, most = said.at_end
    return f"{end} of {said.prompts} ({fewest} to {most}; {said.today} today)"


def final_text(run: RankedRun) -> str:
    """Change of the safety loss at the end of the plan with its interval."""
    if run.final is None:
        return NOT_MEASURED
    middle, low, high = run.final
    return f"{signed(middle)} ({signed(low)} to {signed(high)})"


def cost_text(run: RankedRun) -> str:
    """Gradients of the rollout against those of the plan, and wall time."""
    taken = f" + {run.shared_seconds:.0f} s shared" if run.shared_seconds else ""
    spent = f"{run.seconds:.0f} s{taken}"
    if not run.gradient_evaluations:
        return f"no rollout, {spent}"
    return f"{run.gradient_evaluations} of {run.planned_evaluations} gradients, {spent}"


def signed(value: float | None) -> str:
    """A change with its sign."""
    text = number(value, 2)
    return f"+{text}" if value is not None and value > 0 and text[0].isdigit() else text


def headline(told: Comparative) -> str:
    """The answer in one sentence; plans that are not told apart from the safest are named with it."""
    placed = [entry.run for entry in told.ranked if entry.rank is not None]
    rest = len(told.ranked) - len(placed)
    tail = f" {rest} of {len(told.ranked)} cannot be ranked." if rest else ""
    if not placed:
        return "No plan can be ranked: none has a conclusive forecast."
    best, worst = placed[0], placed[-1]
    alike = list(itertools.takewhile(lambda run: run is best or _alike(best, run), placed))
    names = " and ".join(run.name for run in alike)
    level = best.level if len(alike) == 1 else f"{best.level}, not told apart"
    if best.level != "low":
        return f"No plan is low risk; least bad: {names} ({level}).{tail}"
    if len(alike) == len(placed):
        return f"Low risk: {names}{', not told apart' if len(alike) > 1 else ''}.{tail}"
    return f"Safest: {names} ({level}); riskiest: {worst.name} ({worst.level}).{tail}"


def compare_findings(told: Comparative) -> list[str]:
    """What the numbers say about the runs together, as sentences made by rules."""
    said = [
        *_levels(told.runs),
        _tied(told.ranked),
        *_drift(told.runs),
        _overlap(told.ranked),
        _shared(told.runs),
    ]
    return [sentence for sentence in said if sentence]


def _levels(runs: Sequence[RankedRun]) -> list[str]:
    return [f"{run.name}: {run.sentence}" for run in runs]


def _tied(ranked: Sequence[Ranked]) -> str | None:
    """Neighbours of one level that are not told apart: their order is not sure."""
    placed = [entry.run for entry in ranked if entry.rank is not None]
    pairs = [
        f"{first.name} and {second.name}"
        for first, second in itertools.pairwise(placed)
        # One plan run twice is not a question of order.
        if _alike(first, second) and first.curve != second.curve
    ]
    if not pairs:
        return None
    return f"Their intervals overlap, so the order is not sure: {'; '.join(pairs)}."


def _alike(first: RankedRun, second: RankedRun) -> bool:
    """One level, and intervals with a value in common.

    Of the refusals at the end of the plan where both counted them; else of the loss there and of the collapse
    step.
    """
    if first.level != second.level or first.final is None or second.final is None:
        return False
    if first.counted is not None and second.counted is not None:
        (low, high), (other_low, other_high) = (
            [share[-1] for share in (said.lower, said.upper)] for said in (first.counted, second.counted)
        )
        return high >= other_low and other_high >= low
    ends = first.final[2] >= second.final[1] and second.final[2] >= first.final[1]
    (low, high), (other_low, other_high) = _collapses(first), _collapses(second)
    return ends and high >= other_low and other_high >= low


def _collapses(run: RankedRun) -> tuple[float, float]:
    """Interval of the collapse step; ∞ beyond the plan, and all steps where none is known."""
    known = None if run.curve is None else run.curve.collapse_interval
    if known is None:
        return (0.0, math.inf)
    low, high = (math.inf if step is None else float(step) for step in known)
    return low, high


def _drift(runs: Sequence[RankedRun]) -> list[str]:
    """Where the drift is general forgetting, and where it is specific to safety."""
    general: list[str] = []
    specific: list[str] = []
    for run in runs:
        safety, control = run.safety_change, run.control_change
        if safety is None or control is None or not math.isfinite(safety) or safety < NO_RISE * run.threshold:
            continue
        (general if safety <= GENERAL * control else specific).append(run.name)
    said: list[str] = []
    if general:
        said.append(
            f"Ordinary answers drift about as much as refusals (general forgetting): {', '.join(general)}."
        )
    if specific:
        said.append(f"Refusals drift more than ordinary answers (specific to safety): {', '.join(specific)}.")
    return said


def _overlap(ranked: Sequence[Ranked]) -> str | None:
    """Whether the overlap alone would have ranked otherwise."""
    placed = [e.run for e in ranked if e.rank is not None and e.run.overlap_to_random is not None]
    if len(placed) < 2:
        return None
    by_overlap = sorted(placed, key=lambda run: run.overlap_to_random or 0.0)
    if [run.name for run in by_overlap] == [run.name for run in placed]:
        return None
    return (
        "The overlap of the first update with the safety subspace would rank them otherwise "
        f"({', '.join(run.name for run in by_overlap)}); it says where training starts, not where it ends, "
        "and does not enter the rank."
    )


def _shared(runs: Sequence[RankedRun]) -> str | None:
    taken = [run.name for run in runs if run.shared_seconds]
    spared = sum(run.shared_seconds for run in runs)
    if not taken:
        return None
    return f"The safety side was measured once and taken over by {', '.join(taken)} ({spared:.0f} s spared)."
