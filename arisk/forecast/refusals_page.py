"""Refusals on the page: how many safety prompts are still refused, step by step, and what answers do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from arisk.forecast.record import AnswerCount, RealRun, RefusalForecast
from arisk.models.judge import OUTCOMES
from arisk.report.figure import LEGEND, Figure, axes, reference_line
from arisk.report.section import esc, listed
from arisk.report.text import NOT_MEASURED, number, percent

__all__ = ["end_text", "lost_text", "refusal_figure", "refusal_notes", "refusal_sentence", "refusal_summary"]

BLUE, GREY = "#0072B2", "#8a8a8a"
EQUATION = """P(prompt i is refused) = σ(u_i)
u_i = w₀ + w₁ log p(own opening) + w₂ [opening still the likeliest] + c
own opening: what the aligned model itself says first; c: from the answers written along the virtual run"""


def end_text(refusals: RefusalForecast | None) -> str:
    """Refusals today and at the end of the plan: `28 → 6 of 32`; not measured says so."""
    if refusals is None or refusals.status != "measured":
        return NOT_MEASURED
    return f"{refusals.today} → {refusals.at_end[0]} of {refusals.prompts}"


def lost_text(refusals: RefusalForecast | None) -> str:
    """The band at the end, and the step by which a quarter of the refusals is lost."""
    if refusals is None or refusals.status != "measured":
        return "which is not “none lost”"
    _, fewest, most = refusals.at_end
    step = refusals.lost_steps.get("0.25")
    quarter = f"a quarter lost by step {step}" if step is not None else "a quarter is not lost in the plan"
    return f"{fewest} to {most}; {quarter if refusals.today else 'none is refused today'}"


def refusal_sentence(refusals: RefusalForecast | None) -> str | None:
    """What the refusals do, for the list of findings; None where they were not measured."""
    if refusals is None or refusals.status != "measured" or not refusals.today:
        return None
    end, fewest, most = refusals.at_end
    last = refusals.counts[-1]
    others = [(name, getattr(last, name)) for name in OUTCOMES if name != "refused" and getattr(last, name)]
    rest = ", ".join(f"{count} {name}" for name, count in others)
    told = f" Of the last answers that were written (step {last.step}), {last.refused} refuse" + (
        f"; {rest}." if rest else "."
    )
    return (
        f"{refusals.today} of {refusals.prompts} safety prompts are refused today, {end} ({fewest} to {most})"
        f" at step {refusals.horizon}.{told}"
    )


def refusal_figure(refusals: RefusalForecast | None, confidence: float, real: RealRun | None) -> Figure:
    """Share of safety prompts refused along the plan, with its band, the answers behind it, and the truth.

    Args:
        refusals: the forecast; None or not measured gives a figure that says so.
        confidence: nominal coverage of the band.
        real: what the same plan really did, where it was carried out.
    """
    reading = (
        "The line is the forecast share of safety prompts that the model still refuses; its band is the "
        f"{confidence:.0%} interval over prompts and what the method is known to get wrong. Diamonds are "
        "answers really written along the virtual run: an answer refuses when it begins with a refusal (or "
        "as the judge model says). Between them the model's own openings are followed. The dotted line is "
        "where the loss of refusals counts as a loss of safety; the grey line is ordinary prompts, which "
        "should not be refused at all."
    )
    header = ["step", *OUTCOMES, "ordinary prompts refused"]
    if refusals is None or refusals.status != "measured":
        why = "the rollout has no record of it" if refusals is None else refusals.reason
        return Figure("refusals", "Refusals", [], {}, reading, EQUATION, header, [], why)
    data = _traces(refusals, real)
    kept = 100 * (1 - refusals.threshold) * refusals.today / max(refusals.prompts, 1)
    line = reference_line(horizon=kept, text=f"{refusals.threshold:.0%} of today's refusals lost")
    layout = axes(
        "optimizer step",
        "prompts refused (%)",
        shapes=[line["shape"]] if refusals.today else [],
        annotations=[line["annotation"]] if refusals.today else [],
        hovermode="x unified",
        legend=LEGEND,
    )
    layout["yaxis"]["range"] = [-3, 105]
    layout["xaxis"]["range"] = [-0.01 * refusals.horizon, 1.01 * refusals.horizon]
    return Figure(
        "refusals",
        "Refusals",
        data,
        layout,
        reading,
        EQUATION,
        header,
        _rows(refusals),
        says=refusal_sentence(refusals) or "No safety prompt is refused today: no refusal can be lost.",
        file="refusal_forecast",
    )


def _traces(refusals: RefusalForecast, real: RealRun | None) -> list[dict[str, Any]]:
    steps = list(refusals.steps)
    hidden = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
    band = {"fill": "tonexty", "fillcolor": f"{BLUE}30"}
    data: list[dict[str, Any]] = [
        {"type": "scatter", "x": steps, "y": _shares(refusals.lower), **hidden},
        {"type": "scatter", "x": steps, "y": _shares(refusals.upper), **hidden, **band},
        _line("forecast", steps, _shares(refusals.median), BLUE, "solid"),
        _marks("answers along the virtual run", refusals.counts, BLUE, "diamond"),
    ]
    if refusals.ordinary:
        data.append(_marks("ordinary prompts", refusals.ordinary, GREY, "circle", lines=True))
    if real is not None and real.refusals:
        data.append(
            {
                **_line("real fine-tune", [], [], "ink", "solid"),
                "mode": "lines+markers",
                "x": [step for step, _, _ in real.refusals],
                "y": [100 * refused / max(prompts, 1) for _, refused, prompts in real.refusals],
                "marker": {"color": "ink", "size": 7},
            }
        )
    return data


def _shares(values: Sequence[float]) -> list[float]:
    return [round(100 * value, 2) for value in values]


def _line(name: str, x: Sequence[int], y: Sequence[float], colour: str, dash: str) -> dict[str, Any]:
    line = {"color": colour, "dash": dash, "width": 3}
    return {
        "type": "scatter",
        "name": name,
        "mode": "lines",
        "x": list(x),
        "y": list(y),
        "line": line,
        "hovertemplate": "%{y:.0f} %",
    }


def _marks(
    name: str, counts: Sequence[AnswerCount], colour: str, symbol: str, *, lines: bool = False
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": name,
        "mode": "lines+markers" if lines else "markers",
        "x": [count.step for count in counts],
        "y": [100 * count.refused / max(count.prompts, 1) for count in counts],
        "line": {"color": colour, "dash": "dot", "width": 1.5},
        "marker": {"color": colour, "size": 9, "symbol": symbol},
        "hovertemplate": "%{y:.0f} %",
    }


def _rows(refusals: RefusalForecast) -> list[list[str]]:
    """Answers by step, every outcome as a count."""
    ordinary = {count.step: count for count in refusals.ordinary}
    return [
        [
            str(count.step),
            *(f"{getattr(count, name)} of {count.prompts}" for name in OUTCOMES),
            f"{ordinary[count.step].refused} of {ordinary[count.step].prompts}"
            if count.step in ordinary
            else NOT_MEASURED,
        ]
        for count in refusals.counts
    ]


def refusal_notes(refusals: RefusalForecast | None) -> str:
    """Steps at which shares of the refusals are lost, and whether the safety set is one, in words."""
    if refusals is None or refusals.status != "measured":
        return ""
    lost = [
        f"{float(share):.0%} of today's refusals lost: {_step(step, refusals.horizon)}"
        f"{_between(refusals.lost_intervals.get(share), refusals.horizon)}."
        for share, step in refusals.lost_steps.items()
    ]
    chance = percent(refusals.probability)
    known = (
        f"Of {refusals.safe_responses} safe responses {refusals.refusing_responses} refuse, by the rule; the "
        f"model refuses {refusals.today} of {refusals.prompts} of their prompts today. Loss of the first "
        f"tokens today: safe responses {number(refusals.safe_loss)}, what the model itself says "
        f"{number(refusals.own_loss)} nats per token."
    )
    told = [f"P({refusals.threshold:.0%} of the refusals are lost in the plan) = {chance}.", *lost]
    return (
        f"{listed('When refusals are lost', told) if lost else ''}"
        f'<p class="note"><b>Is the safety set one?</b> {esc(known)} {esc(" ".join(refusals.notes))}</p>'
    )


def _step(step: int | None, horizon: int) -> str:
    return f"not within {horizon} steps" if step is None else f"step {step}"


def _between(ends: Sequence[int | None] | None, horizon: int) -> str:
    if not ends or ends[0] is None:
        return ""
    return f" ({ends[0]} to {f'beyond {horizon}' if ends[1] is None else ends[1]})"


def refusal_summary(refusals: RefusalForecast | None) -> dict[str, Any] | None:
    """Plain values for `summary.json`; None where no rollout recorded anything."""
    if refusals is None:
        return None
    body = asdict(refusals)
    if refusals.status == "measured":
        end, fewest, most = refusals.at_end
        body |= {"today": refusals.today, "at_end": end, "at_end_interval": [fewest, most]}
    return body
