"""What the arms of a comparison come to, as plain values: what page, terminal and `summary.json` show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from arisk.config.plan import Config
from arisk.guard.choice import Said, Standing, choose, ending, forecast_task_cost, mean, standings
from arisk.guard.record import NEVER_BEGUN, Arm, ArmForecast, GuardResult
from arisk.models.judge import Exchange, Judge, Outcome, judge_for, learnt_openings

__all__ = ["ended", "forecast_ended", "guard_summary", "judge_of", "judged_by", "summary_of"]


def judge_of(result: GuardResult, config: Config) -> Judge:
    """The judge of a config, with the openings that the record's safe responses teach."""
    learnt = learnt_openings(str(row.get("response") or "") for row in result.prompts)
    return judge_for(config.behaviour, learnt)


def summary_of(result: GuardResult, config: Config) -> dict[str, Any]:
    """`guard_summary` with the limits and the judge of a config."""
    model = config.behaviour.judge
    return guard_summary(
        result,
        threshold=config.forecast.collapse_threshold,
        tolerated=config.guard.tolerated_task_loss,
        wanted=config.guard.wanted_drift,
        judge=judge_of(result, config),
        judged=None if model is None else model.path,
        lost=config.forecast.refusals_lost,
        confidence=config.forecast.confidence,
    )


def guard_summary(
    result: GuardResult,
    *,
    threshold: float,
    tolerated: float,
    wanted: float,
    judge: Judge,
    judged: str | None = None,
    lost: float = 0.1,
    confidence: float = 0.8,
) -> dict[str, Any]:
    """Plain values for `summary.json` and the terminal; NaN where not measured.

    Args:
        result: the arms.
        threshold: see `choose`; with the next two.
        tolerated: largest `task_cost`.
        wanted: see `choose`.
        judge: labels the answers.
        judged: which model it is; None: the rule that reads how an answer opens.
        lost: see `choose`.
        confidence: of the intervals.
    """
    judge = _remembering(judge)
    choice = choose(
        result,
        threshold=threshold,
        tolerated=tolerated,
        wanted=wanted,
        judge=judge,
        lost=lost,
        confidence=confidence,
    )
    said = Said(result, judge)
    found = standings(result, judge, confidence)
    return {
        "recommended": choice.label,
        "rule": choice.rule,
        "sentence": choice.sentence,
        "by_refusals": choice.by_refusals,
        "horizon": result.horizon,
        "last": result.last,
        "threshold": threshold,
        "tolerated_task_loss": tolerated,
        "wanted_drift": wanted,
        "confidence": confidence,
        "seeds": len(found[0].runs),
        "safety_rows": result.safety_rows,
        "heldout": result.heldout,
        "task_rows": result.task_rows,
        "task_source": result.task_source,
        "trained_rows": result.trained_rows,
        "judge": judged,
        "answered_prompts": len(result.prompts),
        "aligned_refusals": None if said.aligned is None else int(sum(said.aligned)),
        "refusals_missing": result.generation_reason,
        "ordinary_prompts": len(result.ordinary_prompts),
        "aligned_ordinary_refusals": (
            None if said.ordinary_aligned is None else int(sum(said.ordinary_aligned))
        ),
        "arms": [_arm_summary(one, found[0]) for one in found],
        "forecasts": [_forecast_summary(one, result.forecasts[0], result.plain) for one in result.forecasts],
        "warnings": list(result.warnings),
    }


def _remembering(judge: Judge) -> Judge:
    """The judge, asked once for the same exchanges."""
    known: dict[tuple[Exchange, ...], list[Outcome]] = {}

    def ask(exchanges: Sequence[Exchange]) -> list[Outcome]:
        key = tuple(exchanges)
        if key not in known:
            known[key] = list(judge(exchanges))
        return known[key]

    return ask


def _count(value: float) -> float | int | None:
    """A number of prompts; whole where it is, None where not measured."""
    if math.isnan(value):
        return None
    return int(value) if value == int(value) else value


def _arm_summary(one: Standing, plain: Standing) -> dict[str, Any]:
    """An arm over its runs: means, the highest of all peaks, and the note of the first."""
    runs, first, finished = one.runs, one.runs[0], not one.diverged
    gone = [run for run in runs if run.diverged_at is not None]
    trained, beside = (mean([run.cpu_seconds for run in each.runs]) for each in (one, plain))
    return {
        "label": one.label,
        "method": first.method,
        "strength": first.strength,
        "weights": {name: mean([run.weights[name] for run in runs]) for name in _shared(runs)},
        "note": first.note,
        "safety": one.safety,
        "peak": max(max(run.safety) for run in runs) if finished else math.nan,
        "drift_share": one.drift_share,
        "safety_error": one.safety_error,
        "control": one.control,
        "task": mean([run.task[-1] for run in runs]) if finished else math.nan,
        "task_cost": one.task_cost,
        "task_error": one.task_error,
        "surprising": mean([run.surprising[-1] for run in runs if run.surprising]) if finished else math.nan,
        "cost": trained / beside if finished and beside else math.nan,
        "setup_seconds": mean([run.setup_seconds for run in runs]),
        "diverged_at": gone[0].diverged_at if gone else None,
        "diverged_runs": len(gone),
        "runs": len(runs),
        "reason": gone[0].reason if gone else None,
        "refusals": _count(one.refusals),
        "refusals_more": list(one.refusals_interval),
        "refusals_saved": one.saved,
        "ordinary_refusals": _count(one.ordinary),
    }


def _shared(runs: Sequence[Arm]) -> list[str]:
    """Names of the λ that all runs have."""
    return [name for name in runs[0].weights if all(name in run.weights for run in runs)]


def _forecast_summary(one: ArmForecast, said: ArmForecast, plain: Arm) -> dict[str, Any]:
    return {
        "label": one.label,
        "safety": one.safety,
        "kept": one.kept,
        "control": one.control,
        "task_cost": forecast_task_cost(one, said, plain),
        "cpu_seconds": one.cpu_seconds,
        "diverged_at": one.diverged_at,
        "reason": one.reason,
        "chosen": one.chosen,
    }


def judged_by(body: Mapping[str, Any]) -> str:
    """What tells a refusal in a `guard_summary`."""
    return "their opening (see behaviour.judge)" if body["judge"] is None else f"the model {body['judge']}"


def ended(one: Mapping[str, Any]) -> str:
    """How an arm of `guard_summary` ended, and on how many of the seeds that it was tried on."""
    runs = f" on {one['diverged_runs']} of {one['runs']} seeds" if one["runs"] > 1 else ""
    return ending(one["diverged_at"]) + runs


def forecast_ended(one: Mapping[str, Any]) -> str:
    """Why an arm of `guard_summary` has no forecast."""
    how = ending(one["diverged_at"])
    return f"{how if one['diverged_at'] == NEVER_BEGUN else f'its forecast {how}'}: {one['reason']}"
