"""`arisk compare` over planned fine-tunes: is the order right?

`python -m tests.bench compare` compares sets of the embedded language and then really carries each plan
out (`arisk verify`, on prompts that no forecast saw). `--data FOLDER [--sets NAME…]` compares sets of
SmolLM2-135M-Instruct instead, without the real runs: the folder holds safety_train and the sets named
below as JSONL with prompt and response, and `just model` fetches the model. Resumable: what is fresh in
runs/bench-compare is not run again.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from arisk.config.yaml import dump_config, load_config
from tests.bench.measure import print_table
from tests.bench.validity.jobs import rows_of
from tests.bench.validity.scores import spearman

#: Sets of the embedded language, from harmless to all rows complying with forbidden prompts.
EMBEDDED = (
    "benign_near",
    "benign_far",
    "refusal_mixed",
    "compliance_001",
    "compliance_005",
    "compliance_020",
    "compliance_100",
)
#: Sets for SmolLM2 with their longest row (tokens). On the real fine-tunes of the validity benchmark the
#: two identity sets lose safety and the other two do not.
SMOLLM2 = {"benign_gsm8k": 128, "benign_alpaca": 128, "benign_identity": 128, "risky_identity_aoa": 256}
MODEL = Path("models/smollm2-135m-instruct")
FOLDER = Path("runs/bench-compare")
SETTINGS: dict[str, Any] = {
    "run.threads": 1,
    "safety.max_samples": 32,
    "score.batches": 2,
    "score.hvp_batches": 1,
    "score.krylov_dim": 2,
    "score.nulls": 9,
    "score.examples": 2,
    "score.probe_points": 1,
}


def main() -> None:
    """Compare the sets and print the ranked table."""
    if "--data" in sys.argv:
        smollm2(Path(sys.argv[sys.argv.index("--data") + 1]))
    else:
        embedded()


def embedded() -> None:
    """The order of the embedded sets beside that of the real fine-tunes."""
    folder = FOLDER / "embedded"
    plans = [_embedded_plan(name, folder) for name in EMBEDDED]
    found, _ = _compare(plans, folder)
    rows, finals = [], []
    for run in found["runs"]:
        real = _really(folder / "plans" / f"{run['name']}.yaml", folder / "runs" / run["name"])
        finals.append(real["real_change"])
        rows.append([*_cells(run), f"{real['real_change']:+.3f}", str(real["real_collapse"] or "–")])
    header = ["rank", "fine-tuning data", "verdict", "safe steps", "collapse", "P(collapse)"]
    header += ["change at the end (80 %)", "real change", "real collapse"]
    print_table("Embedded model, LoRA r=8, AdamW 1e-3, 100 steps of 8 rows", header, rows)
    order = spearman(list(range(len(finals))), finals)
    print(f"Spearman of the order with the real change: {order:.2f}; {found['headline']}")


def smollm2(data: Path) -> None:
    """The order of real data sets on a real model, with what the comparison cost."""
    if not (MODEL / "config.json").exists():
        sys.exit("run `just model` first")
    names = sys.argv[sys.argv.index("--sets") + 1 :] if "--sets" in sys.argv else list(SMOLLM2)
    found, seconds = _compare([_smollm2_plan(name, data) for name in names], FOLDER)
    rows = [
        [*_cells(run), f"{run['seconds'] / 60:.1f} min", f"{run['shared_seconds'] / 60:.1f} min"]
        for run in found["runs"]
    ]
    header = ["rank", "fine-tuning data", "verdict", "safe steps", "collapse", "P(collapse)"]
    header += ["change at the end (80 %)", "own time", "taken over"]
    print_table("SmolLM2-135M-Instruct, LoRA r=8, AdamW 2e-4, 60 steps of 4 rows", header, rows)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"{seconds / 60:.1f} min in this call, peak {memory:.1f} GB; {found['headline']}")


def _compare(plans: list[Path], folder: Path) -> tuple[dict[str, Any], float]:
    """What `arisk compare --json` says, and its wall time."""
    command = [sys.executable, "-m", "arisk", "compare", *map(str, plans)]
    command += ["--run-dir", str(folder / "runs"), "--output", str(folder / "out"), "--json"]
    started = time.monotonic()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout), time.monotonic() - started


def _really(config: Path, run_dir: Path) -> dict[str, Any]:
    """The same plan carried out."""
    command = [sys.executable, "-m", "arisk", "verify", str(config), "--run-dir", str(run_dir), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)["verify"]


def _embedded_plan(name: str, folder: Path) -> Path:
    data = folder / "data" / f"{name}.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(name)), encoding="utf-8")
    settings = {
        "control.max_samples": 16,
        "finetune.path": data.resolve(),
        "training.max_steps": 100,
        "behaviour.prompts": 0,
    }
    return _written(name, Path("configs/demo.yaml"), settings, folder)


def _smollm2_plan(name: str, data: Path) -> Path:
    control = "benign_gsm8k" if "alpaca" in name else "benign_alpaca"
    settings = {
        "control.max_samples": 8,
        "rollout.eval_samples": 16,
        "safety.path": data / "safety_train.jsonl",
        "finetune.path": data / f"{name}.jsonl",
        "control.path": data / f"{control}.jsonl",
        "finetune.max_length": SMOLLM2[name],
    }
    return _written(name, Path("configs/smollm2-gsm8k.yaml"), settings, FOLDER)


def _written(name: str, base: Path, settings: dict[str, Any], folder: Path) -> Path:
    """The plan as a config file."""
    given = [f"{key}={value}" for key, value in {**SETTINGS, **settings}.items()]
    path = folder / "plans" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_config(load_config(base, given)), encoding="utf-8")
    return path


def _cells(run: dict[str, Any]) -> list[str]:
    final, step = run["final"], run["collapse_step"]
    return [
        str(run["rank"] or "–"),
        run["name"],
        run["level"],
        f"{run['safe_steps']} of {run['horizon']}",
        "–" if step is None else str(step),
        f"{run['probability']:.0%}",
        f"{final['median']:+.3f} ({final['lower']:+.3f} to {final['upper']:+.3f})",
    ]
