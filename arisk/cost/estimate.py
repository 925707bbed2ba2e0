"""What a run will take, before it starts: counted passes of every stage times passes timed here.

seconds(stage) = Σ_pass count(stage, pass) · seconds(pass). Counts are `arisk.cost.work`'s; a pass over one
row is timed by `arisk.cost.calibration` on a real batch of each kind. The rest of a stage (eigenvalues,
bootstrap, page) is a rule of thumb. `just bench check` lays it beside real runs.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from arisk.base.artifacts import existing_parent
from arisk.base.terminal import StageDisplay, peak_memory
from arisk.config.plan import Config
from arisk.cost.calibration import calibrate
from arisk.cost.optional_work import OPTIONAL_STAGES
from arisk.cost.work import device_sizes, kept_gradients, operations, passes, path_operations, said, sizes
from arisk.engine.job import Job
from arisk.engine.rundir import RunDir

__all__ = ["estimate"]

#: Seconds of the stages that run no model, for the default settings.
FIXED = {"subspace": 0.1, "forecast": 0.9, "report": 2.5}
#: Bootstrap draws to which the fixed seconds of the forecast belong.
DRAWS = 400
#: Seconds to write, digest and sync a gigabyte of gradients.
WRITING = 2.0
#: Multiplications a second of the recursion over optimizer steps, which is bound by memory.
RATE = 5e9


def estimate(
    config: Config, run_dir: Path, kept: dict[str, Any] | None = None, *, loading: float = 0.0
) -> dict[str, Any]:
    """Time, memory and disk of every stage, from a short calibration on the model itself.

    Args:
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
    job = Job(config, RunDir(run_dir), "", StageDisplay(quiet=True), {}, models=kept or {})
    task = job.task
    timed = calibrate(task, config)
    store = kept_gradients(task, config, run_dir)
    counts = passes(task, config, store)
    seconds = {
        stage: sum(count * timed.seconds[kind] for kind, count in own.items())
        for stage, own in counts.items()
    }
    seconds["collect"] += loading + timed.seconds["engine"] + WRITING * store.kept
    for stage in OPTIONAL_STAGES:
        seconds[stage] += loading
    for stage, fixed in FIXED.items():
        scale = config.forecast.bootstrap_samples / DRAWS if stage == "forecast" else 1.0
        seconds[stage] = fixed * scale
    seconds["forecast"] += path_operations(task, config) / RATE
    memory, disk = sizes(task, config, timed.memory, store)
    on_device = device_sizes(task, timed.device)
    order = ("collect", "subspace", "score", "rollout", "forecast", "report")
    stages = {
        stage: {
            "seconds": round(seconds[stage], 2),
            "memory_gb": round(memory[stage], 3),
            "device_gb": round(on_device[stage], 3) if stage in on_device else None,
            "disk_gb": round(disk.get(stage, 0.0), 4),
            "flop": operations(task, counts.get(stage, {})),
            "work": said(counts.get(stage, {})),
        }
        for stage in (*order, *OPTIONAL_STAGES)
    }
    return {
        "stages": stages,
        "seconds": round(sum(seconds[stage] for stage in order), 2),
        "memory_gb": round(max(memory[stage] for stage in order), 3),
        "store": store.told,
        "warnings": [*store.refused, *_over_budget(run_dir, disk, max(memory[s] for s in order))],
    }


def _over_budget(run_dir: Path, disk: dict[str, float], memory: float) -> list[str]:
    """What does not fit, with the remedy."""
    found: list[str] = []
    free = shutil.disk_usage(existing_parent(run_dir)).free / 1e9
    needed = sum(disk.values())
    if needed > 0.9 * free:
        found.append(
            f"the run needs {needed:.2f} GB of disk and {free:.2f} GB are free: set collect.store to gram, "
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
