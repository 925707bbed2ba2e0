"""Protections on real jobs, forecast and really trained: `python -m tests.bench.real protect`.

On the plan of a LoRA job of `jobs.py`, every arm of `arisk guard` is forecast, and plain and the best two are
trained; with `--all` all are. Told are refusals kept on the truth's prompts, which no protection saw, and
task loss; with `--all` Kendall's τ of forecasts and truths too. With `--share` as many processes as are
started share the arms through files; started once more without, it finds them done.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from arisk.base.artifacts import read_record, write_record
from arisk.config.plan import Config, planned_steps
from arisk.config.yaml import set_value
from arisk.gradients import ParameterLayout, layout_of, measuring
from arisk.guard.choice import best_forecasts
from arisk.guard.methods import METHODS, arm_names
from arisk.guard.plan import ArmPlan
from arisk.guard.record import Arm, ArmForecast, GuardResult
from arisk.guard.run import BEST, ArmComparison
from arisk.models import load_task
from arisk.models.answers import Shelf
from tests.bench.guard_forecast import both, chosen, report
from tests.bench.pool import Item
from tests.bench.real.forecast import forecast_rows
from tests.bench.real.jobs import SOURCES, Job
from tests.bench.real.rows import MAX_LENGTH, read_rows, spread, truth_split, write_rows

#: Safety prompts, control rows and rows of the task that an arm is measured on; protections use the first.
PROMPTS, CONTROL, TASK = 64, 32, 64


def protect(
    job: Job,
    model: Path,
    data: Path,
    folder: Path,
    device: str = "cpu",
    seeds: int = 1,
    *,
    every: bool = False,
    settings: Sequence[str] = (),
) -> GuardResult:
    """Carry out the arms of one job; what is in `folder` is not made again.

    Args:
        job: a LoRA job with a linear or cosine schedule.
        model: folder of the aligned model.
        data: folder of JSONL files.
        folder: where arms are kept.
        device: `cpu`, or `cuda` for the first GPU.
        seeds: runs of every arm.
        every: train all arms.
        settings: as for `arisk guard --set`.
    """
    config = plan(job, model, data, folder, seeds, settings)
    whole = folder / ("all" if every else "result")
    if not whole.exists():
        write_record(whole, both(config, folder, device) if every else chosen(config, folder, device))
    found = read_record(whole, GuardResult)
    report(found, config)
    return found


def items(
    jobs: Sequence[Job],
    model: Path,
    data: Path,
    folder: Path,
    device: str,
    seeds: int,
    *,
    every: bool,
    settings: Sequence[str] = (),
) -> list[Item]:
    """Arms and forecasts of jobs as pieces of work, the plan's own seed first.

    Of further seeds the plain arm and the best two forecast are trained, as `arisk guard` would; with `every`
    the others too, last of all.

    Args:
        jobs: LoRA jobs.
        model: folder of the aligned model.
        data: folder of JSONL files.
        folder: a folder per job below it.
        device: where to train.
        seeds: runs of every arm.
        every: train all arms, not the best two alone.
        settings: as for `arisk guard --set`.
    """
    benches = [
        _Bench(plan(job, model, data, folder / job.name(), seeds, settings), folder / job.name(), device)
        for job in jobs
    ]
    plains = [bench.plain(seed) for seed in range(seeds) for bench in benches]
    forecasts = [item for bench in benches for item in bench.forecasts()]
    best = [item for seed in range(seeds) for bench in benches for item in bench.best(seed)]
    others = [item for seed in range(seeds) for bench in benches for item in bench.others(seed)]
    others = others if every else []
    return [*plains, *forecasts, *best, *others]


@contextmanager
def _measuring(bench: _Bench) -> Generator[ArmComparison]:
    """The comparison of a job; the last one loaded by this process is kept."""
    if bench.folder not in _LOADED:
        _LOADED.clear()
        # The same prompts in every job, and the same answers.
        shelf = Shelf(bench.folder.parent, {"path": str(bench.config.model.path)})
        task = load_task(bench.config, device=torch.device(bench.device), shelf=shelf)
        steps = planned_steps(bench.config.training, task.finetune.units)
        layout = layout_of(task.model, task.parameter_names)
        with measuring(task.model, layout):
            planned = ArmPlan.of(
                task,
                layout,
                config=bench.config.guard,
                training=bench.config.training,
                steps=steps,
                seed=bench.config.run.seed,
                behaviour=bench.config.behaviour,
            )
            found = ArmComparison(planned, bench.folder)
        assert [name.label for name in found.names] == [name.label for name in bench.names]
        _LOADED[bench.folder] = found, layout
    found, layout = _LOADED[bench.folder]
    with measuring(found.plan.task.model, layout):
        yield found


_LOADED: dict[Path, tuple[ArmComparison, ParameterLayout]] = {}


class _Bench:
    """The arms of one job in a folder, each trained or forecast by itself."""

    def __init__(self, config: Config, folder: Path, device: str) -> None:
        self.config, self.folder, self.device = config, folder, device
        self.names = arm_names(config.guard)

    def kept(self, number: int, seed: int = 0, kind: str = "") -> Path:
        """The record of an arm, or of its forecast, where `arisk guard` keeps it."""
        parts = ["arm", f"{number:02d}", *([f"seed{seed}"] if seed else []), *([kind] if kind else [])]
        return self.folder / "-".join(parts) / "record.json"

    def item(
        self, what: str, record: Path, make: Callable[[ArmComparison], object], needs: Sequence[Path] = ()
    ) -> Item:
        """A piece of work that ends with a record."""

        def work() -> None:
            with _measuring(self) as found:
                make(found)

        return Item(
            f"{self.folder.name} {what}",
            self.folder.name,
            work,
            record.exists,
            lambda: all(path.exists() for path in needs),
        )

    def trains(self) -> list[int]:
        """Numbers of the arms that train, but for the plain one."""
        return [n for n, name in enumerate(self.names) if n and METHODS[name.method].read_off is None]

    def plain(self, seed: int) -> Item:
        """The plain arm and those that are read off it."""
        return self.item(f"plain {seed}", self.kept(0, seed), lambda f: f.plain(f.plan_of(seed), seed))

    def forecasts(self) -> list[Item]:
        """Of the arms that train, plain first."""

        def forecast(number: int) -> Callable[[ArmComparison], object]:
            return lambda f: f.forecast(self.known(f, 0, rises=number > 0), f.names[number])

        def needs(number: int) -> list[Path]:
            return [self.kept(0), *([self.kept(0, kind="forecast")] if number else [])]

        return [
            self.item(f"forecast {n}", self.kept(n, kind="forecast"), forecast(n), needs(n))
            for n in [0, *self.trains()]
        ]

    def arm(self, number: int, seed: int) -> Item:
        """One arm that trains."""

        def train(found: ArmComparison) -> None:
            found.trained(self.known(found, seed, rises=True), [found.names[number]], seed)

        needs = [self.kept(0, seed), self.kept(0, kind="forecast")]
        return self.item(f"arm {number} seed {seed}", self.kept(number, seed), train, needs)

    def others(self, seed: int) -> list[Item]:
        """All arms that train."""
        return [self.arm(number, seed) for number in self.trains()]

    def best(self, seed: int) -> list[Item]:
        """The best two by forecast; which they are is told when all are forecast."""
        needs = [self.kept(n, kind="forecast") for n in (0, *self.trains())] + [self.kept(0, seed)]

        def chosen(place: int) -> int:
            told = [read_record(path.parent, ArmForecast) for path in needs[:-1]]
            labels = best_forecasts(
                told, self.config.guard.tolerated_task_loss, BEST, read_record(self.kept(0).parent, Arm)
            )
            return next(n for n, name in enumerate(self.names) if name.label == labels[place])

        def done(place: int) -> bool:
            return all(path.exists() for path in needs) and self.kept(chosen(place), seed).exists()

        def work(place: int) -> None:
            self.arm(chosen(place), seed).make()

        return [
            Item(
                f"{self.folder.name} best {place} seed {seed}",
                self.folder.name,
                partial(work, place),
                partial(done, place),
                lambda: all(path.exists() for path in needs),
            )
            for place in range(min(BEST, len(self.trains())))
        ]

    def known(self, found: ArmComparison, seed: int, *, rises: bool) -> ArmPlan:
        """The plan of a seed with what plain and its forecast told, as `arisk guard` hands it to the arms."""
        plain = read_record(self.kept(0, seed).parent, Arm)
        told = read_record(self.kept(0, kind="forecast").parent, ArmForecast).rises if rises else []
        at_risk = torch.tensor(told, dtype=torch.float64) if told else None
        return replace(found.plan_of(seed), plain=plain, rises=at_risk)


def plan(job: Job, model: Path, data: Path, folder: Path, seeds: int, settings: Sequence[str] = ()) -> Config:
    """The job in arisk's words; its data go to `folder`."""
    sets, split = forecast_rows(data), truth_split(data)["harmful"]
    files: dict[str, Sequence[Any]] = {
        "finetune": SOURCES[job.source](data),
        "safety": spread(sets["safety"], PROMPTS),
        "control": spread(sets["control"], CONTROL),
        "heldout": [{"prompt": read_rows(data, name)[i]["prompt"]} for name, i in split],
    }
    folder.mkdir(parents=True, exist_ok=True)
    given = {name: _written(folder / f"{name}.jsonl", rows) for name, rows in files.items()}
    mapping: dict[str, Any] = {
        "model": {"path": str(model), "adapter": {"r": 8, "alpha": 16}},
        "verify": {"safety": given.pop("heldout")},
        **given,
        "training": {
            "learning_rate": job.learning_rate,
            "max_steps": job.steps,
            "batch_size": job.batch,
            "gradient_accumulation": job.accumulation,
            "schedule": job.schedule,
            "warmup_ratio": job.warmup_ratio,
            "weight_decay": job.weight_decay,
            "precision": "bf16",
        },
        "guard": {
            "seeds": seeds,
            "task_samples": TASK,
            "control_samples": CONTROL,
        },
    }
    for setting in settings:
        set_value(mapping, setting)
    return Config.model_validate(mapping)


def _written(file: Path, rows: Sequence[Any]) -> dict[str, Any]:
    write_rows(file, rows)
    return {"path": str(file.resolve()), "max_length": MAX_LENGTH}
