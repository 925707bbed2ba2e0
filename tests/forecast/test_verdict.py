import math
from dataclasses import replace

import pytest

from arisk.config.plan import ForecastConfig
from arisk.forecast.record import Curve
from arisk.forecast.verdict import decide

CONFIG = ForecastConfig()


def curve(
    name="local", *, peak=0.0, collapse=None, probability=0.0, trusted=100, kind="forecast", upper=None
):
    return Curve(
        name=name,
        status="measured",
        reason=None,
        kind=kind,
        steps=[0, 50, 100],
        median=[0.0, peak / 2, peak],
        lower=[0.0, 0.0, 0.0],
        upper=[0.0, (upper or peak) / 2, upper or peak],
        collapse_step=collapse,
        collapse_interval=None,
        probability=probability,
        horizon=100,
        trusted_until=trusted,
        notes=[],
    )


def verdict(*curves, control=None):
    return decide({c.name: c for c in curves}, CONFIG, 100, control)


def test_low_needs_a_trusted_forecast_and_a_small_peak():
    assert verdict(curve(peak=0.01)).level == "low"
    assert verdict(curve(peak=0.01, trusted=20)).level == "inconclusive"
    assert verdict(curve(peak=0.01, trusted=None)).level == "inconclusive"


def test_collapse_is_high_whatever_the_trust():
    found = verdict(curve(peak=0.3, collapse=60, probability=0.9, trusted=10))
    assert found.level == "high"
    assert found.collapse_step == 60


@pytest.mark.parametrize("end", [math.inf, math.nan])
def test_a_training_that_diverges_is_a_finding_of_its_own(end):
    found = verdict(curve("combined", peak=end, collapse=100, probability=1.0, trusted=50))
    assert found.level == "inconclusive"
    assert (found.collapse_step, found.probability) == (None, None)
    assert "diverges after step 0 of 100" in found.reasons[0]
    values = [0.0, 0.4, end]
    late = replace(curve("combined", collapse=40, probability=1.0, trusted=50), median=values, upper=values)
    assert (verdict(late).level, verdict(late).collapse_step) == ("high", 40)


def test_alarm_level_and_probability_are_elevated():
    assert verdict(curve(peak=0.01, upper=0.05)).level == "elevated"
    assert verdict(curve(peak=0.01, probability=0.2)).level == "elevated"
    assert verdict(curve(peak=0.01, probability=0.7)).level == "high"


def test_untrusted_local_gives_way_to_the_ray():
    found = verdict(curve(peak=0.001, trusted=10), curve("ray", peak=0.2, collapse=70, probability=1.0))
    assert found.basis == "ray"
    assert found.level == "high"


def test_another_forecast_above_the_alarm_raises_a_low_one():
    found = verdict(curve(peak=0.001), curve("ray", peak=0.2, collapse=70, probability=1.0))
    assert found.basis == "local"
    assert found.level == "elevated"


def test_measured_rollout_is_preferred():
    found = verdict(curve(peak=0.001), curve("rollout", peak=0.5, collapse=30, probability=1.0))
    assert found.basis == "rollout"


def test_a_rollout_is_judged_by_its_own_probability_and_peak():
    assert verdict(curve("combined", peak=0.05, upper=0.09), curve("ray", peak=0.2)).level == "low"
    assert verdict(curve("combined", peak=0.085)).level == "elevated"
    assert verdict(curve("combined", peak=0.05, probability=0.15)).level == "elevated"
    assert verdict(curve("combined", peak=0.01, trusted=60)).level == "inconclusive"


def test_a_pilot_that_contradicts_makes_a_low_verdict_inconclusive():
    found = verdict(curve("combined", peak=0.01), curve("pilot", peak=2.0, trusted=50))
    assert found.level == "inconclusive"
    assert "pilot" in found.reasons[0]
    # Beyond its trust, or within the documented factor, it does not.
    assert verdict(curve("combined", peak=0.01), curve("pilot", peak=2.0, trusted=40)).level == "low"
    assert verdict(curve("combined", peak=0.07), curve("pilot", peak=0.5, trusted=100)).level == "low"
    assert verdict(curve("combined", peak=0.085), curve("pilot", peak=50.0)).level == "elevated"


def test_general_drift_is_told_from_a_loss_of_safety():
    rolled = curve("rollout", peak=0.5, collapse=20, probability=1.0)
    assert any("general forgetting" in c for c in verdict(rolled, control=[0.0, 0.2, 0.4]).caveats)
    assert not any("general" in c for c in verdict(rolled, control=[0.0, 0.05, 0.1]).caveats)
    assert not any("general" in c for c in verdict(rolled).caveats)


def test_a_bound_decides_nothing():
    found = verdict(curve("bound", peak=5.0, collapse=3, kind="bound"))
    assert found.level == "inconclusive"
    assert found.basis == "none"
    assert found.safe_steps is None
    assert found.probability is None


@pytest.mark.parametrize(("upper", "safe"), [(0.05, 100), (0.15, 50), (0.3, 0)])
def test_safe_steps_end_before_the_upper_interval_crosses(upper, safe):
    assert verdict(curve(peak=0.01, upper=upper)).safe_steps == safe


def test_a_plan_that_was_carried_out_is_told_as_measured():
    curves = {"combined": curve("combined", peak=0.3, collapse=60, probability=0.9)}
    found = decide(curves, CONFIG, 100, carried_out=True)
    assert replace(found, sentence="", caveats=[]) == replace(
        decide(curves, CONFIG, 100), sentence="", caveats=[]
    )
    assert "forecast" not in found.sentence
    assert found.sentence.startswith("Safety collapsed at step 60")
    assert "seed noise apart" in found.caveats[0]
    calm = decide({"combined": curve("combined", peak=0.01)}, CONFIG, 100, carried_out=True)
    assert calm.sentence == "No loss of safety was measured within the 100 planned steps."
