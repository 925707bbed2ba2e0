"""The first screen: does safety survive the planned run, until which step, how sure, and what to do.

What the numbers say, as sentences made by rules; each leads to the figure it was read from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arisk.anatomy.record import CollectResult, ScoreResult, SubspaceResult
from arisk.forecast.record import Curve, ForecastResult, RolloutResult
from arisk.forecast.text import collapse_text, drift_sentence, sample_sentence
from arisk.report.section import esc, listed
from arisk.report.text import (
    NOT_MEASURED,
    layer_and_type,
    number,
    percent,
)
from arisk.report.worth import record_line
from arisk.verification.truth import Comparison

__all__ = [
    "ICONS",
    "Finding",
    "findings",
    "findings_section",
    "found",
    "layer_sentence",
    "row_sentence",
    "run_strip",
    "verdict_section",
]

#: Where no optional stage has found a remedy yet.
HELP = "Find the rows that do it: arisk screen. Train with protection: arisk guard."
ICONS = {"low": "✓", "elevated": "▲", "high": "✕", "inconclusive": "?"}


def verdict_section(
    forecast: ForecastResult,
    task: Mapping[str, Any],
    check: Comparison | None,
    advice: Sequence[str] = (),
) -> str:
    """Level, sentence, the planned run as a strip, four numbers, advice and reasons.

    Args:
        forecast: the verdict and what it rests on.
        task: what the plan is about.
        check: a real run beside the forecast, where there is one.
        advice: what optional stages found to help.
    """
    v = forecast.verdict
    curve = forecast.forecasters.get(v.basis)
    worth = [record_line(v.basis)] if v.basis in forecast.forecasters else []
    # What really happened is worth more than any record.
    real = [] if check is None else [check.sentence]
    return (
        f'<section class="verdict" data-level="{esc(v.level)}" aria-labelledby="verdict">'
        f'<p class="level"><span aria-hidden="true">{ICONS[v.level]}</span> Risk: {esc(v.level)}</p>'
        f'<h1 id="verdict">{_sentence(v.sentence)}</h1>'
        f'<p class="plan">{esc(_plan(forecast.training, task))}</p>'
        f'{run_strip(forecast, check)}<dl class="tiles">{"".join(_tiles(forecast, curve, check))}</dl>'
        f'<div class="three"><div>{listed("What to do", _advice(forecast, check, advice))}</div>'
        f"<div>{listed('Why', v.reasons)}</div>"
        f"<div>{listed('How far to trust this', [*real, *v.caveats, *worth])}</div></div></section>"
    )


def _sentence(sentence: str) -> str:
    """The verdict, what stands in brackets at its end in smaller type."""
    head, bracket, rest = sentence.partition(" (")
    if not rest.rstrip(".").endswith(")"):
        return esc(sentence)
    return f'{esc(head)} <span class="aside">{esc(bracket.strip() + rest)}</span>'


def _tiles(forecast: ForecastResult, curve: Curve | None, check: Comparison | None) -> list[str]:
    v = forecast.verdict
    real = None if check is None else check.real_collapse
    budget = "steps whose upper interval stays below the threshold"
    if real is not None and v.safe_steps is not None and real <= v.safe_steps:
        budget = f"too many: the real run collapsed at step {real}"
    safe = NOT_MEASURED if v.safe_steps is None else f"{v.safe_steps} of {v.horizon}"
    between = "" if curve is None or curve.collapse_interval is None else _interval(curve)
    return [
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


def run_strip(forecast: ForecastResult, check: Comparison | None) -> str:
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
    if check is not None and check.real_collapse is not None:
        drawn += f'<i class="real" style="left:{_share(check.real_collapse, horizon)}"></i>'
        key.append(("real", f"real run: step {check.real_collapse}"))
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


def _advice(forecast: ForecastResult, check: Comparison | None, measured: Sequence[str]) -> list[str]:
    """What follows from the verdict, with the numbers to do it by."""
    verdict, grid = forecast.verdict, forecast.what_if
    real = None if check is None else check.real_collapse
    # A real run that collapsed outweighs a forecast that did not see it.
    if verdict.level == "low" and real is None:
        return ["Keep a safety evaluation at the end of the run; low risk is a forecast, not a proof."]
    if verdict.level == "inconclusive" and real is None:
        return ["Measure more: more safety rows, more probe points; or watch a short real fine-tune closely."]
    rate = grid.safest_rate()
    if real is not None and verdict.level in ("low", "inconclusive"):
        advice = ["Trust the real run, not this forecast or its what-if map."]
    elif rate is None:
        advice = ["Plan fewer steps and a lower rate together: the what-if map says which stay below."]
    else:
        advice = [
            f"Lower the peak learning rate to {number(rate.learning_rate)}: all {grid.planned_steps} steps "
            "stay below the alarm level there."
        ]
    known = [step for step in (verdict.safe_steps, None if real is None else real - 1) if step is not None]
    last = min(known, default=0)
    if last:
        advice.append(f"Stop or evaluate safety by step {number(last, 9)}.")
    return [*measured, *advice] if measured else [*advice, HELP]


def findings_section(found: Sequence[Finding], more: Sequence[tuple[str, str]]) -> str:
    """Sentences made from the numbers, each with what it is about and a way to its figure.

    Args:
        found: findings of the stages.
        more: topic and sentence of what optional stages found.
    """
    rows = [(finding.topic, finding.sentence, finding.section) for finding in found]
    rows += [(topic, sentence, "") for topic, sentence in more]
    if not rows:
        return ""
    told = "".join(
        f"<div><dt>{_topic(topic, section)}</dt><dd>{esc(sentence)}</dd></div>"
        for topic, sentence, section in rows
    )
    return f'<section id="findings"><h2>Findings</h2><dl class="notes findings">{told}</dl></section>'


def _topic(topic: str, section: str) -> str:
    return f'<a href="#{esc(section)}">{esc(topic)}</a>' if section else esc(topic)


#: Share of a sum from which the few that carry it are named: of rows, and of neighbouring layers.
ROWS_CARRY, LAYERS_CARRY = 0.5, 0.6
#: Rows are few up to this share of those scored; a band of layers is narrow up to half of the layers.
FEW_ROWS, NARROW_BAND = 0.25, 0.5
#: Share from which one module outside the layers is named.
OUTSIDE_CARRIES = 0.25
WORDS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")


@dataclass(frozen=True)
class Finding:
    """One sentence, what it is about in a word or two, and the id of the section that shows it."""

    topic: str
    sentence: str
    section: str


def found(
    collected: CollectResult,
    space: SubspaceResult,
    scored: ScoreResult,
    forecast: ForecastResult,
    measured: RolloutResult | None = None,
) -> list[Finding]:
    """Every rule that has something to say, in the order of what a reader acts on."""
    traces, harm = space.module_traces, scored.module_second_order
    said = [
        ("Specificity", drift_sentence(forecast) or _probed(scored), "drift"),
        ("Safety rows", sample_sentence(measured, forecast.threshold), "samples"),
        ("What if", forecast.what_if.rate_sentence(), "what-if"),
        ("Training rows", row_sentence(scored.examples), "examples"),
        ("Safety lives", layer_sentence(collected.modules, traces, "safety Fisher trace"), "fisher-map"),
        ("Harm enters", layer_sentence(collected.modules, harm, "second-order harm"), "harm-map"),
        ("Overlap", _overlap(scored), "overlap"),
    ]
    return [Finding(topic, sentence, section) for topic, sentence, section in said if sentence]


def findings(
    collected: CollectResult,
    space: SubspaceResult,
    scored: ScoreResult,
    forecast: ForecastResult,
    measured: RolloutResult | None = None,
) -> list[str]:
    """The sentences alone, for the summaries."""
    return [finding.sentence for finding in found(collected, space, scored, forecast, measured)]


def row_sentence(examples: Sequence[Mapping[str, Any]]) -> str | None:
    """How few of the scored rows carry half of the second-order harm; None where there is no harm.

    Few are at most a quarter of the rows; they are named where they are at most four.
    """
    pairs = [(float(row.get("second_order") or 0.0), row.get("line", row.get("index"))) for row in examples]
    ranked = sorted((pair for pair in pairs if math.isfinite(pair[0]) and pair[0] > 0), key=lambda p: -p[0])
    total = sum(harm for harm, _ in ranked)
    if len(pairs) < 4 or total <= 0:
        return None
    sums = list(itertools.accumulate(harm / total for harm, _ in ranked))
    count = 1 + next(i for i, share in enumerate(sums) if share >= ROWS_CARRY - 1e-9)
    share = percent(sums[count - 1])
    if count > FEW_ROWS * len(pairs):
        return (
            f"The harm is spread over the data: the {count} worst of {len(pairs)} scored fine-tuning rows "
            f"carry {share} of the second-order harm of the first update."
        )
    named = f" ({', '.join(str(line) for _, line in ranked[:count])})" if count <= 4 else ""
    return (
        f"{_counted(count, 'scored fine-tuning row')}{named} of {len(pairs)} {_verb(count)} {share} of the "
        "second-order harm of the first update."
    )


def layer_sentence(modules: Sequence[str], values: Tensor, what: str) -> str | None:
    """The narrowest band of neighbouring layers that carries 60 %; None where nothing is positive.

    Without two numbered layers the one module that carries most is named. Where no band does, and modules
    outside the layers (embedding, head) hold `OUTSIDE_CARRIES` or more, they are named with their share and
    the band is that of the rest.
    """
    mass = values.to(torch.float64).nan_to_num(0.0).clamp(min=0).tolist()
    total = sum(mass)
    if len(modules) < 2 or total <= 0:
        return None
    named = [(*layer_and_type(module), value / total) for module, value in zip(modules, mass, strict=True)]
    layers = sorted({layer for layer, _, _ in named if layer is not None})
    if len(layers) < 2:
        name, share = _heaviest(named, lambda _: True)
        return f"{name} carries {percent(share)} of the {what} ({len(modules)} modules)."
    by_layer = [sum(share for layer, _, share in named if layer == at) for at in layers]
    band = _band(by_layer)
    name, outside = _heaviest(named, lambda layer: layer is None)
    if band is None and outside >= OUTSIDE_CARRIES:
        inside = sum(by_layer)
        rest = _band([share / inside for share in by_layer]) if inside else None
        mass_there = 0.0 if rest is None else sum(by_layer[rest[0] : rest[1] + 1])
        where = "" if rest is None else f", {percent(mass_there)} {_at(layers, rest)}"
        return f"{name} carries {percent(outside)} of the {what}{where}."
    if band is None:
        return f"The {what} is spread over the {len(layers)} layers: no narrow band carries most of it."
    first, last, share = layers[band[0]], layers[band[1]], sum(by_layer[band[0] : band[1] + 1])
    name, most = _heaviest(named, lambda layer: layer is not None and first <= layer <= last)
    where = f"Layer {first}" if first == last else f"Layers {first}–{last}"
    return (
        f"{where} of {len(layers)} {'carries' if first == last else 'carry'} {percent(share)} of the {what}, "
        f"{percent(most)} of all in {name}."
    )


def _at(layers: Sequence[int], band: tuple[int, int]) -> str:
    first, last = layers[band[0]], layers[band[1]]
    named = f"layer {first}" if first == last else f"layers {first}–{last}"
    return f"lies in {named} of {len(layers)}"


def _band(shares: Sequence[float]) -> tuple[int, int] | None:
    """First and last index of the narrowest run that reaches `LAYERS_CARRY`; None where it is not narrow."""
    for width in range(1, math.floor(NARROW_BAND * len(shares)) + 1):
        sums = [sum(shares[i : i + width]) for i in range(len(shares) - width + 1)]
        best = max(range(len(sums)), key=lambda i: sums[i])
        if sums[best] >= LAYERS_CARRY - 1e-9:
            return best, best + width - 1
    return None


def _heaviest(
    named: Sequence[tuple[int | None, str, float]], inside: Callable[[int | None], bool]
) -> tuple[str, float]:
    """The kind of module with the largest share among the chosen layers; share 0 where there is none."""
    sums: dict[str, float] = {"": 0.0}
    for layer, kind, share in named:
        if inside(layer):
            sums[kind] = sums.get(kind, 0.0) + share
    kind = max(sums, key=lambda name: sums[name])
    return kind, sums[kind]


def _counted(count: int, noun: str) -> str:
    word = WORDS[count] if count < len(WORDS) else str(count)
    return f"{word} {noun}{'' if count == 1 else 's'}"


def _verb(count: int) -> str:
    return "carries" if count == 1 else "carry"


def _overlap(scored: ScoreResult) -> str | None:
    overlap = scored.overlap
    if overlap.p_value is None or math.isnan(overlap.ratio):
        return None
    control = "" if overlap.control is None else f"; ordinary data overlaps {number(overlap.control)}"
    says = {
        True: "more than chance",
        False: "no more than chance",
        None: f"more than its {overlap.permutations} shuffled copies, which are too few to rule out chance",
    }[overlap.beyond_chance]
    return (
        f"The first update overlaps the safety subspace by {number(overlap.ratio)}, {says} "
        f"(permutation p = {number(overlap.p_value, 2)}{control})."
    )


def _probed(scored: ScoreResult) -> str | None:
    """Whether ordinary answers suffer as much as safe ones along the measured move."""
    if scored.probe_safety is None or scored.probe_control is None:
        return None
    safety, control = float(scored.probe_safety[:, -1].mean()), float(scored.probe_control[-1])
    if not math.isfinite(safety) or not math.isfinite(control) or safety <= 0:
        return None
    if control >= 0.5 * safety:
        return (
            f"At the end of the measured move the control loss has risen by {number(control)} nats/token, "
            f"the safety loss by {number(safety)}: much of the drift is general, not specific to safety."
        )
    return (
        f"At the end of the measured move the safety loss has risen by {number(safety)} nats/token and the "
        f"control loss by {number(control)}: the drift is specific to safety."
    )
