"""What a run will take, before it starts: counted passes of every stage times passes timed here.

seconds(stage) = Σ_pass count(stage, pass) · seconds(pass) + the rest of the stage by a rule of thumb. Each
stage counts for itself (`Stage.cost`); a pass over one row is timed by `arisk.cost.calibration` on a real
batch of each kind. `just bench check` lays it beside real runs.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arisk.base.artifacts import existing_parent
from arisk.base.task import Task
from arisk.base.terminal import StageDisplay, peak_memory
from arisk.config.plan import Config
from arisk.cost.calibration import calibrate
from arisk.engine.job import Job
from arisk.engine.rundir import RunDir
from arisk.engine.stage import Catalogue, Cost, CostScene, cost_of
from arisk.gradients import layout_of

__all__ = ["estimate", "operations", "said"]

#: Forward passes in a pass of each kind, by floating-point operations: a backward pass counts as two.
FORWARDS = {
    "forward rows": 1,
    "gradient rows": 3,
    "single-row gradients": 3,
    "curvature rows": 6,
}


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
        length = tokens["finetune" if kind in ("gradient rows", "curvature rows") else "safety"]
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
