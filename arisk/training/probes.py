"""What else a fine-tune costs: rows beside safety, measured at a few points of a run, each set in its way.

* `nll`: v_i = −(1/S_i) Σ_s log p(y_is | y_i,<s), as everywhere (nats per token).
* `opening`: the same over the first k tokens of the response.
* `choice`: v_i = log p(right option) − max log p(another option), each summed over the option's tokens
  (nats). A question is answered rightly where v_i > 0; a tie is not. The rate is what is told; the margin
  says how far from turning each question is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arisk.base.errors import ConfigError, InputError
from arisk.base.task import Measure, ProbeRows
from arisk.models.losses import per_sample_nll
from arisk.training.panels import Panel, panel_of
from arisk.training.state import Track

__all__ = [
    "INNER_POINTS",
    "ProbePanel",
    "ProbeTrack",
    "measure_probes",
    "probe_panels",
    "probe_points",
    "probe_tracks",
    "value_of",
]

#: Points between the end of the pilot and the end of a run at which probes are measured, at most.
INNER_POINTS = 2
#: What begins the names of probes among the further losses of a run.
PREFIX = "probe "


@dataclass(frozen=True)
class ProbeTrack:
    """One probe along a run.

    Attributes:
        name, measure: of the probe.
        steps: M optimizer steps at which it was measured, from 0.
        values: N rows (`choice`: questions) of M values v_i, as of this module.
        tokens: k of `opening`; None for the other measures.
    """

    name: str
    measure: Measure
    steps: Sequence[int]
    values: Sequence[Sequence[float]]
    tokens: int | None = None

    @property
    def tensor(self) -> Tensor:
        """`values` as (N, M) float64."""
        return torch.tensor(self.values, dtype=torch.float64).reshape(len(self.values), len(self.steps))

    @property
    def means(self) -> list[float]:
        """What is told of it at each of its steps, see `value_of`."""
        return value_of(self.measure, self.tensor).tolist()


def value_of(measure: Measure, values: Tensor) -> Tensor:
    """Mean loss over rows (nats per token), or share of questions answered rightly.

    Args:
        measure: of the probe.
        values: (N, …) v_i.

    Returns:
        (…) float64; NaN where a row has none.
    """
    if measure != "choice":
        return values.mean(0)
    right = (values > 0).to(torch.float64)
    return right.masked_fill(values.isnan(), float("nan")).mean(0)


@dataclass(frozen=True)
class ProbePanel:
    """The rows of one probe on a device.

    Attributes:
        probe: measure and questions.
        panel: its rows.
        lengths: tokens by which each row's mean loss is multiplied; ones where they are not known.
        first: k, tokens of an opening.
    """

    probe: ProbeRows
    panel: Panel
    lengths: Tensor
    first: int

    def values(self, model: nn.Module) -> Tensor:
        """v_i of every row, or question, (N,) float64. No gradient; shared over ranks."""
        if self.probe.measure == "nll":
            return self.panel.losses(model)
        if self.probe.measure == "opening":
            openings = self.panel.losses_and_openings(model, self.first)[1]
            assert openings is not None
            return openings
        scores = -self.panel.losses(model) * self.lengths
        parts = scores.split(list(self.probe.options))
        return torch.stack(
            [_margin(part, right) for part, right in zip(parts, self.probe.right, strict=True)]
        )


def _margin(scores: Tensor, right: int) -> Tensor:
    others = torch.cat([scores[:right], scores[right + 1 :]])
    return scores[right] - others.max()


def probe_panels(probes: Sequence[ProbeRows], first: int, device: torch.device) -> list[ProbePanel]:
    """The probes of a task, checked.

    Args:
        probes: as the task has them.
        first: k, tokens of an opening.
        device: where rows go.

    Raises:
        ConfigError: two have one name, or a measure needs what the loss does not tell.
        InputError: one has no row, or its questions are not those of its rows.
    """
    twice = [name for name, count in Counter(probe.name for probe in probes).items() if count > 1]
    if twice:
        raise ConfigError(
            f"two probes are named {twice[0]!r}", where="Task.probes", fix="give each a name of its own"
        )
    return [_panel(probe, first, device) for probe in probes]


def _panel(probe: ProbeRows, first: int, device: torch.device) -> ProbePanel:
    where = f"probe {probe.name!r}"
    if probe.measure not in ("nll", "opening", "choice"):
        raise ConfigError(
            f"there is no measure {probe.measure!r}", where=where, fix="one of nll, opening, choice"
        )
    if probe.measure == "opening" and probe.samples.loss_fn is not per_sample_nll:
        raise ConfigError(
            "the loss of first tokens needs a causal LM with arisk's own loss, and this one is given from "
            "Python",
            where=where,
            fix="use the measure nll",
        )
    panel = panel_of(probe.samples, None, device)
    if probe.measure == "choice":
        _require_questions(probe, len(panel), where)
    lengths = [float(row.get("tokens") or 1) for row in probe.samples.rows] or [1.0] * len(panel)
    return ProbePanel(probe, panel, torch.tensor(lengths, dtype=torch.float64), first)


def _require_questions(probe: ProbeRows, rows: int, where: str) -> None:
    """Refuse questions that do not fit the rows.

    Raises:
        InputError: with what does not fit.
    """
    pairs = list(zip(probe.options, probe.right, strict=False))
    fine = len(probe.options) == len(probe.right) and sum(probe.options) == rows
    if fine and all(count >= 2 and 0 <= right < count for count, right in pairs):
        return
    raise InputError(
        f"the questions do not fit the rows: {sum(probe.options)} options of {len(probe.options)} questions, "
        f"{len(probe.right)} right ones, {rows} rows",
        where=where,
        fix="give one row per option, two or more options a question, and the place of each right one from 0",
    )


def probe_points(points: Sequence[int], pilot: int) -> list[int]:
    """Which of the measured points of a rollout probes are measured at: both ends, the pilot's, few between.

    Args:
        points: ascending, the last being the end of the plan.
        pilot: the end of the pilot.

    >>> probe_points([5, 20, 40, 80, 120, 160, 200], 20)
    [0, 20, 80, 160, 200]
    """
    inner = [point for point in points if pilot < point < points[-1]]
    inner = inner or [point for point in points if point < points[-1]]
    count = min(INNER_POINTS, len(inner))
    chosen = {inner[(2 * i + 1) * len(inner) // (2 * count)] for i in range(count)}
    return sorted({0, points[-1], *chosen, *({pilot} & set(points))})


def measure_probes(track: Track, model: nn.Module, panels: Sequence[ProbePanel], step: int) -> None:
    """Take down every probe's values here."""
    if not panels:
        return
    track.probed.append(step)
    for panel in panels:
        track.others.setdefault(PREFIX + panel.probe.name, []).append(panel.values(model))


def probe_tracks(track: Track, panels: Sequence[ProbePanel]) -> list[ProbeTrack]:
    """What was measured of every probe."""
    return [
        ProbeTrack(
            panel.probe.name,
            panel.probe.measure,
            list(track.probed),
            torch.stack(track.others[PREFIX + panel.probe.name], 1).tolist(),
            panel.first if panel.probe.measure == "opening" else None,
        )
        for panel in panels
    ]
