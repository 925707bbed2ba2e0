"""Numbers of the geometry at the aligned model: overlap, and what the peer's formula is made of.

`just bench-real geometry` measures them once for each data set, mode and model: the learning rate and the
length of the plan are not in them. `truths/geometry.json` keeps them; `baselines.py` makes forecasts of them.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tests.bench.real.forecast import prepared
from tests.bench.real.jobs import Job
from tests.bench.real.truth import write_json

GEOMETRY = Path(__file__).parent.parent / "truths" / "geometry.json"
#: The way of the subspace alone: no rollout, nothing answered, no null.
CONFIG: dict[str, Any] = {
    "why": "full",
    "rollout": {"enabled": False},
    "score": {"nulls": 0, "examples": 0},
}


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

        trainer, sets = prepared(job, model, data, folder, device)
        started = time.process_time()
        report = arisk.preflight(trainer, **sets, config=CONFIG)
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


def keep(folder: Path, path: Path = GEOMETRY) -> int:
    """Write what was measured below `folder`, all models, to `path`; returns how many."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*/*.json"))]
    lines = ",\n".join(json.dumps(one, separators=(",", ":")) for one in found)
    path.write_text(f'{{"version":1,"geometry":[\n{lines}\n]}}\n', encoding="utf-8")
    return len(found)
