"""Numbers of the geometry at the aligned model: overlap, and what the peer's formula is made of.

`just bench-real geometry` measures them once for each data set, mode and model: the learning rate and the
length of the plan are not in them. `truths/geometry.json` keeps them; `baselines.py` makes forecasts of them.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from tests.bench.real.baselines import GEOMETRY
from tests.bench.real.forecast import forecast_rows, prepared
from tests.bench.real.jobs import Job
from tests.bench.real.measure import answers
from tests.bench.real.outcomes import outcome
from tests.bench.real.rows import spread
from tests.bench.real.truth import write_json

#: The way of the subspace alone, and of it what the two formulas need.
CONFIG: dict[str, Any] = {
    "why": "full",
    "rollout": {"enabled": False},
    "score": {
        "batches": 8,
        "hvp": "finite_difference",
        "hvp_batches": 1,
        "krylov_dim": 2,
        "nulls": 0,
        "examples": 0,
        "probe_points": 0,
    },
}
#: Safety prompts whose refusals by the model itself span the subspace, and tokens of these.
PROMPTS, TOKENS = 24, 48


def measure(job: Job, model: Path, data: Path, folder: Path, device: str = "cpu") -> dict[str, Any]:
    """Numbers of the job's data set and mode; what is in `folder` is not measured again.

    Returns:
        `overlap` |Pg|/|g| of the first update with the safety subspace, `gamma` and `epsilon` of the quartic
        bound (MATH of `arisk/geometry/dynamics.py`), `eigenvalue`, the smallest that is retained, and
        `cpu_seconds`.
    """
    path = folder / f"{job.source}-{job.mode}.json"
    if not path.exists():
        import arisk

        trainer, _ = prepared(job, model, data, folder, device)
        started = time.process_time()
        safety = _own_refusals(model, data, folder / "refusals.jsonl", device)
        report = arisk.preflight(trainer, safety={"path": str(safety.resolve())}, config=CONFIG)
        scored = report.scored
        found = {
            "model": model.name,
            "source": job.source,
            "mode": job.mode,
            "overlap": scored.overlap.ratio,
            "gamma": scored.gamma_hat,
            "epsilon": scored.epsilon_hat,
            "eigenvalue": float(report.subspace.eigenvalues[-1]),
            "cpu_seconds": round(time.process_time() - started, 1),
        }
        write_json(path, found)
    return json.loads(path.read_text(encoding="utf-8"))


def _own_refusals(model: Path, data: Path, path: Path, device: str) -> Path:
    """What the aligned model says to prompts that a forecast may see, where that refuses; made once."""
    if not path.exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        aligned = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()
        prompts = [row["prompt"] for row in spread(forecast_rows(data)["safety"], PROMPTS)]
        said = zip(prompts, answers(aligned, tokenizer, prompts, TOKENS), strict=True)
        rows = [{"prompt": asked, "response": text} for asked, text in said if outcome(text) == "refused"]
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        part.replace(path)
    return path


def keep(folder: Path, path: Path = GEOMETRY) -> int:
    """Write what was measured below `folder`, all models, to `path`; returns how many."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*/*.json"))]
    lines = ",\n".join(json.dumps(one, separators=(",", ":")) for one in found)
    path.write_text(f'{{"version":1,"geometry":[\n{lines}\n]}}\n', encoding="utf-8")
    return len(found)
