"""The stages in order: the only list of them.

A new stage is one package and one line here; engine, verbs, help, `status`, `check` and the report take what
they know of it from its `Stage`.
"""

from __future__ import annotations

from arisk.anatomy.stage import COLLECT, SCORE, SUBSPACE
from arisk.engine.report import report_stage
from arisk.engine.stage import Catalogue, Stage
from arisk.forecast.stage import FORECAST, ROLLOUT
from arisk.guard.stage import GUARD
from arisk.screening.stage import SCREEN
from arisk.verification.stage import VERIFY

__all__ = ["catalogue", "register"]

#: In the order in which they run: what decides, what says why, what only its own verb runs.
_STAGES: list[Stage] = [ROLLOUT, FORECAST, COLLECT, SUBSPACE, SCORE, VERIFY, SCREEN, GUARD]


def catalogue() -> Catalogue:
    """The stages and, last, the report that shows them."""
    return Catalogue([*_STAGES, report_stage(_STAGES)])


def register(stage: Stage) -> None:
    """Add a stage of another package behind those of arisk.

    Args:
        stage: it may read any stage that is there already; an ordinary one becomes part of every run.

    Raises:
        ValueError: its name is taken, or it reads a stage that is not there.
    """
    Catalogue([*_STAGES, stage])
    _STAGES.append(stage)
