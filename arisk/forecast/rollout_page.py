"""The rollout on the page: what it cost, what was measured point by point, and how it works."""

from __future__ import annotations

import math

from arisk.forecast.record import ForecastResult, RolloutResult
from arisk.report.section import esc, folded, table
from arisk.report.text import NOT_MEASURED, number, percent

__all__ = ["cost_text", "method", "rollout_section"]

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
        f"{measured.safety_passes} passes over the safety and control samples.{esc(ended)}</p>"
        '<p class="reading"><b>How to read this.</b> One line per point at which losses were measured, in '
        "optimizer steps of the planned run; losses in nats per token, safety and control as changes against "
        "the aligned model. Kept share is how much of the leap before the point speed control kept (1 = all "
        f"of it, or real steps). The first {measured.pilot_steps} steps are real.</p>"
        f"{folded('The measured points as a table', table(_HEADER, _rows(measured)))}</section>"
    )


_HEADER = ("step", "fine-tuning loss", "kept share", "safety change", "control change")


def _rows(measured: RolloutResult) -> list[list[str]]:
    safety = measured.safety.mean(0).tolist()
    control = None if measured.control is None else measured.control.mean(0).tolist()
    return [
        [
            str(step),
            "–" if math.isnan(measured.finetune_loss[i]) else number(measured.finetune_loss[i]),
            number(measured.kept_share[i]),
            number(safety[i]),
            NOT_MEASURED if control is None else number(control[i]),
        ]
        for i, step in enumerate(measured.steps)
    ]


def method() -> str:
    """How the rollout forecasts, in words and equations."""
    parts = "".join(
        f'<h3>{esc(name)}</h3><p>{esc(words)}</p><p class="equation">{esc(equation)}</p>'
        for name, words, equation in METHOD
    )
    return (
        '<section id="method"><h2>How the rollout forecasts</h2>'
        '<p class="reading"><b>How to read this.</b> The planned fine-tune is walked through at a share of '
        "its cost, and safety is measured along the way. Symbols: η learning rate, τ = Σ η flow time, θ "
        "parameters, ḡ mean gradient and σ² its batch variance over q steps, L steps a leap stands for, z "
        f"the model's outputs, ℓ losses in nats per token.</p>{parts}</section>"
    )
