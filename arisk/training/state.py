"""What was measured along a run, and the state of an unfinished one on disk, from which a killed one goes on.

A rollout is saved at its segments, a real fine-tune at any step.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arisk.base.artifacts import FORMAT_VERSION, read_json, read_tensors, write_tensors, write_text
from arisk.base.errors import ArtifactError
from arisk.base.processes import is_first
from arisk.training.loop import PlannedRun, StepDone, put

__all__ = ["Extra", "Pauses", "Track", "load_state", "save_state"]

#: Seconds between two saved states, and the least time between them in units of what saving takes.
SAVE_EVERY, SAVE_SHARE = 30.0, 20.0
VALUES, TENSORS = "state.json", "state-{}.safetensors"


@dataclass(frozen=True)
class Extra:
    """What a run keeps beside parameters, optimizer and track: tensors and plain values by name."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass
class Track:
    """What was measured so far, one entry per point.

    Attributes:
        steps: points; finetune_loss, kept_share beside them.
        safety, control: (N,) losses at each point, NaN for rows that were left out there.
        whole: names of the sets of which every row was measured, at each point; empty where all always are.
        extrapolated: (N, S) losses at extrapolated outputs, from the end of the pilot.
        diverged_at: first step that could not be taken.
        pending: training losses of the steps after the last point.
        texts: generated answers by step.
        others: losses of further data sets at each point, by name.
        probed: points at which probes were measured.
        notes: values of every step, by name.
        behaviour: state of the observer of what the model says; empty before it.
        precision_error: what narrower passes change in a loss at the start (nats); None where none are.
    """

    steps: list[int] = field(default_factory=list[int])
    finetune_loss: list[float] = field(default_factory=list[float])
    kept_share: list[float] = field(default_factory=list[float])
    safety: list[Tensor] = field(default_factory=list[Tensor])
    control: list[Tensor] = field(default_factory=list[Tensor])
    whole: list[list[str]] = field(default_factory=list[list[str]])
    extrapolated: Tensor | None = None
    diverged_at: int | None = None
    pending: list[float] = field(default_factory=list[float])
    texts: dict[int, list[str]] = field(default_factory=dict[int, list[str]])
    others: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]])
    probed: list[int] = field(default_factory=list[int])
    notes: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    behaviour: dict[str, Any] = field(default_factory=dict[str, Any])
    precision_error: float | None = None

    @property
    def at(self) -> int:
        """Steps done."""
        return self.steps[-1] + len(self.pending)


class Pauses:
    """When to save: the state of a large model, which takes long to write, less often.

    Args:
        workspace: folder of the state; None never saves.
        run: the run that is saved.
        track: what was measured on it.
    """

    def __init__(self, workspace: Path | None, run: PlannedRun, track: Track) -> None:
        self.workspace, self.run, self.track = workspace, run, track
        self._next = time.monotonic() + SAVE_EVERY

    def saved(self, extra: Extra | None = None) -> None:
        """Save where it is time; the next is due after a pause in proportion to what this one took."""
        if self.workspace is None or not is_first() or time.monotonic() <= self._next:
            return
        started = time.monotonic()
        save_state(self.workspace, self.run, self.track, extra)
        ended = time.monotonic()
        self._next = ended + max(SAVE_EVERY, SAVE_SHARE * (ended - started))

    def __call__(self, done: StepDone) -> None:
        """As an observer of steps, the last of them: the others have taken the step down."""
        del done
        self.saved()


def save_state(workspace: Path, run: PlannedRun, track: Track, extra: Extra | None = None) -> None:
    """Write position, optimizer state, track and extra; the JSON comes last and names the rest.

    Raises:
        ArtifactError: the disk is full or the folder is read-only.
    """
    extra = Extra() if extra is None else extra
    name = TENSORS.format(track.at)
    tensors: dict[str, Tensor] = {"safety": torch.stack(track.safety)}
    if track.control:
        tensors["control"] = torch.stack(track.control)
    if track.extrapolated is not None:
        tensors["extrapolated"] = track.extrapolated
    tensors |= {f"other.{key}": torch.stack(losses) for key, losses in track.others.items()}
    tensors |= {f"extra.{key}": value for key, value in extra.tensors.items()}
    tensors |= {f"buffer.{i}": buffer for i, buffer in enumerate(run.running)}
    numbers: dict[str, float] = {}
    for i, parameter in enumerate(run.parameters):
        tensors[f"parameter.{i}"] = parameter.detach()
        for key, value in run.state_of(parameter).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{i}.{key}"] = value
            elif value is not None:
                numbers[f"{i}.{key}"] = value
    write_tensors(workspace / name, tensors)
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "tensors": name,
        "steps": track.steps,
        "finetune_loss": [loss if math.isfinite(loss) else None for loss in track.finetune_loss],
        "kept_share": track.kept_share,
        "whole": track.whole,
        "precision_error": track.precision_error,
        "pending": track.pending,
        "texts": list(track.texts.items()),
        "probed": track.probed,
        "notes": [{k: v if math.isfinite(v) else None for k, v in note.items()} for note in track.notes],
        "behaviour": track.behaviour,
        "gradient_evaluations": run.gradient_evaluations,
        "optimizer": numbers,
        "scale": None if run.scaler is None else [run.scaler.get_scale(), run.skipped],
        "extra": dict(extra.values),
    }
    write_text(workspace / VALUES, json.dumps(values))
    for old in workspace.glob(TENSORS.format("*")):
        if old.name != name:
            old.unlink()


def load_state(workspace: Path, run: PlannedRun) -> tuple[Track, Extra] | None:
    """Put a saved state back into the run; None where there is none, or it cannot be read."""
    try:
        values = read_json(workspace / VALUES)
        tensors = read_tensors(workspace / values["tensors"])
    except ArtifactError:
        return None
    put(run.running, [tensors[f"buffer.{i}"] for i in range(len(run.running))])
    put(run.parameters, [tensors[f"parameter.{i}"] for i in range(len(run.parameters))])
    for i, parameter in enumerate(run.parameters):
        state = run.state_of(parameter)
        for key, value in _under(f"optimizer.{i}.", tensors).items():
            # The step count stays on the CPU, as torch keeps it.
            state[key] = value if key == "step" else value.to(parameter)
        state.update(_under(f"{i}.", values["optimizer"]))
    run.gradient_evaluations = values["gradient_evaluations"]
    if run.scaler is not None and values["scale"] is not None:
        scale, run.skipped = values["scale"]
        run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": scale})
    track = Track(
        behaviour=values.get("behaviour") or {},
        steps=values["steps"],
        finetune_loss=[float("nan") if loss is None else loss for loss in values["finetune_loss"]],
        kept_share=values["kept_share"],
        safety=_apart(tensors["safety"]),
        control=_apart(tensors["control"]) if "control" in tensors else [],
        whole=values["whole"],
        precision_error=values["precision_error"],
        extrapolated=tensors.get("extrapolated"),
        pending=values["pending"],
        texts=dict(values["texts"]),
        probed=values.get("probed", []),
        others={key: _apart(kept) for key, kept in _under("other.", tensors).items()},
        notes=[{k: float("nan") if v is None else v for k, v in note.items()} for note in values["notes"]],
    )
    return track, Extra(_under("extra.", tensors), values["extra"])


def _apart(losses: Tensor) -> list[Tensor]:
    """The rows (n,) of losses (points, n), each in memory of its own as when it was measured."""
    return [row.clone() for row in losses]


def _under(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Entries whose names begin so, without that."""
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
