"""The engines of per-sample gradients: one entry to them, and the test that chooses one.

`vmap` is torch.func: vmap over samples of grad of the functional loss. `loop` goes one sample at a time:
slow, obvious, and the oracle of the others. `hooks` has its own module. `mean_gradient` is that of a
batch's mean loss, as training would compute it. `choose_engine` says which fits and whether it agrees with
the oracle.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from arisk.base.errors import AriskError, ConfigError, NumericsError
from arisk.base.task import Batch, LossFn
from arisk.gradients.factors import Part, PartSink, Sink, tensors_of
from arisk.gradients.hooks import hook_gradients, hook_parts
from arisk.gradients.layout import (
    ParameterLayout,
    batch_size,
    is_sharded,
    map_tensors,
    parameters_of,
    recomputing,
    slice_batch,
)

__all__ = [
    "ENGINES",
    "EngineChoice",
    "batch_invariance",
    "choose_engine",
    "loop_gradients",
    "mean_gradient",
    "per_sample_gradients",
    "per_sample_parts",
    "vmap_gradients",
]


def per_sample_gradients(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFn,
    layout: ParameterLayout,
    sink: Sink,
    *,
    engine: str,
    offset: int = 0,
) -> Tensor:
    """G_i = ∇_θ ℓ_i(θ) for every sample of a batch, inside `measuring`.

    Args:
        model: the model.
        batch: B samples along dimension 0.
        loss_fn: per-sample losses (B,), or a scalar that is their mean.
        layout: the selected parameters.
        sink: called once per parameter with its block (B, *shape), in the parameter's dtype.
        engine: "hooks", "vmap" or "loop".
        offset: index of the batch's first sample, for messages.

    Returns:
        (B,) losses, detached.

    Raises:
        NumericsError: a loss or gradient is NaN or infinite; names the sample.
    """

    def checked(name: str, block: Tensor) -> None:
        # The sum is one read of the block; only a suspicious one is looked at closely.
        if not bool(torch.isfinite(block.sum())):
            _require_finite(block.flatten(1).isfinite().all(1), f"gradient of {name!r}", offset)
        sink(name, block)

    losses = ENGINES[engine](model, batch, loss_fn, layout, checked)
    _require_finite(torch.isfinite(losses), "loss", offset)
    return losses


def per_sample_parts(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFn,
    layout: ParameterLayout,
    sink: PartSink,
    *,
    engine: str,
    offset: int = 0,
) -> Tensor:
    """The same gradients as sums of parts, by hooks factors where a module has them.

    Args:
        model: the model, inside `measuring`.
        batch: B samples along dimension 0.
        loss_fn: per-sample losses (B,), or a scalar that is their mean.
        layout: the selected parameters.
        sink: called once per parameter with its parts, in the parameter's dtype.
        engine: "hooks" gives factors, "vmap" and "loop" blocks.
        offset: index of the batch's first sample, for messages.

    Returns:
        (B,) losses, detached.

    Raises:
        NumericsError: a loss, factor or block is NaN or infinite; names the sample. A product of finite
            factors that overflows is the caller's to find.
    """
    if engine != "hooks":
        return per_sample_gradients(
            model, batch, loss_fn, layout, lambda n, block: sink(n, [block]), engine=engine, offset=offset
        )

    later: list[tuple[str, Tensor]] = []

    def checked(name: str, parts: Sequence[Part]) -> None:
        for tensor in (tensor for part in parts for tensor in tensors_of(part)):
            if tensor.device.type != "cpu":
                # To read a number stops the device: all are read at once, after the pass.
                later.append((name, tensor.flatten(1).isfinite().all(1)))
            elif not bool(torch.isfinite(tensor.sum())):
                _require_finite(tensor.flatten(1).isfinite().all(1), f"gradient of {name!r}", offset)
        sink(name, parts)

    losses = hook_parts(model, batch, loss_fn, layout, checked)
    if later and not bool(torch.stack([finite.all().to(losses.device) for _, finite in later]).all()):
        for name, finite in later:
            _require_finite(finite, f"gradient of {name!r}", offset)
    _require_finite(torch.isfinite(losses), "loss", offset)
    return losses


def _require_finite(finite: Tensor, what: str, offset: int) -> None:
    if not bool(finite.all()):
        sample = int((~finite).to(torch.int64).argmax()) + offset
        raise NumericsError(
            f"the {what} of sample {sample} is NaN or infinite",
            where=f"sample {sample} (counted from 0, in data order)",
            fix="look at that row (empty response, extreme length), or load the model in float32",
        )


class _Loss(nn.Module):
    """The loss as a module, so that `functional_call` can swap parameters under any loss function."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Batch) -> Tensor:
        return self.loss_fn(self.model, batch).mean()


def vmap_gradients(
    model: nn.Module, batch: Batch, loss_fn: LossFn, layout: ParameterLayout, sink: Sink
) -> Tensor:
    """G_i = ∇ℓ_i for all samples of the batch at once; see `per_sample_gradients`.

    Tensors without a sample dimension and non-tensor values are shared by all samples.
    """
    wrapped = _Loss(model, loss_fn)
    parameters = {
        f"model.{name}": p.detach()
        for name, p in zip(layout.names, parameters_of(model, layout), strict=True)
    }
    size = batch_size(batch)
    tensors: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        if tensor.ndim > 0:
            tensors.append(tensor)
        return tensor

    map_tensors(batch, collect)

    def loss_of(values: dict[str, Tensor], sample: list[Tensor]) -> Tensor:
        waiting = iter(sample)

        def put(tensor: Tensor) -> Any:
            return next(waiting).unsqueeze(0) if tensor.ndim > 0 else tensor

        return functional_call(wrapped, values, (map_tensors(batch, put),), tie_weights=True)

    with warnings.catch_warnings():
        # Of operations that torch maps one by one, as those of experts: slower, and right all the same.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        gradients, losses = vmap(grad_and_value(loss_of), in_dims=(None, 0), randomness="error")(
            parameters, tensors
        )
    for name in layout.names:
        sink(name, gradients.pop(f"model.{name}").detach())
    assert losses.shape == (size,)
    return losses.detach()


def loop_gradients(
    model: nn.Module, batch: Batch, loss_fn: LossFn, layout: ParameterLayout, sink: Sink
) -> Tensor:
    """G_i = ∇ℓ_i by ordinary autograd, sample by sample; see `per_sample_gradients`."""
    parameters = parameters_of(model, layout)
    losses: list[Tensor] = []
    rows: list[list[Tensor]] = [[] for _ in parameters]
    for i in range(batch_size(batch)):
        loss = loss_fn(model, slice_batch(batch, i, i + 1)).mean()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        losses.append(loss.detach())
        for row, parameter, gradient in zip(rows, parameters, gradients, strict=True):
            row.append(torch.zeros_like(parameter) if gradient is None else gradient.detach())
    for name, row in zip(layout.names, rows, strict=True):
        sink(name, torch.stack(row))
    return torch.stack(losses)


def mean_gradient(
    model: nn.Module, batch: Batch, loss_fn: LossFn, layout: ParameterLayout, *, create_graph: bool = False
) -> tuple[float, Tensor]:
    """Mean loss of the batch and its gradient g_b (P,), inside `measuring`.

    Args:
        model: the model.
        batch: one micro-batch on the model's device.
        loss_fn: per-sample losses or their mean.
        layout: the selected parameters.
        create_graph: keep the graph, for a second backward.

    Returns:
        The loss (nats) and g_b in the parameters' dtype; zeros where a parameter is unused.

    Raises:
        NumericsError: the loss or the gradient is NaN or infinite.
        ConfigError: the parameters are sharded over processes.
    """
    if is_sharded(model):
        raise ConfigError(
            "this stage moves parameters, and the model's are sharded over processes (FSDP2)",
            where="model",
            fix="stages collect and subspace run on sharded models; for the others load the model whole, "
            "on one device or over several by `run.device_map`",
        )
    parameters = parameters_of(model, layout)
    with recomputing(model):
        loss = loss_fn(model, batch).mean()
    if not bool(torch.isfinite(loss)):
        raise NumericsError(
            f"the mean loss of a batch is {float(loss.detach())}",
            where="a training batch",
            fix="check its rows (empty responses, extreme lengths), or load the model in float32",
        )
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, create_graph=create_graph)
    flat = torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).reshape(-1)
            for p, g in zip(parameters, gradients, strict=True)
        ]
    )
    if not bool(torch.isfinite(flat.detach()).all()):
        raise NumericsError(
            "the gradient of a batch has a NaN or infinite entry",
            where="a training batch",
            fix="check its rows, or load the model in float32",
        )
    return float(loss.detach()), flat if create_graph else flat.detach()


#: Engines by name, fastest first.
ENGINES = {"hooks": hook_gradients, "vmap": vmap_gradients, "loop": loop_gradients}


#: Entries per block of an inner product.
DOT_BLOCK = 1 << 20
#: Accepted relative error against `loop` by dtype of the parameters.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
#: Samples of the batch-invariance test, and the batch they are in.
INVARIANCE_SAMPLES, INVARIANCE_BATCH = 2, 4


@dataclass(frozen=True)
class EngineChoice:
    """The engine taken, and what its test on two samples found.

    Attributes:
        engine: its name.
        parity: relative error against `loop` of each engine tried.
        refused: why others were not taken.
        coverage: `parameters`, the share of selected parameters in tensors with a non-zero gradient
            (below 1 for a fresh adapter, whose A side has none yet), and `gradient_norm`, ‖G‖² of
            the engine over ‖G‖² of `loop` (1 where it sees everything).
    """

    engine: str
    parity: Mapping[str, float] = field(default_factory=dict[str, float])
    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    coverage: Mapping[str, float] = field(default_factory=dict[str, float])


def choose_engine(
    model: nn.Module, batch: Batch, loss_fn: LossFn, layout: ParameterLayout, requested: str
) -> EngineChoice:
    """The requested engine, or for `auto` the first of hooks, vmap, loop that agrees with `loop`.

    The test takes the first two samples of the batch: an engine must work on them and have
    ‖G − G_loop‖/‖G_loop‖ within the tolerance of the parameters' dtype.

    Of a model that is sharded over processes only hooks see whole gradients: there is no test.

    Raises:
        ConfigError: the requested engine fails the test, or cannot work on a sharded model.
        NumericsError: a loss or gradient is not finite.
    """
    if is_sharded(model):
        return _sharded_choice(requested)
    pair = slice_batch(batch, 0, min(2, batch_size(batch)))
    oracle = _blocks(model, pair, loss_fn, layout, "loop")
    tolerance = TOLERANCE.get(next(iter(oracle.values())).dtype, 1e-3)
    parity: dict[str, float] = {}
    refused: dict[str, str] = {}
    for engine in ENGINES if requested == "auto" else (requested,):
        if engine == "loop":
            return EngineChoice("loop", {**parity, "loop": 0.0}, refused, _coverage(oracle, 1.0, layout))
        try:
            parity[engine], energy = _compared(model, pair, loss_fn, layout, engine, oracle)
        except NumericsError:
            raise
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, AriskError) as err:
            refused[engine] = str(err).strip().splitlines()[0]
            continue
        if parity[engine] <= tolerance:
            return EngineChoice(engine, parity, refused, _coverage(oracle, energy, layout))
        refused[engine] = f"relative error {parity[engine]:.1e} against loop, accepted {tolerance:.0e}"
    raise ConfigError(
        f"engine {requested!r} does not fit this model: {refused[requested]}",
        where="collect.engine",
        fix="use `engine: auto`, which falls back to the next engine that agrees",
    )


def _sharded_choice(requested: str) -> EngineChoice:
    if requested not in ("auto", "hooks"):
        raise ConfigError(
            f"engine {requested!r} needs whole parameters, and this model's are sharded over processes",
            where="collect.engine",
            fix="use `engine: hooks`",
        )
    return EngineChoice("hooks", {}, {"loop": "the parameters are sharded over processes"})


def batch_invariance(
    model: nn.Module, batch: Batch, loss_fn: LossFn, layout: ParameterLayout, engine: str
) -> float:
    """Smallest cosine between a sample's gradient alone and inside its batch, over a few samples.

    Padding, batch statistics or masks that leak between samples show up here; 1 is perfect.

    Returns:
        In [−1, 1]; NaN when a gradient is zero.
    """
    count = min(INVARIANCE_SAMPLES, batch_size(batch))
    together = slice_batch(batch, 0, min(INVARIANCE_BATCH, batch_size(batch)))
    # Of the passes over the batch only the first samples' rows are kept.
    rows = _blocks(model, together, loss_fn, layout, engine, keep=count)
    cosines: list[float] = []
    for i in range(count):
        dots = [0.0, 0.0, 0.0]

        def compare(name: str, block: Tensor, i: int = i, dots: list[float] = dots) -> None:
            alone, inside = block[0].flatten().to("cpu"), rows[name][i]
            for place, (a, b) in enumerate(((alone, alone), (inside, inside), (alone, inside))):
                dots[place] += _dot(a, b)

        alone = slice_batch(batch, i, i + 1)
        per_sample_gradients(model, alone, loss_fn, layout, compare, engine=engine)
        lengths = math.sqrt(dots[0] * dots[1])
        cosines.append(dots[2] / lengths if lengths else math.nan)
    return math.nan if any(map(math.isnan, cosines)) else min(1.0, *cosines)


def _dot(a: Tensor, b: Tensor) -> float:
    """Inner product summed in float64: in float32 the cosine of a vector with itself came out above 1."""
    pieces = zip(a.split(DOT_BLOCK), b.split(DOT_BLOCK), strict=True)
    return sum(float(x.double() @ y.double()) for x, y in pieces)


def _coverage(oracle: Mapping[str, Tensor], energy: float, layout: ParameterLayout) -> dict[str, float]:
    """Shares of the selection that an engine sees, from the oracle's blocks and the engine's ‖G‖² / ‖G‖²."""
    touched = sum(block[0].numel() for block in oracle.values() if bool((block != 0).any()))
    return {"parameters": touched / layout.numel, "gradient_norm": energy}


def _blocks(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFn,
    layout: ParameterLayout,
    engine: str,
    *,
    keep: int | None = None,
) -> dict[str, Tensor]:
    """(B, p) gradients of a small batch (its first `keep` samples) by parameter, on the CPU."""
    blocks: dict[str, Tensor] = {}

    def sink(name: str, block: Tensor) -> None:
        part = block[:keep].flatten(1)
        # A view would hold on to the whole batch's block.
        blocks[name] = part.to("cpu", copy=keep is not None and keep < len(block))

    per_sample_gradients(model, batch, loss_fn, layout, sink, engine=engine)
    return blocks


def _compared(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFn,
    layout: ParameterLayout,
    engine: str,
    oracle: Mapping[str, Tensor],
) -> tuple[float, float]:
    """‖G − G_loop‖/‖G_loop‖ and ‖G‖²/‖G_loop‖² of an engine, block by block; the latter NaN for 0/0."""
    off = own = length = 0.0

    def sink(name: str, block: Tensor) -> None:
        nonlocal off, own, length
        found, wanted = block.flatten().to("cpu"), oracle[name].flatten()
        difference = found - wanted
        off += _dot(difference, difference)
        own += _dot(found, found)
        length += _dot(wanted, wanted)

    per_sample_gradients(model, batch, loss_fn, layout, sink, engine=engine)
    if not length:
        return float(own > 0), math.nan
    return math.sqrt(off / length), own / length
