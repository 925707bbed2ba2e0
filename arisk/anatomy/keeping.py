"""Where the safety gradients go while collect works, and the products that are taken of them.

One pass over the samples keeps every batch's gradients, as factors where those are smaller, and the
products are taken parameter by parameter afterwards. They are kept on disk for later stages (store
`gradients`), or until the products are there (store `gram`): in memory where the budget allows it, else
on disk. Where neither has room, several passes each take a group of parameters that fits in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from arisk.anatomy.safety_pass import (
    Products,
    SafetyPass,
    batch_losses,
    batch_parts,
    held_entries,
    rounded,
)
from arisk.base.artifacts import existing_parent, read_tensors, write_tensors
from arisk.base.errors import ConfigError
from arisk.base.processes import barrier, from_first, gathered, rank, share, world
from arisk.config.plan import CollectConfig
from arisk.gradients import GradientStore, ParameterLayout, is_sharded, layout_of
from arisk.gradients.factors import Part
from arisk.gradients.products import parameter_products

__all__ = ["GRADIENTS_FOLDER", "PARTS_FOLDER", "Plan", "measure", "plan_store", "store_for"]

#: Folder of the gradient shards inside the stage's own folder.
GRADIENTS_FOLDER = "gradients"
#: Folder of what is kept on disk until the products are there.
PARTS_FOLDER = "parts"
#: Share of the free disk that may be taken.
FREE_SHARE = 0.9
#: Samples of different length make the size of a store uncertain by so much.
MARGIN = 1.1


@dataclass(frozen=True)
class Plan:
    """What is kept for later stages, and where gradients lie until then.

    Attributes:
        store: "gradients" or "gram".
        dtype: dtype of the store; None keeps the gradients' own.
        place: "memory" or "disk" for one pass, "groups" for several.
        entries: numbers held for one sample, by parameter.
        exact: whether the Gram matrices of a rounded store are taken before rounding.
    """

    store: Literal["gradients", "gram"]
    dtype: Literal["bfloat16"] | None
    place: Literal["memory", "disk", "groups"]
    entries: Mapping[str, float]
    exact: bool


def plan_store(run: SafetyPass, config: CollectConfig, folder: Path) -> Plan:
    """Gradients on disk where asked for or where there is room for them, else gram.

    Later stages take a dozen products with the gradients. Reading them from factors costs a third of a
    pass of the model each, reading blocks less, so `auto` keeps gradients whenever the disk allows it.

    Raises:
        ConfigError: `store: gradients`, or what a sharded model needs, does not fit the disk budget.
    """
    entries = held_entries(run)  # A pass of the model, in which every rank may have to take part.
    return from_first(lambda: store_for(run, config, folder, entries))


def store_for(run: SafetyPass, config: CollectConfig, folder: Path, entries: Mapping[str, float]) -> Plan:
    """The choice for so many numbers a sample; `folder` is only looked at.

    Raises:
        ConfigError: as `plan_store`.
    """
    wide = next(run.task.model.parameters()).dtype == torch.float64
    size = 8 if wide else 4
    held = MARGIN * sum(run.sizes) * sum(entries.values())
    there = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    free = shutil.disk_usage(existing_parent(folder)).free
    available = min(config.disk_budget_gb * 1e9, FREE_SHARE * free + there)
    fits_memory = world() == 1 and held * size <= config.memory_budget_gb * 1e9
    dtype = "bfloat16" if config.store_dtype == "bfloat16" else None
    needed = held * (2 if dtype else size)
    if config.store != "gram":
        if needed <= available:
            return Plan("gradients", dtype, "disk", entries, exact=fits_memory)
        if config.store == "gradients":
            raise ConfigError(
                f"the gradient store needs {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB are available",
                where="collect.store",
                fix="use `store: gram` or `store_dtype: bfloat16`, fewer safety samples "
                "(`safety.max_samples`), or raise `collect.disk_budget_gb` if the disk allows it",
            )
    if fits_memory:
        return Plan("gram", None, "memory", entries, exact=True)
    place = "disk" if held * size <= available else "groups"
    if place == "groups" and is_sharded(run.task.model):
        raise ConfigError(
            f"the factors of all gradients take {held * size / 1e9:.1f} GB of disk and {available / 1e9:.1f} "
            "GB are available; a sharded model is passed over once only",
            where="collect.disk_budget_gb",
            fix="raise it, or use fewer safety samples (`safety.max_samples`)",
        )
    return Plan("gram", None, place, entries, exact=True)


def measure(run: SafetyPass, plan: Plan, folder: Path, memory_budget_gb: float) -> Products:
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
    exact = GradientStore(None) if plan.dtype and plan.exact else None
    losses, rounding = _one_pass(run, plan, folder, store, exact)
    gram, mean, diagonal = (store if exact is None else exact).sweep(run.layout)
    return Products(gram, mean, diagonal, losses, None if exact is not None else rounding)


def _one_pass(
    run: SafetyPass, plan: Plan, folder: Path, store: GradientStore, exact: GradientStore | None
) -> tuple[Tensor, float | None]:
    """Every batch's gradients into the store, shared over ranks; losses (N,), and one batch's rounding."""
    # Nothing that lies in memory outlives a killed run.
    resumes = store.directory is not None and exact is None
    finished = from_first(lambda: set(store.finished())) if resumes else set[int]()
    count = len(run.batches)
    losses: list[Tensor] = []
    rounding: float | None = None
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
        if exact is not None:
            exact.write_shard(index, parts)
        if plan.dtype:
            whole, parts = parts, rounded(parts, torch.bfloat16)
            if rounding is None and exact is None:
                rounding = _rounding(run.layout, whole, parts)
        if resumes:
            batch_losses(folder, index, measured)
        store.write_shard(index, parts)
        losses.append(measured)
    together = torch.cat(gathered(losses, count))  # Waits until every shard is written.
    run.progress("safety gradients", count, count)
    return together, rounding


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


def _rounding(layout: ParameterLayout, whole: dict[str, list[Part]], parts: dict[str, list[Part]]) -> float:
    """Largest relative change of a sample's ‖G_i‖, over one batch."""
    stores = GradientStore(None), GradientStore(None)
    stores[0].write_shard(0, whole)
    stores[1].write_shard(0, rounded(parts, torch.float32))
    before, after = (s.sweep(layout)[0].diagonal(dim1=1, dim2=2).sum(0).sqrt() for s in stores)
    return float(((after - before).abs() / before.clamp(min=torch.finfo(before.dtype).tiny)).max())


def _by_groups(run: SafetyPass, plan: Plan, folder: Path, memory_budget_gb: float) -> Products:
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
    held: dict[str, list[list[Part]]] = {name: [] for name in names}
    losses: list[Tensor] = []
    for index, batch in enumerate(run.batches):
        parts: dict[str, list[Part]] = {}
        losses.append(batch_parts(run, part_layout, index, batch, parts))
        for name in names:
            held[name].append(parts.pop(name))
    made: dict[str, Tensor] = {"losses": torch.cat(losses)}
    for name, shape in zip(names, part_layout.shapes, strict=True):
        products = parameter_products(held.pop(name), shape)
        made[f"gram.{name}"] = products.gram
        made[f"mean.{name}"], made[f"diagonal.{name}"] = products.mean, products.diagonal
    write_tensors(file, made)
    return made
