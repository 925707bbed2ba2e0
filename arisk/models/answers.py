"""Greedy answers of a causal LM to the prompts of rows: what a user of the model would read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from arisk.base.errors import InputError
from arisk.models.rendering import Rendered

__all__ = ["BATCH", "GreedyAnswers"]

#: Prompts answered at once.
BATCH = 8


class GreedyAnswers:
    """`arisk.base.task.Generate` for rendered rows: the likeliest token, one after the other.

    Prompts are the tokens before each row's response, so they are what the loss sees: chat template,
    truncation and all. They are padded on the left; an answer ends at an end token.

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
        return [
            text
            for start in range(0, len(rows), BATCH)
            for text in self._batch(model, rows[start : start + BATCH], max_new_tokens)
        ]

    def _batch(self, model: Any, rows: Sequence[int], max_new_tokens: int) -> list[str]:
        prompts = [self.rendered[i].tokens[: self.rendered[i].response_start] for i in rows]
        longest = max(len(prompt) for prompt in prompts)
        pad = int(self.tokenizer.pad_token_id or 0)
        device = next(model.parameters()).device
        ids = torch.tensor([(pad,) * (longest - len(p)) + p for p in prompts], device=device)
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
                eos_token_id=self._ends(model),
                pad_token_id=pad,
            )
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as err:
            lines = str(err).strip().splitlines()
            raise InputError(
                f"the model cannot generate text: {lines[0] if lines else type(err).__name__}",
                where="verify.generate",
                fix="set `verify.generate: 0` or `guard.generate: 0`; losses are measured all the same",
            ) from err
        texts: list[str] = self.tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _ends(self, model: Any) -> list[int] | None:
        """End tokens of the model and of the tokenizer; chat models often have several."""
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = [own] if isinstance(own, int) else list(own or [])
        if self.tokenizer.eos_token_id is not None:
            ends.append(int(self.tokenizer.eos_token_id))
        return sorted(set(ends)) or None
