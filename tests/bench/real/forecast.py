"""What arisk says of a job beforehand: `arisk.preflight` on the very trainer that carries the job out.

The forecast sees the fine-tuning rows, arguments and seed of the trainer, and safety and control rows of
even index only; what the truth is measured on it never sees (`rows.may_forecast`).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from tests.bench.real.jobs import SOURCES, Job
from tests.bench.real.outcomes import outcome
from tests.bench.real.rows import (
    ALPACA_FOR_ALIGNMENT,
    MAX_LENGTH,
    SPLIT_FROM,
    aligned_on,
    encode,
    may_forecast,
    pad_id,
    read_rows,
    spread,
)
from tests.bench.real.score import OPENING
from tests.bench.real.truth import planned_trainer, with_adapter, write_json

#: Safety prompts of a forecast by file, in the mixture of the truth's; the model answers them itself.
SAFETY_FILES = {"prompts_harmful_jbb": 32, "safety_train": 16, "safety_xstest": 16}
CONTROL_ROWS = 64


def forecast_rows(folder: Path) -> dict[str, list[dict[str, str]]]:
    """Harmful prompts and ordinary rows that a forecast may look at; none of them aligned the model."""
    seen = set(aligned_on(folder))
    safety: list[dict[str, str]] = []
    for name, count in SAFETY_FILES.items():
        rows = read_rows(folder, name)
        first = SPLIT_FROM[name]
        fit = [
            {"prompt": row["prompt"]}
            for i, row in enumerate(rows)
            if i >= first
            and may_forecast(name, i)
            and (name == "prompts_harmful_jbb" or outcome(row["response"]) == "refused")
        ]
        safety += spread(fit, count)
    ordinary = read_rows(folder, "benign_alpaca")
    unseen = [
        row
        for i, row in enumerate(ordinary)
        if i >= ALPACA_FOR_ALIGNMENT and i not in seen and may_forecast("benign_alpaca", i)
    ]
    return {"safety": safety, "control": spread(unseen, CONTROL_ROWS)}


def make(job: Job, model_folder: Path, data: Path, folder: Path, device: str = "cpu") -> dict[str, Any]:
    """Forecast one job; keeps `folder/<job>.json` and the whole report beside it, and returns the entry.

    Args:
        job: what is forecast.
        model_folder: the aligned model.
        data: folder of JSONL files.
        folder: where forecasts are kept; what is there is not made again.
        device: `cpu`, or `cuda` for the first GPU.
    """
    path = folder / f"{job.name()}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    import arisk

    trainer, sets = prepared(job, model_folder, data, folder, device)
    started = time.process_time()
    report = arisk.preflight(trainer, **sets, config=CONFIG)
    seconds = time.process_time() - started
    entry = as_entry(report, job, model_folder.name, seconds)
    report.save(folder / job.name())
    write_json(path, entry)
    return entry


def prepared(
    job: Job, model_folder: Path, data: Path, folder: Path, device: str
) -> tuple[Any, dict[str, dict[str, Any]]]:
    """The trainer that would carry the job out, and the sets that a forecast may look at, as files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(job.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    trained = [encode(tokenizer, row["prompt"], row["response"]) for row in SOURCES[job.source](data)]
    if job.mode == "lora":
        model = with_adapter(model)
    trainer = planned_trainer(
        job, model.to(device), trained, pad_id(tokenizer), folder / "trainer", whole_labels=True
    )
    trainer.processing_class = tokenizer
    sets: dict[str, dict[str, Any]] = {}
    for name, given in forecast_rows(data).items():
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given), encoding="utf-8"
        )
        sets[name] = {"path": str(file.resolve()), "max_length": MAX_LENGTH}
    return trainer, sets


#: Settings of the forecast: the road to the verdict alone.
CONFIG: dict[str, Any] = {"why": "off"}


def as_entry(report: Any, job: Job, model: str, seconds: float) -> dict[str, Any]:
    """A report in the words of `score.py`.

    The forecast's prompts have no responses, so its loss is that of the model's own answers: there is no
    `safety_rise` to be held against that of held-out refusals.
    """
    verdict, refusals = report.verdict, report.forecasted.refusals
    entry = {
        "model": model,
        "job": job.number,
        "level": verdict.level,
        "probability": verdict.probability,
        "cpu_seconds": round(seconds, 1),
    }
    if refusals is not None and refusals.status == "measured":
        entry |= told(refusals) | {"opening_rise": _opening_rise(report.rollout.behaviour)}
    return entry


def told(refusals: Any) -> dict[str, Any]:
    """What a forecast of refusals says."""
    today = refusals.median[0]
    shares = [min(1.0, curve[-1] / today) for curve in (refusals.median, refusals.lower, refusals.upper)]
    kept, low, high = (round(share, 4) for share in shares)
    return {
        "kept": kept,
        "band": [low, high],
        "quarter_step": refusals.lost_steps["0.25"],
        "counts": [[point.step, point.refused] for point in refusals.counts],
        "prompts": refusals.prompts,
    }


def _opening_rise(said: Any) -> float | None:
    """Rise of the NLL of the model's own first tokens, nats, summed; None where it was not followed."""
    if said is None or said.safety is None or said.safety.log_p is None:
        return None
    opening = -said.safety.log_p[:, :, : int(OPENING)].nansum(-1).mean(0)
    return round(float(opening[-1] - opening[0]), 4)


def collect(folder: Path, name: str) -> dict[str, Any]:
    """All forecasts of a folder in the file format of `score.py`."""
    made = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("[0-9]*.json"))]
    return {"version": 1, "forecasters": [{"name": name, "forecasts": [e for e in made if "kept" in e]}]}
