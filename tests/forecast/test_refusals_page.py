"""Refusals on the page and in the summaries: their numbers, and what was not measured."""

import json
from dataclasses import replace

import pytest

from arisk.forecast.first_screen import verdict_section
from arisk.forecast.page import forecast_figure
from arisk.forecast.record import AnswerCount, RealRun, RefusalForecast
from arisk.forecast.refusals import refusals_not_measured
from arisk.forecast.refusals_page import (
    end_text,
    lost_section,
    lost_text,
    refusal_notes,
    refusal_sentence,
    refusal_summary,
)
from arisk.report.page import Around
from arisk.training.behaviour import AnsweredPrompts
from tests.report import records as made

SAID = RefusalForecast(
    status="measured",
    reason=None,
    prompts=32,
    counts=[AnswerCount(0, 28, 1, 3, 0), AnswerCount(60, 6, 4, 21, 1)],
    ordinary=[AnswerCount(0, 1, 0, 15, 0), AnswerCount(60, 0, 0, 16, 0)],
    steps=[0, 30, 60],
    median=[28 / 32, 0.5, 6 / 32],
    lower=[28 / 32, 0.4, 2 / 32],
    upper=[28 / 32, 0.6, 11 / 32],
    threshold=0.1,
    lost_steps={"0.1": 12, "0.25": 20, "0.5": None},
    lost_intervals={"0.1": [8, 15], "0.25": [15, None], "0.5": [None, None]},
    probability=0.97,
    safe_steps=8,
    horizon=60,
    trusted_until=60,
    safe_responses=32,
    refusing_responses=30,
    safe_loss=0.41,
    own_loss=0.12,
    notes=["Answers of 24 tokens were written at steps 0, 60."],
)
NOTHING = refusals_not_measured("the safety rows have no prompt or no tokenizer", 60, 0.1)


def test_words():
    assert end_text(SAID) == "28 → 6 of 32"
    assert lost_text(SAID, 0.8) == "80 % interval 2 to 11; a quarter lost by step 20"
    sentence = refusal_sentence(SAID)
    start = "Of the answers that the model wrote at step 60 of the shortened run of the plan, 6 of 32 refuse"
    assert sentence.startswith(start)
    assert "at step 60 of the run, 6 of 32 refuse" in refusal_sentence(SAID, carried_out=True)
    assert "4 deflect, 21 do what was asked, 1 is broken (28 refused at step 0)" in sentence
    notes = refusal_notes(SAID)
    assert "25 % of the refusals before are lost: by step 20 (15 to beyond 60)." in notes
    assert "50 % of the refusals before are lost: not within 60 steps." in notes
    assert (
        "<td>60</td><td>6 of 32</td><td>4 of 32</td><td>21 of 32</td><td>1 of 32</td><td>0 of 16</td>"
        in notes
    )
    assert "Of 32 safe responses 30 refuse" in notes


@pytest.mark.parametrize("said", [None, NOTHING])
def test_not_measured_is_said_and_never_called_safe(said):
    assert end_text(said) == "not measured"
    assert "none lost" in lost_text(said, 0.8)
    assert refusal_sentence(said) is None
    assert refusal_notes(said) == ""
    figure = forecast_figure(replace(made.records()[3], refusals=said))
    assert "yaxis2" not in figure.layout
    assert "loss" in figure.layout["yaxis"]["title"]["text"]
    assert lost_section(said, made.rolled(), show_text=True) == ""
    assert (refusal_summary(said) or {"status": "not_measured"})["status"] == "not_measured"


def test_the_figure_has_the_counts_and_the_truth():
    real = RealRun([0, 60], [0.0, 0.1], None, "s", [(0, 27, 32), (60, 4, 32)])
    figure = forecast_figure(replace(made.records()[3], refusals=SAID), real)
    upper = {trace.get("name"): trace for trace in figure.data if trace["yaxis"] == "y"}
    lower = {trace.get("name"): trace for trace in figure.data if trace["yaxis"] == "y2"}
    assert upper["refusals, forecast"]["y"] == [87.5, 50.0, 18.75]
    assert upper["answers written"]["y"] == [87.5, 18.75]
    assert upper["real fine-tune"]["y"] == [100 * 27 / 32, 12.5]
    assert lower["real fine-tune"]["y"] == [0.0, 0.1]
    limits = {shape.get("yref"): shape["y0"] for shape in figure.layout["shapes"]}
    assert limits["y2"] == pytest.approx(0.1)
    assert limits[None] == pytest.approx(90 * 28 / 32)
    assert figure.layout["yaxis2"]["domain"][1] < figure.layout["yaxis"]["domain"][0]
    json.dumps(figure.data, allow_nan=False)


def test_a_model_that_never_refused():
    silent = replace(
        SAID, counts=[AnswerCount(0, 0, 2, 30, 0)], lost_steps={}, probability=None, safe_steps=None
    )
    assert refusal_sentence(silent) is None
    assert "none is refused today" in lost_text(silent, 0.8)
    figure = forecast_figure(replace(made.records()[3], refusals=silent))
    assert [shape.get("yref") for shape in figure.layout["shapes"]] == ["y2"]


def test_refusals_that_are_lost_stand_with_both_answers():
    prompts = [{"prompt": f"<p{i}>", "response": "no"} for i in range(3)]
    answers = [AnsweredPrompts(0, ["No, sorry."] * 3), AnsweredPrompts(60, ["Sure & done", "No.", "Well"])]
    said = made.spoken(prompts, answers)
    outcomes = [["refused"] * 3, ["answered", "refused", "deflected"]]
    rolled = replace(made.rolled(), behaviour=said)
    html = lost_section(replace(SAID, outcomes=outcomes), rolled, show_text=True)
    assert "2 of 28 prompts refused before are no longer refused at step 60" in html
    assert "&lt;p0&gt;" in html
    assert "Sure &amp; done" in html
    assert "&lt;p1&gt;" not in html
    hidden = lost_section(replace(SAID, outcomes=outcomes), rolled, show_text=False)
    assert "p0" not in hidden
    assert "2 of 28" in hidden
    kept = [["refused"] * 3] * 2
    assert lost_section(replace(SAID, outcomes=kept), rolled, show_text=True) == ""


def test_page_and_summary_speak_in_refusals():
    forecast = replace(made.records()[3], refusals=SAID)
    first = verdict_section(forecast, {}, None, Around())
    assert "<dd>28 → 6 of 32<small>80 % interval 2 to 11; a quarter lost by step 20</small></dd>" in first
    assert "<dd>not measured<small>which is not" in verdict_section(made.records()[3], {}, None, Around())
    body = refusal_summary(SAID)
    assert (body["today"], body["at_end"], body["at_end_interval"]) == (28, 6, [2, 11])
    json.dumps(body)
