"""What collect, subspace and score will take; the store is chosen by the rule of stage collect itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from arisk.anatomy.budget import score_passes
from arisk.anatomy.collect import Held, SafetyPass, StorePlan, held, store_for
from arisk.anatomy.score import DIRECTIONS_BYTES
from arisk.anatomy.update import PERMUTATION_CHUNK
from arisk.base.errors import ConfigError, ShapeError
from arisk.base.task import SampleSet, Task, silent
from arisk.config.plan import Config
from arisk.engine.stage import Cost, CostScene
from arisk.geometry.vectors import column_groups
from arisk.gradients import batch_size, layout_of, measuring, move_batch

__all__ = [
    "collect_cost",
    "kept_gradients",
    "krylov_steps",
    "numel",
    "samples_in",
    "score_cost",
    "score_memory",
    "subspace_cost",
]

#: Copies of the selected parameters in the update of stage score.
UPDATE = 4
#: Seconds of the eigenvalues, which need no model; seconds to write, digest and sync a gigabyte of gradients.
EIGENVALUES, WRITING = 0.1, 2.0


@dataclass(frozen=True)
class KeptGradients:
    """What collect will keep.

    Attributes:
        plan: as collect would choose it; None where it would refuse.
        kept, held: GB on disk afterwards, and of all gradients while collect works.
        refused: why it would refuse.
    """

    plan: StorePlan | None
    kept: float
    held: float
    refused: tuple[str, ...] = ()

    @property
    def told(self) -> str:
        """One line."""
        if self.plan is None:
            return "refused"
        if self.plan.store == "gradients":
            return f"gradients, {self.kept:.2f} GB on disk"
        return "gram: later stages run the safety rows again"


def kept_gradients(scene: CostScene) -> KeptGradients:
    """The choice of collect, made by its own rule; one row is run for it, once."""
    if "kept gradients" not in scene.probed:
        scene.probed["kept gradients"] = _kept_gradients(scene.task, scene.config, scene.run_dir)
    return scene.probed["kept gradients"]


def _kept_gradients(task: Task, config: Config, run_dir: Path) -> KeptGradients:
    layout = layout_of(task.model, task.parameter_names)
    device = next(task.model.parameters()).device
    batches = [move_batch(batch, device) for batch in task.safety.batches]
    rows = [batch_size(batch) for batch in batches]
    # Other engines than hooks make no factors; `auto` takes them where hooks do not fit.
    engine = "hooks" if config.collect.engine == "auto" else config.collect.engine
    dtype = torch.bfloat16 if config.collect.store_dtype == "bfloat16" else None
    run = SafetyPass(task, layout, batches, rows, engine, silent, dtype)
    with measuring(task.model, layout):
        try:
            probed = held(run)
        except ShapeError:
            probed = Held({name: float(math.prod(layout.shape_of(name))) for name in layout.names}, None)
    size = sum(rows) * sum(probed.entries.values()) * (2 if dtype else 4) / 1e9
    try:
        plan = store_for(run, config.collect, run_dir / "collect", probed)
    except ConfigError as err:
        return KeptGradients(None, size, size, (f"{err.what}: {err.fix}",))
    return KeptGradients(plan, size if plan.store == "gradients" else 0.0, size)


def samples_in(samples: SampleSet | None) -> int:
    """How many samples there are; a set from Python may list no rows, and is counted by its batches."""
    if samples is None:
        return 0
    if samples.rows or not hasattr(samples.batches, "__len__"):
        return len(samples.rows)
    return sum(batch_size(batch) for batch in samples.batches)


def numel(task: Task) -> int:
    """Number of selected parameters P."""
    return layout_of(task.model, task.parameter_names).numel


def krylov_steps(task: Task, config: Config) -> int:
    """Lanczos steps J of stage score."""
    return config.score.krylov_steps(numel(task))


def collect_cost(scene: CostScene) -> Cost:
    """One gradient a safety row, and the Gram matrices."""
    task, config = scene.task, scene.config
    store = kept_gradients(scene)
    block = min(config.collect.memory_budget_gb, store.held)
    kept = store.kept
    if store.plan is not None and store.plan.store == "gram" and store.plan.place == "disk":
        kept = store.held
    return Cost(
        passes={"single-row gradients": samples_in(task.safety), "Gram products": 1},
        seconds=scene.seconds["engine"] + WRITING * store.kept,
        memory_gb=scene.memory["per sample"] + block,
        device_gb=scene.device.get("per sample"),
        disk_gb=kept + 2 * numel(task) * 4 / 1e9,
        notes={"store": store.told},
        warnings=store.refused,
    )


def subspace_cost(scene: CostScene) -> Cost:
    """Eigenvalues of small matrices: no pass of the model."""
    return Cost(seconds=EIGENVALUES, memory_gb=scene.memory["gradients"])


def score_cost(scene: CostScene) -> Cost:
    """Update, curvature, nulls, probe and single rows."""
    task, config, score = scene.task, scene.config, scene.config.score
    store = kept_gradients(scene)
    safety = samples_in(task.safety)
    passes = score_passes(
        score,
        safety=safety,
        control=samples_in(task.control),
        finetune=samples_in(task.finetune),
        selected=numel(task),
        batch=config.training.batch_size,
        chunk=config.collect.chunk_size,
    )
    examples = passes["single-row gradients"]
    reads, columns = _products(task, config, store)
    again = safety * reads if store.plan is not None and store.plan.store == "gram" else 0
    vector = numel(task) * 4 / 1e9
    inside, spilled, directions = score_memory(scene)
    budget = min(config.collect.memory_budget_gb, 2 * vector * PERMUTATION_CHUNK)
    on_device = scene.device.get("curvature")
    return Cost(
        passes={
            **passes,
            "curvature tests": 1,
            "single-row gradients": examples + again,
            "products": safety * reads + examples,
            "product columns": safety * columns,
            "permutations": score.nulls,
        },
        memory_gb=scene.memory["curvature"] + UPDATE * vector + inside + budget,
        device_gb=None if on_device is None else on_device + vector,
        disk_gb=max(spilled, directions),
    )


def score_memory(scene: CostScene) -> tuple[float, float, float]:
    """GB of stage score's vectors held in memory, spilled to disk, and of the directions it hands on."""
    config, vector = scene.config, numel(scene.task) * 4 / 1e9
    budget, steps = config.collect.memory_budget_gb, krylov_steps(scene.task, scene.config)
    stacks = [config.score.batches * vector, steps * vector]
    inside = 0.0
    for size in stacks:
        inside += size if inside + size <= budget else 0.0
    spilled = sum(stacks) - inside
    directions = (steps + 3) * vector if sum(stacks) * 1e9 <= DIRECTIONS_BYTES else 0.0
    return inside, spilled, directions


def _products(task: Task, config: Config, store: KeptGradients) -> tuple[float, int]:
    """Passes over all safety gradients in stage score, and the directions they are multiplied with.

    Stored gradients are read once for every group of directions of a parameter that fits in memory; those
    that are made anew, once for every group of whole directions.
    """
    score, budget = config.score, config.collect.memory_budget_gb * 1e9
    chunks, rest = divmod(score.nulls, PERMUTATION_CHUNK)
    several = [
        score.batches,
        krylov_steps(task, config),
        *[PERMUTATION_CHUNK] * chunks,
        *([rest] if rest else []),
    ]
    single = 3 if task.control else 2  # The update, the pull of its c-vector, the control's update.
    layout = layout_of(task.model, task.parameter_names)
    whole = store.plan is not None and store.plan.store == "gram"
    blocks = [layout.numel] if whole else [math.prod(shape) for shape in layout.shapes]
    reads = sum(
        size / layout.numel * sum(1 for _ in column_groups(size, count, budget))
        for count in several
        for size in blocks
    )
    return single + reads, single + sum(several)
