"""How much work every stage of a run has: passes of the model by kind, memory and disk.

Counts come from the config, the data and `geometry.segments`; the store is chosen by the rule of stage
collect itself. Nothing is timed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from arisk.anatomy.collect import Held, SafetyPass, StorePlan, held, store_for
from arisk.anatomy.overlaps import PERMUTATION_CHUNK
from arisk.anatomy.score import DIRECTIONS_BYTES
from arisk.base.errors import ConfigError, ShapeError
from arisk.base.task import Task, silent
from arisk.config.plan import Config, planned_steps
from arisk.cost.optional_work import (
    COPIES_OF_A_RUN,
    answer_tokens,
    followed_rows,
    optional_passes,
    optional_sizes,
)
from arisk.forecast.forecasters import PATH_BUDGET, PATH_POINTS
from arisk.forecast.leap import rollout_cost
from arisk.forecast.rare import SCORED_SHARE
from arisk.forecast.rollout import SCALES
from arisk.geometry.vectors import column_groups
from arisk.gradients import batch_size, layout_of, measuring, move_batch

__all__ = [
    "KeptGradients",
    "device_sizes",
    "kept_gradients",
    "operations",
    "passes",
    "path_operations",
    "said",
    "sizes",
]

#: Points of a rollout at which answers are written, about: the start, the pilot's end, the end, one between.
ANSWERED_POINTS = 4
#: Doublings, about, until a virtual move has gone far enough.
REACHING = 12
#: Copies of the selected parameters beside the model: in a rollout (θ*, gradient, two moments, the anchor,
#: direction, mean and square of a block, the leap), and in the update of stage score.
COPIES, UPDATE = 9, 4
#: Forward passes in a pass of each kind, by floating-point operations: a backward pass counts as two.
FORWARDS = {
    "forward rows": 1,
    "gradient rows": 3,
    "single-row gradients": 3,
    "curvature rows": 6,
}


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


def kept_gradients(task: Task, config: Config, run_dir: Path) -> KeptGradients:
    """The choice of collect, made by its own rule."""
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


def _krylov(task: Task, config: Config) -> int:
    return config.score.krylov_steps(_numel(task))


def passes(task: Task, config: Config, store: KeptGradients) -> dict[str, dict[str, float]]:
    """Passes of every stage that runs the model, by kind."""
    score, batch = config.score, config.training.batch_size
    safety, finetune = len(task.safety.rows), len(task.finetune.rows)
    control = len(task.control.rows) if task.control else 0
    steps = planned_steps(config.training, finetune)
    per_step = batch * config.training.gradient_accumulation
    probe = (score.probe_points + 1) if score.probe_points else 0
    reaching = REACHING * (min(safety, config.collect.chunk_size) + batch) if probe else 0
    probed = safety + score.hvp_batches * batch * (2 if control else 1)
    examples = min(score.examples, finetune)
    reads, columns = _products(task, config, store)
    counts: dict[str, dict[str, float]] = {
        "collect": {"single-row gradients": safety, "Gram products": 1},
        "score": {
            "gradient rows": score.batches * batch * (2 if control else 1),
            "curvature rows": _krylov(task, config) * score.hvp_batches * batch,
            "curvature tests": 1,
            "single-row gradients": examples,
            "forward rows": probe * probed + reaching,
            "products": safety * reads + examples,
            "product columns": safety * columns,
            "permutations": score.nulls,
        },
        "rollout": {},
    }
    if store.plan is not None and store.plan.store == "gram":
        counts["score"]["single-row gradients"] += safety * reads
        if path_operations(task, config):
            points = min(steps, PATH_POINTS)
            counts["forecast"] = {"single-row gradients": safety, "product columns": safety * points}
    if config.rollout.enabled:
        rolled, measurements = rollout_cost(steps, config.rollout)
        measured = min(safety, config.rollout.eval_samples or safety)
        both = measured + min(control, config.rollout.control_samples)
        counts["rollout"] = {
            "gradient rows": rolled * per_step,
            "forward rows": measurements * (both + followed_rows(task, config))
            + 2 * measured
            + measurements * per_step  # The loss before a leap.
            + (SCORED_SHARE * steps * per_step if config.rollout.rare_rows else 0),
            "output losses": len(SCALES) * measured,
            "answer tokens": answer_tokens(task, config, ANSWERED_POINTS),
        }
    counts |= optional_passes(task, config, counts["rollout"])
    return counts


def said(own: Mapping[str, float]) -> str:
    """A stage's passes of the model in words."""
    return (
        ", ".join(f"{round(own[kind])} {kind}" for kind in FORWARDS if own.get(kind))
        or "no pass of the model"
    )


def operations(task: Task, own: Mapping[str, float]) -> float | None:
    """Floating-point operations of a stage; None where the rows' tokens are not known.

    2 P_model a token and forward pass, 2 P for a product with one gradient, and P N² for the Gram matrices.
    """
    tokens = {name: getattr(task, name).statistics.get("tokens_mean") for name in ("safety", "finetune")}
    if None in tokens.values():
        return None
    whole = sum(parameter.numel() for parameter in task.model.parameters())
    selected, samples = _numel(task), len(task.safety.rows)
    total = selected * (2 * own.get("product columns", 0) + samples**2 * own.get("Gram products", 0))
    for kind, forwards in FORWARDS.items():
        length = tokens["finetune" if kind in ("gradient rows", "curvature rows") else "safety"]
        total += 2 * whole * length * forwards * own.get(kind, 0)
    return float(total)


def path_operations(task: Task, config: Config) -> float:
    """Multiplications of the exact recursion of stage forecast; 0 where it is too long and left out."""
    training = config.training
    plain = training.optimizer == "sgd" and not training.weight_decay and training.max_grad_norm is None
    count = _numel(task) * planned_steps(training, len(task.finetune.rows)) * (4 * _krylov(task, config) + 20)
    return 0.0 if plain or count > PATH_BUDGET else float(count)


def _products(task: Task, config: Config, store: KeptGradients) -> tuple[float, int]:
    """Passes over all safety gradients in stage score, and the directions they are multiplied with.

    Stored gradients are read once for every group of directions of a parameter that fits in memory; those
    that are made anew, once for every group of whole directions.
    """
    score, budget = config.score, config.collect.memory_budget_gb * 1e9
    chunks, rest = divmod(score.nulls, PERMUTATION_CHUNK)
    several = [
        score.batches,
        _krylov(task, config),
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


def _numel(task: Task) -> int:
    return layout_of(task.model, task.parameter_names).numel


def device_sizes(task: Task, seen: Mapping[str, float]) -> dict[str, float]:
    """Peak memory in GB on the model's device, of the stages that run it; empty where that is the CPU.

    Args:
        task: the model with its data.
        seen: peak memory there (GB) by kind of pass.
    """
    if not seen:
        return {}
    vector = _numel(task) * 4 / 1e9
    moving = seen["gradients"] + COPIES_OF_A_RUN * vector
    return {
        "collect": seen["per sample"],
        "score": seen["curvature"] + vector,
        "rollout": seen["gradients"] + COPIES * vector,
        "verify": moving,
        "screen": max(moving, seen["per sample"] + vector),
        "guard": moving + 2 * vector,
    }


def sizes(
    task: Task, config: Config, seen: Mapping[str, float], store: KeptGradients
) -> tuple[dict[str, float], dict[str, float]]:
    """Peak memory and disk of every stage in GB.

    Args:
        task: the model with its data.
        config: the resolved config.
        seen: peak memory of this process (GB) by kind of pass, which has seen the activations.
        store: what collect will keep.
    """
    vector, budget = _numel(task) * 4 / 1e9, config.collect.memory_budget_gb
    block = min(budget, store.held)
    stacks = [config.score.batches * vector, _krylov(task, config) * vector]
    inside = 0.0
    for size in stacks:
        inside += size if inside + size <= budget else 0.0
    spilled = sum(stacks) - inside
    directions = (_krylov(task, config) + 3) * vector if sum(stacks) * 1e9 <= DIRECTIONS_BYTES else 0.0
    memory = {
        "collect": seen["per sample"] + block,
        "subspace": seen["gradients"],
        "score": seen["curvature"] + UPDATE * vector + inside + min(budget, 2 * vector * PERMUTATION_CHUNK),
        "rollout": seen["gradients"] + (COPIES * vector if config.rollout.enabled else 0.0),
        "forecast": seen["gradients"] + 2 * directions,
        "report": seen["gradients"],
    }
    # A run is one process, whose peak stays.
    peak = 0.0
    for stage, own in memory.items():
        memory[stage] = peak = max(peak, own)
    memory |= optional_sizes(task, config, seen)
    kept = store.kept
    if store.plan is not None and store.plan.store == "gram" and store.plan.place == "disk":
        kept = store.held
    return memory, {"collect": kept + 2 * vector, "score": max(spilled, directions)}
