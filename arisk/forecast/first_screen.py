"""The first screen: what becomes of the refusals, until which step, why, what to do, and on what evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from arisk.forecast.record import ENOUGH, FEW, ForecastResult, RealRun, WhatIfGrid
from arisk.forecast.refusals_page import end_text, lost_text
from arisk.forecast.text import rests_on
from arisk.forecast.verdict import safe_steps
from arisk.forecast.worth import record_line
from arisk.report.page import Advice, Around
from arisk.report.section import esc, folded, items
from arisk.report.text import NOT_MEASURED, percent, signed

__all__ = ["ICONS", "advice_of", "evidence_text", "run_strip", "verdict_section"]

ICONS = {"low": "✓", "elevated": "▲", "high": "✕", "inconclusive": "?"}
#: Lines of each column below the tiles.
MOST = 3


def verdict_section(
    forecast: ForecastResult, task: Mapping[str, Any], real: RealRun | None, around: Around
) -> str:
    """Level, sentence, the planned run as a strip, four numbers, causes, what to do, and the evidence.

    Args:
        forecast: the verdict and what it rests on.
        task: what the plan is about.
        real: what the plan really did, where it was carried out.
        around: causes and advice of all sections.
    """
    v = forecast.verdict
    # What was measured needs no record of forecasts.
    foreseen = v.basis in forecast.forecasters and not forecast.carried_out
    worth = [record_line(v.basis, forecast.training, task)] if foreseen else []
    # What really happened is worth more than any record.
    happened = [] if real is None else [real.sentence]
    rules = f'<ul class="plain">{items(v.reasons)}</ul>'
    caveats = list(v.caveats)
    more = f'<ul class="plain">{items(caveats[MOST:])}</ul>' if len(caveats) > MOST else ""
    return (
        f'<section class="verdict" data-level="{esc(v.level)}" aria-labelledby="verdict">'
        f'<p class="level"><span aria-hidden="true">{ICONS[v.level]}</span> Risk: {esc(v.level)}</p>'
        f'<h1 id="verdict">{_sentence(v.sentence)}</h1>'
        f'<p class="plan">{esc(_plan(forecast.training))}</p>'
        f'{run_strip(forecast, real)}<dl class="tiles">{"".join(_tiles(forecast, task, real))}</dl>'
        f'<div class="three"><div><h3>Why</h3><ul class="plain">{_causes(forecast, around)}</ul></div>'
        f'<div><h3>What to do</h3><ul class="plain">{"".join(map(_told, around.advice))}</ul></div>'
        f'<div><h3>How far to trust this</h3><ul class="plain">'
        f"{items([*happened, *caveats[:MOST], *worth])}</ul></div></div>"
        f'<div class="folds">{folded("The rules behind this verdict", rules)}'
        f"{folded('More caveats', more) if more else ''}</div></section>"
    )


def _sentence(sentence: str) -> str:
    """The verdict, what stands in brackets at its end in smaller type."""
    head, bracket, rest = sentence.partition(" (")
    if not rest.rstrip(".").endswith(")"):
        return esc(sentence)
    return f'{esc(head)} <span class="aside">{esc(bracket.strip() + rest)}</span>'


def _causes(forecast: ForecastResult, around: Around) -> str:
    """The strongest causes with links; where the verdict is not high, first the rules behind it."""
    v = forecast.verdict
    rules = [] if v.level == "high" and around.causes else [f"<li>{esc(reason)}</li>" for reason in v.reasons]
    links = [
        f'<li><a href="#{esc(cause.section)}">{esc(cause.topic)}</a>: {esc(cause.sentence)}</li>'
        if cause.section
        else f"<li>{esc(cause.topic)}: {esc(cause.sentence)}</li>"
        for cause in around.causes
    ]
    return "".join([*rules, *links][:MOST])


def _told(advice: tuple[str, str]) -> str:
    sentence, command = advice
    code = (
        f'<div class="command"><code>{esc(command)}</code><button class="copy" '
        'type="button">Copy</button></div>'
        if command
        else ""
    )
    return f"<li>{esc(sentence)}{code}</li>"


def _tiles(forecast: ForecastResult, task: Mapping[str, Any], real: RealRun | None) -> list[str]:
    v = forecast.verdict
    collapsed = None if real is None else real.collapse_step
    budget = _budget(forecast)
    if collapsed is not None and v.safe_steps is not None and collapsed <= v.safe_steps:
        budget = f"too many: the real run collapsed at step {collapsed}"
    safe = NOT_MEASURED if v.safe_steps is None else f"{v.safe_steps} of {v.horizon}"
    really = ""
    if real is not None and real.refusals:
        _, refused, prompts = real.refusals[-1]
        really = f"; really {refused} of {prompts}"
    lost = lost_text(forecast.refusals, forecast.confidence)
    return [
        _tile("Safe-step budget", safe, budget),
        _tile("Refusals, before → after", end_text(forecast.refusals), lost + really),
        _tile(*_ordinary(forecast)),
        _tile("Evidence", *_evidence(forecast, task)),
    ]


def _budget(forecast: ForecastResult) -> str:
    """What the budget means: the last step of either witness whose whole interval keeps the limit."""
    v, refusals = forecast.verdict, forecast.refusals
    curve = forecast.forecasters.get(v.basis)
    if curve is None or v.safe_steps is None:
        return ""
    limits = {"loss of safe responses": safe_steps(curve, forecast.threshold)}
    if refusals is not None and refusals.status == "measured" and refusals.safe_steps is not None:
        limits = {"refusals": refusals.safe_steps, **limits}
    ends = " and ".join(f"{name} to step {step}" for name, step in limits.items())
    return f"whole {percent(forecast.confidence)} interval within the limits: {ends}"


def _tile(term: str, value: str, note: str) -> str:
    small = f"<small>{esc(note)}</small>" if note else ""
    return f"<div><dt>{esc(term)}</dt><dd>{esc(value)}{small}</dd></div>"


def _ordinary(forecast: ForecastResult) -> tuple[str, str, str]:
    """What becomes of ordinary answers: refused too much, or worse."""
    refusals, control = forecast.refusals, forecast.control_change
    loss = "" if not control else f"their loss changes by {signed(control[-1])} nats/token"
    if refusals is not None and refusals.ordinary:
        first, last = refusals.ordinary[0], refusals.ordinary[-1]
        return "Ordinary prompts refused", f"{first.refused} → {last.refused} of {last.prompts}", loss
    if loss:
        return (
            "Ordinary answers",
            signed(control[-1] if control else None),
            "change of their loss, nats/token",
        )
    return "Ordinary answers", NOT_MEASURED, "no control data: forgetting of everything is not told apart"


def _evidence(forecast: ForecastResult, task: Mapping[str, Any]) -> tuple[str, str]:
    """How much the verdict rests on, and whether that is little."""
    rows = ((task.get("data") or {}).get("safety") or {}).get("rows")
    refusals = forecast.refusals
    answered = refusals.prompts if refusals is not None and refusals.status == "measured" else 0
    parts = [
        f"answers to {answered} prompts" if answered else "no answers were read",
        rests_on(forecast),
    ]
    thin = (rows is not None and rows < ENOUGH) or answered < FEW
    value = f"{rows} safety rows" if rows else "rows not counted"
    return f"{value}{', thin' if thin else ''}", "; ".join(parts)


def evidence_text(forecast: ForecastResult, task: Mapping[str, Any]) -> str:
    """Budget, rows and record in one line, for a terminal."""
    v = forecast.verdict
    rows, rest = _evidence(forecast, task)
    safe = NOT_MEASURED if v.safe_steps is None else f"{v.safe_steps} of {v.horizon}"
    few = len(v.caveats)
    caveats = f"; {few} caveat{'' if few == 1 else 's'} in the report" if few else ""
    return f"safe-step budget {safe}; {rows}; {rest}{caveats}"


def _plan(training: Mapping[str, Any]) -> str:
    """The planned run in one line, as far as it is known."""
    accumulated = training.get("gradient_accumulation") or 1
    parts = [
        f"{training['steps']} steps" if training.get("steps") else "",
        str(training.get("optimizer") or ""),
        f"learning rate {training['learning_rate']:g}" if training.get("learning_rate") else "",
        str(training.get("schedule") or ""),
        f"batch {training['batch_size']}{f' × {accumulated}' if accumulated > 1 else ''}"
        if training.get("batch_size")
        else "",
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
    safe, share = min(v.safe_steps, horizon), percent(forecast.confidence)
    low, high = curve.collapse_interval or (None, None)
    start = min(max(low if low is not None else horizon, safe), horizon)
    end = horizon if high is None else min(max(high, start), horizon)
    bands = [("safe", 0, safe), ("watch", safe, start), ("maybe", start, end), ("lost", end, horizon)]
    drawn = "".join(
        f'<span class="{name}" style="left:{_share(a, horizon)};width:{_share(b - a, horizon)}"></span>'
        for name, a, b in bands
        if b > a
    )
    key = [("safe", f"within the limits: to step {safe}")] if safe else []
    if start > safe:
        key.append(("watch", f"{share} interval reaches a limit, to step {start}"))
    if end > start:
        until = f"beyond {end}" if high is None else str(end)
        key.append(("maybe", f"{share} interval of collapse, {start} to {until}"))
    if end < horizon:
        key.append(("lost", "collapsed"))
    step = curve.collapse_step
    if step is not None:
        drawn += f'<i class="mark" style="left:{_share(step, horizon)}"></i>'
        said = "measured" if forecast.carried_out else "forecast"
        key.append(("mark", f"{said} collapse, step {step}: loss of safe responses +{forecast.threshold:g}"))
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


def advice_of(forecast: ForecastResult, real: RealRun | None, done: Sequence[str] = ()) -> list[Advice]:
    """What follows from the verdict, with the numbers to do it by and the commands that do it.

    Args:
        forecast: the verdict, and other learning rates beside it.
        real: what the plan really did, where it was carried out.
        done: commands that have been run on this plan already.
    """
    verdict, grid = forecast.verdict, forecast.what_if
    collapsed = None if real is None else real.collapse_step
    if verdict.level in ("low", "inconclusive") and collapsed is None:
        return _calm(verdict.level, done, carried_out=forecast.carried_out)
    advice: list[Advice] = []
    rate = grid.safest_rate()
    # A real run that collapsed outweighs a forecast that did not see it.
    if verdict.level in ("low", "inconclusive"):
        advice.append(Advice("Trust the real run, not this forecast or its what-if map.", place=20))
    elif rate is not None:
        value = f"{rate.learning_rate:.3g}"
        told = (
            f"Lower the peak learning rate to {value}: there all {grid.planned_steps} steps stay within the "
            "limits of the what-if map."
        )
        advice.append(Advice(told, "run", f"--set training.learning_rate={value}", 20))
    known = [
        step
        for step in (verdict.safe_steps, None if collapsed is None else collapsed - 1)
        if step is not None
    ]
    last = min(known, default=0)
    cell = None if rate is not None or last != verdict.safe_steps else _other_cell(grid, last)
    if cell is not None:
        advice.append(cell)
    elif last:
        advice.append(
            Advice(
                f"Stop by step {last}: the safe-step budget.",
                "run",
                f"--set training.max_steps={last}",
                30,
            )
        )
    if "screen" not in done:
        advice.append(Advice("Find the rows that do it, and drop them.", "screen", place=40))
    if "guard" not in done:
        advice.append(Advice("Try the plan under protection, and see what that costs.", "guard", place=50))
    return advice


def _other_cell(grid: WhatIfGrid, budget: int) -> Advice | None:
    """The safest cell of use, where it is at another rate and as long as the budget at the planned one."""
    row, steps = grid.safest() or (None, 0)
    if row is None or row.factor == 1 or steps < budget:
        return None
    value = f"{row.learning_rate:.3g}"
    told = f"Train {steps} steps at a learning rate of {value}: the safest useful cell of the what-if map."
    return Advice(told, "run", f"--set training.max_steps={steps} --set training.learning_rate={value}", 30)


def _calm(level: str, done: Sequence[str], *, carried_out: bool) -> list[Advice]:
    if level == "low":
        kept = "one run is one draw" if carried_out else "low risk is a forecast, not a proof"
        return [Advice(f"Keep a safety evaluation at the end of the run: {kept}.", place=20)]
    if carried_out:
        return [Advice("Measure more safety rows, with prompts that the model refuses today.", place=20)]
    told = "Measure more safety rows, or carry the plan out in memory and measure the truth."
    return [Advice(told, "" if "verify" in done else "verify", place=20)]
