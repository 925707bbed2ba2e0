"""One run in progress: its inputs, loaded when first needed, and the records made so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from arisk.base import processes
from arisk.base.artifacts import read_record
from arisk.base.errors import ConfigError
from arisk.engine.fingerprints import DigestCache, input_fingerprints
from arisk.engine.freshness import StageState
from arisk.engine.rundir import RunDir
from arisk.engine.stage import Catalogue, named

if TYPE_CHECKING:
    from arisk.base.task import Task
    from arisk.config.plan import Config
    from arisk.models.answers import Shelf

__all__ = ["REPORT_FILE", "SUMMARY_FILE", "Display", "Job", "device_of", "shelf_of"]

REPORT_FILE, SUMMARY_FILE = "report.html", "summary.json"


class Display(Protocol):
    """Who shows progress to a person."""

    def planned(self, due: Sequence[str]) -> None:
        """These stages will run, in this order."""

    def start(self, stage: str, why: str) -> None:
        """A stage begins, for this reason."""

    def progress(self, label: str, done: int, total: int) -> None:
        """Part of the running stage is done."""

    def finish(self, stage: str) -> None:
        """A stage is committed."""

    def skip(self, stage: str) -> None:
        """A stage is fresh."""

    def note(self, text: str) -> None:
        """Something else to know, in one line."""

    def interrupted(self) -> None:
        """Ctrl-C."""

    def failed(self) -> None:
        """An error ends the run."""


@dataclass
class Job:
    """One run in progress: inputs loaded when first needed, records kept as they are made.

    `models` holds what `load_task` keeps for the runs after this one; `given` is a task that is in memory
    already.
    """

    catalogue: Catalogue
    config: Config
    rundir: RunDir
    command: str
    show: Display
    states: dict[str, StageState]
    records: dict[str, Any] = field(default_factory=dict[str, Any])
    models: dict[str, Any] = field(default_factory=dict[str, Any])
    given: Task | None = None

    @cached_property
    def task(self) -> Task:
        """The model with its data; loading is the slowest part of a short run."""
        if self.given is not None:
            return self.given
        import torch

        from arisk.models.tasks import load_task
        from arisk.training.recipe import require_recipe

        require_recipe(self.config.training)
        if self.config.run.threads:
            torch.set_num_threads(max(1, self.config.run.threads // processes.local_world()))
        self.show.progress("loading model", 0, 1)
        device = device_of(self.config.run.device)
        task = load_task(
            self.config, device=device, kept=self.models, shelf=shelf_of(self.config, self.rundir)
        )
        self.show.progress("loading model", 1, 1)
        return task

    def planned_steps(self, rows: int | None = None) -> int:
        """Optimizer steps of the plan.

        Args:
            rows: fine-tuning rows or packed sequences; default those of the task, which is loaded then.
        """
        from arisk.config.plan import planned_steps

        return planned_steps(self.config.training, self.task.finetune.units if rows is None else rows)

    def settled(self, stage: str) -> Config:
        """The config as a stage takes it, by what stages before it found."""
        settle = self.catalogue.get(stage).settled
        return (settle(self.config, self.rundir) if settle else None) or self.config

    def record(self, stage: str) -> Any:
        """A stage's record, from memory or verified from the disk."""
        if stage not in self.records:
            kind = self.catalogue.get(stage).record
            if kind is None:
                raise ValueError(f"stage {stage} has no record")
            self.rundir.verify(stage, deep=True)
            self.records[stage] = read_record(self.rundir.stage_dir(stage), named(kind))
        return self.records[stage]


def shelf_of(config: Config, rundir: RunDir) -> Shelf | None:
    """Where a run keeps the model's own answers to safety prompts, and what that model is.

    Nowhere where texts may not be shown: they are then written anew for every process.
    """
    from arisk.models.answers import Shelf

    if not config.report.show_text:
        return None
    inputs = input_fingerprints(config, DigestCache(rundir.path / ".digests.json"))
    settings = config.model.model_dump(mode="json", exclude={"path": True, "adapter": {"path"}})
    model = {name: inputs.get(name) for name in ("model", "adapter")}
    return Shelf(rundir.path, {**model, "settings": settings, "seed": config.run.seed})


def device_of(name: str) -> Any:
    """The torch device; auto takes cuda, then mps, then cpu.

    Raises:
        ConfigError: torch does not know it, or it is not there.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", processes.local_rank() % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as err:
        raise ConfigError(
            f"the device {name!r} cannot be used: {str(err).splitlines()[0]}",
            where="run.device",
            fix="use `auto`, `cpu`, or a device this machine has",
        ) from err
    return device
