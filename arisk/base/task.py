"""What arisk looks at: a model, the data sets with their losses, and the parameters that train.

Everything after loading works on these records alone, so a Hugging Face model and any other torch
model take the same road. This module holds data only; it loads nothing and runs nothing.

How long work reports on itself: one callback, given by whoever shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

__all__ = [
    "Batch",
    "Generate",
    "LoraPair",
    "LossFn",
    "Measure",
    "ProbeRows",
    "Progress",
    "RowBatches",
    "SampleSet",
    "Task",
    "TokenLoss",
    "silent",
    "without_text",
]

#: One batch: a tensor, or a tuple, list, mapping or dataclass of tensors that share dimension 0.
Batch = Any

#: ``loss_fn(model, batch)``: per-sample losses of shape (B,), or their mean as a scalar.
LossFn = Callable[[nn.Module, Batch], Tensor]

#: ``generate(model, rows, max_new_tokens)``: greedy answers to the prompts of rows by index.
Generate = Callable[[nn.Module, Sequence[int], int], Sequence[str]]


@runtime_checkable
class RowBatches(Protocol):
    """Planned batches that know their rows and can be regrouped; other data cannot be stratified."""

    size: int

    @property
    def row_count(self) -> int:
        """Different rows."""
        ...

    def indices(self, number: int) -> list[int]:
        """Rows of the micro-batch with this number, counted from 0."""
        ...

    def of(self, rows: Sequence[int]) -> Batch:
        """A batch of these rows."""
        ...

    def sample(self, count: int) -> list[int]:
        """Numbers of at most `count` different rows."""
        ...


@dataclass(frozen=True)
class TokenLoss:
    """A loss by trained tokens, as trainers take it over a whole optimizer step.

    Attributes:
        sums: ``(model, batch) -> (B,)`` summed negative log-likelihood of each sample (nats).
        counts: ``batch -> (B,)`` trained tokens of each sample, without running the model.
    """

    sums: LossFn
    counts: Callable[[Batch], Tensor]


@dataclass(frozen=True)
class SampleSet:
    """A data set cut into batches, with its loss.

    Attributes:
        name: ``safety``, ``finetune``, ``control``, ``heldout`` or ``probes.…``; used in messages and
            artifacts.
        batches: iterable of batches; each iteration starts anew and gives the same batches.
        loss_fn: ``(model, batch) -> (B,)`` mean negative log-likelihood per response token of each
            sample (nats), or for a foreign loss its scalar mean over the batch.
        rows: one mapping per sample in batch order (``prompt``, ``response``, ``tokens``, ``line``,
            …), for display and provenance; empty for foreign data.
        statistics: counts made while loading (rows read, duplicates, truncated, tokens).
        generate: writes greedy answers to the prompts of some of the rows; None where there is no
            tokenizer to write with.
        tokens: the loss by trained tokens; None where tokens are not known, and a training step then
            takes the mean over rows.
    """

    name: str
    batches: Iterable[Batch]
    loss_fn: LossFn
    rows: Sequence[Mapping[str, Any]] = ()
    statistics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    generate: Generate | None = None
    tokens: TokenLoss | None = None

    @property
    def units(self) -> int:
        """What micro-batches count: packed sequences, or rows; 0 where neither is known."""
        sequences: Sequence[Any] | None = getattr(self.batches, "sequences", None)
        return len(self.rows if sequences is None else sequences)


#: What is measured on the rows of a probe.
Measure = Literal["nll", "opening", "choice"]


@dataclass(frozen=True)
class ProbeRows:
    """Rows on which something beside safety is measured along a run: what else the fine-tune costs.

    Attributes:
        name: under which it is shown; each once.
        measure: ``nll``: mean loss of the responses; ``opening``: of their first tokens (both nats per
            token); ``choice``: share of questions whose right option is the likeliest.
        samples: its rows; of ``choice`` one row per option, the options of a question one after the other.
            An option's log-probability is minus its loss, times its tokens where the rows tell their
            ``tokens``.
        options: of ``choice`` how many options each question has; right: the place of the right one, from 0.
    """

    name: str
    measure: Measure
    samples: SampleSet
    options: Sequence[int] = ()
    right: Sequence[int] = ()


@dataclass(frozen=True)
class LoraPair:
    """One LoRA adapter: ΔW = scaling · B A, with A (r, in) and B (out, r) named as parameters."""

    name_a: str
    name_b: str
    scaling: float


@dataclass(frozen=True)
class Task:
    """A model with its safety, fine-tuning and (optional) control data.

    Attributes:
        model: the aligned model, as it would be before the first optimizer step.
        safety: prompts with safe responses.
        finetune: the planned fine-tuning batches in the order they would be trained on; a batch is
            one optimizer step's micro-batch.
        control: ordinary (utility) data, the null against which safety drift is judged.
        heldout: safety samples that no forecast may see, on which a real fine-tune is measured
            (`arisk verify`, `arisk guard`).
        clean: rows on which the fine-tune's use is measured, best not trained on (`arisk guard`).
        probes: further rows, each with a measure, that are forecast and verified beside safety.
        parameter_names: the selected parameters, in the model's order; they need not all have
            ``requires_grad`` set.
        lora_pairs: adapters among the selected parameters.
        description: provenance for the report (model id, adapter, dtype, counts).
    """

    model: nn.Module
    safety: SampleSet
    finetune: SampleSet
    parameter_names: Sequence[str]
    control: SampleSet | None = None
    lora_pairs: Sequence[LoraPair] = ()
    description: Mapping[str, Any] = field(default_factory=dict[str, Any])
    heldout: SampleSet | None = None
    clean: SampleSet | None = None
    probes: Sequence[ProbeRows] = ()


#: ``progress(label, done, total)``; called with ``done == 0`` first and ``done == total`` last.
Progress = Callable[[str, int, int], None]


def silent(label: str, done: int, total: int) -> None:
    """Report nothing."""


def without_text(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a row in numbers, and where it comes from: no text of it.

    >>> without_text({"prompt": "How?", "tokens": 4, "line": 2, "source": "data.jsonl"})
    {'tokens': 4, 'line': 2, 'source': 'data.jsonl'}
    """
    return {key: value for key, value in row.items() if key == "source" or isinstance(value, (int, float))}
