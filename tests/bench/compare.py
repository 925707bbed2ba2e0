"""`arisk compare` over planned fine-tunes of SmolLM2-135M-Instruct: order, and what sharing spares.

`python -m tests.bench compare --data FOLDER [--sets NAME…]`: the folder holds safety_train and the
fine-tuning sets named below as JSONL with prompt and response. `just model` fetches the model.
Resumable: what is fresh in runs/bench-compare is not run again.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from arisk.configfile import dump_config, load_config
from tests.bench.measure import print_table

#: Fine-tuning sets with their longest row (tokens). On the real fine-tunes of the validity benchmark the
#: two identity sets lose safety and the other two do not.
SETS = {"benign_gsm8k": 128, "benign_alpaca": 128, "benign_identity": 128, "risky_identity_aoa": 256}
MODEL = Path("models/smollm2-135m-instruct")
FOLDER = Path("runs/bench-compare")
SETTINGS = {
    "safety.max_samples": 32,
    "control.max_samples": 8,
    "run.threads": 1,
    "score.batches": 2,
    "score.hvp_batches": 1,
    "score.krylov_dim": 2,
    "score.nulls": 9,
    "score.examples": 2,
    "score.probe_points": 1,
    "rollout.eval_samples": 16,
}


def main() -> None:
    """Compare the sets and print the ranked table."""
    if "--data" not in sys.argv:
        sys.exit("give --data FOLDER with the JSONL files (see tests/bench/compare.py)")
    if not (MODEL / "config.json").exists():
        sys.exit("run `just model` first")
    data = Path(sys.argv[sys.argv.index("--data") + 1])
    names = sys.argv[sys.argv.index("--sets") + 1 :] if "--sets" in sys.argv else list(SETS)
    plans = [str(_config(name, data)) for name in names]
    command = [sys.executable, "-m", "arisk", "compare", *plans, "--run-dir", str(FOLDER / "runs")]
    started = time.monotonic()
    done = subprocess.run(
        [*command, "--output", str(FOLDER / "out"), "--json"], check=True, stdout=subprocess.PIPE
    )
    seconds = time.monotonic() - started
    found = json.loads(done.stdout)
    rows = [_row(run) for run in found["runs"]]
    header = ["rank", "fine-tuning data", "verdict", "safe steps", "P(collapse)", "change at the end"]
    header += ["control", "overlap / random", "gradients", "own time", "taken over"]
    print_table("SmolLM2-135M-Instruct, LoRA r=8, AdamW 2e-4, 60 steps of 4 rows", header, rows)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"{seconds / 60:.1f} min in this call, peak {memory:.1f} GB; {found['headline']}")


def _config(name: str, data: Path) -> Path:
    """The plan for one set, written as a config."""
    control = "benign_gsm8k" if "alpaca" in name else "benign_alpaca"
    paths = {
        "safety.path": data / "safety_train.jsonl",
        "finetune.path": data / f"{name}.jsonl",
        "control.path": data / f"{control}.jsonl",
        "finetune.max_length": SETS[name],
    }
    given = [f"{key}={value}" for key, value in {**SETTINGS, **paths}.items()]
    path = FOLDER / "plans" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_config(load_config(Path("configs/smollm2-gsm8k.yaml"), given)), encoding="utf-8")
    return path


def _row(run: dict) -> list[str]:
    final = run["final"]
    control = run["control_change"]
    return [
        str(run["rank"] or "–"),
        run["name"],
        run["level"],
        f"{run['safe_steps']} of {run['horizon']}",
        f"{run['probability']:.0%}",
        f"{final['median']:+.3f} ({final['lower']:+.3f} to {final['upper']:+.3f})",
        "not measured" if control is None else f"{control:+.3f}",
        f"{run['overlap_to_random']:.1f} ×",
        f"{run['gradient_evaluations']} of {run['planned_evaluations']}",
        f"{run['seconds'] / 60:.1f} min",
        f"{run['shared_seconds'] / 60:.1f} min",
    ]
