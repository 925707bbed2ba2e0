"""What the numbers of the anatomy say, as sentences made by rules; None where a rule has nothing to say."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from arisk.anatomy.record import ScoreResult
from arisk.report.text import number, percent

__all__ = ["layer_and_type", "layer_sentence", "overlap_sentence", "probed_sentence", "row_sentence"]

#: Share of a sum from which the few that carry it are named: of rows, and of neighbouring layers.
ROWS_CARRY, LAYERS_CARRY = 0.5, 0.6
#: Rows are few up to this share of those scored; a band of layers is narrow up to half of the layers.
FEW_ROWS, NARROW_BAND = 0.25, 0.5
#: Share from which one module outside the layers is named.
OUTSIDE_CARRIES = 0.25


def row_sentence(
    examples: Sequence[Mapping[str, Any]],
    rows: int = 0,
    key: str = "second_order",
    what: str = "harm of the first update (second order)",
) -> str | None:
    """How few of the scored rows carry half of the harm; None where there is no harm.

    Few are at most a quarter of the rows; they are named where they are at most four.

    Args:
        examples: rows that were looked at.
        rows: of the fine-tuning data; 0 when not known.
        key: of their harm.
        what: how the sentence calls it.
    """
    pairs = [(float(row.get(key) or 0.0), row.get("line", row.get("index"))) for row in examples]
    ranked = sorted((pair for pair in pairs if math.isfinite(pair[0]) and pair[0] > 0), key=lambda p: -p[0])
    total = sum(harm for harm, _ in ranked)
    if len(pairs) < 4 or total <= 0:
        return None
    sums = list(itertools.accumulate(harm / total for harm, _ in ranked))
    count = 1 + next(i for i, share in enumerate(sums) if share >= ROWS_CARRY - 1e-9)
    share = percent(sums[count - 1])
    of = f" (of {rows})" if rows > len(pairs) else ""
    scored = f"the {len(pairs)} fine-tuning rows{of} that were scored"
    harm = f"{share} of the {what}"
    if count > FEW_ROWS * len(pairs):
        return f"The harm is spread over the data: of {scored} the {count} worst carry {harm}."
    if count > 4:
        return f"Of {scored}, {count} carry {harm}."
    named = ", ".join(str(line) for _, line in ranked[:count])
    return f"Of {scored}, row{'' if count == 1 else 's'} {named} {_verb(count)} {harm}."


def _verb(count: int) -> str:
    return "carries" if count == 1 else "carry"


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


def layer_and_type(module: str) -> tuple[int | None, str]:
    """Layer number and module type from a name.

    >>> layer_and_type("base_model.model.model.layers.3.self_attn.q_proj")
    (3, 'self_attn.q_proj')
    >>> layer_and_type("lm_head")
    (None, 'lm_head')
    """
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
    if found is None:
        return None, module.removeprefix("base_model.model.").removeprefix("model.")
    return int(found.group(1)), module[found.end() :] or module


def overlap_sentence(scored: ScoreResult) -> str | None:
    """Whether the first update overlaps the safety subspace by more than chance."""
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


def probed_sentence(scored: ScoreResult) -> str | None:
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
