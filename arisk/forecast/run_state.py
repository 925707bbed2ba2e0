"""The state of an unfinished run on disk, from which a killed one goes on.

A rollout is saved at its segments, a real fine-tune at any step.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arisk.base.artifacts import FORMAT_VERSION, read_json, read_tensors, write_tensors, write_text
from arisk.base.errors import ArtifactError
from arisk.forecast.leap import Block
from arisk.training.loop import PlannedRun

__all__ = ["Pauses", "Track", "load_state", "save_state"]

#: Seconds between two saved states, and the least time between them in units of what saving takes.
SAVE_EVERY, SAVE_SHARE = 30.0, 20.0
BLOCK_VALUES = ("count", "loss", "rare_share", "leaps")
VALUES, TENSORS = "state.json", "state-{}.safetensors"


@dataclass
class Track:
    """What was measured so far, one entry per point.

    Attributes:
        steps: points; finetune_loss, kept_share beside them.
        safety, control: (N,) losses at each point.
        extrapolated: (N, S) losses at extrapolated outputs, from the end of the pilot.
        diverged_at: first step that could not be taken.
        pending: training losses of the steps after the last point.
        texts: generated answers by step.
        others: losses of further data sets at each point, by name.
        notes: values of every step, by name.
        behaviour: state of the observer of what the model says; empty before it.
    """

    steps: list[int] = field(default_factory=list[int])
    finetune_loss: list[float] = field(default_factory=list[float])
    kept_share: list[float] = field(default_factory=list[float])
    safety: list[Tensor] = field(default_factory=list[Tensor])
    control: list[Tensor] = field(default_factory=list[Tensor])
    extrapolated: Tensor | None = None
    diverged_at: int | None = None
    pending: list[float] = field(default_factory=list[float])
    texts: dict[int, list[str]] = field(default_factory=dict[int, list[str]])
    others: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]])
    notes: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    behaviour: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def at(self) -> int:
        """Steps done."""
        return self.steps[-1] + len(self.pending)


class Pauses:
    """When to save: the state of a large model, which takes long to write, less often."""

    def __init__(self) -> None:
        self._next = time.monotonic() + SAVE_EVERY

    def over(self) -> bool:
        """Whether it is time."""
        return time.monotonic() > self._next

    @contextmanager
    def saving(self) -> Generator[None]:
        """Inside, a state is written; the next is due after a pause in proportion."""
        started = time.monotonic()
        yield
        ended = time.monotonic()
        self._next = ended + max(SAVE_EVERY, SAVE_SHARE * (ended - started))


def save_state(workspace: Path, run: PlannedRun, track: Track, block: Block | None) -> None:
    """Write position, optimizer state, last block and track; the JSON comes last and names the rest.

    Raises:
        ArtifactError: the disk is full or the folder is read-only.
    """
    name = TENSORS.format(track.at)
    tensors: dict[str, Tensor] = {"safety": torch.stack(track.safety)}
    if track.control:
        tensors["control"] = torch.stack(track.control)
    if track.extrapolated is not None:
        tensors["extrapolated"] = track.extrapolated
    tensors |= {f"other.{key}": torch.stack(losses) for key, losses in track.others.items()}
    for i, parameter in enumerate(run.parameters):
        tensors[f"parameter.{i}"] = parameter.detach()
        for key, value in run.optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{i}.{key}"] = value
        if block is not None:
            for key in ("direction", "mean", "square"):
                tensors[f"{key}.{i}"] = getattr(block, key)[i]
    write_tensors(workspace / name, tensors)
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "tensors": name,
        "steps": track.steps,
        "finetune_loss": [loss if math.isfinite(loss) else None for loss in track.finetune_loss],
        "kept_share": track.kept_share,
        "pending": track.pending,
        "texts": list(track.texts.items()),
        "notes": [{k: v if math.isfinite(v) else None for k, v in note.items()} for note in track.notes],
        "behaviour": track.behaviour,
        "gradient_evaluations": run.gradient_evaluations,
        "block": None if block is None else {key: getattr(block, key) for key in BLOCK_VALUES},
    }
    write_text(workspace / VALUES, json.dumps(values))
    for old in workspace.glob(TENSORS.format("*")):
        if old.name != name:
            old.unlink()


def load_state(workspace: Path, run: PlannedRun) -> tuple[Track, Block | None] | None:
    """Put a saved state back into the run; None where there is none, or it cannot be read."""
    try:
        values = read_json(workspace / VALUES)
        tensors = read_tensors(workspace / values["tensors"])
    except ArtifactError:
        return None
    with torch.no_grad():
        for i, parameter in enumerate(run.parameters):
            parameter.copy_(tensors[f"parameter.{i}"])
            prefix = f"optimizer.{i}."
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            for key, value in state.items():
                # The step count stays on the CPU, as torch keeps it.
                run.optimizer.state[parameter][key] = value if key == "step" else value.to(parameter)
    run.gradient_evaluations = values["gradient_evaluations"]
    block = None
    if values["block"] is not None:
        parts = {
            key: [tensors[f"{key}.{i}"].to(p) for i, p in enumerate(run.parameters)]
            for key in ("direction", "mean", "square")
        }
        block = Block(**parts, **values["block"])
    track = Track(
        behaviour=values.get("behaviour") or {},
        steps=values["steps"],
        finetune_loss=[float("nan") if loss is None else loss for loss in values["finetune_loss"]],
        kept_share=values["kept_share"],
        safety=list(tensors["safety"]),
        control=list(tensors["control"]) if "control" in tensors else [],
        extrapolated=tensors.get("extrapolated"),
        pending=values["pending"],
        texts=dict(values["texts"]),
        others={
            k.removeprefix("other."): list(kept) for k, kept in tensors.items() if k.startswith("other.")
        },
        notes=[{k: float("nan") if v is None else v for k, v in note.items()} for note in values["notes"]],
    )
    return track, block
