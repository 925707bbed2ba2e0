"""What a run will take, before it starts: counted passes of every stage times passes timed here.

seconds(stage) = Σ_pass count(stage, pass) · seconds(pass). Counts come from the config, the data and
`geometry.segments`; a pass over one row is timed on a real batch of each kind. The rest of a stage
(eigenvalues, bootstrap, page) is a rule of thumb. `just bench check` lays it beside real runs.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arisk.config import Config, planned_steps
from arisk.display import StageDisplay, peak_memory
from arisk.errors import ShapeError
from arisk.geometry.segments import rollout_cost
from arisk.job import Job
from arisk.rundir import RunDir

__all__ = ["estimate"]

#: Seconds of the stages that run no model, for the default settings.
FIXED = {"subspace": 0.1, "forecast": 0.8, "report": 0.1}
#: Bootstrap draws to which the fixed seconds of the forecast belong.
DRAWS = 400
#: Krylov steps of the automatic choice; batches and repeats that are timed.
KRYLOV, TIMED = 12, 3
#: Copies of the selected parameters in a rollout: θ*, three of the last real steps, the leap, two moments.
COPIES = 7


def estimate(config: Config, run_dir: Path, kept: dict[str, Any] | None = None) -> dict[str, Any]:
    """Time, memory and disk of every stage, from a short calibration on the model itself.

    Args:
        config: the resolved config.
        run_dir: where the run would live; nothing is written there.
        kept: models loaded before, see `load_task`.

    Returns:
        `stages` (by name: `seconds`, `memory_gb` as peak resident memory of the process up to there,
        `disk_gb`, `work`), `seconds` and `memory_gb` of a whole run, and `warnings` with a remedy each.

    Raises:
        AriskError: what would stop the run.
    """
    job = Job(config, RunDir(run_dir), "", StageDisplay(quiet=True), {}, models=kept or {})
    task = job.task
    loading = time.process_time()
    loaded = peak_memory() or 0.0
    timed = _calibrated(task, config)
    counts = _counts(task, config)
    seconds = {
        stage: sum(count * timed[kind] for kind, count in passes.items()) for stage, passes in counts.items()
    }
    seconds["collect"] += loading + timed["engine"]
    seconds["verify"] += loading
    for stage, fixed in FIXED.items():
        scale = config.forecast.bootstrap_samples / DRAWS if stage == "forecast" else 1.0
        seconds[stage] = fixed * scale
    memory, disk = _sizes(task, config, loaded)
    order = ("collect", "subspace", "score", "rollout", "forecast", "report", "verify")
    stages = {
        stage: {
            "seconds": round(seconds[stage], 2),
            "memory_gb": round(memory[stage], 3),
            "disk_gb": round(disk.get(stage, 0.0), 4),
            "work": ", ".join(f"{round(n)} {kind}" for kind, n in counts.get(stage, {}).items() if n)
            or "no pass of the model",
        }
        for stage in order
    }
    return {
        "stages": stages,
        "seconds": round(sum(seconds[stage] for stage in order[:-1]), 2),
        "memory_gb": round(max(memory.values()), 3),
        "warnings": _over_budget(config, run_dir, disk, memory),
    }


def _calibrated(task: Any, config: Config) -> dict[str, float]:
    """Seconds of one row's pass of each kind, and of choosing the engine."""
    import torch

    from arisk.gradients import batch_invariance, batch_size, choose_engine, layout_of, measuring, move_batch
    from arisk.gradients.hvp import choose_hvp, hvp
    from arisk.gradients.mean import mean_gradient
    from arisk.gradients.per_sample import per_sample_gradients
    from arisk.stages.probe import sample_losses
    from arisk.stages.update import first_batches

    layout = layout_of(task.model, task.parameter_names)
    device = next(task.model.parameters()).device
    # The middle batch: safety rows are sorted by length.
    batches = list(task.safety.batches)
    safety = move_batch(batches[len(batches) // 2], device)
    training = first_batches(task.finetune, TIMED, device)
    rows = sum(batch_size(batch) for batch in training)
    model, loss = task.model, task.finetune.loss_fn
    with measuring(model, layout):
        start = time.perf_counter()
        largest = move_batch(max(batches, key=batch_size), device)
        choice = choose_engine(model, largest, task.safety.loss_fn, layout, config.collect.engine)
        batch_invariance(model, largest, task.safety.loss_fn, layout, choice.engine)
        engine = time.perf_counter() - start
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(layout.numel, generator=generator).to(device)
        start = time.perf_counter()
        plan = choose_hvp(model, training[:1], loss, layout, direction, config.score.hvp)
        hvp_setup = time.perf_counter() - start

        def products() -> None:
            hvp(model, training[:1], loss, layout, direction, method=plan.method, step=plan.step)

        def nowhere(name: str, block: torch.Tensor) -> None:
            del name, block

        def rowwise() -> None:
            per_sample_gradients(model, safety, task.safety.loss_fn, layout, nowhere, engine=choice.engine)

        block = direction.expand(batch_size(safety), -1).contiguous()

        def permuted() -> None:
            # One null of the overlap: a permuted update, and its products with a block of gradients.
            torch.mv(block, direction[torch.randperm(layout.numel, generator=generator).to(device)])

        return {
            "permutations": _seconds(permuted),
            "forward rows": _seconds(lambda: sample_losses(model, [safety], task.safety.loss_fn))
            / batch_size(safety),
            "gradient rows": _seconds(lambda: [mean_gradient(model, b, loss, layout) for b in training])
            / rows,
            "single-row gradients": _seconds(rowwise) / batch_size(safety),
            "curvature rows": _seconds(products) / batch_size(training[0]),
            "curvature tests": hvp_setup,
            "engine": engine,
        }


def _seconds(work: Callable[[], object]) -> float:
    """Median wall time of three repeats, after one that warms up."""
    took: list[float] = []
    for _ in range(TIMED + 1):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return sorted(took[1:])[TIMED // 2]


def _counts(task: Any, config: Config) -> dict[str, dict[str, float]]:
    """Passes of every stage that runs the model, by kind."""
    from arisk.stages.verify import measured_steps

    score, batch = config.score, config.training.batch_size
    safety, finetune = len(task.safety.rows), len(task.finetune.rows)
    control = len(task.control.rows) if task.control else 0
    krylov = KRYLOV if score.krylov_dim == "auto" else score.krylov_dim
    steps = planned_steps(config.training, finetune)
    per_step = batch * config.training.gradient_accumulation
    probe = (score.probe_points + 1) if score.probe_points else 0
    probed = safety + score.hvp_batches * batch * (2 if control else 1)
    counts: dict[str, dict[str, float]] = {
        "collect": {"single-row gradients": safety},
        "score": {
            "gradient rows": score.batches * batch * (2 if control else 1),
            "curvature rows": krylov * score.hvp_batches * batch,
            "curvature tests": 1,
            "single-row gradients": min(score.examples, finetune),
            "forward rows": probe * probed,
            "permutations": score.nulls,
        },
        "rollout": {},
    }
    if config.rollout.enabled:
        rolled, passes = rollout_cost(steps, config.rollout)
        measured = min(safety, config.rollout.eval_samples or safety)
        measured += min(control, config.rollout.control_samples)
        counts["rollout"] = {"gradient rows": rolled * per_step, "forward rows": passes * measured}
    reach = min(config.verify.steps or steps, steps)
    held = len(task.heldout.rows) if task.heldout else safety
    looked = held + min(control, config.verify.control_samples)
    counts["verify"] = {
        "gradient rows": reach * per_step,
        "forward rows": len(measured_steps(reach)) * looked,
    }
    return counts


def _sizes(task: Any, config: Config, loaded: float) -> tuple[dict[str, float], dict[str, float]]:
    """Peak memory and disk of every stage in GB; the calibration has seen the activations."""
    from arisk.gradients import layout_of

    vector = layout_of(task.model, task.parameter_names).numel * 4 / 1e9
    score = config.score
    krylov = KRYLOV if score.krylov_dim == "auto" else score.krylov_dim
    seen = max(loaded, peak_memory() or 0.0)
    held = _held(task, config)
    store = held / 2 if config.collect.store_dtype == "bfloat16" else held
    budget = config.collect.disk_budget_gb
    if config.collect.store == "gram" or (config.collect.store == "auto" and store > budget):
        # What does not fit in memory lies on disk until its products are there, where there is room.
        store = held if config.collect.memory_budget_gb < held <= budget else 0.0
    block = min(config.collect.memory_budget_gb, held)
    directions = (krylov + 2 * score.batches + 4) * vector
    memory = {
        "collect": seen + block,
        "subspace": seen + block,
        "score": seen + max(block, directions),
        "rollout": seen + max(block, directions, COPIES * vector),
        "forecast": seen + max(block, directions),
        "report": seen + max(block, directions),
        "verify": seen + 4 * vector,
    }
    return memory, {"collect": store + 2 * vector, "score": (krylov + 3) * vector}


def _held(task: Any, config: Config) -> float:
    """Gradients of all safety samples as collect keeps them, as factors where those are smaller (GB)."""
    from arisk.gradients import batch_size, layout_of, measuring, move_batch
    from arisk.progress import silent
    from arisk.stages.safety_pass import SafetyPass, held_entries

    layout = layout_of(task.model, task.parameter_names)
    device = next(task.model.parameters()).device
    batches = [move_batch(batch, device) for batch in task.safety.batches]
    sizes = [batch_size(batch) for batch in batches]
    # Other engines than hooks make no factors; `auto` takes them where hooks do not fit.
    asked = config.collect.engine
    engine = "hooks" if asked == "auto" else asked
    run = SafetyPass(task, layout, batches, sizes, engine, silent)
    try:
        with measuring(task.model, layout):
            entries = sum(held_entries(run).values())
    except ShapeError:
        entries = layout.numel
    return sum(sizes) * entries * 4 / 1e9


def _over_budget(
    config: Config, run_dir: Path, disk: dict[str, float], memory: dict[str, float]
) -> list[str]:
    """What does not fit, with the remedy."""
    found: list[str] = []
    parent = next(p for p in (run_dir.resolve(), *run_dir.resolve().parents) if p.exists())
    free = shutil.disk_usage(parent).free / 1e9
    needed, budget = sum(disk.values()), config.collect.disk_budget_gb
    if config.collect.store == "gradients" and disk["collect"] > budget:
        found.append(
            f"the gradient store needs {disk['collect']:.2f} GB and collect.disk_budget_gb is {budget:g}: "
            "set collect.store to gram, lower safety.max_samples, or raise the budget"
        )
    if needed > 0.9 * free:
        found.append(
            f"the run needs {needed:.2f} GB of disk and {free:.2f} GB are free: set collect.store to gram, "
            "or give another --run-dir"
        )
    room = _available()
    if room is not None and max(memory.values()) - (peak_memory() or 0.0) > room:
        found.append(
            f"the run needs about {max(memory.values()):.1f} GB of memory and {room:.1f} GB more are "
            "available: lower collect.memory_budget_gb, collect.chunk_size or score.krylov_dim"
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
