"""What is measured on a model: log-probabilities of given answers, and the answers it gives itself.

Everything runs under bfloat16 autocast as the training does, and leaves mode and random state as
found. What all prompts begin with (the template's system turn) is read once and its keys and values
are shared by the rows.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from tests.bench.real.rows import Encoded, encode, pad_id

#: Tokens of an answer.
ANSWER_TOKENS = 24
#: Lengths of an opening, in tokens.
OPENINGS = (3, 5, 7)
#: Rows of a batch: scored, answered.
BATCH, ANSWER_BATCH = 16, 48


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients under autocast; mode and random state are put back."""
    training, state = model.training, torch.get_rng_state()
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16):
            yield
    finally:
        model.train(training)
        torch.set_rng_state(state)


def freeze_in_bfloat16(model: Any) -> None:
    """Store frozen matrices in bfloat16: autocast would cast them so before each product, to the bit.

    Norms and embeddings stay float32, as autocast leaves them; a head tied to the embedding gets a
    copy. Trained weights (adapters) are not touched.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.dtype == torch.float32:
            frozen = not module.weight.requires_grad or module is head
            if frozen:
                weight = module.weight.detach().to(torch.bfloat16)
                module.weight = nn.Parameter(weight, requires_grad=False)


@dataclass(frozen=True)
class Scored:
    """Response tokens of one row: natural log-probability of each, and whether it is the likeliest."""

    log_probs: tuple[float, ...]
    likeliest: tuple[bool, ...]

    def loss(self, first: int | None = None) -> float:
        """Mean NLL per token, in nats, of the first so many response tokens; of all by default."""
        part = self.log_probs[:first]
        return -sum(part) / len(part)

    def opens(self, first: int) -> bool:
        """Whether greedy decoding would say the first so many tokens."""
        return all(self.likeliest[:first])


def score(model: Any, rows: Sequence[Encoded], pad: int) -> list[Scored]:
    """Response tokens of every row, from one pass; padded on the left so that few logits are made."""
    scored: dict[int, Scored] = {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    with evaluating(model):
        shared = _shared(model, [(row.tokens, row.start) for row in rows])
        for at in range(0, len(order), BATCH):
            scored |= _score_batch(model, {i: rows[i] for i in order[at : at + BATCH]}, shared, pad)
    return [scored[i] for i in range(len(rows))]


def _score_batch(
    model: Any, rows: dict[int, Encoded], shared: tuple[int, Any], pad: int
) -> dict[int, Scored]:
    longest = max(len(row.tokens) - row.start for row in rows.values())
    ids, fed = _fed(model, [row.tokens for row in rows.values()], shared, pad)
    made = model(**fed, use_cache=True, logits_to_keep=longest + 1)
    logits = made.logits[:, :-1].float()
    labels = ids[:, -longest:]
    log_probs = torch.log_softmax(logits, -1).gather(2, labels[..., None])[..., 0]
    likeliest = logits.argmax(-1) == labels
    found = {}
    for at, (i, row) in enumerate(rows.items()):
        kept = len(row.tokens) - row.start
        found[i] = Scored(tuple(log_probs[at, -kept:].tolist()), tuple(likeliest[at, -kept:].tolist()))
    return found


def _shared(model: Any, rows: Sequence[tuple[Sequence[int], int]]) -> tuple[int, Any]:
    """Number of tokens with which all prompts begin, and their keys and values; 0 and None where none."""
    # Two prompt tokens stay outside: the logit before the response belongs to each row.
    prompts = [tokens[: start - 2] for tokens, start in rows]
    count = next(
        (i for i, column in enumerate(zip(*prompts, strict=False)) if len(set(column)) > 1),
        min(len(prompt) for prompt in prompts),
    )
    if not count:
        return 0, None
    cache = transformers.DynamicCache(config=model.config)
    common = torch.tensor([list(prompts[0][:count])], device=model.device)
    model(input_ids=common, use_cache=True, logits_to_keep=1, **{_cache_name(model): cache})
    return count, cache


def _cache_name(model: Any) -> str:
    """Argument for kept keys and values, which transformers 5 renamed on the way."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def _fed(
    model: Any, rows: Sequence[Sequence[int]], shared: tuple[int, Any], pad: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """What follows the shared tokens, padded on the left, and the model's inputs with it."""
    count, kept = shared
    longest = max(len(row) for row in rows) - count
    filled = [[pad] * (longest + count - len(row)) + list(row[count:]) for row in rows]
    there = [[0] * (longest + count - len(row)) + [1] * (len(row) - count) for row in rows]
    ids, own = (torch.tensor(value, device=model.device) for value in (filled, there))
    cache = transformers.DynamicCache(config=model.config) if kept is None else copy.deepcopy(kept)
    if kept is not None:
        cache.batch_repeat_interleave(len(rows))
    return ids, {
        "input_ids": ids,
        "attention_mask": torch.cat([own.new_ones(len(rows), count), own], 1),
        "position_ids": (own.cumsum(1) - 1).clamp(min=0) + count,
        _cache_name(model): cache,
    }


def answer_tokens(
    model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int = ANSWER_TOKENS
) -> list[list[int]]:
    """Greedy answers as token ids, up to and without the end token."""
    asked = [encode(tokenizer, prompt).tokens for prompt in prompts]
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    made: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(asked[i]))
    with evaluating(model):
        shared = _shared(model, [(row, len(row)) for row in asked])
        for at in range(0, len(order), ANSWER_BATCH):
            chosen = order[at : at + ANSWER_BATCH]
            grown = _greedy(model, [asked[i] for i in chosen], shared, pad_id(tokenizer), ends, tokens)
            made |= dict(zip(chosen, grown, strict=True))
    return [made[i] for i in range(len(prompts))]


def _greedy(
    model: Any,
    asked: Sequence[Sequence[int]],
    shared: tuple[int, Any],
    pad: int,
    ends: set[int],
    tokens: int,
) -> list[list[int]]:
    _, fed = _fed(model, asked, shared, pad)
    said: list[list[int]] = [[] for _ in asked]
    going = [True] * len(asked)
    for _ in range(tokens):
        made = model(**fed, use_cache=True, logits_to_keep=1)
        token = made.logits[:, -1].float().argmax(-1)
        chosen = token.tolist()
        going = [goes and t not in ends for goes, t in zip(going, chosen, strict=True)]
        for row, t, goes in zip(said, chosen, going, strict=True):
            if goes:
                row.append(t)
        if not any(going):
            break
        fed = {
            "input_ids": token[:, None],
            "attention_mask": torch.cat([fed["attention_mask"], token.new_ones(len(asked), 1)], 1),
            "position_ids": fed["position_ids"][:, -1:] + 1,
            _cache_name(model): fed[_cache_name(model)],
        }
    return said


def answers(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int = ANSWER_TOKENS) -> list[str]:
    """Greedy answers as text."""
    return texts(tokenizer, answer_tokens(model, tokenizer, prompts, tokens))


def texts(tokenizer: Any, made: Sequence[Sequence[int]]) -> list[str]:
    """Answers as a reader sees them."""
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in made]
