"""The first tokens' loss beside the mean: its curve, where it is said, and the table of all witnesses."""

import math
from dataclasses import replace

import pytest
import torch

from arisk.config.plan import ForecastConfig, TrainingConfig
from arisk.forecast.opening import opening_curve
from arisk.forecast.page import forecast_figure
from arisk.forecast.verdict import decide
from arisk.forecast.witnesses_page import opening_summary, witnesses
from arisk.training.recipe import recipe_of
from tests.forecast.test_refusals import curve as loss_curve
from tests.forecast.test_refusals import followed, found, rolled, said
from tests.report import records as made

STEPS = [0, 5, 20, 60, 100]
CONFIG = ForecastConfig(bootstrap_samples=50, opening_threshold=0.2)


def openings(end):
    """First tokens of two rows, whose mean rises by `end`."""
    rows = [[0.3, 0.3, 0.3 + 0.1 * end, 0.3 + 0.5 * end, 0.3 + share * end] for share in (1.2, 0.8)]
    return torch.tensor(rows, dtype=torch.float64)


def curve(end):
    measured = rolled(None, reason="off", opening_loss=openings(end), opening_tokens=5)
    return opening_curve(measured, recipe_of(TrainingConfig(), 100), CONFIG, 0)


def test_the_curve_is_the_mean_change_of_the_first_tokens():
    opening = curve(0.5)
    at = dict(zip(opening.steps, opening.median, strict=True))
    expected = openings(0.5).mean(0) - openings(0.5)[:, 0].mean()
    assert [at[step] for step in STEPS] == pytest.approx(expected.tolist(), abs=1e-12)
    assert opening.lower[-1] <= opening.median[-1] <= opening.upper[-1]
    # 0.2 lies between step 20 (0.05) and step 60 (0.25).
    assert 20 < opening.collapse_step <= 60
    assert curve(0.1).collapse_step is None
    assert opening_curve(rolled(None, opening_loss=None), recipe_of(TrainingConfig(), 100), CONFIG, 0) is None


def verdict(mean, first, **settings):
    opening = None if first is None else curve(first)
    return decide({"combined": loss_curve(mean)}, CONFIG, 100, opening=opening, opening_tokens=5, **settings)


def told(verdict):
    return [reason for reason in verdict.reasons if "first 5 tokens" in reason]


def test_where_openings_turn_and_the_mean_does_not_the_verdict_says_so_and_keeps_its_level():
    (reason,) = told(verdict(0.03, 0.5))
    assert "+0.5" in reason
    assert "+0.03" in reason
    assert "not calibrated" in reason
    assert "their mean loss does not" in reason
    assert verdict(0.03, 0.5).level == verdict(0.03, None).level


def test_where_the_mean_rises_and_openings_stay_that_is_said_too():
    (reason,) = told(verdict(0.3, 0.05))
    assert "answers still open as before" in reason


@pytest.mark.parametrize(("mean", "first"), [(0.03, 0.05), (0.3, 0.5), (0.03, None)])
def test_agreement_and_what_is_not_known_say_nothing(mean, first):
    assert told(verdict(mean, first)) == []


def test_a_training_that_diverges_turns_no_opening():
    opening = replace(curve(0.5), median=[math.inf] * len(curve(0.5).steps))
    made = decide({"combined": loss_curve(0.03)}, CONFIG, 100, opening=opening, opening_tokens=5)
    assert told(made) == []


def test_the_refusals_come_first():
    gone = found(followed([20, 20, 8, 0, 0], {0: said(20), 20: said(8), 100: said(0)}))
    reasons = verdict(0.03, 0.5, refusals=gone).reasons
    assert reasons[0].startswith("Refusals: 20 of 20 today, 0")
    assert any("first 5 tokens" in reason for reason in reasons)


def forecast(**changes):
    fields = {"opening": curve(0.5), "opening_threshold": 0.2, "opening_tokens": 5}
    return replace(made.records()[3], **{**fields, **changes})


def test_all_witnesses_stand_side_by_side():
    gone = found(followed([20, 20, 8, 0, 0], {0: said(20), 20: said(8), 100: said(0)}))
    shown = witnesses(forecast(refusals=gone))
    assert "loss of their first 5 tokens" in shown
    assert "+0.2, not calibrated" in shown
    assert "(20 before" not in shown  # Bands come first.
    assert "; 20 before)" in shown
    assert "ordinary prompts refused</td><td>not measured" in shown
    none = witnesses(forecast(opening=None, opening_threshold=None, opening_tokens=None, control_change=None))
    assert none.count("not measured") == 4  # Refusals, first tokens, ordinary loss and refusals.
    nothing = witnesses(made.records(holes=True)[3])
    assert "safety prompts refused</td><td>not measured" in nothing


def test_summary_and_figure():
    body = opening_summary(forecast())
    assert (body["tokens"], body["threshold"], body["calibrated"]) == (5, 0.2, False)
    assert body["at_end"] == pytest.approx(0.5)
    assert opening_summary(made.records()[3]) is None
    names = [trace.get("name") for trace in forecast_figure(forecast()).data]
    assert "first 5 tokens, loss" in names
    assert "first 5 tokens, loss" not in [t.get("name") for t in forecast_figure(made.records()[3]).data]
