"""`arisk run` on SmolLM2-135M-Instruct, beside the real fine-tune it forecasts.

`python -m tests.bench smollm2 --data FOLDER`: the folder holds safety_train, benign_gsm8k,
benign_alpaca and risky_identity_aoa as JSONL with prompt and response.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.measure import print_table

RUNS = {"smollm2-gsm8k": "benign_gsm8k", "smollm2-identity-aoa": "risky_identity_aoa"}
MODEL = Path("models/smollm2-135m-instruct")


def main() -> None:
    """Run both configs and print verdict, time and memory."""
    data = _data_folder()
    if not (MODEL / "config.json").exists():
        sys.exit("run `just model` first")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, finetune in RUNS.items():
            summary, seconds, memory = _run(name, finetune, data, Path(folder) / name)
            verdict, curves = summary["verdict"], summary["forecasters"]
            rows.append(
                [
                    finetune,
                    verdict["level"],
                    str(verdict["collapse_step"]),
                    str(verdict["safe_steps"]),
                    *[f"{curves[c]['median'][-1]:+.3f}" for c in ("local", "ray")],
                    f"{summary['overlap']['ratio_to_random']:.1f} ×",
                    f"{seconds / 60:.1f} min",
                    f"{memory:.1f} GB",
                ]
            )
    header = [
        "fine-tuning data",
        "verdict",
        "collapse step",
        "safe steps",
        "local at 60",
        "ray at 60",
        "overlap / random",
    ]
    print_table(
        "SmolLM2-135M-Instruct, LoRA r=8, AdamW 2e-4, 60 × 4", [*header, "CPU time", "peak RSS"], rows
    )


def _data_folder() -> Path:
    if "--data" not in sys.argv:
        sys.exit("give --data FOLDER with the JSONL files (see tests/bench/smollm2.py)")
    return Path(sys.argv[sys.argv.index("--data") + 1])


def _run(name: str, finetune: str, data: Path, folder: Path) -> tuple[dict, float, float]:
    """Summary, CPU seconds and peak memory (GB) of one run in its own process."""
    settings = {
        "safety.path": data / "safety_train.jsonl",
        "finetune.path": data / f"{finetune}.jsonl",
        "control.path": data / "benign_alpaca.jsonl",
    }
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "arisk", "run", f"configs/{name}.yaml", "--run-dir", str(folder), *given]
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    summary = json.loads((folder / "report" / "summary.json").read_text(encoding="utf-8"))
    return summary, seconds, after.ru_maxrss / 1e6
