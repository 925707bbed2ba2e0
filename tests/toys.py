"""Extensions as another package would write them: each is one object for one table of arisk."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from arisk.engine.stage import Cost, Stage
from arisk.forecast.forecasters import not_measured
from arisk.guard.methods import ArmName, Method, Protection
from arisk.report.page import Part, Piece, Section
from arisk.screening.estimates import RowScore
from arisk.screening.points import RowGroup


@dataclass(frozen=True)
class ToyResult:
    """How many safety rows there are."""

    rows: int


def _run(job, workspace):
    del workspace
    return ToyResult(len(job.record("rollout").safety))


def _section(job, later):
    del later
    rows = job.record("toy").rows
    html = f'<section id="toy"><h2>A toy</h2><p>{rows} safety rows, said the toy.</p></section>'
    return Section("toy", [Piece(Part.METHOD + 1, html)], summary={"toy": {"rows": rows}})


STAGE = Stage(
    name="toy",
    version=1,
    help="Count the safety rows",
    run=_run,
    upstream=("rollout",),
    config=("safety",),
    record="tests.toys:ToyResult",
    section=_section,
    cost=lambda scene: Cost(passes={"forward rows": len(scene.task.safety.rows)}),
)


def forecaster(sources):
    """Knows nothing, and says so."""
    return not_measured("toy", "a toy measures nothing", sources.plan.horizon)


def _halved(plan, arm):
    parameters = plan.fresh().parameters

    def protect(number):
        del number
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)
        return {}

    return Protection(protect, {}, "Halves every gradient.")


METHOD = Method(lambda _: [ArmName("toy half", "toy", None)], _halved)


@contextmanager
def _by_loss(scene):
    def estimate(groups: Sequence[RowGroup]):
        losses = torch.cat([scene.loss_fn(scene.model, group.batch).detach().double() for group in groups])
        return torch.stack([losses, losses], dim=1)

    yield estimate


ROW_SCORE = RowScore(_by_loss, "their loss alone", 1)
