"""What a forecast takes beside the fine-tune that it is about, on SmolLM2 or any other model.

`python -m tests.bench cost --model FOLDER --data FOLDER [--out FILE]`: LoRA r = 8, bf16 autocast, 4 rows of
up to 160 tokens a step, 64 safety and 64 control rows, all else default. Every kind of work of a rollout is
timed in a process of its own on one thread (CPU seconds, peak memory); a plan is counts times those. The
parts are kept in FILE, so that a run that was stopped goes on.

Plain is the planned training alone as `transformers.Trainer` takes a step: logits at every position, and
cross entropy in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from arisk.config.plan import Config, RolloutConfig
from arisk.config.yaml import validate_mapping
from arisk.forecast.account import PANEL, account
from arisk.forecast.leap import planned_points, rollout_cost, scored_rows
from arisk.forecast.rollout import FOLLOWED_FROM, SCALES
from arisk.gradients import layout_of, measuring
from arisk.models.losses import response_logits
from arisk.models.openings import losses_at_scales
from arisk.models.tasks import load_task
from arisk.training.loop import PlannedRun, keeping_parameters
from arisk.training.panels import panel_of_rows, split_panel
from arisk.training.recipe import recipe_of
from tests.bench.measure import in_own_process, print_table

HORIZONS = (60, 200, 1000, 2000)
STEPS, ROWS, LENGTH = 4, 64, 160
#: Rows of the plan that are scored to time one of them.
SCORED = 16
#: Gradients of a rollout, about, by which the account chooses its number of rows.
ROLLED = 68


def config_of(model: str, data: str) -> Config:
    """The plan whose parts are timed."""
    folder = Path(data)
    settings: dict[str, Any] = {
        "run": {"threads": 1},
        "model": {"path": model, "adapter": {"r": 8, "alpha": 16}},
        "safety": {"path": str(folder / "safety_train.jsonl"), "max_samples": ROWS, "max_length": LENGTH},
        "finetune": {"path": str(folder / "benign_alpaca.jsonl"), "max_length": LENGTH},
        "control": {
            "path": str(folder / "benign_alpaca_bottom.jsonl"),
            "max_samples": ROWS,
            "max_length": LENGTH,
        },
        "training": {
            "optimizer": "adamw",
            "learning_rate": 2e-4,
            "max_steps": 200,
            "batch_size": 4,
            "precision": "bf16",
        },
    }
    return validate_mapping(Config, settings, "tests.bench.cost")


def plain_step(run: PlannedRun, number: int) -> None:
    """One step as the trainer takes it: logits everywhere, cross entropy in float32, optimizer."""
    run.clear()
    batch = dict(run.stream.at(number))
    labels = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    batch.pop("logits_to_keep")
    run.task.model.train()
    with run.autocasting():
        logits = run.task.model(**batch).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.parameters, 1.0)
    for part in run.parts:
        part.optimizer.step()
    run.task.model.eval()


def part(name: str, model: str, data: str) -> float:
    """CPU seconds of one kind of work, for a unit of it."""
    torch.set_num_threads(1)
    started = time.process_time()
    config = config_of(model, data)
    task = load_task(config, device=torch.device("cpu"))
    if name == "start":
        # With what Python and its packages took before.
        return time.process_time()
    layout, cpu = layout_of(task.model, task.parameter_names), torch.device("cpu")
    del started
    with ExitStack() as inside:
        inside.enter_context(measuring(task.model, layout))
        start = inside.enter_context(keeping_parameters(task.model, layout))
        run = PlannedRun(task, layout, recipe_of(config.training, 200), 0)
        if name == "account":
            run.step(1)
            run.gradient_evaluations = ROLLED
            few = split_panel(task.safety, ROWS, PANEL, cpu).lead
            work, count = (lambda: account(run, layout, start, few, 0.0)), 1
        else:
            work, count = _work(name, run, config, cpu)
        begun = time.process_time()
        work()
        return (time.process_time() - begun) / count


def _work(
    name: str, run: PlannedRun, config: Config, cpu: torch.device
) -> tuple[Callable[[], object], float]:
    """What is timed, and how many units of it."""
    stepping = {
        "plain step": lambda n: plain_step(run, n),
        "real step": run.step,
        "loss before a leap": run.loss,
    }
    if name in stepping:
        stepping[name](1)
        return lambda: [stepping[name](n) for n in range(2, STEPS + 2)], STEPS
    work, count = _read(name, run, config, cpu)

    def inside() -> None:
        with run.reading():
            work()

    return inside, count


def _read(
    name: str, run: PlannedRun, config: Config, cpu: torch.device
) -> tuple[Callable[[], object], float]:
    """Passes without a gradient."""
    task, model, prompts = run.task, run.task.model, list(range(config.behaviour.prompts))
    split = split_panel(
        task.control if "control" in name else task.safety, ROWS, config.rollout.leading_samples, cpu
    )
    scored = panel_of_rows(task.finetune, list(range(SCORED)), cpu)
    openings = [[1, 2, 3, 4, 5]] * len(prompts)

    def extrapolated() -> None:
        for batch in split.lead.batches:
            ends = [response_logits(model, batch) for _ in range(2)]
            losses_at_scales(ends[0][0], ends[1][0], ends[0][1], batch, SCALES)

    known: dict[str, tuple[Callable[[], object], float]] = {
        "leading": (lambda: split.leading(model, 5), 1),
        "other": (lambda: split.others(model, 5), 1),
        "scored": (lambda: scored.losses(model), SCORED),
        "extrapolated": (extrapolated, 1),
        "openings": (lambda: task.safety.generate.followed(model, prompts, openings), 1),
        # For these and the ordinary prompts.
        "answers": (
            lambda: task.safety.generate.tokens(model, prompts, config.behaviour.tokens),
            len(prompts) / (len(prompts) + config.behaviour.ordinary_prompts),
        ),
    }
    return known[name.split(maxsplit=1)[0]]


PARTS = (
    "start", "plain step", "real step", "loss before a leap", "scored row", "leading safety rows",
    "leading control rows", "other safety rows", "other control rows", "openings", "answers",
    "extrapolated outputs", "account",
)  # fmt: skip


def counts(horizon: int, inner: int) -> dict[str, float]:
    """How often each part is needed for a verdict on so many steps.

    Args:
        horizon: planned steps.
        inner: inner points at which all safety rows are measured, 0 to 3: where safety has moved.
    """
    config = RolloutConfig()
    pilot, points = planned_points(horizon, config)
    rolled, measured = rollout_cost(horizon, config)
    leaps = sum(
        b - a > config.batches_per_segment
        for a, b in zip([pilot, *points], points, strict=False)
        if a >= pilot
    )
    return {
        "start": 1,
        "real step": rolled,
        "loss before a leap": leaps,
        "scored row": scored_rows(4 * horizon),
        "leading safety rows": measured,
        "leading control rows": 3 + min(inner, measured - 3),
        "other safety rows": 3 + min(inner, measured - 3),
        "other control rows": 2,
        "openings": 1 + sum(point >= min(FOLLOWED_FROM, pilot) for point in points),
        "answers": 2 + min(inner, 4),
        "extrapolated outputs": 1,
        "account": 1,
    }


def main() -> None:
    """Time the parts that are missing and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "arisk-bench-cost.json")
    given = parser.parse_args(sys.argv[2:])
    known: dict[str, list[float]] = json.loads(given.out.read_text()) if given.out.exists() else {}
    for name in PARTS:
        if name not in known:
            known[name] = list(in_own_process(part, name, given.model, given.data))
            given.out.write_text(json.dumps(known))
            print(f"{name}: {known[name][0]:.2f} s, {known[name][1]:.2f} GB", file=sys.stderr)
    seconds = {name: value[0] for name, value in known.items()}
    step = seconds["plain step"]
    print_table(
        "CPU seconds and peak memory of each part",
        ["part", "CPU seconds", "plain steps", "peak memory"],
        [[name, f"{s:.2f}", f"{s / step:.2f}", f"{gb:.2f} GB"] for name, (s, gb) in known.items()],
    )
    rows = []
    for horizon in HORIZONS:
        plain = seconds["start"] + horizon * step
        totals = {
            inner: sum(n * seconds[name] for name, n in counts(horizon, inner).items()) for inner in (0, 1, 3)
        }
        gradients = counts(horizon, 0)["real step"] * seconds["real step"]
        rows.append(
            [
                str(horizon),
                f"{plain:.0f} s",
                f"{gradients:.0f} s",
                *(f"{total:.0f} s, {total / plain:.2f} ×" for total in totals.values()),
            ]
        )
    print_table(
        "To the verdict, counts times parts",
        ["steps", "plain", "of which gradients", "safety stays", "it moves once", "it moves throughout"],
        rows,
    )
