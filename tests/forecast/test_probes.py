"""What else the fine-tune costs: the forecast of probes, its band, and what is shown of it."""

import math
from dataclasses import replace

import pytest

from arisk.config.plan import ForecastConfig
from arisk.forecast.probes import probe_forecast
from arisk.forecast.probes_page import (
    probe_markdown,
    probe_sentence,
    probe_summary,
    probes_section,
)
from arisk.forecast.record import FEW, RealRun
from arisk.training.probes import ProbeTrack
from arisk.verification.record import compare
from tests.report import records as made

STEPS = [0, 20, 60, 100]
CONFIG = ForecastConfig(bootstrap_samples=300)
LOSSES = ProbeTrack("maths", "nll", STEPS, [[1.0 + i / 50, 1.1, 1.3, 1.4 + i / 25] for i in range(24)])
#: Of 20 questions 16 are right at first and 10 at the end; the last six are close.
MARGINS = ProbeTrack(
    "quiz",
    "choice",
    STEPS,
    [[5.0, 5.0, 5.0, 5.0]] * 10 + [[4.0, 2.0, 0.5, -4.0]] * 6 + [[-3.0] * 4] * 4,
)
SAME = ProbeTrack("persona", "opening", STEPS, [[0.5] * 4] * 12, tokens=5)


def found(track, **changes):
    return probe_forecast(track, CONFIG, **{"horizon": 100, "pilot": 20, "seed": 0, **changes})


def test_the_curve_goes_through_what_was_measured():
    forecast = found(LOSSES)
    at = dict(zip(forecast.steps, forecast.median, strict=True))
    for step, mean in zip(STEPS, LOSSES.means, strict=True):
        assert at[step] == pytest.approx(mean)
    assert forecast.measured == pytest.approx(LOSSES.means)
    middle, lower, upper = forecast.end
    assert lower < middle < upper
    assert (forecast.lower[0], forecast.upper[0]) == pytest.approx((forecast.start, forecast.start))
    asked = found(MARGINS)
    assert (asked.start, asked.end[0]) == (0.8, 0.5)
    assert 0 <= asked.end[1] <= 0.5 <= asked.end[2] <= 1


def test_what_does_not_move_has_no_band():
    forecast = found(SAME)
    assert set(forecast.median) == set(forecast.lower) == set(forecast.upper) == {0.5}
    still = replace(MARGINS, values=[[1.0] * 4] * 15 + [[-1.0] * 4] * 5)
    assert set(found(still).lower) == set(found(still).upper) == {0.75}


def test_a_plan_that_was_carried_out_has_no_error_of_the_virtual_run():
    """Only another draw of the rows is left, and that shrinks with their number."""
    real, virtual = found(LOSSES, pilot=100), found(LOSSES)
    width = [forecast.end[2] - forecast.end[1] for forecast in (real, virtual)]
    assert width[0] < 0.5 * width[1]
    many = replace(LOSSES, values=list(LOSSES.values) * 9)
    wide = found(many, pilot=100)
    assert wide.end[2] - wide.end[1] < 0.5 * width[0]


def test_the_same_seed_gives_the_same_band_and_order_of_rows_does_not_matter_for_the_centre():
    assert found(LOSSES) == found(LOSSES)
    turned = replace(LOSSES, values=list(LOSSES.values)[::-1])
    assert found(turned).median == pytest.approx(found(LOSSES).median)


def test_beyond_the_last_number_nothing_is_said():
    broken = replace(LOSSES, values=[[1.0, 1.1, 1.2, math.nan], *list(LOSSES.values)[1:]])
    forecast = found(broken)
    assert forecast.steps[-1] == 60
    assert forecast.end is None
    assert "beyond step 60" in " ".join(forecast.notes)
    body = probe_summary([forecast])[0]
    assert (body["at_end"], body["at_end_interval"]) == (None, None)
    assert "not measured" in probes_section([forecast], 0.8, None)
    never = found(replace(LOSSES, values=[[math.nan] * 4] * 3))
    assert (never.start, never.end, list(never.steps)) == (None, None, [])
    assert "not measured" in probe_sentence([never])


def test_few_rows_are_said():
    few = replace(LOSSES, values=list(LOSSES.values)[: FEW - 1])
    assert found(few).notes == [f"Only {FEW - 1} rows: few."]
    assert found(LOSSES).notes == []


def test_the_page_shows_every_probe_and_without_probes_nothing():
    probes = [found(track) for track in (LOSSES, MARGINS, SAME)]
    shown = probes_section(probes, 0.8, None)
    assert "right answers to 20 questions" in shown
    assert "80 %" in shown
    assert "−30 points" in shown
    assert "loss of the first 5 tokens, 12 rows" in shown
    assert "real run" not in shown
    assert "not calibrated on probes" in shown
    assert probes_section([], 0.8, None) == ""
    assert probe_sentence([]) is None
    assert probe_markdown([]) == []
    real = RealRun([0, 100], [0.0, 0.1], None, "It ran.", probes={"maths": (100, 1.7), "quiz": (60, 0.65)})
    told = probes_section(probes, 0.8, real)
    assert "<td>1.7</td>" in told
    assert "65 % at step 60" in told
    assert told.count("<td>not measured</td>") == 1  # The probe that the real run did not have.
    assert probe_sentence(probes).startswith("By the end of the plan: maths")


def test_a_hostile_name_stays_text():
    evil = found(replace(LOSSES, name=made.HOSTILE))
    assert "<script>" not in probes_section([evil], 0.8, None)


def test_a_real_run_is_held_against_the_forecast():
    forecast = replace(made.records()[3], probes=[found(LOSSES), found(MARGINS)])
    real = made.truth(
        [0.0, 0.01, 0.02, 0.03, 0.04],
        probes=[
            replace(LOSSES, values=[[row[0], 9.0, 9.0, 9.0] for row in LOSSES.values]),
            replace(MARGINS, steps=[0, 50], values=[[5.0, 5.0]] * 12 + [[-1.0, -1.0]] * 8),
            replace(SAME, steps=[0], values=[[0.5]] * 12),
        ],
    )
    check = compare(real, forecast, threshold=0.1)
    losses, asked = check.probes  # The third was measured at the start alone.
    assert (losses.step, losses.real, losses.inside) == (100, 9.0, False)
    assert losses.forecast == pytest.approx(found(LOSSES).end)
    assert (asked.step, asked.start, asked.real) == (50, 0.6, 0.6)
    assert asked.forecast[1] <= asked.forecast[0] <= asked.forecast[2]
    assert check.as_json()["probes"][0]["real"] == 9.0
    alone = compare(real, None, threshold=0.1).probes
    assert [(probe.forecast, probe.inside) for probe in alone] == [(None, None)] * 2
