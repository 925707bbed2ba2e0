"""What a run will take, before it starts: counted passes of every stage times passes timed here.

seconds(stage) = Σ_pass count(stage, pass) · seconds(pass) + the rest of the stage by a rule of thumb. Each
stage counts for itself (`Stage.cost`); a pass over one row is timed by `arisk.cost.estimate` on a real
batch of each kind. `just bench check` lays it beside real runs.

Passes are timed once they have been warmed up. Work on vectors as long as the selection is timed on a
sample of its parameters and scaled by their size.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arisk.anatomy.update import Permuted, first_batches
from arisk.base.artifacts import existing_parent
from arisk.base.errors import InputError
from arisk.base.task import Batch, Task
from arisk.base.terminal import StageDisplay, peak_memory
from arisk.config.plan import Config
from arisk.engine.job import Job
from arisk.engine.rundir import RunDir
from arisk.engine.stage import FORWARDS, OVER_FINETUNE, Catalogue, Cost, CostScene, cost_of
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

__all__ = ["Calibration", "calibrate", "estimate", "operations", "said"]

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


def estimate(
    catalogue: Catalogue,
    config: Config,
    run_dir: Path,
    kept: dict[str, Any] | None = None,
    *,
    loading: float = 0.0,
) -> dict[str, Any]:
    """Time, memory and disk of every stage, from a short calibration on the model itself.

    Args:
        catalogue: the stages.
        config: the resolved config.
        run_dir: where the run would live; nothing is written there.
        kept: models loaded before, see `load_task`.
        loading: seconds that loading the model and the data took.

    Returns:
        `stages` (by name: `seconds`, `memory_gb` as peak resident memory of the process up to there,
        `device_gb` or None on the CPU, `disk_gb`, `flop` or None, `work`), `seconds` and `memory_gb` of a
        whole run, the `store` that collect will choose, and `warnings` with a remedy each.

    Raises:
        AriskError: what would stop the run.
    """
    job = Job(catalogue, config, RunDir(run_dir), "", StageDisplay(quiet=True), {}, models=kept or {})
    task = job.task
    timed = calibrate(task, config)
    scene = CostScene(task, config, run_dir, timed.seconds, timed.memory, timed.device, loading)
    costs = {stage.name: cost_of(stage, scene) for stage in catalogue}
    memory = _peaks(catalogue, costs)
    order = (*catalogue.ordinary, *catalogue.optional)
    stages = {name: _stage(task, costs[name], timed.seconds, memory[name]) for name in order}
    ordinary = catalogue.ordinary
    peak = max(memory[name] for name in ordinary)
    disk = sum(costs[name].disk_gb for name in ordinary)
    notes = {topic: text for cost in costs.values() for topic, text in cost.notes.items()}
    warnings = [text for cost in costs.values() for text in cost.warnings]
    return {
        "stages": stages,
        "seconds": round(sum(stages[name]["seconds"] for name in ordinary), 2),
        "memory_gb": round(peak, 3),
        **notes,
        "warnings": [*warnings, *_over_budget(run_dir, disk, peak)],
    }


def _peaks(catalogue: Catalogue, costs: Mapping[str, Cost]) -> dict[str, float]:
    """Peak memory in GB up to every stage: a run is one process, whose peak stays."""
    found, peak = {name: costs[name].memory_gb for name in catalogue.optional}, 0.0
    for name in catalogue.ordinary:
        found[name] = peak = max(peak, costs[name].memory_gb)
    return found


def _stage(task: Task, cost: Cost, seconds: Mapping[str, float], memory: float) -> dict[str, Any]:
    timed = sum(count * seconds[kind] for kind, count in cost.passes.items())
    return {
        "seconds": round(timed + cost.seconds, 2),
        "memory_gb": round(memory, 3),
        "device_gb": None if cost.device_gb is None else round(cost.device_gb, 3),
        "disk_gb": round(cost.disk_gb, 4),
        "flop": operations(task, cost.passes),
        "work": said(cost.passes),
    }


def said(passes: Mapping[str, float]) -> str:
    """A stage's passes of the model in words."""
    told = [f"{round(passes[kind])} {kind}" for kind in FORWARDS if passes.get(kind)]
    return ", ".join(told) or "no pass of the model"


def operations(task: Task, passes: Mapping[str, float]) -> float | None:
    """Floating-point operations of a stage; None where the rows' tokens are not known.

    2 P_model a token and forward pass, 2 P for a product with one gradient, and P N² for the Gram matrices.
    """
    tokens = {name: getattr(task, name).statistics.get("tokens_mean") for name in ("safety", "finetune")}
    if None in tokens.values():
        return None
    whole = sum(parameter.numel() for parameter in task.model.parameters())
    selected, samples = layout_of(task.model, task.parameter_names).numel, len(task.safety.rows)
    total = selected * (2 * passes.get("product columns", 0) + samples**2 * passes.get("Gram products", 0))
    for kind, forwards in FORWARDS.items():
        length = tokens["finetune" if kind in OVER_FINETUNE else "safety"]
        total += 2 * whole * length * forwards * passes.get(kind, 0)
    return float(total)


def _over_budget(run_dir: Path, disk: float, memory: float) -> list[str]:
    """What does not fit, with the remedy."""
    found: list[str] = []
    free = shutil.disk_usage(existing_parent(run_dir)).free / 1e9
    if disk > 0.9 * free:
        found.append(
            f"the run needs {disk:.2f} GB of disk and {free:.2f} GB are free: set collect.store to gram, "
            "or give another --run-dir"
        )
    room = _available()
    if room is not None and memory - (peak_memory() or 0.0) > room:
        found.append(
            f"the run needs about {memory:.1f} GB of memory and {room:.1f} GB more are "
            "available: lower collect.memory_budget_gb, collect.chunk_size or training.batch_size"
        )
    return found


def _available() -> float | None:
    """Memory that can still be taken, in GB, where the system tells it."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    line = next((line for line in text.splitlines() if line.startswith("MemAvailable")), None)
    return int(line.split()[1]) * 1024 / 1e9 if line else None
