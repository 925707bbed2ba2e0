"""Stage collect: per-sample safety gradients G (N, P), kept through their inner products.

Two stores. `gradients` writes G in shards, one per batch, in a single pass; later stages read it.
`gram` writes none: it passes over the samples once per group of parameters that fits the memory
budget, and later stages run the model again for the products they need. Both give the same Gram
matrices, and both resume from what a killed run had finished.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from arisk.artifacts import read_tensors, write_tensors
from arisk.config import CollectConfig
from arisk.errors import ConfigError, InputError, NumericsError
from arisk.geometry.gram import gram as gram_of
from arisk.gradients import (
    EngineChoice,
    GradientStore,
    ParameterLayout,
    batch_invariance,
    batch_size,
    choose_engine,
    layout_of,
    measuring,
    move_batch,
    per_sample_gradients,
    slice_batch,
)
from arisk.progress import Progress, silent
from arisk.ranks import barrier, from_first, gathered, share, world
from arisk.results import CollectResult
from arisk.task import Batch, Task

__all__ = ["GRADIENTS_FOLDER", "collect", "store_bytes"]

#: Folder of the gradient shards inside the stage's own folder.
GRADIENTS_FOLDER = "gradients"

#: A sample's gradient may not depend on its batch; below this cosine the report warns.
BATCH_INVARIANCE = 0.999


@dataclass(frozen=True)
class _Pass:
    """What every pass over the safety samples needs."""

    task: Task
    layout: ParameterLayout
    batches: Sequence[Batch]
    sizes: Sequence[int]
    engine: str
    progress: Progress


@dataclass(frozen=True)
class _Products:
    """Inner products and moments of G: gram (L, N, N), mean and diagonal (P,), losses (N,)."""

    gram: Tensor
    mean: Tensor
    diagonal: Tensor
    losses: Tensor


def store_bytes(samples: int, parameters: int, itemsize: int = 4) -> int:
    """Disk of a gradient store, N · P · itemsize bytes."""
    return samples * parameters * itemsize


def collect(task: Task, config: CollectConfig, folder: Path, *, progress: Progress = silent) -> CollectResult:
    """Measure G at θ* and keep K^(l) = G^(l) G^(l)ᵀ per module, ḡ_s, diag F and the losses.

    Args:
        task: model, safety samples and selected parameters; the model is left as found.
        config: engine, store and budgets.
        folder: where shards (or finished parameter groups) go; reused to resume.
        progress: told of finished batches.

    Returns:
        The record; shards lie in `folder / GRADIENTS_FOLDER` when its store is "gradients".

    Raises:
        InputError: fewer than two safety samples.
        NumericsError: a loss or gradient is NaN or infinite, or every gradient is zero.
        ConfigError: the requested engine does not fit the selection.
        ArtifactError: the disk is full, or a shard is damaged.
    """
    layout = layout_of(task.model, task.parameter_names)
    with measuring(task.model, layout):
        batches = _batches(task, config.chunk_size)
        sizes = [batch_size(batch) for batch in batches]
        choice, invariance = _self_test(task, layout, batches, config.engine)
        run = _Pass(task, layout, batches, sizes, choice.engine, progress)
        store = from_first(partial(_choose_store, config, layout, sum(sizes), folder))
        measure = _measure_stored if store == "gradients" else _measure_gram
        products = measure(run, folder, config.memory_budget_gb)
    _require_gradient(products.gram)
    return _record(run, config, store, choice, invariance, products)


def _batches(task: Task, chunk_size: int) -> list[Batch]:
    """Safety batches on the model's device, none larger than the chunk size."""
    device = next(task.model.parameters()).device
    chunks: list[Batch] = []
    for batch in task.safety.batches:
        size = batch_size(batch)
        if size <= chunk_size:
            chunks.append(move_batch(batch, device))
        else:
            chunks += [
                move_batch(slice_batch(batch, i, min(i + chunk_size, size)), device)
                for i in range(0, size, chunk_size)
            ]
    if sum(batch_size(batch) for batch in chunks) < 2:
        raise InputError(
            "at least two safety samples are needed, to tell a direction from noise",
            where=f"data set {task.safety.name!r}",
            fix="give more safety rows (64 or more are advised)",
        )
    return chunks


def _self_test(
    task: Task, layout: ParameterLayout, batches: Sequence[Batch], requested: str
) -> tuple[EngineChoice, float | None]:
    """Choose the engine, and measure what batching does to the gradients."""
    first = max(batches, key=batch_size)
    loss_fn = task.safety.loss_fn
    choice = choose_engine(task.model, first, loss_fn, layout, requested)
    invariance = None
    if batch_size(first) > 1:
        invariance = batch_invariance(task.model, first, loss_fn, layout, choice.engine)
    return choice, invariance


def _choose_store(
    config: CollectConfig, layout: ParameterLayout, samples: int, folder: Path
) -> Literal["gradients", "gram"]:
    """`auto`: gradients where they fit the disk budget and the free disk, else gram."""
    if config.store == "gram":
        return "gram"
    needed = store_bytes(samples, layout.numel)
    folder.mkdir(parents=True, exist_ok=True)
    stored = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    available = min(config.disk_budget_gb * 1e9, 0.9 * shutil.disk_usage(folder).free + stored)
    if needed <= available:
        return "gradients"
    if config.store == "gradients":
        raise ConfigError(
            f"the gradient store needs {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB are available",
            where="collect.store",
            fix="use `store: gram`, fewer safety samples (`safety.max_samples`), or raise "
            "`collect.disk_budget_gb` if the disk allows it",
        )
    return "gram"


def _measure_stored(run: _Pass, folder: Path, memory_budget_gb: float) -> _Products:
    """One pass that writes every batch's gradients as a shard, then one sweep over the shards."""
    del memory_budget_gb  # the sweep reads fixed-size column blocks
    store = GradientStore(folder / GRADIENTS_FOLDER)
    finished = from_first(lambda: set(store.finished()))
    count = len(run.batches)
    losses: list[Tensor] = []
    for index in share(count):
        run.progress("safety gradients", index, count)
        loss_file = folder / f"losses-{index:05d}.safetensors"
        if index in finished and loss_file.exists():
            losses.append(read_tensors(loss_file)["losses"])
            continue
        blocks: dict[str, Tensor] = {}
        batch_losses = _gradients(run, run.layout, index, run.batches[index], blocks)
        write_tensors(loss_file, {"losses": batch_losses})
        store.write_shard(index, blocks)
        losses.append(batch_losses)
    everyone = torch.cat(gathered(losses, count))  # Waits until every shard is written.
    run.progress("safety gradients", count, count)
    gram, mean, diagonal = store.sweep(run.layout)
    return _Products(gram, mean, diagonal, everyone)


def _gradients(
    run: _Pass, layout: ParameterLayout, index: int, batch: Batch, blocks: dict[str, Tensor]
) -> Tensor:
    """Fill `blocks` with one batch's (B, p) gradients by parameter; return its losses, float64."""

    def keep(name: str, block: Tensor) -> None:
        dtype = torch.float64 if block.dtype == torch.float64 else torch.float32
        blocks[name] = block.reshape(block.shape[0], -1).to("cpu", dtype)

    losses = per_sample_gradients(
        run.task.model,
        batch,
        run.task.safety.loss_fn,
        layout,
        keep,
        engine=run.engine,
        offset=sum(run.sizes[:index]),
    )
    return losses.detach().to("cpu", torch.float64)


def _measure_gram(run: _Pass, folder: Path, memory_budget_gb: float) -> _Products:
    """One pass per group of parameters that fits the memory budget; nothing of size N × P is kept."""
    # A killed run may have found more free disk and begun a store.
    from_first(lambda: shutil.rmtree(folder / GRADIENTS_FOLDER, ignore_errors=True))
    samples = sum(run.sizes)
    limit = max(1, int(memory_budget_gb * 1e9 / (samples * 4)))
    # A group is a whole pass over the samples, so ranks take groups: none is left without one.
    if world() > 1:
        limit = min(limit, -(-run.layout.numel // world()))
    groups = list(_groups(run.layout, limit))
    gram = torch.zeros(len(run.layout.modules), samples, samples, dtype=torch.float64)
    means: dict[str, Tensor] = {}
    diagonals: dict[str, Tensor] = {}
    losses = torch.zeros(samples, dtype=torch.float64)
    files = [folder / f"group-{index:05d}.safetensors" for index in range(len(groups))]
    for index in share(len(groups)):
        run.progress("safety gradients", index, len(groups))
        _group_products(run, groups[index], files[index])
    barrier()
    for index, names in enumerate(groups):
        part = _group_products(run, names, files[index])
        losses = part["losses"]
        for name in names:
            position = run.layout.names.index(name)
            gram[run.layout.module_of_parameter[position]] += part[f"gram.{name}"]
            means[name], diagonals[name] = part[f"mean.{name}"], part[f"diagonal.{name}"]
    run.progress("safety gradients", len(groups), len(groups))
    return _Products(gram, run.layout.flatten(means), run.layout.flatten(diagonals), losses)


def _groups(layout: ParameterLayout, limit: int) -> Iterator[list[str]]:
    """Runs of parameters of at most `limit` entries together; a larger one goes alone."""
    group: list[str] = []
    size = 0
    for name in layout.names:
        entries = layout.slice_of(name).stop - layout.slice_of(name).start
        if group and size + entries > limit:
            yield group
            group, size = [], 0
        group.append(name)
        size += entries
    yield group


def _group_products(run: _Pass, names: Sequence[str], file: Path) -> dict[str, Tensor]:
    """Gram, mean and diagonal of some parameters, from one pass over all samples; kept in `file`."""
    if file.exists():
        kept = read_tensors(file)
        # Another budget or number of processes groups the parameters otherwise.
        if {f"gram.{name}" for name in names} <= kept.keys():
            return kept
    part_layout = layout_of(run.task.model, names)
    columns: dict[str, list[Tensor]] = {name: [] for name in names}
    losses: list[Tensor] = []
    for index, batch in enumerate(run.batches):
        blocks: dict[str, Tensor] = {}
        losses.append(_gradients(run, part_layout, index, batch, blocks))
        for name in names:
            columns[name].append(blocks[name])
    part: dict[str, Tensor] = {"losses": torch.cat(losses)}
    for name in names:
        rows = torch.cat(columns.pop(name))
        part[f"gram.{name}"] = gram_of(rows)
        part[f"mean.{name}"] = rows.mean(0)
        part[f"diagonal.{name}"] = rows.square().mean(0)
    write_tensors(file, part)
    return part


def _require_gradient(gram: Tensor) -> None:
    if float(gram.diagonal(dim1=1, dim2=2).sum()) == 0:
        raise NumericsError(
            "every safety gradient is exactly zero",
            where="collect",
            fix="check that the safety loss depends on the selected parameters (`model.parameters`)",
        )


def _record(
    run: _Pass,
    config: CollectConfig,
    store: Literal["gradients", "gram"],
    choice: EngineChoice,
    invariance: float | None,
    products: _Products,
) -> CollectResult:
    """Put the measurements together with their provenance."""
    layout = run.layout
    statistics: Mapping[str, Any] = run.task.safety.statistics
    result = CollectResult(
        parameter_names=list(layout.names),
        parameter_shapes=[list(shape) for shape in layout.shapes],
        modules=list(layout.modules),
        module_of_parameter=list(layout.module_of_parameter),
        gram=products.gram,
        mean_gradient=products.mean,
        fisher_diagonal=products.diagonal,
        losses=products.losses,
        gradient_norms=products.gram.diagonal(dim1=1, dim2=2).sum(0).clamp(min=0).sqrt(),
        rows=[dict(row) for row in run.task.safety.rows],
        dropped_duplicates=int(statistics.get("duplicates", 0)),
        store=store,
        fisher=config.fisher,
        engine={"name": choice.engine, "parity": choice.parity, "refused": choice.refused},
        batch_invariance=invariance,
        coverage=dict(choice.coverage),
        task=dict(run.task.description),
        warnings=[],
    )
    return replace(result, warnings=_warnings(result))


def _warnings(result: CollectResult) -> list[str]:
    """What a reader must know before trusting the numbers."""
    found: list[str] = []
    invariance = result.batch_invariance
    if invariance is not None and not invariance >= BATCH_INVARIANCE:
        found.append(
            f"A safety sample's gradient changes with the batch it is in (cosine {invariance:.4f}, "
            f"wanted {BATCH_INVARIANCE}): set `collect.chunk_size: 1`, or check padding and batch "
            "statistics in the model."
        )
    if len(result.losses) < 64:
        found.append(f"Only {len(result.losses)} safety samples: bootstrap intervals are calibrated from 64.")
    zero = int((result.gradient_norms == 0).sum())
    if zero:
        found.append(f"{zero} safety samples have a gradient of exactly zero.")
    return found
