"""Arms of `arisk guard` forecast and really trained: does the forecast order them as the truth does?

`python -m tests.bench.guard_forecast [CONFIG] [--job lora-obedience …] [--set KEY=VALUE …] [--work FOLDER]`;
jobs are those of `guard_arms`. Every arm is trained and every arm is forecast, on the same rows; told are
both, Kendall's τ between them, and what forecasting all and training two costs beside training all. Resumable
with --work.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from arisk.config.plan import Config, planned_steps
from arisk.config.yaml import load_config
from arisk.guard.choice import forecast_task_cost, standings, task_cost
from arisk.guard.record import Arm, ArmForecast, GuardResult
from arisk.guard.run import BEST, guard
from arisk.models import load_task
from arisk.models.judge import judge_for, learnt_openings
from tests.bench.guard_arms import JOBS, config_of
from tests.bench.measure import print_table

HEADER = [
    "arm",
    "forecast drift",
    "real drift",
    "openings kept",
    "refuses",
    "forecast task",
    "real task",
    "CPU s",
]


def kendall(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's τ-b in [−1, 1], which leaves out what ties: arms that keep all refusals have no order."""
    pairs = list(itertools.combinations(zip(first, second, strict=True), 2))
    signs = [((a > c) - (a < c), (b > d) - (b < d)) for (a, b), (c, d) in pairs]
    untied = [sum(sign[side] != 0 for sign in signs) for side in (0, 1)]
    return sum(a * b for a, b in signs) / math.sqrt(untied[0] * untied[1]) if all(untied) else math.nan


def both(config: Config, folder: Path, device: str = "cpu") -> GuardResult:
    """Every arm trained, and the forecasts beside them."""
    trained = _guarded(config, folder, device, every=True)
    return replace(trained, forecasts=chosen(config, folder, device).forecasts)


def chosen(config: Config, folder: Path, device: str = "cpu") -> GuardResult:
    """Every arm forecast, plain and the best two trained, as `arisk guard` does."""
    return _guarded(config, folder, device, every=False)


def _guarded(config: Config, folder: Path, device: str, *, every: bool) -> GuardResult:
    folder.mkdir(parents=True, exist_ok=True)
    task = load_task(config, device=torch.device(device))
    found = guard(
        task,
        config=config.guard.model_copy(update={"all": every}),
        training=config.training,
        steps=planned_steps(config.training, task.finetune.units),
        seed=config.run.seed,
        behaviour=config.behaviour,
        workspace=folder,
        progress=lambda said, done, total: print(f"\r{said} {done}/{total}   ", end="", flush=True),
    )
    print()
    return found


def report(result: GuardResult, config: Config) -> None:
    """Print both, and what they agree on."""
    judge = judge_for(config.behaviour, learnt_openings(str(row["response"]) for row in result.prompts))
    standing = {one.label: one for one in standings(result, judge)}
    forecasts = {one.label: one for one in result.forecasts}

    def foretold(one: ArmForecast) -> str:
        return f"{forecast_task_cost(one, result.forecasts[0], result.plain):+.1%}"

    rows, told = [], []
    for label, one in standing.items():
        arm, seen = one.runs[0], forecasts.get(label)
        rows.append(
            [
                label + (" *" if seen is not None and seen.chosen else ""),
                "–" if seen is None else f"{seen.safety:+.3f}",
                f"{one.safety:+.3f}",
                "–" if seen is None else f"{seen.kept:.0%}",
                f"{one.refusals:g} of {len(result.prompts)}",
                "–" if seen is None else foretold(seen),
                f"{task_cost(arm, result.plain):+.1%}",
                "–" if seen is None else f"{seen.cpu_seconds:.0f} for {_trained(arm):.0f}",
            ]
        )
        if seen is not None and not one.diverged and seen.diverged_at is None:
            told.append((seen, one))
    print_table(f"{len(result.arms)} arms, {result.last} steps", HEADER, rows)
    said = [
        ("safety drift", [s.safety for s, _ in told], [o.safety for _, o in told]),
        ("task loss", [s.task for s, _ in told], [o.task_cost for _, o in told]),
        ("openings kept and refusals", [s.kept for s, _ in told], [o.refusals for _, o in told]),
    ]
    for one in result.forecasts:
        if one.label not in standing:
            told_so = f"{one.safety:+.3f}, kept {one.kept:.0%}, task {foretold(one)}"
            print(f"forecast only: {one.label}: {told_so}")
    for name, first, second in said if len(told) == len(forecasts) else ():
        print(f"Kendall {name}: {kendall(first, second):.2f} of {len(told)} arms")
    if not result.forecasts:
        return
    arms = {arm.label: arm for arm in result.arms if arm.label in forecasts}
    chosen = [one.label for one in result.forecasts if one.chosen]
    # Arms of a method share what they measure beforehand, and the forecasts have measured it already.
    setting_up: dict[tuple[str, bool], float] = {}
    for arm in arms.values():
        key = arm.method, arm.strength is None
        setting_up[key] = max(setting_up.get(key, 0.0), arm.setup_seconds)
    everything = sum(setting_up.values()) + sum(arm.cpu_seconds for arm in arms.values())
    spent = sum(one.cpu_seconds for one in result.forecasts)
    spent += sum(arms[label].cpu_seconds for label in (result.plain.label, *chosen) if label in arms)
    print(f"forecast all and train plain and {BEST}: {spent:.0f} CPU s of {everything:.0f}")
    print(f"share {spent / everything:.2f}; chosen: {', '.join(chosen)}")


def _trained(arm: Arm) -> float:
    """CPU seconds of setting an arm up and taking its steps; measuring is left out."""
    return arm.cpu_seconds + arm.setup_seconds


def main() -> None:
    """Run both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?", default="configs/demo.yaml")
    parser.add_argument("--job", choices=["-".join(job) for job in JOBS], action="append", default=[])
    parser.add_argument("--set", dest="settings", action="append", default=[])
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    given, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or Path(folder)
        for job in given.job:
            print(job)
            (work / job).mkdir(parents=True, exist_ok=True)
            mode, _, name = job.partition("-")
            config = config_of(mode, name, work / job)
            report(both(config, work / job / "arms", given.device), config)
        if not given.job:
            config = load_config(Path(given.config), given.settings)
            report(both(config, work, given.device), config)


if __name__ == "__main__":
    main()
