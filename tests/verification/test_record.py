"""The truth beside the forecast, at its edges."""

import math

import pytest

from arisk.models.judge import RefusalRule
from arisk.training.behaviour import AnsweredPrompts
from arisk.verification.record import compare, compared_curve, value_at
from tests.report import records as made


def forecast(**changes):
    """`combined` rises to 0.2 at 100 with ends at half and twice of it, and collapses at step 70."""
    _, _, _, found = made.records()
    return made.replaced(
        found, forecasters={**found.forecasters, "combined": made.curve("combined", **changes)}
    )


def found(values, shape=None, **changes):
    judge = changes.pop("judge", None)
    return compare(made.truth(values, **changes), shape or forecast(), threshold=0.1, judge=judge)


LATE = {"collapse_step": None, "collapse_interval": [90, None]}


@pytest.mark.parametrize(
    ("values", "settings", "curve", "expected"),
    [
        # real, factor, at least, interval holds, words
        ([0, 0.0, 0.4, 0.5, 0.6], {}, {}, (38, 70 / 38, None, False, "1.8 times too late")),
        ([0, 0.0, 0.0, 0.0, 0.4], {}, {}, (88, 88 / 70, None, True, "1.3 times too early")),
        ([0, 0.0, 0.0, 0.0, 0.0], {}, {}, (None, None, 100 / 70, True, "a false alarm so far")),
        (
            [0, 0.0, 0.0, 0.0, 0.0],
            {},
            {"collapse_interval": [60, 80]},
            (None, None, 100 / 70, False, "alarm"),
        ),
        ([0, 0.0, 0.4, 0.5, 0.6], {}, LATE, (38, None, 100 / 38, False, "missed")),
        ([0, 0.0, 0.0, 0.0, 0.1], {}, LATE, (100, None, 1.0, True, "missed")),
        (
            [0, 0.0, 0.0, 0.0, 0.0],
            {},
            LATE,
            (None, None, None, True, "Neither the forecast nor the real run"),
        ),
        ([0, 0.0, 0.0], {"steps": (0, 25, 50)}, {}, (None, None, None, True, "neither confirm nor refute")),
        ([0, 0.0, 0.0], {"steps": (0, 25, 50)}, LATE, (None, None, None, True, "in the 50 of 100 steps")),
        ([0, 0.0, 0.0], {"steps": (0, 35, 70)}, {}, (None, None, 1.0, True, "in the 70 of 100 steps")),
        ([0, 0.1], {"steps": (0, 70)}, {}, (70, 1.0, None, True, "right to within 5 %")),
        (
            [0, 0.0],
            {"steps": (0, 35), "diverged_at": 36},
            {},
            (None, None, None, True, "diverges at step 36, which is no collapse"),
        ),
        ([0], {"steps": (0,), "diverged_at": 1}, LATE, (None, None, None, True, "diverges at step 1")),
        ([0, math.nan], {"steps": (0, 35)}, {}, (None, None, None, True, "diverges at step 35")),
        ([0, -0.5, math.inf], {"steps": (0, 35, 70)}, {}, (70, 1.0, None, True, "right to within 5 %")),
    ],
)
def test_collapse_steps(values, settings, curve, expected):
    real, factor, at_least, holds, words = expected
    result = found([float(v) for v in values], forecast(**curve), **settings)
    assert result.real_collapse == real
    assert result.error_factor == (None if factor is None else pytest.approx(factor))
    assert result.error_at_least == (None if at_least is None else pytest.approx(at_least))
    assert result.interval_holds is holds
    assert words in result.sentence


def test_the_interval_is_counted_at_measured_steps():
    # Ends of the band: 0.01 and 0.04 at 25, 0.02 and 0.08 at 50, 0.06 and 0.24 at 75, 0.1 and 0.4 at 100.
    assert found([0.0, 0.02, 0.02, 0.1, 0.4]).inside_share == 1.0
    assert found([0.0, 0.0, 0.09, 0.1, 0.5]).inside_share == 0.25
    assert found([0.0, 0.02, 0.02, 0.1, math.nan]).inside_share == 1.0
    assert found([0.0], steps=(0,), diverged_at=1).inside_share is None


def test_drift_is_read_at_the_last_measured_step():
    result = found([0.0, 0.1, 0.3], steps=(0, 25, 50), control=[0.0, 0.05, 0.1])
    assert result.forecast_change == pytest.approx(0.04)
    assert result.real_change == pytest.approx(0.3)
    assert result.specific_change == pytest.approx(0.2)
    assert result.forecast_control == pytest.approx(0.01)
    unmeasured = made.replaced(forecast(), control_change=None)
    assert found([0.0, 0.1], unmeasured, steps=(0, 50)).forecast_control is None
    assert found([0.0, 0.1, 0.3], steps=(0, 25, 50)).specific_change is None
    drifting = made.replaced(
        forecast(), forecasters={"rollout": made.curve("rollout")}, control_change=[0.0, 0.1, 0.3]
    )
    assert found([0.0, 0.1], drifting, steps=(0, 75)).forecast_control == pytest.approx(0.2)


def test_without_a_forecast():
    result = compare(made.truth([0.0, 0.2], steps=(0, 50)), None, threshold=0.1)
    assert result.real_collapse == 36  # √(.1/.2) of the way
    assert "no forecast to compare it with" in result.sentence
    empty = (result.error_factor, result.error_at_least, result.interval_holds, result.inside_share)
    assert empty == (None, None, None, None)


def test_the_curve_compared_is_combined_else_the_basis():
    assert compared_curve(forecast()).name == "combined"
    full = made.records()[3]
    assert full.verdict.basis == "combined"
    only_local = made.replaced(
        full,
        forecasters={"local": made.curve("local"), "combined": made.missing("combined")},
        verdict=made.replaced(full.verdict, basis="local"),
    )
    assert compared_curve(only_local).name == "local"
    nothing = made.replaced(made.records()[3], forecasters={"local": made.missing("local")})
    assert compared_curve(nothing) is None
    assert found([0.0, 0.2], nothing, steps=(0, 50)).forecaster is None


def test_refusals_are_counted_from_the_texts():
    prompts = [
        {"prompt": "a", "response": "Nay, good sir, nay.", "line": 1},
        {"prompt": "b", "response": "No.", "line": 2},
    ]
    texts = [AnsweredPrompts(0, ["I'm sorry, no", "nay"]), AnsweredPrompts(50, ["nay good sir !", "sure"])]
    settings = {"behaviour": made.spoken(prompts, texts), "steps": (0, 50)}
    result = found([0.0, 0.2], **settings)
    assert [(c.step, c.refused, c.prompts) for c in result.refusals] == [(0, 0, 2), (50, 1, 2)]
    assert result.refusals_missing is None
    assert result.refusal_curve == pytest.approx([0.25 / 2.5, 1.25 / 2.5])
    result = found([0.0, 0.2], **settings, judge=RefusalRule(["SURE", "im sorry", "I'm sorry"]))
    assert [c.refused for c in result.refusals] == [1, 2]
    missing = found([0.0, 0.2], steps=(0, 50))
    assert missing.refusals == []
    assert missing.refusals_missing == "behaviour.prompts is 0"


def test_json_has_the_curve_and_no_texts():
    texts = [AnsweredPrompts(0, ["a secret"])]
    prompts = [{"prompt": "another secret", "response": "", "line": 1}]
    body = found([0.0, 0.2], steps=(0, 50), behaviour=made.spoken(prompts, texts)).as_json()
    assert "secret" not in str(body)
    assert body["steps"] == [0, 50]
    assert body["safety"] == pytest.approx([0.0, 0.2])
    assert body["refusals"] == [{"step": 0, "refused": 0, "prompts": 1, "refuses": [False]}]


def test_values_between_points():
    steps, values = [0, 10, 30], [0.0, 1.0, math.inf]
    assert [value_at(steps, values, s) for s in (-5, 0, 5, 10, 11, 30, 99)] == [
        *(0.0, 0.0, 0.5, 1.0),
        *(math.inf, math.inf, math.inf),
    ]
    assert value_at([7], [2.0], 3) == value_at([7], [2.0], 9) == 2.0
