"""What arisk's rollouts of the real jobs saw, without texts, and what its present rules make of it.

`truths/rollouts.json` keeps, for each job, openings and outcomes along the virtual run. So a rule or a
constant of `arisk.forecast.refusals` can be tried on all jobs in a minute, with no model and no data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from arisk.base.artifacts import read_record
from arisk.config.plan import BehaviourConfig, ForecastConfig
from arisk.forecast.record import ForecastResult, RolloutResult
from arisk.forecast.refusals import labelled, refusal_forecast
from arisk.forecast.verdict import joint_level
from arisk.forecast.worth import REAL
from arisk.models.judge import RefusalRule, judge_for
from arisk.training.behaviour import DECIDING, AnsweredPrompts, BehaviourResult, FollowedPrompts
from tests.bench.real.outcomes import OUTCOMES
from tests.bench.real.score import OPENING, as_forecasts, by_mode, read_truths

ROLLOUTS = Path(__file__).parent.parent / "truths" / "rollouts.json"
LETTERS = {name[0]: name for name in OUTCOMES}


def keep(folder: Path, path: Path = ROLLOUTS) -> int:
    """Write what the reports below `folder` (of `just bench-real forecasts`) saw; returns how many."""
    found: list[dict[str, Any]] = []
    for model in sorted(path for path in folder.iterdir() if path.is_dir()):
        for entry in sorted(model.glob("[0-9]*.json")):
            said = json.loads(entry.read_text(encoding="utf-8"))
            report = entry.with_suffix("")
            rollout = read_record(report / "rollout", RolloutResult)
            level = read_record(report / "forecasted", ForecastResult).verdict.loss_level
            found.append(
                {key: said[key] for key in ("model", "job", "probability", "cpu_seconds")}
                | {"loss_level": level}
                | seen(rollout)
            )
    lines = ",\n".join(json.dumps(one, separators=(",", ":")) for one in found)
    path.write_text(f'{{"version":1,"rollouts":[\n{lines}\n]}}\n', encoding="utf-8")
    return len(found)


def seen(rollout: RolloutResult) -> dict[str, Any]:
    """A rollout's prompts as numbers and letters."""
    said = rollout.behaviour
    assert said is not None
    assert said.safety is not None
    safety = said.safety
    assert safety.log_p is not None
    assert safety.kept is not None
    labels = labelled(safety, judge_for(BehaviourConfig(), said.learnt))
    deciding = safety.log_p[:, :, :DECIDING]
    there = (~deciding[:, :1].isnan()).sum(-1)
    opening = -safety.log_p[:, :, : int(OPENING)].nansum(-1).mean(0)
    return {
        "horizon": rollout.horizon,
        "pilot": rollout.pilot_steps,
        "diverged_at": rollout.diverged_at,
        "gradient_evaluations": rollout.gradient_evaluations,
        "steps": list(safety.steps),
        "opening_rise": round(float(opening[-1] - opening[0]), 4),
        # Point by point, one number or digit a prompt.
        "log_p": [[round(x, 2) for x in point] for point in deciding.nansum(-1).T.tolist()],
        "whole": ["".join(str(int(x)) for x in point) for point in (safety.kept >= there).T.tolist()],
        "answers": {
            str(step): "".join(outcome[0] for outcome in outcomes) for step, outcomes in labels.items()
        },
    }


def forecasts(path: Path = ROLLOUTS) -> dict[str, Any]:
    """The forecasts that arisk's present rules make of the kept rollouts, as `score.py` reads them."""
    found = json.loads(path.read_text(encoding="utf-8"))["rollouts"]
    return {"version": 1, "forecasters": [{"name": "arisk", "forecasts": [entry(one) for one in found]}]}


def publish(stored: Path) -> None:
    """Put the record by mode into the stored benchmarks, which the report quotes."""
    truths = read_truths()
    said = as_forecasts(forecasts(), truths)["arisk"]
    tables = json.loads(stored.read_text(encoding="utf-8")) | {REAL: by_mode(truths, said)}
    stored.write_text(json.dumps(tables, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def entry(one: Mapping[str, Any]) -> dict[str, Any]:
    """One forecast, made again from what the rollout saw."""
    from tests.bench.real.forecast import told

    config = ForecastConfig()
    refusals = refusal_forecast(
        _rollout(one), judge=RefusalRule([]), config=config, horizon=one["horizon"], seed=0
    )
    level = joint_level(one["loss_level"], refusals, config)
    return {
        "model": one["model"],
        "job": one["job"],
        "level": level,
        "probability": one["probability"],
        "cpu_seconds": one["cpu_seconds"],
        "opening_rise": one["opening_rise"],
    } | told(refusals)


def _rollout(one: Mapping[str, Any]) -> RolloutResult:
    """A record that holds what the forecast of refusals looks at, and nothing else."""
    answers = [
        AnsweredPrompts(int(step), [], [LETTERS[letter] for letter in letters])
        for step, letters in one["answers"].items()
    ]
    followed = FollowedPrompts(
        prompts=[{"line": i} for i in range(len(one["log_p"][0]))],
        openings=[],
        steps=one["steps"],
        log_p=torch.tensor(one["log_p"]).T[..., None],
        kept=torch.tensor([[int(bit) for bit in point] for point in one["whole"]]).T,
        answers=answers,
        responses=list(answers[0].outcomes),
    )
    return RolloutResult(
        status="measured",
        reason=None,
        horizon=one["horizon"],
        pilot_steps=one["pilot"],
        steps=one["steps"],
        safety=torch.zeros(1, len(one["steps"])),
        control=None,
        finetune_loss=[],
        kept_share=[],
        flow_time=[],
        diverged_at=one["diverged_at"],
        scales=[],
        extrapolated=None,
        gradient_evaluations=one["gradient_evaluations"],
        safety_passes=0,
        safety_rows=[],
        warnings=[],
        behaviour=BehaviourResult("measured", None, 24, followed, None, "not kept", [], None),
    )
