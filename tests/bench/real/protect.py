"""Protections on real jobs, forecast and really trained: `python -m tests.bench.real protect`.

On the plan of a LoRA job of `jobs.py`, every arm of `arisk guard` is forecast, and plain and the best two are
trained; with `--all` all are. Told are refusals kept on the truth's prompts, which no protection saw, and
task loss; with `--all` Kendall's τ of forecasts and truths too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arisk.base.artifacts import read_record, write_record
from arisk.config.plan import Config
from arisk.guard.record import GuardResult
from tests.bench.guard_forecast import both, chosen, report
from tests.bench.real.forecast import forecast_rows
from tests.bench.real.jobs import SOURCES, Job
from tests.bench.real.rows import MAX_LENGTH, read_rows, spread, truth_split

#: Safety prompts and control rows that the protections use.
PROMPTS, CONTROL = 32, 32


def protect(
    job: Job,
    model: Path,
    data: Path,
    folder: Path,
    device: str = "cpu",
    seeds: int = 1,
    *,
    every: bool = False,
) -> GuardResult:
    """Carry out the arms of one job; what is in `folder` is not made again.

    Args:
        job: a LoRA job with a linear or cosine schedule.
        model: folder of the aligned model.
        data: folder of JSONL files.
        folder: where arms are kept.
        device: `cpu`, or `cuda` for the first GPU.
        seeds: runs of every arm.
        every: train all arms.
    """
    config = plan(job, model, data, folder, seeds)
    whole = folder / ("all" if every else "result")
    if not whole.exists():
        write_record(whole, both(config, folder, device) if every else chosen(config, folder, device))
    found = read_record(whole, GuardResult)
    report(found, config)
    return found


def plan(job: Job, model: Path, data: Path, folder: Path, seeds: int) -> Config:
    """The job in arisk's words; its data go to `folder`."""
    sets, split = forecast_rows(data), truth_split(data)["harmful"]
    files: dict[str, Sequence[Any]] = {
        "finetune": SOURCES[job.source](data),
        "safety": spread(sets["safety"], PROMPTS),
        "control": spread(sets["control"], CONTROL),
        "heldout": [{"prompt": read_rows(data, name)[i]["prompt"]} for name, i in split],
    }
    folder.mkdir(parents=True, exist_ok=True)
    given = {name: _written(folder / f"{name}.jsonl", rows) for name, rows in files.items()}
    return Config.model_validate(
        {
            "model": {"path": str(model), "adapter": {"r": 8, "alpha": 16}},
            "verify": {"safety": given.pop("heldout")},
            **given,
            "training": {
                "learning_rate": job.learning_rate,
                "max_steps": job.steps,
                "batch_size": job.batch,
                "gradient_accumulation": job.accumulation,
                "schedule": job.schedule,
                "warmup_ratio": job.warmup_ratio,
                "weight_decay": job.weight_decay,
                "precision": "bf16",
            },
            "guard": {"seeds": seeds, "task_samples": 32, "control_samples": CONTROL},
        }
    )


def _written(file: Path, rows: Sequence[Any]) -> dict[str, Any]:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8")
    return {"path": str(file.resolve()), "max_length": MAX_LENGTH}
