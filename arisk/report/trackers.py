"""A report in the experiment tracker of the training run: numbers, curves, and the page.

Each tracker is imported when it is asked for, and used through what it offers itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from arisk.base.errors import MissingExtraError

__all__ = ["Logged", "to_mlflow", "to_tensorboard", "to_wandb"]

#: What every name in a tracker starts with.
PREFIX = "arisk"


@dataclass(frozen=True)
class Logged:
    """What a tracker is given.

    Attributes:
        words: short texts by name, such as the level of the verdict.
        numbers: single numbers by name; what was not measured is left out.
        curves: (optimizer steps, values) by name; what is not finite is left out.
        page: the whole report as HTML.
    """

    words: Mapping[str, str]
    numbers: Mapping[str, float]
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]] = field(
        default_factory=dict[str, tuple[Sequence[int], Sequence[float]]]
    )
    page: str = ""

    def points(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Values of all curves at each step, in ascending order."""
        at: dict[int, dict[str, float]] = {}
        for name, (steps, values) in self.curves.items():
            for step, value in zip(steps, values, strict=True):
                if math.isfinite(value):
                    at.setdefault(step, {})[f"{PREFIX}/{name}"] = value
        yield from sorted(at.items())

    def single(self) -> dict[str, float]:
        """The numbers under their names in a tracker."""
        return {f"{PREFIX}/{name}": value for name, value in self.numbers.items() if math.isfinite(value)}


def to_wandb(logged: Logged, run: Any = None) -> None:
    """Log into a run of Weights & Biases, with the page as an artifact.

    Args:
        logged: what is logged.
        run: the run; default: the one that is active, else a new one in the project `arisk`.

    Raises:
        MissingExtraError: wandb is not installed.
    """
    wandb = _module("wandb")
    run = run or wandb.run or wandb.init(project=PREFIX)
    # Steps of their own: the training's are elsewhere.
    run.define_metric(f"{PREFIX}/step")
    run.define_metric(f"{PREFIX}/*", step_metric=f"{PREFIX}/step")
    for step, values in logged.points():
        run.log({f"{PREFIX}/step": step, **values})
    run.summary.update(
        {**logged.single(), **{f"{PREFIX}/{name}": text for name, text in logged.words.items()}}
    )
    artifact = wandb.Artifact(f"{PREFIX}-report", type="report")
    with artifact.new_file("report.html", mode="w", encoding="utf-8") as file:
        file.write(logged.page)
    run.log_artifact(artifact)


def to_mlflow(logged: Logged) -> None:
    """Log into the active run of MLflow, or a new one, with the page as an artifact.

    Args:
        logged: what is logged.

    Raises:
        MissingExtraError: mlflow is not installed.
    """
    mlflow = _module("mlflow")
    for step, values in logged.points():
        mlflow.log_metrics(values, step=step)
    mlflow.log_metrics(logged.single())
    mlflow.set_tags({f"{PREFIX}.{name}": text for name, text in logged.words.items()})
    mlflow.log_text(logged.page, f"{PREFIX}/report.html")


def to_tensorboard(logged: Logged, folder: str | Path) -> Path:
    """Write an event file for TensorBoard, and the page beside it.

    Args:
        logged: what is logged.
        folder: where they go; made if needed.

    Returns:
        The page.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """
    _module("tensorboard")
    from torch.utils.tensorboard.writer import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for step, values in logged.points():
            for name, value in values.items():
                writer.add_scalar(name, value, step)
        for name, value in logged.single().items():
            writer.add_scalar(name, value)
        for name, text in logged.words.items():
            writer.add_text(f"{PREFIX}/{name}", text)
    page = Path(folder) / f"{PREFIX}-report.html"
    page.write_text(logged.page, encoding="utf-8")
    return page


def _module(name: str) -> Any:
    """An optional package.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as err:
        raise MissingExtraError(
            f"the package {name} is not installed", where=f"to_{name}", fix=f"pip install {name}"
        ) from err
