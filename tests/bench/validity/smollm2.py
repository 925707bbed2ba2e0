"""Forecasts against real fine-tunes of SmolLM2-135M-Instruct: LoRA r=8, AdamW 2e-4, 60 steps of 4 rows.

`python -m tests.bench.validity.smollm2 --data FOLDER`: the folder holds safety_train, benign_alpaca and
the fine-tuning sets named below as JSONL with prompt and response. `just model` fetches the model.
Half of safety_train makes the forecast, the truth is measured on rows of the other half. Resumable.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from arisk.base.artifacts import read_record, write_record
from arisk.base.task import Task
from arisk.config.plan import Config, ForecastConfig, RolloutConfig
from arisk.config.yaml import load_config
from arisk.forecast.record import RolloutResult
from arisk.forecast.rollout import rollout
from arisk.models import load_task
from arisk.training.panels import panel_of
from arisk.training.recipe import recipe_of
from tests.bench.measure import print_table
from tests.bench.validity.scores import Line, spearman
from tests.bench.validity.tables import READERS, extrapolated, line_of
from tests.bench.validity.truth import trained

#: Fine-tuning sets with their longest row (tokens).
SETS = {
    "benign_gsm8k": 128,
    "benign_alpaca": 128,
    "benign_identity": 128,
    "benign_alpaca_bottom": 128,
    "risky_alpaca_top": 128,
    "risky_identity_aoa": 256,
}
ROWS, CONTROL_ROWS, STEPS = 32, 12, 60
MEASURED = (5, 10, 15, 20, 30, 40, 50, 60)
CONFIG = RolloutConfig(control_samples=CONTROL_ROWS)
MODEL = Path("models/smollm2-135m-instruct")


def main() -> None:
    """Forecast and train on every set, and print them side by side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the JSONL files")
    parser.add_argument("--folder", type=Path, default=Path("runs/validity/smollm2"), help="results")
    parser.add_argument("--sets", nargs="*", default=list(SETS), help="some of the sets")
    given = parser.parse_args()
    if not (MODEL / "config.json").exists():
        sys.exit("run `just model` first")
    made = {name: compute(name, given.data, given.folder) for name in given.sets}
    report(made, given.folder)


def compute(name: str, data: Path, folder: Path) -> dict[str, Any]:
    """Rollout, then truth, of one set; both kept."""
    truth, record = folder / f"{name}.json", folder / "rollouts" / name
    if not truth.exists():
        config, heldout = configs(name, data, folder)
        task = load_task(config, device=torch.device("cpu"))
        started = time.process_time()
        made = rollout(task, config=CONFIG, training=config.training, steps=STEPS)
        rolled = time.process_time() - started
        write_record(record, made)
        other = load_task(heldout, device=torch.device("cpu"))
        started = time.process_time()
        real = real_run(task, other, config)
        real["seconds"] = {"rollout": rolled, "real run": time.process_time() - started}
        truth.write_text(json.dumps(real), encoding="utf-8")
    return json.loads(truth.read_text(encoding="utf-8"))


def configs(name: str, data: Path, folder: Path) -> tuple[Config, Config]:
    """The config of the forecast, and the same with held-out safety rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = (data / "safety_train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    half = len(rows) // 2
    made: list[Config] = []
    for part, kept in (("safety_forecast", rows[:half]), ("safety_heldout", rows[half:])):
        path = (folder / f"{part}.jsonl").resolve()
        path.write_text("".join(kept), encoding="utf-8")
        control = "benign_gsm8k" if "alpaca" in name else "benign_alpaca"
        settings = {
            "safety.path": path,
            "safety.max_samples": ROWS,
            "finetune.path": (data / f"{name}.jsonl").resolve(),
            "finetune.max_length": SETS[name],
            "control.path": (data / f"{control}.jsonl").resolve(),
            "control.max_samples": CONTROL_ROWS,
            "training.max_steps": STEPS,
        }
        overrides = [f"{key}={value}" for key, value in settings.items()]
        made.append(load_config(Path("configs/smollm2-gsm8k.yaml"), overrides))
    return made[0], made[1]


def real_run(task: Task, heldout: Task, config: Config) -> dict[str, Any]:
    """Change of held-out safety and control losses along the real fine-tune of the task's model."""
    assert task.control is not None
    device = torch.device("cpu")
    # The control batches are endless, like the training ones.
    sets = {
        "safety": replace(heldout.safety, batches=panel_of(heldout.safety, ROWS, device).batches),
        "control": replace(task.control, batches=panel_of(task.control, CONTROL_ROWS, device).batches),
    }
    return trained(task, config.training, STEPS, sets, MEASURED)


def report(made: dict[str, dict[str, Any]], folder: Path) -> None:
    """Print the table and the rank correlations; keep them as JSON."""
    config, rows, finals = ForecastConfig(), [], []
    for name, real in made.items():
        record = read_record(folder / "rollouts" / name, RolloutResult)
        truth = Line(real["steps"], real["safety"])
        training = load_config(Path("configs/smollm2-gsm8k.yaml"), [f"training.max_steps={STEPS}"]).training
        lines = {n: line_of(r(record, recipe_of(training, STEPS), config, 0)) for n, r in READERS.items()}
        lines["20 real steps"] = extrapolated(truth, 20)
        control = float("nan") if record.control is None else float(record.control.mean(0)[-1])
        finals.append({"set": name, "truth": truth.final, **{n: line.final for n, line in lines.items()}})
        ends = f"{lines['combined'].lower[-1]:+.2f} to {lines['combined'].upper[-1]:+.2f}"
        rows.append(
            [
                name,
                f"{truth.final:+.3f} ({_step(truth)})",
                f"{lines['combined'].final:+.3f} ({_step(lines['combined'])})",
                ends,
                f"{lines['rollout'].final:+.3f}",
                f"{lines['pilot'].final:+.3f}",
                f"{lines['20 real steps'].final:+.3f}",
                f"{real['control'][-1]:+.3f}",
                f"{control:+.3f}",
                f"{record.gradient_evaluations}/{STEPS}",
            ]
        )
    header = ["data", "real change (collapse step)", "combined", "80 %", "rollout", "pilot"]
    header += ["20 real steps, extrapolated", "real control", "control said", "gradients"]
    print_table("SmolLM2-135M-Instruct, LoRA r=8, AdamW 2e-4, 60 steps of 4 rows", header, rows)
    truths = [row["truth"] for row in finals]
    ranks = {n: spearman([row[n] for row in finals], truths) for n in finals[0] if n not in ("set", "truth")}
    print("Spearman with the real change:", {n: round(value, 2) for n, value in ranks.items()})
    (folder / "results.json").write_text(
        json.dumps({"sets": finals, "rho": ranks}, indent=1), encoding="utf-8"
    )


def _step(line: Line) -> str:
    found = line.crossing(ForecastConfig().collapse_threshold)
    return "–" if found is None else f"{found:.0f}"


if __name__ == "__main__":
    main()
