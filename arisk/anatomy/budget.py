"""How much of `collect`, `subspace` and `score` a verdict pays for (`why: auto`). No torch.

Everything is counted in forward passes of one token, from facts that stage rollout leaves behind: the same
plan makes the same choice on every machine, and another learning rate changes nothing. What was chosen is
part of the stage's key and stands in its record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from arisk.base.artifacts import read_json
from arisk.engine.stage import FORWARDS

if TYPE_CHECKING:
    from arisk.config.plan import ScoreConfig

__all__ = ["COUNTS", "Counts", "affordable", "counts_in", "score_passes"]

#: File of stage rollout with these facts.
COUNTS = "counts.json"
#: Share of what the verdict took that may be spent on saying why, by count: in CPU time on the demo these
#: passes take 1.5 times what they count, so that it comes to 30 %.
SHARE = 0.2
#: Shares of the settings that are tried, and what is left of each setting at least: two batches show their
#: noise, nineteen permutations a p-value of .05.
SHARES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.0)
LEAST = {"batches": 2, "hvp_batches": 1, "krylov_dim": 3, "nulls": 19, "examples": 8, "probe_points": 3}
#: A gradient of a single row with its products, over the same without them; a pass of a permutation over a
#: vector, in products of it: it jumps through memory.
SINGLE, PERMUTED = 1.3, 10
#: Doublings, about, until a virtual move has gone far enough.
REACHING = 12


@dataclass(frozen=True)
class Counts:
    """What is known once the verdict stands.

    Attributes:
        forward_tokens: what the verdict took, in forward passes of one token.
        safety, control, finetune: rows; safety_tokens, finetune_tokens of one row in the mean.
        selected, parameters: of the model, those that train and all.
    """

    forward_tokens: float
    safety: int
    control: int
    finetune: int
    safety_tokens: float
    finetune_tokens: float
    selected: int
    parameters: int


def counts_in(folder: Path) -> Counts | None:
    """The facts that stage rollout left; None where it has not been run."""
    path = folder / COUNTS
    if not path.exists():
        return None
    body = read_json(path)
    return Counts(**{name: body[name] for name in Counts.__dataclass_fields__})


def score_passes(
    score: ScoreConfig, *, safety: int, control: int, finetune: int, selected: int, batch: int, chunk: int
) -> dict[str, float]:
    """Passes of the model in stage score, by kind.

    Args:
        score: its settings.
        safety: rows; with `control` and `finetune`.
        control: rows of ordinary data.
        finetune: fine-tuning rows.
        selected: parameters that train.
        batch: rows of a micro-batch.
        chunk: safety rows of a pass.
    """
    probe = score.probe_points + 1 if score.probe_points else 0
    reaching = REACHING * (min(safety, chunk) + batch) if probe else 0
    probed = safety + score.hvp_batches * batch * (2 if control else 1)
    return {
        "gradient rows": score.batches * batch * (2 if control else 1),
        "curvature rows": score.krylov_steps(selected) * score.hvp_batches * batch,
        "single-row gradients": min(score.examples, finetune),
        "forward rows": probe * probed + reaching,
    }


def affordable(score: ScoreConfig, counts: Counts, *, batch: int, chunk: int) -> ScoreConfig | None:
    """The largest settings of stage score with which it and `collect` stay within `SHARE`; None: none do.

    Args:
        score: the settings wished for; none is raised.
        counts: what is known.
        batch: rows of a micro-batch.
        chunk: safety rows of a pass.
    """
    for share in SHARES:
        for probe in ({}, {"probe_points": 0}) if share == SHARES[-1] else ({},):
            tried = score.model_copy(update={**_lowered(score, share, counts.selected), **probe})
            if _tokens(tried, counts, batch, chunk) <= SHARE * counts.forward_tokens:
                return tried
    return None


def _lowered(score: ScoreConfig, share: float, selected: int) -> Mapping[str, int]:
    """The settings at a share of themselves; only those that change."""
    if share == 1:
        return {}
    wished = {name: getattr(score, name) for name in LEAST} | {"krylov_dim": score.krylov_steps(selected)}
    return {name: min(value, max(LEAST[name], round(share * value))) for name, value in wished.items()}


def _tokens(score: ScoreConfig, counts: Counts, batch: int, chunk: int) -> float:
    """What collect and score take, in forward passes of one token."""
    passes = score_passes(
        score,
        safety=counts.safety,
        control=counts.control,
        finetune=counts.finetune,
        selected=counts.selected,
        batch=batch,
        chunk=chunk,
    )
    safety = SINGLE * FORWARDS["single-row gradients"] * counts.safety + passes.pop("forward rows")
    rows = SINGLE * FORWARDS["single-row gradients"] * passes.pop("single-row gradients")
    rows += sum(FORWARDS[kind] * count for kind, count in passes.items())
    columns = score.batches + score.krylov_steps(counts.selected) + score.nulls + 3
    products = counts.safety * (columns + counts.safety) + PERMUTED * score.nulls
    share = counts.selected / max(counts.parameters, 1)
    return safety * counts.safety_tokens + rows * counts.finetune_tokens + products * share
