"""Refusals on the page: how many safety prompts are still refused, step by step, and which are lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from arisk.forecast.record import AnswerCount, RealRun, RefusalForecast, RolloutResult
from arisk.models.judge import OUTCOMES
from arisk.report.section import esc, folded, listed, table
from arisk.report.text import NOT_MEASURED, chance, number, percent

__all__ = [
    "EQUATION",
    "READING",
    "end_text",
    "lost_section",
    "lost_text",
    "refusal_notes",
    "refusal_sentence",
    "refusal_summary",
    "refusal_traces",
]

BLUE = "#0072B2"
#: Prompts that lose their refusal and are shown at once, and characters of an answer.
AT_ONCE, LONGEST = 3, 280
READING = (
    "Share of safety prompts that the model still refuses; the band holds the luck of the prompts and what "
    "the "
    "method is known to get wrong. Diamonds are answers that the model wrote along the shortened run: an "
    "answer refuses when it begins with a refusal, or as the judge model says. Between them the model's own "
    "openings are followed. At the dotted line so many refusals are lost that it counts as a loss of safety."
)
EQUATION = """refusals: P(prompt i is refused) = σ(u_i)
u_i = w₀ + w₁ log p(own opening) + w₂ [opening still the likeliest] + c"""


def end_text(refusals: RefusalForecast | None) -> str:
    """Refusals today and at the end of the plan: `28 → 6 of 32`; not measured says so."""
    if refusals is None or refusals.status != "measured":
        return NOT_MEASURED
    return f"{refusals.today} → {refusals.at_end[0]} of {refusals.prompts}"


def lost_text(refusals: RefusalForecast | None, confidence: float) -> str:
    """The interval at the end, and the step by which a quarter of the refusals is lost.

    Args:
        refusals: the forecast of refusals.
        confidence: nominal coverage of its interval.
    """
    if refusals is None or refusals.status != "measured":
        return "which is not “none lost”"
    _, fewest, most = refusals.at_end
    step = refusals.lost_steps.get("0.25")
    quarter = f"a quarter lost by step {step}" if step is not None else "a quarter is not lost in the plan"
    interval = f"{percent(confidence)} interval {fewest} to {most}"
    return f"{interval}; {quarter if refusals.today else 'none is refused today'}"


def refusal_sentence(refusals: RefusalForecast | None, *, carried_out: bool = False) -> str | None:
    """What the answers that were written do; None where they were not, or nothing can be lost.

    Args:
        refusals: the forecast of refusals.
        carried_out: the run along which they were written was the plan itself.
    """
    if refusals is None or refusals.status != "measured" or not refusals.today:
        return None
    last = refusals.counts[-1]
    others = [(name, getattr(last, name)) for name in OUTCOMES if name != "refused" and getattr(last, name)]
    rest = "".join(f", {count} {_verb(name, count)}" for name, count in others)
    run = "the run" if carried_out else "the shortened run of the plan"
    return (
        f"Of the answers that the model wrote at step {last.step} of {run}, {last.refused} of "
        f"{last.prompts} refuse{rest} ({refusals.today} refused at step 0)."
    )


def _verb(outcome: str, count: int) -> str:
    """An outcome as a verb of so many answers."""
    one, many = {
        "deflected": ("deflects", "deflect"),
        "answered": ("does what was asked", "do what was asked"),
        "broken": ("is broken", "are broken"),
    }[outcome]
    return one if count == 1 else many


def refusal_traces(
    refusals: RefusalForecast, real: RealRun | None, axis: str, *, carried_out: bool = False
) -> list[dict[str, Any]]:
    """Band, forecast, answers written, and the truth, in percent of the prompts.

    Args:
        refusals: a forecast that was measured.
        real: what the same plan really did, where it was carried out.
        axis: plotly's name of the vertical axis.
        carried_out: the run along which they were followed was the plan itself.
    """
    steps, where = list(refusals.steps), {"type": "scatter", "yaxis": axis}
    hidden = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
    shown = {"hovertemplate": "%{y:.0f} %"}
    data: list[dict[str, Any]] = [
        {**where, "x": steps, "y": _shares(refusals.lower), **hidden},
        {
            **where,
            "x": steps,
            "y": _shares(refusals.upper),
            **hidden,
            "fill": "tonexty",
            "fillcolor": f"{BLUE}30",
        },
        {
            **where,
            **shown,
            "name": "refusals" if carried_out else "refusals, forecast",
            "mode": "lines",
            "x": steps,
            "y": _shares(refusals.median),
            "line": {"color": BLUE, "width": 3},
        },
        {
            **where,
            **shown,
            "name": "answers written",
            "mode": "markers",
            "x": [count.step for count in refusals.counts],
            "y": [100 * count.refused / max(count.prompts, 1) for count in refusals.counts],
            "marker": {"color": BLUE, "size": 9, "symbol": "diamond"},
        },
    ]
    if real is not None and real.refusals:
        data.append(
            {
                **where,
                **shown,
                "name": "real fine-tune",
                "legendgroup": "real",
                "showlegend": False,
                "mode": "lines+markers",
                "line": {"color": "ink", "width": 2.5},
                "x": [step for step, _, _ in real.refusals],
                "y": [100 * refused / max(prompts, 1) for _, refused, prompts in real.refusals],
                "marker": {"color": "ink", "size": 7},
            }
        )
    return data


def _shares(values: Sequence[float]) -> list[float]:
    return [round(100 * value, 2) for value in values]


def refusal_notes(refusals: RefusalForecast | None) -> str:
    """When shares of the refusals are lost, the answers counted, and whether the safety set is one."""
    if refusals is None or refusals.status != "measured":
        return ""
    lost = [
        f"{percent(float(share))} of the refusals before are lost: {_step(step, refusals.horizon)}"
        f"{_between(refusals.lost_intervals.get(share), refusals.horizon)}."
        for share, step in refusals.lost_steps.items()
    ]
    told = [
        f"P({percent(refusals.threshold)} of the refusals are lost in the plan): "
        f"{chance(refusals.probability)}.",
        *lost,
    ]
    known = (
        f"Of {refusals.safe_responses} safe responses {refusals.refusing_responses} refuse, by the rule; the "
        f"model refuses {refusals.today} of {refusals.prompts} of their prompts today. Loss of the first "
        f"tokens today: safe responses {number(refusals.safe_loss)}, what the model itself says "
        f"{number(refusals.own_loss)} nats per token."
    )
    header = ["step", *OUTCOMES, "ordinary prompts refused"]
    return folded(
        "When refusals are lost, and what was counted",
        f"{listed('When refusals are lost', told) if lost else ''}{table(header, _rows(refusals))}"
        f'<p class="note"><b>Is the safety set one?</b> {esc(known)} {esc(" ".join(refusals.notes))}</p>',
    )


def _rows(refusals: RefusalForecast) -> list[list[str]]:
    """Answers by step, every outcome as a count."""
    ordinary = {count.step: count for count in refusals.ordinary}
    return [
        [str(c.step), *(_of(c, name) for name in OUTCOMES), _ordinary(ordinary.get(c.step))]
        for c in refusals.counts
    ]


def _of(count: AnswerCount, outcome: str) -> str:
    return f"{getattr(count, outcome)} of {count.prompts}"


def _ordinary(count: AnswerCount | None) -> str:
    return NOT_MEASURED if count is None else _of(count, "refused")


def _step(step: int | None, horizon: int) -> str:
    return f"not within {horizon} steps" if step is None else f"by step {step}"


def _between(ends: Sequence[int | None] | None, horizon: int) -> str:
    if not ends or ends[0] is None:
        return ""
    return f" ({ends[0]} to {f'beyond {horizon}' if ends[1] is None else ends[1]})"


def lost_section(refusals: RefusalForecast | None, measured: RolloutResult, show_text: bool) -> str:
    """Prompts that were refused and no longer are, each with the answer before and the last one written.

    Args:
        refusals: the forecast, with the outcomes of the answers.
        measured: the rollout with their texts.
        show_text: show prompts and answers, or only how many.
    """
    said = None if measured.behaviour is None else measured.behaviour.safety
    if refusals is None or said is None or len(refusals.outcomes) < 2 or len(said.answers) < 2:
        return ""
    first, last = said.answers[0], said.answers[-1]
    pairs = zip(*refusals.outcomes, strict=True)
    lost = [i for i, (before, after) in enumerate(pairs) if before == "refused" and after != "refused"]
    if not lost:
        return ""
    head = (
        '<section id="lost"><h2>Refusals that are lost</h2>'
        f'<p class="says">{len(lost)} of {refusals.today} prompts refused before are no longer refused at '
        "step "
        f"{last.step} of the {'run' if measured.carried_out else 'shortened run'}.</p>"
    )
    if not show_text:
        return f'{head}<p class="note">Texts are not shown (report.show_text is off).</p></section>'
    rows = [_turned(said.prompts[i], first.texts[i], last.texts[i], refusals.outcomes[1][i]) for i in lost]
    header = ("prompt", "before", f"after {last.step} steps")
    rest = (
        folded(f"The other {len(rows) - AT_ONCE}", _texts(header, rows[AT_ONCE:]))
        if len(rows) > AT_ONCE
        else ""
    )
    return f"{head}{_texts(header, rows[:AT_ONCE])}{rest}</section>"


def _turned(row: Mapping[str, Any], before: str, after: str, outcome: str) -> str:
    """One prompt, as a row of a table; a phone shows its cells one below the other."""
    cells = [esc(_short(str(row.get("prompt") or "(no prompt)"))), esc(_short(before) or "(nothing)")]
    cells.append(f"{esc(_short(after) or '(nothing)')} <small>[{esc(outcome)}]</small>")
    return "<tr>" + "".join(f'<td class="text" dir="auto">{cell}</td>' for cell in cells) + "</tr>"


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= LONGEST else flat[: LONGEST - 1] + "…"


def _texts(header: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{esc(name)}</th>' for name in header)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="answers before and after">'
        f'<table class="turned"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def refusal_summary(refusals: RefusalForecast | None) -> dict[str, Any] | None:
    """Plain values for `summary.json`; None where no rollout recorded anything."""
    if refusals is None:
        return None
    body = asdict(refusals)
    body.pop("outcomes")
    if refusals.status == "measured":
        end, fewest, most = refusals.at_end
        body |= {"today": refusals.today, "at_end": end, "at_end_interval": [fewest, most]}
    return body
