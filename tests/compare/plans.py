"""Synthetic planned runs for comparisons."""

from arisk.compare.record import Ranked, RankedRun
from arisk.compare.text import Comparative
from arisk.forecast.record import AnswerCount, RefusalForecast
from tests.report import records as made

HOSTILE = made.HOSTILE


def plan(name, *, level="low", probability=0.0, peak=0.05, collapse_step=None, **changes):
    """A run whose forecast rises to `peak` halfway and ends at half of it; None: no forecast."""
    curve = None
    if peak is not None:
        values = [0.0, peak, peak / 2]
        curve = made.curve(
            "combined",
            median=values,
            lower=[v * 0.5 for v in values],
            upper=[v * 2 for v in values],
            collapse_step=collapse_step,
            probability=probability,
            trusted_until=100,
        )
    fields = {
        "run_dir": f"runs/{name}",
        "sentence": f"The verdict is {level}.",
        "basis": "none" if curve is None else "combined",
        "horizon": 100,
        "safe_steps": None if curve is None else 60,
        "threshold": 0.1,
        "confidence": 0.8,
        "safety_change": None if peak is None else peak / 2,
        "control_change": None if peak is None else 0.01,
        "overlap_to_random": 3.0,
        "gradient_evaluations": 34,
        "planned_evaluations": 100,
        "seconds": 12.0,
        "shared_seconds": 0.0,
        "finetune": f"{name}.jsonl",
        "finetune_rows": 400,
        "training": {"steps": 100},
    }
    return RankedRun(
        name=name,
        level=level,
        probability=probability,
        collapse_step=collapse_step,
        curve=curve,
        **{**fields, **changes},
    )


def refusing(end, band=(0, 0), *, today=28, lost=None):
    """A forecast of refusals: `today` of 32 before, `end` at the end, and how far the band reaches."""
    fewest, most = end - band[0], end + band[1]
    return RefusalForecast(
        status="measured",
        reason=None,
        prompts=32,
        counts=[AnswerCount(0, today, 0, 32 - today, 0), AnswerCount(100, end, 0, 32 - end, 0)],
        ordinary=[],
        steps=[0, 50, 100],
        median=[today / 32, (today + end) / 64, end / 32],
        lower=[today / 32, (today + fewest) / 64, fewest / 32],
        upper=[today / 32, (today + most) / 64, most / 32],
        threshold=0.1,
        lost_steps={"0.1": lost, "0.25": None, "0.5": None} if today else {},
        lost_intervals={},
        probability=0.5 if today else None,
        safe_steps=40 if today else None,
        horizon=100,
        trusted_until=100,
        safe_responses=32,
        refusing_responses=32,
        safe_loss=0.1,
        own_loss=0.1,
        notes=[],
    )


def compared(runs, *, title="three plans", notes=(), command="arisk compare a b"):
    """What a comparison of the runs shows."""
    ranked = Ranked.all(runs)
    settings = {"finetune.path": [run.finetune for run in (entry.run for entry in ranked)]}
    return Comparative(title, ranked, settings, list(notes), command)
