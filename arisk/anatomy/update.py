"""The planned update: where the optimizer starts, how noisy that is, and its overlap with safety.

The overlap with the safety subspace stands beside everything it must be compared with; for LoRA adapters it
is also taken in ΔW space.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from arisk.anatomy.record import CollectResult, OverlapNulls, SubspaceResult
from arisk.anatomy.subspace import SafetySide
from arisk.base.errors import InputError, NumericsError
from arisk.base.processes import gathered, share, world
from arisk.base.task import Batch, LoraPair, LossFn, Progress, SampleSet, Task
from arisk.config.plan import ScoreConfig, TrainingConfig
from arisk.geometry.lora import displacement_coordinates, gradient_coordinates, tangent_frame
from arisk.geometry.spectrum import (
    dual_coefficients,
    eigenpairs,
    permutation_p_value,
    projection_ratio,
    random_overlap,
)
from arisk.geometry.vectors import VectorStack, gram
from arisk.gradients import ParameterLayout, mean_gradient, move_batch
from arisk.training.loop import training_loss
from arisk.training.optimizers import optimizer_named
from arisk.training.recipe import start_ratios

__all__ = [
    "Scene",
    "Update",
    "delta_w_overlap",
    "first_batches",
    "measure_overlap",
    "measure_update",
    "preconditioner",
    "step_loss",
]


@dataclass(frozen=True)
class Update:
    """Mini-batch gradients of the fine-tuning loss at θ*, and the step they give.

    Attributes:
        loss: mean loss over the batches.
        gradient: (P,) g, mean over the batches, weighted by their trained tokens where the plan trains so.
        noise_variance: (P,) unbiased variance of one micro-batch gradient; 0 with one batch.
        preconditioner: (P,) D of the planned optimizer: ones for SGD, 1/(√v̂ + ε) for AdamW with
            v̂ = g² + noise/accumulation.
        direction: (P,) u = −D g.
        batch_losses: (B,).
    """

    loss: float
    gradient: Tensor
    noise_variance: Tensor
    preconditioner: Tensor
    direction: Tensor
    batch_losses: Tensor


def first_batches(samples: SampleSet, count: int, device: torch.device) -> list[Batch]:
    """The first `count` batches in planned order (fewer when the data set is finite and shorter)."""
    batches = [move_batch(batch, device) for batch in itertools.islice(iter(samples.batches), count)]
    if not batches:
        raise InputError(
            "the data set gives no batch",
            where=f"data set {samples.name!r}",
            fix="give at least one row",
        )
    return batches


def preconditioner(
    model: nn.Module,
    layout: ParameterLayout,
    gradient: Tensor,
    noise_variance: Tensor,
    training: TrainingConfig,
) -> Tensor:
    """D (P,) of the planned optimizer at the start, learning-rate ratios of LoRA+ included.

    Args:
        model: whose parameters these are.
        layout: the selected parameters.
        gradient: (P,) mean gradient.
        noise_variance: (P,) variance of one micro-batch gradient.
        training: the planned optimizer.

    Raises:
        ConfigError: the optimizer is not known.
    """
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    noise = noise_variance / training.gradient_accumulation
    d = optimizer_named(training.optimizer).start(gradient, noise, training, shapes)
    ratios = start_ratios(model, layout.names, training)
    return d if ratios is None else d * ratios.to(d)


def measure_update(
    task: Task,
    samples: SampleSet,
    layout: ParameterLayout,
    training: TrainingConfig,
    batches: Sequence[Batch],
    progress: Progress,
    *,
    stack: VectorStack | None = None,
) -> Update:
    """Average the first batches' gradients and precondition them as the optimizer would.

    Mean and variance are updated with each gradient (Welford), so that no more than one per process is
    held at a time.

    Args:
        task: the model, inside `measuring`.
        samples: the data set the batches come from.
        layout: the selected parameters.
        training: the planned optimizer.
        batches: micro-batches on the model's device.
        progress: told of finished batches.
        stack: an empty stack that takes the batches' gradients; None keeps none.

    Raises:
        NumericsError: a loss or gradient is not finite, or the mean gradient is exactly zero.
    """
    losses: list[float] = []
    mean = squares = torch.zeros(0)
    loss_fn = step_loss(samples, batches, training)
    gradients = _gradients(task, samples.name, loss_fn, layout, batches, progress)
    for number, (loss, gradient) in enumerate(gradients, 1):
        losses.append(loss)
        if stack is not None:
            stack.append(gradient)
        if number == 1:
            mean, squares = gradient.clone(), torch.zeros_like(gradient)
            continue
        off = gradient - mean
        mean.add_(off, alpha=1 / number)
        squares.addcmul_(off, gradient.sub_(mean))
    progress(f"{samples.name} gradients", len(batches), len(batches))
    noise = squares.div_(max(1, len(losses) - 1))
    if float(mean.norm()) == 0:
        raise NumericsError(
            f"the update of the {samples.name} data is exactly zero",
            where=f"gradient of data set {samples.name!r}",
            fix="check that its loss depends on the selected parameters, and that its rows are not "
            "already fitted perfectly; after steps of the plan, lower `training.learning_rate`",
        )
    d = preconditioner(task.model, layout, mean, noise, training)
    return Update(
        loss=sum(losses) / len(losses),
        gradient=mean,
        noise_variance=noise,
        preconditioner=d,
        direction=-d * mean,
        batch_losses=torch.tensor(losses, dtype=torch.float64),
    )


def step_loss(samples: SampleSet, batches: Sequence[Batch], training: TrainingConfig) -> LossFn:
    """The loss whose plain mean over these micro-batches is that of one step on all of them.

    By tokens: Σ of token losses over the mean number of trained tokens of a micro-batch.
    """
    if training.loss != "tokens" or samples.tokens is None:
        return samples.loss_fn
    counts = [float(samples.tokens.counts(batch).sum()) for batch in batches]
    return partial(_by_tokens, samples, max(sum(counts) / len(counts), 1.0))


def _by_tokens(samples: SampleSet, trained: float, model: nn.Module, batch: Batch) -> Tensor:
    return training_loss(samples, model, batch, trained)


def _gradients(
    task: Task,
    name: str,
    loss_fn: LossFn,
    layout: ParameterLayout,
    batches: Sequence[Batch],
    progress: Progress,
) -> Iterator[tuple[float, Tensor]]:
    """Loss and gradient of every batch in order, float32 or float64, on the CPU.

    The ranks work on as many batches at a time as there are ranks, and each gets all gradients.
    """
    for start in range(0, len(batches), world()):
        progress(f"{name} gradients", start, len(batches))
        own: list[tuple[float, Tensor]] = []
        count = min(world(), len(batches) - start)
        for index in share(count):
            loss, gradient = mean_gradient(task.model, batches[start + index], loss_fn, layout)
            own.append((loss, gradient.cpu() if gradient.dtype == torch.float64 else gradient.float().cpu()))
        yield from gathered(own, count)


#: Permuted directions multiplied at a time.
PERMUTATION_CHUNK = 33


@dataclass(frozen=True)
class Permuted:
    """m copies of a vector u (P,), each with its entries permuted inside every parameter tensor.

    Every column of a parameter comes from a generator of its own, so that a block is the same however V
    is cut, and only what is asked for is made. `first` is the number of the first column.
    """

    vector: Tensor
    layout: ParameterLayout
    count: int
    seed: int
    first: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(P, m)."""
        return len(self.vector), self.count

    def block(self, where: slice, columns: slice) -> Tensor:
        """Permuted entries of the parameters in `where`."""
        which = range(*columns.indices(self.count))
        out = torch.empty(where.stop - where.start, len(which), dtype=self.vector.dtype)
        for position in range(len(self.layout.names)):
            own = slice(self.layout.offsets[position], self.layout.offsets[position + 1])
            if own.start >= where.start and own.stop <= where.stop:
                values, place = self.vector[own], slice(own.start - where.start, own.stop - where.start)
                for i, j in enumerate(which):
                    out[place, i] = values[self._order(position, j)]
        return out

    def at(self, coordinates: Tensor) -> Tensor:
        """Entries (k, m) at k coordinates of θ, the same as in the blocks."""
        out = torch.empty(len(coordinates), self.count, dtype=self.vector.dtype)
        for position in range(len(self.layout.names)):
            start, stop = self.layout.offsets[position : position + 2]
            inside = (coordinates >= start) & (coordinates < stop)
            if bool(inside.any()):
                for j in range(self.count):
                    order = self._order(position, j)
                    out[inside, j] = self.vector[start:stop][order[coordinates[inside] - start]]
        return out

    def _order(self, position: int, j: int) -> Tensor:
        start, stop = self.layout.offsets[position : position + 2]
        mixed = ((self.seed * 1_000_003 + position) * 1_000_003 + self.first + j) % (1 << 63)
        return torch.randperm(stop - start, generator=torch.Generator().manual_seed(mixed))


@dataclass(frozen=True)
class Scene:
    """What every part of stage score looks at: the task, the safety side and its subspace."""

    task: Task
    layout: ParameterLayout
    collected: CollectResult
    space: SubspaceResult
    side: SafetySide
    progress: Progress

    def coefficients(self, c: Tensor, directions: Tensor) -> Tensor:
        """Coordinates in the safety basis, of directions (P,) or (P, m) with c-vectors c."""
        if self.space.method == "diag_topk":
            return directions[self.space.coordinates].to(torch.float64)
        return dual_coefficients(c, self.space.eigenvalues, self.space.dual_vectors)


def measure_overlap(
    scene: Scene, update: Update, c_update: Tensor, config: ScoreConfig, training: TrainingConfig, seed: int
) -> OverlapNulls:
    """‖Pu‖/‖u‖ with its random, permutation, control and ΔW companions."""
    u = update.direction
    norm = float(u.to(torch.float64).norm())
    ratio = projection_ratio(scene.coefficients(c_update, u), norm)
    random = random_overlap(scene.space.rank, scene.layout.numel)
    permuted = _permuted_overlaps(scene, u, norm, config.nulls, seed)
    delta_w, dimension = delta_w_overlap(scene.task, scene.layout, scene.side, scene.space.rank, u)
    mean = scene.collected.mean_gradient
    length = float(mean.norm()) * norm
    return OverlapNulls(
        ratio=ratio,
        random=random,
        ratio_to_random=ratio / random,
        control=_control_overlap(scene, config, training),
        permutations=len(permuted),
        permuted_mean=float(permuted.mean()) if len(permuted) else None,
        permuted_max=float(permuted.max()) if len(permuted) else None,
        p_value=permutation_p_value(ratio, permuted),
        delta_w=delta_w,
        delta_w_random=random_overlap(scene.space.rank, dimension) if dimension else None,
        conflict_cosine=float(mean @ u.to(mean)) / length if length > 0 else None,
    )


def _permuted_overlaps(scene: Scene, u: Tensor, norm: float, count: int, seed: int) -> Tensor:
    """Overlaps of u with its entries permuted inside each parameter tensor."""
    overlaps: list[float] = []
    while len(overlaps) < count:
        scene.progress("overlap null", len(overlaps), count)
        width = min(PERMUTATION_CHUNK, count - len(overlaps))
        shuffled = Permuted(u, scene.layout, width, seed, first=len(overlaps))
        if scene.space.method == "diag_topk":
            coefficients = shuffled.at(scene.space.coordinates).to(torch.float64)
        else:
            coefficients = scene.coefficients(scene.side.dots(shuffled), u)
        overlaps += [projection_ratio(coefficients[:, j], norm) for j in range(width)]
    scene.progress("overlap null", count, count)
    return torch.tensor(overlaps, dtype=torch.float64)


def _control_overlap(scene: Scene, config: ScoreConfig, training: TrainingConfig) -> float | None:
    """The overlap an ordinary data set's update has; None without control data."""
    control = scene.task.control
    if control is None:
        return None
    device = next(scene.task.model.parameters()).device
    batches = first_batches(control, config.batches, device)
    update = measure_update(scene.task, control, scene.layout, training, batches, scene.progress)
    c = scene.side.dots(update.direction[:, None])[:, 0]
    return projection_ratio(scene.coefficients(c, update.direction), float(update.direction.norm()))


def delta_w_overlap(
    task: Task, layout: ParameterLayout, side: SafetySide, rank: int, direction: Tensor
) -> tuple[float | None, int]:
    """‖P u‖/‖u‖ with gradients and update taken as first-order changes of ΔW = (α/r) B A.

    Args:
        task: names the adapters; their current A and B are read from the model.
        layout: the selected parameters.
        side: columns of the per-sample safety gradients.
        rank: rank of the subspace.
        direction: (P,) u in raw (A, B) coordinates.

    Returns:
        The ratio in [0, 1] and the dimension of the tangent space; (None, 0) unless every selected
        parameter belongs to an adapter.
    """
    pairs = [p for p in task.lora_pairs if p.name_a in layout.names and p.name_b in layout.names]
    if not pairs or 2 * len(pairs) != len(layout.names):
        return None, 0
    parts = [_pair_products(task, layout, side, pair, direction) for pair in pairs]
    total = torch.stack([part[0] for part in parts]).sum(0)
    c = torch.stack([part[1] for part in parts]).sum(0)
    norm = sum(part[2] for part in parts) ** 0.5
    values, vectors = eigenpairs(total)
    values, vectors = values[:rank], vectors[:, :rank]
    ratio = projection_ratio(dual_coefficients(c, values, vectors), norm)
    return ratio, sum(part[3] for part in parts)


def _pair_products(
    task: Task, layout: ParameterLayout, side: SafetySide, pair: LoraPair, direction: Tensor
) -> tuple[Tensor, Tensor, float, int]:
    """One adapter's Gram (N, N), c-vector (N,), squared displacement and tangent dimension."""
    parameters = dict(task.model.named_parameters(remove_duplicate=False))
    a, b = parameters[pair.name_a].cpu(), parameters[pair.name_b].cpu()
    frame = tangent_frame(a, b, pair.scaling)
    grad_a = side.columns(pair.name_a).reshape(-1, *a.shape)
    grad_b = side.columns(pair.name_b).reshape(-1, *b.shape)
    rows = gradient_coordinates(frame, grad_a, grad_b)
    step_a = direction[layout.slice_of(pair.name_a)].reshape(a.shape)
    step_b = direction[layout.slice_of(pair.name_b)].reshape(b.shape)
    step = displacement_coordinates(frame, step_a, step_b)
    return gram(rows), rows @ step, float(step.square().sum()), frame.dimension
