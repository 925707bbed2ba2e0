"""Which prompts are answered in text along a real fine-tune, when, and why none are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from arisk.base.task import Generate, SampleSet

__all__ = ["Writer", "writer", "writing_steps"]

#: Shares of the run after which text is generated; losses are measured far more often.
SHARES = (0.0, 0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Writer:
    """Answers the same prompts at every call.

    Attributes:
        prompts: their rows: `prompt`, `response`, `line`.
        rows: their indices in the sample set.
        reason: why there are none; None where there are.
    """

    prompts: Sequence[Mapping[str, str | int | None]]
    rows: Sequence[int]
    max_new_tokens: int
    generate: Generate | None
    reason: str | None

    def texts(self, model: nn.Module) -> list[str]:
        """One greedy answer per prompt; none where nothing can be written."""
        if self.generate is None:
            return []
        return [str(text) for text in self.generate(model, self.rows, self.max_new_tokens)]


def writer(samples: SampleSet, count: int, max_new_tokens: int, *, setting: str) -> Writer:
    """Evenly spread rows of a sample set to be answered, or the reason why none can be.

    Args:
        samples: prompts with safe responses, with their `generate`.
        count: prompts wanted; 0 switches it off.
        max_new_tokens: length of an answer at most.
        setting: name of the setting that gave the count.
    """
    reason = None
    if count == 0:
        reason = f"{setting} is 0"
    elif samples.generate is None:
        reason = "the safety rows have no prompt or no tokenizer to answer it with"
    elif not samples.rows:
        reason = "the task does not name its safety rows"
    if reason is not None:
        return Writer((), (), max_new_tokens, None, reason)
    # Rows lie in order of length: the first ones would all be short.
    taken = min(count, len(samples.rows))
    rows = [i * len(samples.rows) // taken for i in range(taken)]
    prompts = [_prompt(samples.rows[i]) for i in rows]
    return Writer(prompts, rows, max_new_tokens, samples.generate, None)


def _prompt(row: Mapping[str, object]) -> dict[str, str | int | None]:
    line = row.get("line")
    return {
        "prompt": str(row.get("prompt") or ""),
        "response": str(row.get("response") or ""),
        "line": line if isinstance(line, int) else None,
    }


def writing_steps(points: Sequence[int]) -> list[int]:
    """The measured steps nearest to 0, 1/8, 1/4, 1/2 and all of the run, without repeats.

    >>> writing_steps([0, 1, 2, 5, 10, 24, 50, 90, 200])
    [0, 24, 50, 90, 200]
    """
    wanted = [share * points[-1] for share in SHARES]
    return sorted({min(points, key=lambda point: abs(point - want)) for want in wanted})
