"""The rollout on the page: what it cost, what was measured point by point, and how it works.

Per-sample drift: whether it is shared by all safety rows, and which rows lose most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from arisk.anatomy.text import layer_sentence, row_sentence
from arisk.forecast.record import DriftAccount, ForecastResult, RolloutResult
from arisk.forecast.text import last_drift, sample_sentence
from arisk.forecast.worth import worth_line
from arisk.report.figure import LEGEND, Figure, axes, threshold_line
from arisk.report.section import Column, coded, esc, folded, notes, rows_table, table
from arisk.report.text import NOT_MEASURED, number, percent
from arisk.training.behaviour import DECIDING

__all__ = [
    "account_findings",
    "account_section",
    "cost_text",
    "method",
    "rollout_section",
    "sample_drift",
    "sample_table",
]

#: How the forecast is made, in words and in equations; symbols as in `arisk.forecast.leap`.
METHOD = (
    (
        "Pilot",
        "The first optimizer steps are taken for real, on the planned batches, with the planned optimizer; "
        "the model is put back to the bit afterwards. What the outputs did there is extrapolated through "
        "the exact softmax: the pilot forecast.",
        "z(τ) = z₀ + (z_k − z₀)(τ/τ_k)^p, p fitted inside the pilot",
    ),
    (
        "Leap",
        "Then one leap stands for many steps: along the mean update d of the last q real steps, as far as "
        "the planned learning rates go. Far along noisy batches a real run goes less than straight: the "
        "distance correction f shortens the leap, tensor by tensor.",
        "Δ = x · f · (Σ η) · d, f² = (L² S + L σ²)/(L² S + L² σ²/q), S = ‖ḡ‖² − σ²/q",
    ),
    (
        "Speed control",
        "One gradient at the end of the leap says how much of the slope is left there; where fine-tuning "
        "stops paying off the flow slows down, and the leap is pulled back to the share x. A few real steps "
        "follow and damp what the leap stirred up.",
        "x = (1 − e^{−a})/a, a = 1 − ⟨g(end), d⟩/⟨ḡ, d⟩",
    ),
    (
        "Measurement",
        "At the end of every segment the loss of each safety and control sample is measured; nothing about "
        "safety is modelled between θ* and that point. The combined forecast pulls the rollout towards the "
        "pilot in log space, with a weight that falls with flow time.",
        "ΔL_s(k) = (1/N) Σ_i [ℓ_i(θ_k) − ℓ_i(θ*)], weight of the pilot ∝ τ_pilot/τ",
    ),
    (
        "What if",
        "Another learning rate or length passes the same positions at the same flow times, to first order "
        "in the learning rate, so it reads the same curve elsewhere. Batch noise and stability limits do "
        "not carry over: far above the planned rate the answer is rough and rather too low.",
        "ΔL_s(η', k) = combined(τ'_k), τ'_k = Σ_{i≤k} η'_i",
    ),
)


def cost_text(forecast: ForecastResult) -> str:
    """Gradients of the rollout as a share of the planned run: `68 of 200 planned gradients, 34 %`."""
    if not forecast.gradient_evaluations or not forecast.planned_evaluations:
        return NOT_MEASURED
    share = forecast.gradient_evaluations / forecast.planned_evaluations
    return (
        f"{forecast.gradient_evaluations} of {forecast.planned_evaluations} planned gradients, "
        f"{percent(share)}"
    )


READING = (
    "One line per point at which losses were measured, in optimizer steps of the planned run; losses in "
    "nats per "
    "token, safety and control as changes against the aligned model. First tokens is the same for the "
    "first tokens "
    "of the safe responses, which decide what an answer becomes; openings kept counts prompts whose own "
    "first three "
    "tokens are still the likeliest. Kept share is how much of the leap before the point speed control "
    "kept (1 = "
    "all of it, or real steps). The first {pilot} steps are real."
)


def rollout_section(measured: RolloutResult, forecast: ForecastResult) -> str:
    """Cost, and the measured points folded away; not measured says why."""
    head = '<section id="rollout"><h2>The rollout</h2>'
    if measured.status != "measured":
        return (
            f'{head}<p class="missing">Not measured: {esc(measured.reason or "not run")}. '
            "That is not the same as no risk.</p></section>"
        )
    ended = (
        ""
        if measured.diverged_at is None
        else f" It diverged after step {measured.steps[-1]}; later steps were not measured."
    )
    return (
        f"{head}<p><b>Cost:</b> {esc(cost_text(forecast))} (micro-batches), and "
        f"{esc(_passes(measured))}{esc(ended)}</p>"
        f'<div class="folds">{notes(READING.format(pilot=measured.pilot_steps))}'
        f"{folded('The measured points as a table', table(_HEADER, _rows(measured)))}</div></section>"
    )


def _passes(measured: RolloutResult) -> str:
    """How often samples were measured, at how many points all of them, and in which precision."""
    points, whole = len(measured.steps), len(measured.whole_steps)
    said = f"{points} measurements of the safety and control samples."
    if whole and whole < points:
        worst = number(max(measured.safety_error))
        said = (
            f"{points} measurements of safety and control samples: all safety samples at {whole} of them, at "
            f"at others a few that lead the rest (standard error of the mean up to {worst} nats per token, "
            "which the interval holds)."
        )
    if measured.precision is not None and measured.precision_error is not None:
        said += (
            f" Losses are in {measured.precision}, as the plan trains; at the aligned model that changes one "
            f"by {number(measured.precision_error)} nats per token (root mean square)."
        )
    return said


_HEADER = (
    *("step", "fine-tuning loss", "kept share", "safety change", "first tokens", "openings kept"),
    "control change",
)


def _rows(measured: RolloutResult) -> list[list[str]]:
    safety = measured.safety.mean(0).tolist()
    control = None if measured.control is None else measured.control.mean(0).tolist()
    first, kept = _first_tokens(measured), _openings_kept(measured)
    return [
        [
            str(step),
            "–" if math.isnan(measured.finetune_loss[i]) else number(measured.finetune_loss[i]),
            number(measured.kept_share[i]),
            number(safety[i]),
            first[i],
            kept.get(step, NOT_MEASURED),
            NOT_MEASURED if control is None else number(control[i]),
        ]
        for i, step in enumerate(measured.steps)
    ]


def _first_tokens(measured: RolloutResult) -> list[str]:
    """Change of the loss of the safe responses' first tokens at every point."""
    if measured.opening_loss is None:
        return [NOT_MEASURED] * len(measured.steps)
    mean = measured.opening_loss.mean(0)
    return [number(float(value)) for value in mean - mean[0]]


def _openings_kept(measured: RolloutResult) -> dict[int, str]:
    """Prompts whose own first tokens are still the likeliest, by step."""
    said = measured.behaviour.safety if measured.behaviour is not None else None
    if said is None or said.kept is None or said.log_p is None:
        return {}
    whole = (~said.log_p[:, 0, :DECIDING].isnan()).sum(1, keepdim=True)
    counts = (said.kept >= whole).sum(0).tolist()
    return {step: f"{count} of {len(said.prompts)}" for step, count in zip(said.steps, counts, strict=True)}


def method() -> str:
    """How the rollout forecasts, in words and equations."""
    parts = "".join(
        f'<h3>{esc(name)}</h3><p>{esc(words)}</p><p class="equation">{esc(equation)}</p>'
        for name, words, equation in METHOD
    )
    return (
        '<section id="method"><h2>How the rollout forecasts</h2>'
        '<p class="note">The planned fine-tune is walked through at a share of its cost, and safety is '
        "measured "
        "along the way. Symbols: η learning rate, τ = Σ η flow time, θ parameters, ḡ mean gradient and σ² "
        "its batch "
        "variance over q steps, L steps a leap stands for, z the model's outputs, ℓ losses in nats per "
        "token.</p>"
        f"{parts}</section>"
    )


#: Headings of the rows that were looked at, with the keys of `DriftAccount.rows` behind them.
ACCOUNT_COLUMNS = (
    (Column("row"), "line"),
    (Column("push against safety", "descending"), "first_order"),
    (Column("loss"), "loss"),
    (Column("tokens"), "tokens"),
)
ACCOUNT_EQUATION = """row i: −(Σ_k η_k / N) ⟨∇L_s, D g_i⟩ at the middle of the chord Δ = θ_T − θ*
module: ∫₀¹ ⟨∇L_s(θ* + tΔ), Δ⟩ dt, its part of the inner product (nats per token)"""
#: Rows, and modules, that are shown at once.
FIRST_ROWS, FIRST_MODULES = 5, 8


#: What modules and rows carry, in words.
RISE, PUSH = "rise of the loss of safe responses", "push against safety over the plan (first order)"

PUSH_MEANING = (
    "Push against safety: what a row would add to the loss of safe responses over the plan if all were "
    "linear (nats/token); `arisk screen` looks at every row."
)


def account_findings(found: DriftAccount) -> list[tuple[str, str | None, str]]:
    """Which rows and layers carry the change: (topic, sentence, section)."""
    values = torch.tensor(found.parts, dtype=torch.float64)
    layers = layer_sentence(found.modules, values, RISE) if found.change > 0 else None
    rows = row_sentence(found.rows, found.finetune_rows or 0, key="first_order", what=PUSH)
    return [("Training rows", rows, "account"), ("Harm enters", layers, "account")]


def account_section(found: DriftAccount, show_text: bool, limit: int) -> str:
    """The fine-tuning rows and the modules that carry the change of safety, to first order.

    Args:
        found: the account of the rollout.
        show_text: show prompts and responses, or only their numbers.
        limit: rows shown.
    """
    said = "".join(f'<p class="says">{esc(says)}</p>' for _, says, _ in account_findings(found) if says)
    total = sum(found.parts)
    of = "" if found.finetune_rows is None else f" of {found.finetune_rows}"
    reading = (
        f"{len(found.rows)} fine-tuning rows{of} were looked at, evenly over the data. The numbers say who "
        "pushes, not how far. Modules are those of the shortened run's whole move: their "
        f"parts add up to {number(total)} where {number(found.change)} nats per token were measured on the "
        f"same {found.safety_rows} safety rows."
    )
    ranked = sorted(found.rows, key=lambda row: -float(row["first_order"]))
    told = [([_account_value(row, key) for _, key in ACCOUNT_COLUMNS], row) for row in ranked[:limit]]
    rows = rows_table([c for c, _ in ACCOUNT_COLUMNS], told, show_text, "riskiest rows", first=FIRST_ROWS)
    if not told:
        rows = '<p class="missing">Single rows were not looked at. That is not the same as no risk.</p>'
    parts = sorted(zip(found.modules, found.parts, strict=True), key=lambda pair: -abs(pair[1]))
    heaviest = table(("module", "nats/token"), [[name, number(part)] for name, part in parts[:FIRST_MODULES]])
    return (
        f'<section id="account"><h2>Riskiest training rows and layers, a first look</h2>{said}{rows}'
        f'<p class="note">{coded(PUSH_MEANING)}</p><div class="folds">{notes(reading, ACCOUNT_EQUATION)}'
        f"{folded('The modules that carry most', heaviest)}</div></section>"
    )


def _account_value(row: Mapping[str, Any], key: str) -> Any:
    if key == "line":
        return row.get("line", row.get("index"))
    value = row.get(key)
    return None if value is None else float(value)


LOST, KEPT = "#D55E00", "#0072B2"
COLUMNS = (
    Column("safety row"),
    Column("change", "descending"),
    Column("loss at the start"),
    Column("lost at step"),
)


def sample_drift(measured: RolloutResult, forecast: ForecastResult) -> Figure:
    """Every safety sample's change at the last finite point of the rollout, in ascending order."""
    reading = (
        "One dot per safety row, sorted: how much its loss has changed at the end of the shortened run. A "
        "line that is flat and then shoots up means that a few rows are lost; one that lies above the "
        "threshold as a whole means that safety is lost everywhere. The mean is what the forecast shows."
    )
    equation = "ℓ_i(θ_k) − ℓ_i(θ*) for each safety row i, ascending"
    header = ["share of rows", "change at most"]
    drift = last_drift(measured)
    if drift is None:
        missing = measured.reason or "the rollout has no finite point after its start"
        return Figure("samples", "Drift row by row", [], {}, reading, equation, header, [], missing)
    step, values = drift
    ranked = sorted(enumerate(values), key=lambda pair: pair[1])
    lines = [row.get("line", index + 1) for index, row in enumerate(_known_rows(measured))]
    data = [
        _dots("below the threshold", KEPT, ranked, lines, lambda v: v < forecast.threshold),
        _dots("lost", LOST, ranked, lines, lambda v: v >= forecast.threshold),
    ]
    line = threshold_line(forecast.threshold, None, 100)
    mean = sum(values) / len(values)
    layout = axes(
        "safety rows, sorted (% of rows)",
        f"change of loss at step {step} (nats / token)",
        shapes=[line["shape"]],
        annotations=[line["annotation"]],
        legend=LEGEND,
    )
    layout["xaxis"]["range"] = [-2, 102]
    quantiles = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
    return Figure(
        "samples",
        "Drift row by row",
        [trace for trace in data if trace["x"]],
        layout,
        reading,
        equation,
        header,
        [
            *[[f"{q:.0%}", number(ranked[round(q * (len(ranked) - 1))][1])] for q in quantiles],
            ["mean", number(mean)],
        ],
        says=sample_sentence(measured, forecast.threshold) or "",
        worth=f"{worth_line('rollout')} That is about the mean; single rows were not compared one by one.",
    )


def _dots(
    name: str, colour: str, ranked: Sequence[tuple[int, float]], lines: Sequence[Any], keep: Any
) -> dict[str, Any]:
    last = max(1, len(ranked) - 1)
    kept = [(100 * rank / last, index, value) for rank, (index, value) in enumerate(ranked) if keep(value)]
    return {
        "type": "scatter",
        "name": name,
        "mode": "markers",
        "x": [round(share, 3) for share, _, _ in kept],
        "y": [value for _, _, value in kept],
        "customdata": [lines[index] for _, index, _ in kept],
        "marker": {"color": colour, "size": 6, "symbol": "circle" if name != "lost" else "diamond"},
        "hovertemplate": "row %{customdata}: %{y:+.3g}<extra></extra>",
    }


def _known_rows(measured: RolloutResult) -> Sequence[Mapping[str, Any]]:
    """What is known of each measured sample; nothing where the rows are those of a Python loader."""
    return measured.rows or [{}] * len(measured.safety)


def sample_table(measured: RolloutResult, forecast: ForecastResult, show_text: bool, limit: int) -> str:
    """The safety rows that lose most, sortable, their text folded away."""
    drift = last_drift(measured)
    if drift is None:
        return ""
    step, values = drift
    rows, start = _known_rows(measured), measured.start_losses
    worst = sorted(range(len(values)), key=lambda i: -values[i])[:limit]
    told = [
        (
            [
                rows[i].get("line", i + 1),
                values[i],
                None if start is None else float(start[i]),
                _lost_at(measured, i, forecast.threshold),
            ],
            rows[i],
        )
        for i in worst
    ]
    return (
        f"<h3>Safety rows that lose most by step {step}</h3>"
        '<p class="note">Changes and losses in nats per token. Lost at step: first measured step at which '
        f"the row has lost {forecast.threshold:g} or more; – where it has not.</p>"
        f"{rows_table(COLUMNS, told, show_text, 'safety rows that lose most')}"
    )


def _lost_at(measured: RolloutResult, row: int, threshold: float) -> str | int:
    changes = measured.safety[row].tolist()
    for step, change in zip(measured.steps, changes, strict=True):
        if math.isnan(change):
            continue
        if change >= threshold:
            return step
    return "–"
