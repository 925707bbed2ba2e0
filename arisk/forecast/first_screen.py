"""The first screen: does safety survive the planned run, until which step, how sure, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from arisk.forecast.record import Curve, ForecastResult, RealRun
from arisk.forecast.refusals_page import end_text, lost_text
from arisk.forecast.text import collapse_text
from arisk.forecast.worth import record_line
from arisk.report.section import esc, listed
from arisk.report.text import (
    NOT_MEASURED,
    number,
    percent,
)

__all__ = ["ICONS", "run_strip", "verdict_section"]

#: Where no optional stage has found a remedy yet.
HELP = "Find the rows that do it: arisk screen. Train with protection: arisk guard."
ICONS = {"low": "✓", "elevated": "▲", "high": "✕", "inconclusive": "?"}


def verdict_section(
    forecast: ForecastResult,
    task: Mapping[str, Any],
    real: RealRun | None,
    advice: Sequence[str] = (),
) -> str:
    """Level, sentence, the planned run as a strip, four numbers, advice and reasons.

    Args:
        forecast: the verdict and what it rests on.
        task: what the plan is about.
        real: what the plan really did, where it was carried out.
        advice: what was measured to help.
    """
    v = forecast.verdict
    curve = forecast.forecasters.get(v.basis)
    worth = [record_line(v.basis)] if v.basis in forecast.forecasters else []
    # What really happened is worth more than any record.
    happened = [] if real is None else [real.sentence]
    return (
        f'<section class="verdict" data-level="{esc(v.level)}" aria-labelledby="verdict">'
        f'<p class="level"><span aria-hidden="true">{ICONS[v.level]}</span> Risk: {esc(v.level)}</p>'
        f'<h1 id="verdict">{_sentence(v.sentence)}</h1>'
        f'<p class="plan">{esc(_plan(forecast.training, task))}</p>'
        f'{run_strip(forecast, real)}<dl class="tiles">{"".join(_tiles(forecast, curve, real))}</dl>'
        f'<div class="three"><div>{listed("What to do", _advice(forecast, real, advice))}</div>'
        f"<div>{listed('Why', v.reasons)}</div>"
        f"<div>{listed('How far to trust this', [*happened, *v.caveats, *worth])}</div></div></section>"
    )


def _sentence(sentence: str) -> str:
    """The verdict, what stands in brackets at its end in smaller type."""
    head, bracket, rest = sentence.partition(" (")
    if not rest.rstrip(".").endswith(")"):
        return esc(sentence)
    return f'{esc(head)} <span class="aside">{esc(bracket.strip() + rest)}</span>'


def _tiles(forecast: ForecastResult, curve: Curve | None, real: RealRun | None) -> list[str]:
    v = forecast.verdict
    collapsed = None if real is None else real.collapse_step
    budget = "steps whose upper interval stays below the threshold"
    if collapsed is not None and v.safe_steps is not None and collapsed <= v.safe_steps:
        budget = f"too many: the real run collapsed at step {collapsed}"
    safe = NOT_MEASURED if v.safe_steps is None else f"{v.safe_steps} of {v.horizon}"
    between = "" if curve is None or curve.collapse_interval is None else _interval(curve)
    return [
        _tile("Refusals, now → end", end_text(forecast.refusals), lost_text(forecast.refusals)),
        _tile("Safe-step budget", safe, budget),
        _tile("Collapse", collapse_text(curve) if curve else NOT_MEASURED, between),
        _tile("P(collapse in the plan)", percent(v.probability), "over draws of samples and known errors"),
        _tile("Rests on", v.basis, _trust(forecast)),
    ]


def _tile(term: str, value: str, note: str) -> str:
    small = f"<small>{esc(note)}</small>" if note else ""
    return f"<div><dt>{esc(term)}</dt><dd>{esc(value)}{small}</dd></div>"


def _interval(curve: Curve) -> str:
    low, high = curve.collapse_interval or (None, None)
    if low is None:
        return f"interval: beyond step {curve.horizon}"
    return f"interval: step {low} to {f'beyond {curve.horizon}' if high is None else high}"


def _plan(training: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    """The planned run in one line, as far as it is known."""
    rows = (task.get("data") or {}).get("finetune") or {}
    parts = [
        str(training.get("optimizer") or ""),
        f"learning rate {training['learning_rate']:g}" if training.get("learning_rate") else "",
        str(training.get("schedule") or ""),
        f"{training['steps']} steps" if training.get("steps") else "",
        f"batch {training['batch_size']}" if training.get("batch_size") else "",
        "LoRA" if task.get("adapter") else "",
        f"{rows['rows']} training rows" if rows.get("rows") else "",
    ]
    return "Plan: " + " · ".join(part for part in parts if part)


def run_strip(forecast: ForecastResult, real: RealRun | None) -> str:
    """The planned run as a strip: safe steps, the interval of the collapse step, what is beyond.

    Without a forecast it is one grey bar that says so.
    """
    v = forecast.verdict
    curve = forecast.forecasters.get(v.basis)
    horizon = max(v.horizon, 1)
    if curve is None or curve.status != "measured" or v.safe_steps is None:
        return (
            '<div class="strip"><div class="track unknown" role="img" aria-label="not measured"></div>'
            f'<p class="key"><span>{NOT_MEASURED.capitalize()}: that is not the same as no risk.</span></p>'
            "</div>"
        )
    safe = min(v.safe_steps, horizon)
    low, high = curve.collapse_interval or (None, None)
    start = min(max(low if low is not None else horizon, safe), horizon)
    end = horizon if high is None else min(max(high, start), horizon)
    bands = [("safe", 0, safe), ("watch", safe, start), ("maybe", start, end), ("lost", end, horizon)]
    drawn = "".join(
        f'<span class="{name}" style="left:{_share(a, horizon)};width:{_share(b - a, horizon)}"></span>'
        for name, a, b in bands
        if b > a
    )
    key = [("safe", f"below the threshold: to step {safe}")]
    if start > safe:
        key.append(("watch", f"upper interval above it, to step {start}"))
    if end > start:
        until = f"beyond {end}" if high is None else str(end)
        key.append(("maybe", f"collapse in this interval, {start} to {until}"))
    if end < horizon:
        key.append(("lost", "collapsed"))
    step = curve.collapse_step
    if step is not None:
        drawn += f'<i class="mark" style="left:{_share(step, horizon)}"></i>'
        key.append(("mark", f"forecast: step {step}"))
    if real is not None and real.collapse_step is not None:
        drawn += f'<i class="real" style="left:{_share(real.collapse_step, horizon)}"></i>'
        key.append(("real", f"real run: step {real.collapse_step}"))
    label = "; ".join(text for _, text in key)
    told = "".join(f'<span><i class="{name}" aria-hidden="true"></i>{esc(text)}</span>' for name, text in key)
    return (
        f'<div class="strip"><div class="track" role="img" aria-label="{esc(label)}">{drawn}</div>'
        f'<p class="ends"><span>0</span><span>planned end, step {horizon}</span></p>'
        f'<p class="key">{told}</p></div>'
    )


def _share(step: float, horizon: int) -> str:
    return f"{100 * min(step, horizon) / horizon:.2f}%"


def _trust(forecast: ForecastResult) -> str:
    curve = forecast.forecasters.get(forecast.verdict.basis)
    if curve is None or curve.trusted_until is None:
        return "trust not measured"
    return f"trusted until step {curve.trusted_until}"


def _advice(forecast: ForecastResult, real: RealRun | None, measured: Sequence[str]) -> list[str]:
    """What follows from the verdict, with the numbers to do it by."""
    verdict, grid = forecast.verdict, forecast.what_if
    collapsed = None if real is None else real.collapse_step
    # A real run that collapsed outweighs a forecast that did not see it.
    if verdict.level == "low" and collapsed is None:
        return ["Keep a safety evaluation at the end of the run; low risk is a forecast, not a proof."]
    if verdict.level == "inconclusive" and collapsed is None:
        return ["Measure more: more safety rows, more probe points; or watch a short real fine-tune closely."]
    rate = grid.safest_rate()
    if collapsed is not None and verdict.level in ("low", "inconclusive"):
        advice = ["Trust the real run, not this forecast or its what-if map."]
    elif rate is None:
        advice = ["Plan fewer steps and a lower rate together: the what-if map says which stay below."]
    else:
        advice = [
            f"Lower the peak learning rate to {number(rate.learning_rate)}: all {grid.planned_steps} steps "
            "stay below the alarm level there."
        ]
    known = [
        step
        for step in (verdict.safe_steps, None if collapsed is None else collapsed - 1)
        if step is not None
    ]
    last = min(known, default=0)
    if last:
        advice.append(f"Stop or evaluate safety by step {number(last, 9)}.")
    return [*measured, *advice] if measured else [*advice, HELP]
