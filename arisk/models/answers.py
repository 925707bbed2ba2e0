"""Greedy answers of a causal LM to the prompts of rows: what a user of the model would read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from arisk.base.errors import InputError
from arisk.models.openings import OpeningScores, followed
from arisk.models.rendering import Rendered

__all__ = ["BATCH", "GreedyAnswers"]

#: Prompts answered at once, and padded prompt tokens of such a batch.
BATCH, BATCH_TOKENS = 32, 8192


class GreedyAnswers:
    """`arisk.base.task.Generate` for rendered rows: the likeliest token, one after the other.

    Prompts are the tokens before each row's response, so they are what the loss sees: chat template,
    truncation and all. Prompts of like length are answered together, padded on the left, with a cache
    of keys and values; an answer ends at an end token, and is the one it would be alone.

    Args:
        tokenizer: a Hugging Face tokenizer.
        rendered: rows in the order of their sample set.
    """

    def __init__(self, tokenizer: Any, rendered: Sequence[Rendered]) -> None:
        self.tokenizer = tokenizer
        self.rendered = rendered

    def __call__(self, model: nn.Module, rows: Sequence[int], max_new_tokens: int) -> list[str]:
        """Answers to the prompts of these rows, special tokens left out.

        Args:
            model: a Hugging Face causal LM in evaluation mode; it is not changed.
            rows: indices of rows.
            max_new_tokens: length of an answer at most.

        Raises:
            InputError: the model cannot generate.
        """
        return [self.text(tokens) for tokens in self.tokens(model, rows, max_new_tokens)]

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as a reader sees them: no special tokens, no space around."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

    def tokens(self, model: nn.Module, rows: Sequence[int], max_new_tokens: int) -> list[list[int]]:
        """The same answers as tokens, the end token included where it was reached.

        Raises:
            InputError: the model cannot generate.
        """
        prompts = [self.prompt(i) for i in rows]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        made: dict[int, list[int]] = {}
        # In float64 the masks of transformers overflow at padding, and what they mask is NaN.
        pads = next(model.parameters()).dtype != torch.float64
        while order:
            taken = [i for n, i in enumerate(order[:BATCH]) if (n + 1) * len(prompts[i]) <= BATCH_TOKENS]
            taken = taken or order[:1]
            if not pads:
                taken = [i for i in taken if len(prompts[i]) == len(prompts[order[0]])]
            order = order[len(taken) :]
            made.update(
                zip(taken, self._batch(model, [prompts[i] for i in taken], max_new_tokens), strict=True)
            )
        return [made[i] for i in range(len(prompts))]

    def prompt(self, row: int) -> tuple[int, ...]:
        """The prompt's tokens of a row."""
        rendered = self.rendered[row]
        return rendered.tokens[: rendered.response_start]

    def followed(
        self, model: nn.Module, rows: Sequence[int], openings: Sequence[Sequence[int]]
    ) -> OpeningScores:
        """How much of these openings the model still says after the prompts of these rows."""
        return followed(model, [self.prompt(i) for i in rows], openings, self._pad)

    @property
    def _pad(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)

    def _batch(self, model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        longest = max(len(prompt) for prompt in prompts)
        pad, ends = self._pad, self._ends(model)
        device = next(model.parameters()).device
        ids = torch.tensor([(pad,) * (longest - len(p)) + tuple(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        try:
            # Every setting that the model's own generation config might turn away from greedy.
            made = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                use_cache=True,
                eos_token_id=ends,
                pad_token_id=pad,
            )
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as err:
            lines = str(err).strip().splitlines()
            raise InputError(
                f"the model cannot generate text: {lines[0] if lines else type(err).__name__}",
                where="behaviour.prompts",
                fix="set `behaviour.prompts: 0`, and `guard.generate: 0` for protected fine-tunes; "
                "losses are measured all the same",
            ) from err
        return [_until(tokens, ends or []) for tokens in made[:, longest:].tolist()]

    def _ends(self, model: Any) -> list[int] | None:
        """End tokens of the model and of the tokenizer; chat models often have several."""
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = [own] if isinstance(own, int) else list(own or [])
        if self.tokenizer.eos_token_id is not None:
            ends.append(int(self.tokenizer.eos_token_id))
        return sorted(set(ends)) or None


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Tokens up to the first end token and with it; what follows is padding."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens
