"""Seconds of one pass of each kind, timed on the model and a real batch of each data set.

What a pass costs is measured once it has been warmed up. Work on vectors as long as the selection is timed
on a sample of its parameters and scaled by their size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from arisk.anatomy.update import Permuted, first_batches
from arisk.base.errors import InputError
from arisk.base.task import Batch, Task
from arisk.base.terminal import peak_memory
from arisk.config.plan import Config
from arisk.gradients import (
    ParameterLayout,
    batch_invariance,
    batch_size,
    choose_engine,
    layout_of,
    measuring,
    move_batch,
    per_sample_parts,
)
from arisk.gradients.curvature import choose_hvp, hvp, losses_between, outputs_of
from arisk.gradients.engines import mean_gradient
from arisk.gradients.factors import Part, dots_of, lightest, parameter_products, tensors_of, with_tensors
from arisk.training.panels import sample_losses

__all__ = ["Calibration", "calibrate"]

#: Batches and repeats that are timed; a pass longer than this many seconds is timed once.
TIMED, LONG = 3, 5.0
#: Parameters on which work with long vectors is timed: as many as have so many entries.
SAMPLED = 4_000_000
#: Columns of the two products from which the cost of a product and that of a column are told apart.
FEW, MANY = 2, 10
#: Prompts answered at once.
ANSWERED = 8


@dataclass(frozen=True)
class Calibration:
    """What was timed.

    Attributes:
        seconds: for one row: `forward rows`, `gradient rows`, `single-row gradients`, `curvature rows`,
            `output losses` (of given outputs),
            `answer tokens` (of a written answer), `products` (of a kept gradient with any number of
            directions) and `product columns` (for each of them); for one vector: `permutations`; once:
            `Gram products` of all safety rows, `curvature tests`, `engine`.
        memory: peak resident memory of the process (GB) after mean `gradients`, after those `per sample`,
            and after `curvature`.
        device: peak memory (GB) on the model's device at the same places; empty where that is the CPU.
    """

    seconds: dict[str, float]
    memory: dict[str, float]
    device: dict[str, float]


def device_memory(device: torch.device) -> float | None:
    """Peak memory in GB that torch has taken on a device; None on the CPU, whose memory is the process's."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def calibrate(task: Task, config: Config) -> Calibration:
    """Time every kind of pass.

    Args:
        task: the model with its data; left as found.
        config: the wanted engine, the method of Hessian-vector products, and the length of answers.
    """
    layout = layout_of(task.model, task.parameter_names)
    device = next(task.model.parameters()).device
    # The middle batch: safety rows are sorted by length.
    batches = list(task.safety.batches)
    safety = move_batch(batches[len(batches) // 2], device)
    training = first_batches(task.finetune, TIMED, device)
    model, loss, safety_loss = task.model, task.finetune.loss_fn, task.safety.loss_fn
    rows, step_rows = batch_size(safety), sum(batch_size(batch) for batch in training)
    made: dict[str, float] = {}
    memory: dict[str, float] = {}
    on_device: dict[str, float] = {}

    def seen(kind: str) -> None:
        memory[kind] = peak_memory() or 0.0
        if (taken := device_memory(device)) is not None:
            on_device[kind] = taken

    with measuring(model, layout):
        # In the order of their memory, whose peak stays.
        made["forward rows"] = _seconds(lambda: sample_losses(model, [safety], safety_loss)) / rows
        made["output losses"] = _output_losses(task, safety) / rows
        made["gradient rows"] = _seconds(lambda: _gradients(task, layout, training)) / step_rows
        made["answer tokens"] = _answers(task, config.behaviour.tokens)
        seen("gradients")
        start = time.perf_counter()
        largest = move_batch(max(batches, key=batch_size), device)
        choice = choose_engine(model, largest, safety_loss, layout, config.collect.engine)
        batch_invariance(model, largest, safety_loss, layout, choice.engine)
        made["engine"] = time.perf_counter() - start

        def nowhere(name: str, parts: Sequence[Part]) -> None:
            del name
            lightest(parts)

        def rowwise() -> None:
            per_sample_parts(model, safety, safety_loss, layout, nowhere, engine=choice.engine)

        made["single-row gradients"] = _seconds(rowwise) / rows
        made |= _vectors(task, layout, safety, choice.engine)
        seen("per sample")
        direction = torch.randn(layout.numel, generator=torch.Generator().manual_seed(0)).to(device)
        start = time.perf_counter()
        plan = choose_hvp(model, training[:1], loss, layout, direction, config.score.hvp)
        made["curvature tests"] = time.perf_counter() - start

        def products() -> None:
            hvp(model, training[:1], loss, layout, direction, method=plan.method, step=plan.step)

        made["curvature rows"] = _seconds(products) / batch_size(training[0])
        seen("curvature")
    return Calibration(made, memory, on_device)


def _gradients(task: Task, layout: ParameterLayout, batches: Sequence[Batch]) -> None:
    for batch in batches:
        mean_gradient(task.model, batch, task.finetune.loss_fn, layout)


def _answers(task: Task, tokens: int) -> float:
    """Seconds of one token of an answer, several prompts at a time; 0 where nothing can be written."""
    generate, rows = task.safety.generate, range(min(ANSWERED, len(task.safety.rows)))
    if generate is None or not rows:
        return 0.0
    try:
        return _seconds(lambda: generate(task.model, rows, tokens)) / (len(rows) * tokens)
    except InputError:
        # A model that cannot write is told by the stages that want answers, with the way out.
        return 0.0


def _output_losses(task: Task, safety: Batch) -> float:
    """Seconds of the batch's losses at given outputs; 0 where the loss has none to extrapolate."""
    output = outputs_of(task.model, safety, task.safety.loss_fn)
    if output is None:
        return 0.0
    return _seconds(lambda: losses_between(task.model, safety, task.safety.loss_fn, output, output, [0.5]))


def _vectors(task: Task, layout: ParameterLayout, safety: Batch, engine: str) -> dict[str, float]:
    """Work on vectors (P,): a permutation, and products of a batch's kept gradients with directions."""
    sample = _sampled(task.model, layout)
    kept: dict[str, list[Part]] = {}

    def keep(name: str, own: Sequence[Part]) -> None:
        kept[name] = [with_tensors(part, [t.cpu() for t in tensors_of(part)]) for part in lightest(own)]

    per_sample_parts(task.model, safety, task.safety.loss_fn, sample, keep, engine=engine)
    share, rows = sample.numel / layout.numel, batch_size(safety)
    vector = torch.randn(sample.numel, generator=torch.Generator().manual_seed(0))

    def multiplied(columns: int) -> float:
        directions = vector[:, None].expand(-1, columns).contiguous()

        def work() -> None:
            for name, parts in kept.items():
                own = directions[sample.slice_of(name)].reshape(*sample.shape_of(name), -1)
                dots_of(parts, own.to(tensors_of(parts[0])[-1].dtype))

        return _seconds(work)

    # As many copies of the batch as there are safety rows: the Gram matrix grows with their square.
    copies = max(1, math.ceil(len(task.safety.rows) / rows))

    def gram() -> None:
        for name, parts in kept.items():
            parameter_products([parts] * copies, sample.shape_of(name))

    few, many = multiplied(FEW), multiplied(MANY)
    column = max(0.0, many - few) / (MANY - FEW)
    permuted = Permuted(vector, sample, 1, 0)
    return {
        "Gram products": _seconds(gram) / share,
        "permutations": _seconds(lambda: permuted.block(slice(0, sample.numel), slice(0, 1))) / share,
        "products": max(0.0, few - FEW * column) / (share * rows),
        "product columns": column / (share * rows),
    }


def _sampled(model: nn.Module, layout: ParameterLayout) -> ParameterLayout:
    """Parameters evenly through the model, of `SAMPLED` entries or little more; all of a small model."""
    if layout.numel <= SAMPLED:
        return layout
    # The largest ones, such as an embedding, would be the whole sample.
    sizes = [math.prod(shape) for shape in layout.shapes]
    names = [name for name, size in zip(layout.names, sizes, strict=True) if size <= SAMPLED]
    stride = max(1, layout.numel // SAMPLED)
    return layout_of(model, names[::stride] or layout.names[:1])


def _seconds(work: Callable[[], object]) -> float:
    """Median wall time of some repeats after one that warms up; a long one is its own result."""
    took: list[float] = []
    for _ in range(TIMED + 1):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
        if took[0] > LONG:
            return took[0]
    return sorted(took[1:])[TIMED // 2]
