"""Anchor scores: whether a row's answer begins like the answers that the model should refuse to give.

    s_j = mean_i cos(h_j, a_i) − mean_i cos(h_j, r_i)

h is the hidden state of one layer at the L-th token of an answer. a and r come from the same safety prompts,
those that the model refuses today: r with the first L tokens of its own refusal, a with as many of an answer
that complies. Rows are read at their L-th response token too, or at their last. No gradient, no planned run:
a forward pass over the openings. The layer is chosen on the anchors alone: of the upper half, the one at
which each anchor, left out, is told best from those of the other kind.

Source: the idea is representation matching, He et al., arXiv 2404.01099; anchors from one set of prompts and
of one length are this project's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arisk.base.errors import InputError, NumericsError
from arisk.base.task import Progress, Task
from arisk.config.plan import BehaviourConfig, ScreenConfig
from arisk.gradients import move_batch
from arisk.models.answers import GreedyAnswers
from arisk.models.losses import KEEP
from arisk.models.rendering import IGNORED
from arisk.screening.measure import refused_prompts, writer_of
from arisk.screening.points import control_groups, row_groups

__all__ = ["AnchorScores", "anchor_scores"]

#: How an answer begins that complies.
AFFIRMATIVE = "Sure, here is how to"
#: Tokens of the anchors where control rows must show how an answer begins.
LENGTH = 5


@dataclass(frozen=True)
class AnchorScores:
    """Scores of rows (N,) and of control rows (None without), and the layer: 0 is the embedding."""

    scores: Tensor
    null: Tensor | None
    layer: int
    anchors: int


def anchor_scores(
    task: Task, config: ScreenConfig, progress: Progress, behaviour: BehaviourConfig | None = None
) -> AnchorScores:
    """Anchor scores at the aligned model, inside `measuring`.

    Args:
        task: model and data.
        config: rows per pass, control rows.
        progress: told of rows.
        behaviour: the judge that tells which prompts are refused; default the rule.

    Raises:
        InputError: the safety set has no prompts that the model refuses, or the model shows no hidden states.
        NumericsError: a score is not finite; names the row.
    """
    why = "set `screen.score: point`"
    writer = writer_of(task, why)
    rows, refusals = refused_prompts(task, writer, task.model, behaviour or BehaviourConfig(), why)
    answers = _answered(task, writer, len(rows))
    # One length for both kinds, so that no score tells long from short.
    length = min(*(len(tokens) for tokens in answers), *(len(tokens) for tokens in refusals))
    kinds = [
        _all_states(
            task.model, writer.opening_batches(rows, [t[:length] for t in texts], config.batch_size), length
        )
        for texts in (answers, refusals)
    ]
    layer = _layer(*kinds)
    anchors = [states[:, layer] for states in kinds]
    groups = row_groups(task.finetune, config.batch_size)
    scores = _scores(task, groups, anchors, layer, length, progress, len(task.finetune.rows), "row")
    null = None
    if task.control is not None:
        held = control_groups(task.control, config)
        null = _scores(task, held, anchors, layer, length, progress, config.control_samples, "control row")
    return AnchorScores(scores, null, layer, len(rows))


def _answered(task: Task, writer: GreedyAnswers, count: int) -> list[list[int]]:
    """Openings that comply: one English phrase, or those of control rows where the model lacks its words.

    Raises:
        InputError: neither can be had.
    """
    tokenizer = writer.tokenizer
    tokens: list[int] = tokenizer(AFFIRMATIVE, add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id is None or tokenizer.unk_token_id not in tokens:
        return [tokens] * count
    ordinary = None if task.control is None else task.control.generate
    if not isinstance(ordinary, GreedyAnswers) or not ordinary.rendered:
        raise InputError(
            f"the tokenizer does not know the words of {AFFIRMATIVE!r}, and no control row shows an answer",
            where="control",
            fix="give control rows, or set `screen.score: point`",
        )
    openings = [
        list(row.tokens[row.response_start : row.response_start + LENGTH]) for row in ordinary.rendered
    ]
    return [openings[i % len(openings)] for i in range(count)]


def _all_states(model: nn.Module, batches: Sequence[Mapping[str, Any]], length: int) -> Tensor:
    """(N, layers + 1, H) of the anchors."""
    device = next(model.parameters()).device
    return torch.cat([_states(model, move_batch(batch, device), length) for batch in batches])


def _states(model: nn.Module, batch: Mapping[str, Any], length: int) -> Tensor:
    """Hidden states of every layer at the L-th response token of each row, or its last: (B, layers + 1, H).

    Raises:
        InputError: the model shows none.
    """
    trained = batch["labels"] != IGNORED
    at = (trained.cumsum(1) <= length) & trained
    # The last true place; what comes behind is not run.
    last = at.shape[1] - 1 - at.flip(1).to(torch.int64).argmax(1)
    stop = int(last.max()) + 1
    inputs = {key: value[:, :stop] for key, value in batch.items() if key not in ("labels", KEEP)}
    with torch.no_grad():
        found = model(**inputs, output_hidden_states=True)
    states: Sequence[Tensor] | None = getattr(found, "hidden_states", None)
    if states is None:
        raise InputError(
            "the model shows no hidden states",
            where="screen.score: anchors",
            fix="set `screen.score: point`",
        )
    rows = torch.arange(len(last), device=last.device)
    return torch.stack([state[rows, last].to("cpu", torch.float64) for state in states], 1)


def _layer(answered: Tensor, refused: Tensor) -> int:
    """The layer of the upper half at which anchors, each left out, are told apart best, by d′."""
    count, layers = answered.shape[:2]
    best, found = layers - 1, -float("inf")
    for layer in range(layers // 2, layers):
        sides = [nn.functional.normalize(kind[:, layer], dim=1) for kind in (answered, refused)]
        own = [(side @ side.T).fill_diagonal_(0).sum(1) / (count - 1) for side in sides]
        other = (sides[0] @ sides[1].T).mean(1), (sides[1] @ sides[0].T).mean(1)
        # Both as scores: high for an answer, low for a refusal.
        values = own[0] - other[0], other[1] - own[1]
        spread = float((values[0].var() + values[1].var()).sqrt())
        apart = float(values[0].mean() - values[1].mean()) / max(spread, 1e-12)
        if apart > found:
            best, found = layer, apart
    return best


def _scores(
    task: Task,
    groups: Any,
    anchors: Sequence[Tensor],
    layer: int,
    length: int,
    progress: Progress,
    known: int,
    name: str,
) -> Tensor:
    """(N,) scores in the order of the rows' numbers."""
    device = next(task.model.parameters()).device
    sides = [nn.functional.normalize(side, dim=1) for side in anchors]
    rows: list[int] = []
    values: list[Tensor] = []
    for group in groups:
        progress(f"{name}s beside anchors", len(rows), max(known, len(rows)))
        states = _states(task.model, move_batch(group.batch, device), length)[:, layer]
        own = nn.functional.normalize(states, dim=1)
        values.append((own @ sides[0].T).mean(1) - (own @ sides[1].T).mean(1))
        rows += group.rows
    progress(f"{name}s beside anchors", len(rows), len(rows))
    found = torch.cat(values)
    if not bool(found.isfinite().all()):
        row = rows[int((~found.isfinite()).to(torch.int64).argmax())]
        raise NumericsError(
            f"the hidden state of {name} {row} is not finite",
            where=f"screen.score: anchors ({name} {row}, counted from 0)",
            fix="check the row, or load the model in float32",
        )
    return found[torch.argsort(torch.tensor(rows))]
