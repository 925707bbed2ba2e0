"""What a run will take, before it starts: counted passes of every stage times passes timed here.

seconds(stage) = Σ_pass count(stage, pass) · seconds(pass) + the rest of the stage by a rule of thumb. Each
stage counts for itself (`Stage.cost`). A row forward and a row with its gradient are timed, what other passes
take is counted in those two. `just bench check` lays it beside real runs.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arisk.anatomy.budget import COUNTS
from arisk.anatomy.update import first_batches
from arisk.base.artifacts import existing_parent
from arisk.base.errors import ConfigError
from arisk.base.task import Batch, SampleSet, Task
from arisk.base.terminal import StageDisplay, peak_memory
from arisk.config.plan import Config
from arisk.engine.job import Job
from arisk.engine.rundir import RunDir
from arisk.engine.stage import FORWARDS, OVER_FINETUNE, SOFTMAX, Catalogue, Cost, CostScene, cost_of
from arisk.forecast.run import as_walked, verdict_counts
from arisk.gradients import ParameterLayout, batch_size, layout_of, measuring, move_batch, slice_batch
from arisk.gradients.engines import mean_gradient
from arisk.training.panels import sample_losses

__all__ = ["Calibration", "calibrate", "estimate", "operations", "said"]

#: Seconds below which a pass is timed over a whole batch, and once more.
SHORT = 0.15
#: Numbers of a vector on which work with long vectors is timed.
SAMPLED = 1_000_000
#: What other passes take, in passes of one row with its gradient: a row alone with its factors, two gradients
#: of a difference, the engine's tests on two rows by every engine, the test of a method of products.
SINGLE, CURVED, ENGINE, CURVATURE_TESTS = 1.25, 2.0, 10.0, 6.0
#: A token of an answer, in forward passes of a token: weights are read for a few tokens at a time.
WRITTEN = 1.5
#: Memory of a backward pass beside what it has kept, as a share of that.
WORKSPACE = 0.35
#: Double backward keeps the graph of the first one; `hvp: auto` takes it where it is cheap, on small models.
DOUBLE = 2.5


@dataclass(frozen=True)
class Calibration:
    """What was timed and weighed.

    Attributes:
        seconds: for one row: `forward rows`, `gradient rows`, `single-row gradients`, `curvature rows`,
            `output losses` (of given outputs), `answer tokens` (of a written answer), `products` (of a kept
            gradient with any number of directions) and `product columns` (for each of them); for one vector:
            `permutations`; once: `Gram products` of all safety rows, `curvature tests`, `engine`.
        memory: peak resident memory of the process (GB) with mean `gradients`, with those `per sample`, and
            with `curvature`.
        device: peak memory (GB) on the model's device at the same places; empty where that is the CPU.
        step_gb: what one training step takes beside the model, with its optimizer's state.
        learnt: what was found, a line each.
    """

    seconds: dict[str, float]
    memory: dict[str, float]
    device: dict[str, float]
    step_gb: float
    learnt: tuple[str, ...]


def device_peak(device: torch.device, work: Callable[[], object]) -> float:
    """Most memory in GB that torch holds on a CUDA device at once while `work` is done."""
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 1e9


def device_memory(device: torch.device) -> float | None:
    """Memory in GB that torch holds on a device now; None on the CPU, whose memory is the process's."""
    return torch.cuda.memory_allocated(device) / 1e9 if device.type == "cuda" else None


def calibrate(task: Task, config: Config) -> Calibration:
    """Time a row forward and a row with its gradient, and weigh what the gradient keeps; count the rest.

    It takes less time and memory than one training step: the numbers of a row are kept by its length.

    Args:
        task: the model with its data; left as found.
        config: the method of Hessian-vector products, and rows of a pass.
    """
    layout = layout_of(task.model, task.parameter_names)
    device = next(task.model.parameters()).device
    # The middle batch: safety rows are sorted by length.
    batches = list(task.safety.batches)
    safety = move_batch(batches[len(batches) // 2], device)
    (training,) = first_batches(task.finetune, 1, device)
    with measuring(task.model, layout):
        forward = _row_seconds(safety, lambda batch: sample_losses(task.model, [batch], task.safety.loss_fn))
        saved = _Saved(task.model)
        with saved:
            gradient = _row_seconds(
                training, lambda batch: mean_gradient(task.model, batch, task.finetune.loss_fn, layout), saved
            )
    per_row = saved.bytes / max(saved.rows, 1) / 1e9
    vector = layout.numel * next(task.model.parameters()).element_size() / 1e9
    kept = (1 + WORKSPACE) * per_row
    widest = max(batch_size(batch) for batch in batches)
    batch = batch_size(training)
    base = _resident()

    def at_once(kept: float) -> dict[str, float]:
        """Memory of the passes, given what a row keeps."""
        mean = vector + kept * batch
        return {
            "gradients": mean,
            "per sample": max(mean, vector + kept * widest + layout.numel * 4 * widest / 1e9),
            "curvature": mean * (DOUBLE if config.score.hvp == "autograd" else 1) + vector,
        }

    own = at_once(kept)
    length = _ratio(task.safety, task.finetune)
    seconds = {
        "forward rows": forward,
        "gradient rows": gradient,
        "single-row gradients": SINGLE * length * gradient,
        "curvature rows": CURVED * gradient,
        "curvature tests": CURVATURE_TESTS * CURVED * gradient * batch,
        "engine": ENGINE * length * gradient,
        "output losses": SOFTMAX * forward,
        "answer tokens": 0.0
        if task.safety.generate is None
        else WRITTEN * forward / float(task.safety.statistics.get("tokens_mean", 1.0)),
        **_vectors(layout, len(task.safety.rows)),
    }
    there = device_memory(device)
    on_device: dict[str, float] = {}
    if there is not None:
        # A device tells what a pass takes, logits and their gradient included: measured, not counted.
        part = slice_batch(training, 0, saved.rows)
        with measuring(task.model, layout):
            peak = device_peak(device, lambda: mean_gradient(task.model, part, task.finetune.loss_fn, layout))
        most = max(0.0, peak - there - vector) / saved.rows
        on_device = {kind: there + size for kind, size in at_once(most).items()}
    moments = 2 * vector
    learnt = (
        f"one safety row: {forward:.3g} s forward; one fine-tuning row: {gradient:.3g} s with its gradient",
        f"one micro-batch of {batch} rows: about {batch * gradient:.3g} s; it and the optimizer's state take "
        f"{own['gradients'] + moments:.2f} GB, model and process {base:.2f} GB",
    )
    memory = {kind: base + size for kind, size in own.items()}
    return Calibration(seconds, memory, on_device, own["gradients"] + moments, learnt)


def _ratio(one: SampleSet, other: SampleSet) -> float:
    """Tokens of a row of one data set in those of a row of another; 1 where they are not known."""
    lengths = [samples.statistics.get("tokens_mean") for samples in (one, other)]
    return float(lengths[0]) / float(lengths[1]) if all(lengths) else 1.0  # pyright: ignore[reportArgumentType] - both are numbers here


class _Saved:
    """Counts the bytes that a forward pass keeps for its backward pass, parameters apart."""

    def __init__(self, model: nn.Module) -> None:
        self._own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._seen: set[int] = set()
        self.bytes = self.rows = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own and storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def of(self, rows: int) -> None:
        """A pass over so many rows begins."""
        self._seen.clear()
        self.bytes, self.rows = 0, rows

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *raised: object) -> None:
        self._hooks.__exit__(*raised)


def _row_seconds(batch: Batch, work: Callable[[Batch], object], saved: _Saved | None = None) -> float:
    """Seconds of a mean row: of one row where that takes long, else of the whole batch, warmed up."""
    size = batch_size(batch)

    def took(part: Batch, rows: int) -> float:
        if saved is not None:
            saved.of(rows)
        start = time.perf_counter()
        work(part)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    one = slice_batch(batch, 0, 1)
    first = took(one, 1)
    if first > SHORT and saved is not None:
        return first  # A forward pass before it has warmed the model up.
    second = took(one, 1)
    return second if second > SHORT else min(took(batch, size) for _ in range(2)) / size


def _resident() -> float:
    """Resident memory of this process now, in GB; its peak where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return peak_memory() or 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def _vectors(layout: ParameterLayout, samples: int) -> dict[str, float]:
    """Work on vectors (P,), from a product and a permutation of a short one."""
    size = min(SAMPLED, layout.numel)
    vector = torch.randn(size, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    product, permuted = _timed(lambda: vector @ vector), _timed(lambda: vector[order])
    scale = layout.numel / size
    return {
        "Gram products": scale * product * samples * (samples + 1) / 2,
        "permutations": scale * permuted,
        "products": scale * product,
        "product columns": scale * product,
    }


def _timed(work: Callable[[], object]) -> float:
    """Shortest wall time of three."""
    took: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return min(took)


def estimate(
    catalogue: Catalogue,
    config: Config,
    run_dir: Path,
    kept: dict[str, Any] | None = None,
    *,
    loading: float = 0.0,
    learnt: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Time, memory and disk of every stage, from a row or two run on the model itself.

    Args:
        catalogue: the stages.
        config: the resolved config.
        run_dir: where the run would live; nothing is written there.
        kept: models loaded before, see `load_task`.
        loading: seconds that loading the model and the data took.
        learnt: told a line as soon as it is known.

    Returns:
        `stages` (by name: `seconds`, `memory_gb` as peak resident memory of the process up to there,
        `device_gb` or None on the CPU, `disk_gb`, `flop` or None, `work`), `seconds` and `memory_gb` of a
        whole run, `verdict_seconds` of its road to the verdict and `real_seconds` of really doing it, the
        `store` that collect will choose, and `warnings` with a remedy each.

    Raises:
        ConfigError: one training step does not fit into memory.
        AriskError: what would stop the run.
    """
    job = Job(catalogue, config, RunDir(run_dir), "", StageDisplay(quiet=True), {}, models=kept or {})
    task = job.task
    timed = calibrate(task, config)
    for line in timed.learnt:
        learnt(line)
    _refuse_small(task, timed)
    why, out = _why(catalogue, task, config)
    costs: dict[str, Cost] = {}
    probed: dict[str, Any] = {}
    for stage in catalogue:
        own = why if stage.settled is not None else config
        scene = CostScene(task, own, run_dir, timed.seconds, timed.memory, timed.device, loading, probed)
        costs[stage.name] = Cost() if stage.name in out else cost_of(stage, scene)
    memory = _peaks(catalogue, costs)
    order = (*catalogue.ordinary, *catalogue.optional)
    stages = {name: _stage(task, costs[name], timed.seconds, memory[name]) for name in order}
    ordinary = catalogue.ordinary
    decides = [name for name in ordinary if name not in catalogue.explaining(config)]
    peak = max(memory[name] for name in ordinary)
    disk = sum(costs[name].disk_gb for name in ordinary)
    notes = {topic: text for cost in costs.values() for topic, text in cost.notes.items()}
    warnings = [text for cost in costs.values() for text in cost.warnings]
    return {
        "stages": stages,
        "seconds": round(sum(stages[name]["seconds"] for name in ordinary), 2),
        "verdict_seconds": round(sum(stages[name]["seconds"] for name in decides), 2),
        "real_seconds": stages["verify"]["seconds"] if "verify" in stages else None,
        "carried_out": as_walked(task, config).pilot_steps is not None and config.rollout.pilot_steps is None,
        "memory_gb": round(peak, 3),
        **notes,
        "warnings": [*warnings, *_over_budget(run_dir, disk, peak)],
    }


def _why(catalogue: Catalogue, task: Task, config: Config) -> tuple[Config, tuple[str, ...]]:
    """The config of the stages that say why once the verdict stands, and those that will be left out."""
    with tempfile.TemporaryDirectory() as folder:
        rundir = RunDir(Path(folder))
        place = rundir.stage_dir("rollout")
        place.mkdir()
        (place / COUNTS).write_text(json.dumps(verdict_counts(task, config)), encoding="utf-8")
        settle = next((stage.settled for stage in catalogue if stage.settled is not None), None)
        own = config if settle is None else settle(config, rundir)
        return own or config, catalogue.left_out(config, rundir)


def _refuse_small(task: Task, timed: Calibration) -> None:
    """Refuse a machine on which the plan itself has no room.

    Raises:
        ConfigError: with the memory that one training step needs.
    """
    device = next(task.model.parameters()).device
    room = torch.cuda.mem_get_info(device)[0] / 1e9 if device.type == "cuda" else _available()
    if room is None or timed.step_gb <= room:
        return
    raise ConfigError(
        f"one training step of this plan needs about {timed.step_gb:.2f} GB beside the model, and "
        f"{room:.2f} GB are available",
        where=f"memory of {device}",
        fix="lower `training.batch_size` (and raise `training.gradient_accumulation`), set "
        "`model.gradient_checkpointing`, or cut rows with `finetune.max_length`",
    )


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
