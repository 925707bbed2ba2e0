"""Which engine fits, whether it agrees with the oracle, and what batching does to a gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from arisk.base.errors import AriskError, ConfigError, NumericsError
from arisk.base.task import Batch, LossFn
from arisk.gradients.batches import batch_size, slice_batch
from arisk.gradients.engines import ENGINES, per_sample_gradients
from arisk.gradients.layout import ParameterLayout, is_sharded

__all__ = ["EngineChoice", "batch_invariance", "choose_engine"]

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
