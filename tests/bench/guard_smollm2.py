"""Protected fine-tunes of SmolLM2-135M-Instruct: LoRA r=8, AdamW 2e-4, 60 steps of 4 identity rows.

`python -m tests.bench.guard_smollm2 --data FOLDER [--work FOLDER]`: the folder holds safety_train,
benign_alpaca and risky_identity_aoa as JSONL with prompt and response; `just model` fetches the model.
One half of safety_train is what the protections use, the other is measured. Resumable with --work.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.measure import print_table

CONFIG = "configs/smollm2-identity-aoa.yaml"
SETTINGS = {
    "run.threads": "1",
    "safety.max_samples": "32",
    "verify.safety.max_samples": "24",
    "control.max_samples": "12",
    "guard.control_samples": "8",
    "guard.task_samples": "8",
    "guard.calibration_steps": "6",
    "guard.alignguard.strengths": "[10.0]",
    "guard.replay.strengths": "[0.3]",
    "guard.replay.rows": "4",
    "guard.projection.rows": "4",
    "guard.methods": "[plain,replay,alignguard,projection]",
    "guard.all": "true",
}
HEADER = [
    "arm",
    "safety",
    "of plain",
    "refuses",
    "control",
    "task loss",
    "against plain",
    "CPU time of the steps",
]


def main() -> None:
    """Run all arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=None)
    given, _ = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(given.data.resolve(), given.work or Path(folder))
    print_table(f"SmolLM2, identity rows, {found['last']} steps", HEADER, [cells(a) for a in found["arms"]])
    print(
        f"{found['sentence']} The aligned model refuses {found['aligned_refusals']} of "
        f"{found['answered_prompts']} prompts."
    )


def run(data: Path, folder: Path) -> dict[str, Any]:
    """The summary of `arisk guard`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = (data / "safety_train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    half = len(rows) // 2
    for name, part in (("guarding", rows[:half]), ("measured", rows[half:])):
        (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    settings = {
        "safety.path": folder.resolve() / "guarding.jsonl",
        "verify.safety.path": folder.resolve() / "measured.jsonl",
        "verify.safety.max_length": 128,
        "finetune.path": data / "risky_identity_aoa.jsonl",
        "control.path": data / "benign_alpaca.jsonl",
        **SETTINGS,
    }
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "arisk", "guard", CONFIG, "--run-dir", str(folder / "run"), "--json"]
    done = subprocess.run([*command, *sets], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)["guard"]


def cells(arm: dict[str, Any]) -> list[str]:
    """One row of the table."""
    if arm["diverged_at"] is not None:
        return [arm["label"], f"diverged at step {arm['diverged_at']}", *["–"] * (len(HEADER) - 2)]
    share = "–" if arm["drift_share"] is None else f"{arm['drift_share']:.0%}"
    return [
        arm["label"],
        f"{arm['safety']:+.3f}",
        share,
        "–" if arm["refusals"] is None else str(arm["refusals"]),
        "–" if arm["control"] is None else f"{arm['control']:+.3f}",
        f"{arm['task']:.4f}",
        "–" if arm["task_cost"] is None else f"{arm['task_cost']:+.1%}",
        f"× {arm['cost']:.2f}",
    ]


if __name__ == "__main__":
    main()
