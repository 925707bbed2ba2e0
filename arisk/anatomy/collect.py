"""Stage collect: per-sample safety gradients G (N, P), kept through their inner products.

Two stores. `gradients` keeps G on disk, and later stages read it. `gram` keeps none of it, and later
stages run the model again for the products they need. Both give the same Gram matrices, and both resume
from what a killed run had finished.

Passes over the safety samples that keep per-sample gradients, as factors or blocks.

Where the safety gradients go while collect works, and the products that are taken of them.

One pass over the samples keeps every batch's gradients, as factors where those are smaller, and the
products are taken parameter by parameter afterwards. They are kept on disk for later stages (store
`gradients`), or until the products are there (store `gram`): in memory where the budget allows it, else
on disk. Where neither has room, several passes each take a group of parameters that fits in memory.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from arisk.anatomy.record import CollectResult
from arisk.base.artifacts import existing_parent, read_tensors, write_tensors
from arisk.base.errors import ConfigError, InputError, NumericsError
from arisk.base.processes import barrier, from_first, gathered, rank, share, world
from arisk.base.task import Batch, Progress, Task, silent
from arisk.config.plan import CollectConfig
from arisk.gradients import (
    EngineChoice,
    GradientStore,
    ParameterLayout,
    batch_invariance,
    batch_size,
    choose_engine,
    is_sharded,
    layout_of,
    map_tensors,
    measuring,
    move_batch,
    per_sample_parts,
    slice_batch,
)
from arisk.gradients.factors import (
    Part,
    block_of,
    lightest,
    parameter_products,
    tensors_of,
    widened,
    with_tensors,
)

__all__ = [
    "GRADIENTS_FOLDER",
    "PARTS_FOLDER",
    "Held",
    "Products",
    "SafetyPass",
    "StorePlan",
    "batch_losses",
    "batch_parts",
    "collect",
    "held",
    "measure",
    "plan_store",
    "rounded",
    "store_for",
]

#: A sample's gradient may not depend on its batch; below this cosine the report warns.
BATCH_INVARIANCE = 0.999


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
        dtype = torch.bfloat16 if config.store_dtype == "bfloat16" else None
        run = SafetyPass(task, layout, batches, sizes, choice.engine, progress, dtype)
        plan = plan_store(run, config, folder)
        products = measure(run, plan, folder, config.memory_budget_gb)
    _require_gradient(products.gram)
    return _record(run, config, plan, choice, invariance, products)


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


def _require_gradient(gram: Tensor) -> None:
    if float(gram.diagonal(dim1=1, dim2=2).sum()) == 0:
        raise NumericsError(
            "every safety gradient is exactly zero",
            where="collect",
            fix="check that the safety loss depends on the selected parameters (`model.parameters`)",
        )


def _record(
    run: SafetyPass,
    config: CollectConfig,
    plan: StorePlan,
    choice: EngineChoice,
    invariance: float | None,
    products: Products,
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
        store=plan.store,
        fisher=config.fisher,
        engine={"name": choice.engine, "parity": choice.parity, "refused": choice.refused},
        batch_invariance=invariance,
        coverage=dict(choice.coverage),
        # What is said of all data sets together is no property of the safety side.
        task={key: value for key, value in run.task.description.items() if key != "data_warnings"},
        warnings=[],
        store_dtype=config.store_dtype,
        store_rounding=plan.rounding,
    )
    return replace(result, warnings=_warnings(result))


def _warnings(result: CollectResult) -> list[str]:
    """What a reader must know before trusting the numbers."""
    found: list[str] = [str(note) for note in result.task.get("warnings", ())]
    invariance = result.batch_invariance
    if invariance is not None and not invariance >= BATCH_INVARIANCE:
        found.append(
            f"A safety sample's gradient changes with the batch it is in (cosine {invariance:.4f}, "
            f"wanted {BATCH_INVARIANCE}): set `collect.chunk_size: 1`, or check padding and batch "
            "statistics in the model."
        )
    if len(result.losses) < 64:
        found.append(f"Only {len(result.losses)} safety samples: bootstrap intervals are calibrated from 64.")
    if not result.engine["parity"]:
        found.append("The gradients were not compared with another engine: the model is sharded.")
    rounding = result.store_rounding
    if rounding is not None:
        found.append(
            f"The Gram matrices were taken of gradients rounded to {result.store_dtype}: the length of one "
            f"changed by {rounding:.1e} of itself."
        )
    zero = int((result.gradient_norms == 0).sum())
    if zero:
        found.append(f"{zero} safety samples have a gradient of exactly zero.")
    return found


@dataclass(frozen=True)
class SafetyPass:
    """What every pass over the safety samples needs.

    Attributes:
        dtype: what gradients are rounded to, wherever they lie until their products are taken; None
            keeps their own.
    """

    task: Task
    layout: ParameterLayout
    batches: Sequence[Batch]
    sizes: Sequence[int]
    engine: str
    progress: Progress
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Products:
    """Inner products and moments of G: gram (L, N, N), mean and diagonal (P,), losses (N,)."""

    gram: Tensor
    mean: Tensor
    diagonal: Tensor
    losses: Tensor


@dataclass(frozen=True)
class Held:
    """What one sample's gradient takes, and what rounding does to it.

    Attributes:
        entries: numbers held for one sample by parameter, on the mean over samples.
        rounding: relative change of the probed sample's ‖G_i‖ by the pass's dtype; None where nothing is
            rounded.
    """

    entries: Mapping[str, float]
    rounding: float | None


def batch_parts(
    run: SafetyPass, layout: ParameterLayout, index: int, batch: Batch, parts: dict[str, list[Part]]
) -> Tensor:
    """Fill `parts` with one batch's gradients by parameter, on the CPU; return its losses, float64."""
    moved: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def bring(tensor: Tensor) -> Tensor:
        # What several modules share stays shared; the original is held so that its place stays its own.
        place = _place(tensor)
        if place not in moved:
            wide = tensor.dtype in (torch.float64, torch.int64)
            moved[place] = tensor, tensor.to("cpu", tensor.dtype if wide else torch.float32)
        return moved[place][1]

    def keep(name: str, own: Sequence[Part]) -> None:
        parts[name] = [with_tensors(part, [bring(t) for t in tensors_of(part)]) for part in lightest(own)]

    losses = per_sample_parts(
        run.task.model,
        batch,
        run.task.safety.loss_fn,
        layout,
        keep,
        engine=run.engine,
        offset=sum(run.sizes[:index]),
    )
    if run.dtype is not None:
        parts |= rounded({name: parts[name] for name in layout.names}, run.dtype)
    return losses.detach().to("cpu", torch.float64)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def rounded(parts: Mapping[str, Sequence[Part]], dtype: torch.dtype) -> dict[str, list[Part]]:
    """The parts with their real tensors in another dtype; shared ones stay shared."""
    made: dict[tuple[Any, ...], Tensor] = {}

    def change(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if _place(tensor) not in made:
            made[_place(tensor)] = tensor.to(dtype)
        return made[_place(tensor)]

    return {n: [with_tensors(p, [change(t) for t in tensors_of(p)]) for p in own] for n, own in parts.items()}


def batch_losses(folder: Path, index: int, losses: Tensor | None = None) -> Tensor | None:
    """Losses of a finished batch, kept in the workspace for resuming; None where there are none."""
    file = folder / f"losses-{index:05d}.safetensors"
    if losses is not None:
        write_tensors(file, {"losses": losses})
        return losses
    return read_tensors(file)["losses"] if file.exists() else None


def held(run: SafetyPass) -> Held:
    """Probe what one sample takes by parameter.

    One sample of the batch with the most numbers per sample is run; factors grow with its length. What
    several parameters share counts once, for the first of them.
    """

    def numbers(batch: Batch) -> int:
        found = [0]
        map_tensors(batch, lambda t: (found.append(t.numel()), t)[1])
        return max(1, sum(found))

    sizes = [numbers(batch) / batch_size(batch) for batch in run.batches]
    longest = max(range(len(sizes)), key=sizes.__getitem__)
    probe: dict[str, list[Part]] = {}
    sample = slice_batch(run.batches[longest], 0, 1)
    batch_parts(replace(run, dtype=None), run.layout, longest, sample, probe)
    mean = sum(s * n for s, n in zip(sizes, run.sizes, strict=True)) / sum(run.sizes) / sizes[longest]
    seen: set[tuple[Any, ...]] = set()
    entries: dict[str, float] = {}
    for name, parts in probe.items():
        entries[name] = 0.0
        for part in parts:
            for tensor in tensors_of(part):
                if _place(tensor) not in seen:
                    seen.add(_place(tensor))
                    entries[name] += tensor.numel() * (1 if isinstance(part, Tensor) else mean)
    return Held(entries, None if run.dtype is None else _rounding(probe, run.dtype))


def _rounding(parts: Mapping[str, Sequence[Part]], dtype: torch.dtype) -> float:
    """|‖G̃_i‖ − ‖G_i‖| / ‖G_i‖ of one sample, G̃ from rounded numbers; 0 where the gradient is zero."""

    def length(parts: Mapping[str, Sequence[Part]]) -> float:
        blocks = (sum(block_of(widened(part)) for part in own) for own in parts.values())
        return math.sqrt(sum(float(torch.as_tensor(b).to(torch.float64).square().sum()) for b in blocks))

    before = length(parts)
    return abs(length(rounded(parts, dtype)) - before) / before if before else 0.0


#: Folder of the gradient shards inside the stage's own folder.
GRADIENTS_FOLDER = "gradients"
#: Folder of what is kept on disk until the products are there.
PARTS_FOLDER = "parts"
#: Share of the free disk that may be taken.
FREE_SHARE = 0.9
#: Samples of different length make the size of a store uncertain by so much.
MARGIN = 1.1


@dataclass(frozen=True)
class StorePlan:
    """What is kept for later stages, and where gradients lie until then.

    Budgets and free disk decide it, and no number depends on it beyond the order of sums.

    Attributes:
        store: "gradients" or "gram".
        place: "memory" or "disk" for one pass, "groups" for several.
        entries: numbers held for one sample, by parameter.
        rounding: relative change of one sample's ‖G_i‖ by the pass's dtype; None where nothing is rounded.
    """

    store: Literal["gradients", "gram"]
    place: Literal["memory", "disk", "groups"]
    entries: Mapping[str, float]
    rounding: float | None


def plan_store(run: SafetyPass, config: CollectConfig, folder: Path) -> StorePlan:
    """Gradients on disk where asked for or where there is room for them, else gram.

    Later stages take a dozen products with the gradients. Reading them from factors costs a third of a
    pass of the model each, reading blocks less, so `auto` keeps gradients whenever the disk allows it.

    Raises:
        ConfigError: `store: gradients`, or what a sharded model needs, does not fit the disk budget.
    """
    probed = held(run)  # A pass of the model, in which every rank may have to take part.
    return from_first(lambda: store_for(run, config, folder, probed))


def store_for(run: SafetyPass, config: CollectConfig, folder: Path, probed: Held) -> StorePlan:
    """The choice for so many numbers a sample; `folder` is only looked at.

    Raises:
        ConfigError: as `plan_store`.
    """
    wide = next(run.task.model.parameters()).dtype == torch.float64
    size = 2 if run.dtype is not None else 8 if wide else 4
    needed = MARGIN * sum(run.sizes) * sum(probed.entries.values()) * size
    there = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    free = shutil.disk_usage(existing_parent(folder)).free
    available = min(config.disk_budget_gb * 1e9, FREE_SHARE * free + there)
    if config.store != "gram":
        if needed <= available:
            return StorePlan("gradients", "disk", probed.entries, probed.rounding)
        if config.store == "gradients":
            raise ConfigError(
                f"the gradient store needs {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB are available",
                where="collect.store",
                fix="use `store: gram` or `store_dtype: bfloat16`, fewer safety samples "
                "(`safety.max_samples`), or raise `collect.disk_budget_gb` if the disk allows it",
            )
    if world() == 1 and needed <= config.memory_budget_gb * 1e9:
        return StorePlan("gram", "memory", probed.entries, probed.rounding)
    place = "disk" if needed <= available else "groups"
    if place == "groups" and is_sharded(run.task.model):
        raise ConfigError(
            f"the factors of all gradients take {needed / 1e9:.1f} GB of disk and {available / 1e9:.1f} "
            "GB are available; a sharded model is passed over once only",
            where="collect.disk_budget_gb",
            fix="raise it, or use fewer safety samples (`safety.max_samples`)",
        )
    return StorePlan("gram", place, probed.entries, probed.rounding)


def measure(run: SafetyPass, plan: StorePlan, folder: Path, memory_budget_gb: float) -> Products:
    """Run the plan: every batch's gradients, then their products.

    Args:
        run: the samples.
        plan: where gradients go.
        folder: workspace of the stage; what a killed run left there is taken up.
        memory_budget_gb: limit of a group's gradients.
    """
    kept = GRADIENTS_FOLDER if plan.store == "gradients" else PARTS_FOLDER
    # A killed run may have found another budget or more free disk, and begun another way.
    for other in {GRADIENTS_FOLDER, PARTS_FOLDER} - ({kept} if plan.place == "disk" else set()):
        from_first(lambda other=other: shutil.rmtree(folder / other, ignore_errors=True))
    if plan.place == "groups":
        return _by_groups(run, plan, folder, memory_budget_gb)
    # What later stages do not read may stay in memory as far as the budget goes.
    room = memory_budget_gb * 1e9 if plan.store == "gram" and world() == 1 else 0.0
    store = GradientStore(folder / kept if plan.place == "disk" else None, memory=room)
    losses = _one_pass(run, folder, store)
    gram, mean, diagonal = store.sweep(run.layout)
    return Products(gram, mean, diagonal, losses)


def _one_pass(run: SafetyPass, folder: Path, store: GradientStore) -> Tensor:
    """Every batch's gradients into the store, shared over ranks; losses (N,)."""
    # Nothing that lies in memory outlives a killed run.
    resumes = store.directory is not None
    finished = from_first(lambda: set(store.finished())) if resumes else set[int]()
    count = len(run.batches)
    losses: list[Tensor] = []
    for index, known in _turns(run, folder, finished):
        run.progress("safety gradients", index, count)
        if known is not None:
            losses.append(known)
            continue
        parts: dict[str, list[Part]] = {}
        # Beyond the last batch a rank repeats it, where the others cannot work without it.
        measured = batch_parts(run, run.layout, index, run.batches[min(index, count - 1)], parts)
        if index >= count:
            continue
        if resumes:
            batch_losses(folder, index, measured)
        store.write_shard(index, parts)
        losses.append(measured)
    together = torch.cat(gathered(losses, count))  # Waits until every shard is written.
    run.progress("safety gradients", count, count)
    return together


def _turns(run: SafetyPass, folder: Path, finished: set[int]) -> Iterator[tuple[int, Tensor | None]]:
    """This rank's batches, with their losses where a killed run has finished them.

    The ranks of a sharded model pass over it together: one may skip a batch where all may.
    """
    count = len(run.batches)
    known = {index: batch_losses(folder, index) for index in finished}
    if not is_sharded(run.task.model):
        yield from ((index, known.get(index)) for index in share(count))
        return
    for start in range(0, count, world()):
        together = range(start, min(start + world(), count))
        skip = all(known.get(index) is not None for index in together)
        index = start + rank()
        if index < count or not skip:
            yield index, known.get(index) if skip else None


def _by_groups(run: SafetyPass, plan: StorePlan, folder: Path, memory_budget_gb: float) -> Products:
    """One pass per group of parameters that fits the memory budget; nothing larger is kept."""
    samples = sum(run.sizes)
    limit = max(1.0, memory_budget_gb * 1e9 / (samples * 4))
    # A group is a whole pass over the samples, so ranks take groups: none is left without one.
    if world() > 1:
        limit = min(limit, sum(plan.entries.values()) / world())
    groups = list(_groups(run.layout.names, plan.entries, limit))
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
    return Products(gram, run.layout.flatten(means), run.layout.flatten(diagonals), losses)


def _groups(names: Sequence[str], entries: Mapping[str, float], limit: float) -> Iterator[list[str]]:
    """Runs of parameters of at most `limit` entries together; a larger one goes alone."""
    group: list[str] = []
    size = 0.0
    for name in names:
        if group and size + entries[name] > limit:
            yield group
            group, size = [], 0.0
        group.append(name)
        size += entries[name]
    yield group


def _group_products(run: SafetyPass, names: Sequence[str], file: Path) -> dict[str, Tensor]:
    """Gram, mean and diagonal of some parameters, from one pass over all samples; kept in `file`."""
    if file.exists():
        kept = read_tensors(file)
        # Another budget or number of processes groups the parameters otherwise.
        if {f"gram.{name}" for name in names} <= kept.keys():
            return kept
    part_layout = layout_of(run.task.model, names)
    kept_parts: dict[str, list[list[Part]]] = {name: [] for name in names}
    losses: list[Tensor] = []
    for index, batch in enumerate(run.batches):
        parts: dict[str, list[Part]] = {}
        losses.append(batch_parts(run, part_layout, index, batch, parts))
        for name in names:
            kept_parts[name].append([widened(part) for part in parts.pop(name)])
    made: dict[str, Tensor] = {"losses": torch.cat(losses)}
    for name, shape in zip(names, part_layout.shapes, strict=True):
        products = parameter_products(kept_parts.pop(name), shape)
        made[f"gram.{name}"] = products.gram
        made[f"mean.{name}"], made[f"diagonal.{name}"] = products.mean, products.diagonal
    write_tensors(file, made)
    return read_tensors(file)  # As a run that was killed finds them.
