"""The fan of forecasts, and safety against ordinary answers."""

import math

import pytest

from arisk.forecast.first_screen import evidence_text, verdict_section
from arisk.forecast.page import drift_map, forecast_figure
from arisk.forecast.text import collapse_text, drift_sentence, rests_on
from arisk.report.page import Around, render
from arisk.risk_report import sections_of
from tests.report import records as made
from tests.report.reading import figure


def test_the_fan_leads_with_the_combined_forecast():
    traces = figure(made.page(), "forecast")["data"]
    lines = {t["name"]: t for t in traces if "name" in t}
    shown = [name for name, trace in lines.items() if trace.get("showlegend", True)]
    others = ["lower bound", "local", "ray", "pilot", "rollout"]
    assert shown == [*(f"loss: {name}" for name in others), "loss of safe responses"]
    lead = lines["loss of safe responses"]
    assert all(lead["line"]["width"] > 2 * lines[n]["line"]["width"] for n in shown[:-1])
    assert [n for n in shown if lines[n].get("visible") != "legendonly"] == ["loss of safe responses"]
    assert [t["fill"] for t in traces if "fill" in t] == ["tonexty"]
    notes = [a["text"] for a in figure(made.page(), "forecast")["layout"]["annotations"]]
    assert "<b>collapse at step 70</b>" in notes
    assert (lines["loss: local"]["x"], lines["loss: local, not trusted"]["x"]) == ([0, 30], [30, 50, 100])
    assert lines["loss: local"]["y"][-1] == pytest.approx(0.024)  # 30/50 of the way to 0.04
    assert lines["loss: local, not trusted"]["opacity"] < 0.5
    assert "loss of safe responses, not trusted" not in lines
    whisker = lines["collapse"]["error_x"]
    assert (whisker["arrayminus"], whisker["array"]) == ([10], [30])
    without = figure(made.page(holes=True), "forecast")
    assert {t["legendgroup"] for t in without["data"] if t.get("line", {}).get("width", 0) > 3} == {"local"}


def drifting(safety, control):
    """A forecast whose rollout ends at these changes."""
    *_, forecast = made.records()
    path = made.curve("rollout", median=[0.0, safety / 2, safety])
    rest = [0.0, control / 2, control]
    return made.replaced(forecast, forecasters={**forecast.forecasters, "rollout": path}, control_change=rest)


@pytest.mark.parametrize(
    ("safety", "control", "says"),
    [
        (0.23, 0.1, "rises 2.3 times as fast as that of ordinary answers: the harm is specific"),
        (0.15, 0.1, "1.5 times as fast as that of ordinary answers: 33 % of the rise is specific to safety"),
        (0.1, 0.1, "the drift is general"),
        (0.1, 0.9, "the drift is general"),
        (0.2, 0.001, "while ordinary answers stay as good: the harm is specific"),
        (0.2, -0.3, "while ordinary answers stay as good: the harm is specific"),
        (0.001, 0.0, "does not rise (safe responses +0.001, ordinary ones +0 nats/token at step 100"),
        (-0.2, 0.5, "does not rise, though ordinary answers get worse"),
    ],
)
def test_drift_in_words(safety, control, says):
    assert says in drift_sentence(drifting(safety, control))


def test_drift_is_judged_where_safety_is_worst_and_finite():
    forecast = drifting(0.2, 0.1)
    path = made.curve("rollout", median=[0.0, 0.4, 0.001])
    moved = made.replaced(forecast, forecasters={"rollout": path})
    assert "8 times" in drift_sentence(moved)
    assert "step 50" in drift_sentence(moved)
    path = made.curve("rollout", median=[0.0, 0.4, math.inf])
    assert "step 50" in drift_sentence(made.replaced(forecast, forecasters={"rollout": path}))


def test_what_was_measured_stands_beside_what_is_forecast_where_they_differ():
    forecast = drifting(0.15, 0.001)
    assert forecast.forecasters["combined"].median[-1] == 0.2
    told = drift_sentence(forecast)
    assert "+0.15, ordinary ones +0.001 nats/token at step 100 of the shortened run" in told
    assert told.endswith("; the forecast corrects +0.15 to +0.2).")
    assert "corrects" not in drift_sentence(drifting(0.2, 0.001))
    done = drift_sentence(made.replaced(forecast, carried_out=True))
    assert done.endswith("nats/token at step 100).")


@pytest.mark.parametrize(("done", "says"), [(False, "is forecast to rise by 0.1"), (True, "rose by 0.1")])
def test_a_plan_that_was_carried_out_is_no_forecast(done, says):
    forecast = made.replaced(made.records()[-1], carried_out=done)
    assert f"The loss of safe responses {says} nats/token" in forecast_figure(forecast).says
    assert ("the plan itself was carried out" in rests_on(forecast)) is done
    assert rests_on(forecast) in evidence_text(forecast, {})
    assert forecast_figure(forecast).title == ("The plan, carried out" if done else "Forecast")
    assert ("No record yet of all weights" in verdict_section(forecast, {}, None, Around())) is not done


def test_drift_without_a_finite_point_is_not_measured():
    assert drift_sentence(made.replaced(drifting(0.2, 0.1), control_change=[math.nan] * 3)) is None


def test_drift_without_control_data_or_rollout_is_not_measured():
    *_, forecast = made.records()
    assert drift_sentence(made.replaced(forecast, control_change=None)) is None
    assert "no control data" in drift_map(made.replaced(forecast, control_change=None)).missing
    assert drift_map(made.records(holes=True)[-1]).missing == "switched off"
    lines = {t["name"]: t["y"] for t in figure(made.page(), "drift")["data"]}
    specific = lines["difference: specific to safety"][-1]
    assert specific == pytest.approx(lines["safe responses"][-1] - lines["ordinary answers"][-1])


def test_a_collapse_step_never_stands_without_its_horizon():
    assert collapse_text(made.curve("local", collapse_step=None)) == "none within 100 steps"
    assert collapse_text(made.missing("ray")) == "not measured"


def test_what_the_rollout_says_of_the_plan_is_on_the_page():
    records = made.records()
    measured = made.replaced(made.rolled(), task=records[0].task, warnings=["Carried out as adamw."])
    shown = sections_of(*records, measured, show_text=True, max_examples=1, check=None)
    assert render("t", shown, {}).count("Carried out as adamw.") == 1
