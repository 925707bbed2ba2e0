"""A mitigator's state to and from a folder: safetensors and JSON with a format version."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from arisk.base.artifacts import FORMAT_VERSION, read_json, read_tensors, write_tensors, write_text
from arisk.base.errors import ArtifactError, ConfigError, NewerFormatError
from arisk.guard.directions import FisherMass, SafetyDirections
from arisk.guard.settings import AlignGuardConfig
from arisk.guard.sites import Site

__all__ = ["GuardState", "read_state", "write_state"]

TENSORS, RECORD = "tensors.safetensors", "record.json"
KIND = "LoRAMitigator"


@dataclass(frozen=True)
class GuardState:
    """What a mitigator is made of, without the model.

    Attributes:
        sites: guarded weights.
        config: its settings.
        reason: why it is skipped, or None.
        directions: the safety subspace, or None.
        metric: Fisher mass of the fine-tuning loss, or None.
        reference: by site, the trained parameters at the reference.
    """

    sites: Sequence[Site]
    config: AlignGuardConfig
    reason: str | None
    directions: SafetyDirections | None
    metric: FisherMass | None
    reference: Sequence[Sequence[Tensor]]


def write_state(
    folder: Path,
    *,
    sites: Sequence[Site],
    config: Mapping[str, Any],
    reason: str | None,
    directions: SafetyDirections | None,
    metric: FisherMass | None,
    reference: Sequence[Sequence[Tensor]],
) -> None:
    """Write the parts of a `GuardState`; `config` is JSON, a custom metric being null.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    shares: dict[str, float] = {}
    for i, group in enumerate(reference):
        tensors.update({f"reference.{i}.{j}": kept for j, kept in enumerate(group)})
    if directions is not None:
        tensors.update({"basis": directions.basis, "eigenvalues": directions.eigenvalues})
        for i, (u, v) in enumerate(directions.frames):
            tensors.update({f"frame.{i}.u": u, f"frame.{i}.v": v})
        tensors.update(_mass_tensors("mass", directions.mass))
        shares = {"captured": directions.captured, "explained": directions.explained}
    if metric is not None:
        tensors.update(_mass_tensors("metric", metric))
    body = {
        "format_version": FORMAT_VERSION,
        "type": KIND,
        "sites": [asdict(site) for site in sites],
        "config": config,
        "reason": reason,
        "shares": shares,
    }
    write_tensors(folder / TENSORS, tensors)
    write_text(folder / RECORD, json.dumps(body, indent=1, allow_nan=False) + "\n")


def read_state(folder: Path, task_metric: Callable[..., Any] | None) -> GuardState:
    """Read what `write_state` wrote.

    Raises:
        ArtifactError: a file is missing, damaged, or of a newer format.
        ConfigError: there was a custom metric and none is given.
    """
    try:
        body, tensors = read_json(folder / RECORD), read_tensors(folder / TENSORS)
        if body.get("type") != KIND:
            raise _damaged(folder, f"it holds {body.get('type')!r}")
        sites = [Site(**site) for site in body["sites"]]
        reference = [
            [tensors[f"reference.{i}.{j}"] for j in range(len(site.trained))] for i, site in enumerate(sites)
        ]
        directions = None if "basis" not in tensors else _directions(tensors, len(sites), body["shares"])
        metric = None if "metric.0.rows" not in tensors else _mass("metric", tensors, len(sites))
        settings = dict(body["config"])
    except NewerFormatError:
        raise
    except (ArtifactError, KeyError, TypeError) as err:
        raise _damaged(folder, str(err).splitlines()[0]) from err
    if settings["task_metric"] is None:
        settings["task_metric"] = task_metric
        if task_metric is None:
            raise ConfigError(
                "this mitigator had a custom task metric, which cannot be saved",
                where=str(folder),
                fix="give the same function as `task_metric=` to `load`",
            )
    config = AlignGuardConfig(**settings)
    return GuardState(sites, config, body["reason"], directions, metric, reference)


def _damaged(folder: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"a saved mitigator cannot be read: {why}",
        where=str(folder),
        fix="give the folder that `save` wrote, or build the mitigator again",
    )


def _mass_tensors(name: str, mass: FisherMass) -> dict[str, Tensor]:
    found = {f"{name}.{i}.rows": rows for i, rows in enumerate(mass.rows)}
    return found | {f"{name}.{i}.columns": columns for i, columns in enumerate(mass.columns)}


def _mass(name: str, tensors: Mapping[str, Tensor], sites: int) -> FisherMass:
    return FisherMass(
        [tensors[f"{name}.{i}.rows"] for i in range(sites)],
        [tensors[f"{name}.{i}.columns"] for i in range(sites)],
    )


def _directions(tensors: Mapping[str, Tensor], sites: int, shares: Mapping[str, float]) -> SafetyDirections:
    return SafetyDirections(
        frames=[(tensors[f"frame.{i}.u"], tensors[f"frame.{i}.v"]) for i in range(sites)],
        basis=tensors["basis"],
        eigenvalues=tensors["eigenvalues"],
        mass=_mass("mass", tensors, sites),
        captured=shares["captured"],
        explained=shares["explained"],
    )
