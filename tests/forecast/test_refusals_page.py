"""Refusals on the page and in the summaries: their numbers, and what was not measured."""

import json
from dataclasses import replace

import pytest

from arisk.forecast.first_screen import verdict_section
from arisk.forecast.record import AnswerCount, RealRun, RefusalForecast
from arisk.forecast.refusals import refusals_not_measured
from arisk.forecast.refusals_page import (
    end_text,
    lost_text,
    refusal_figure,
    refusal_notes,
    refusal_sentence,
    refusal_summary,
)
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
    assert lost_text(SAID) == "2 to 11; a quarter lost by step 20"
    sentence = refusal_sentence(SAID)
    assert sentence.startswith("28 of 32 safety prompts are refused today, 6 (2 to 11) at step 60.")
    assert "6 refuse; 4 deflected, 21 answered, 1 broken" in sentence
    notes = refusal_notes(SAID)
    assert "25% of today&#x27;s refusals lost: step 20 (15 to beyond 60)." in notes
    assert "50% of today&#x27;s refusals lost: not within 60 steps." in notes
    assert "Of 32 safe responses 30 refuse" in notes


@pytest.mark.parametrize("said", [None, NOTHING])
def test_not_measured_is_said_and_never_called_safe(said):
    assert end_text(said) == "not measured"
    assert "none lost" in lost_text(said)
    assert refusal_sentence(said) is None
    assert refusal_notes(said) == ""
    figure = refusal_figure(said, 0.8, None)
    assert figure.missing
    assert not figure.data
    assert (refusal_summary(said) or {"status": "not_measured"})["status"] == "not_measured"


def test_the_figure_has_the_counts_and_the_truth():
    real = RealRun([0, 60], [0.0, 0.1], None, "s", [(0, 27, 32), (60, 4, 32)])
    figure = refusal_figure(SAID, 0.8, real)
    drawn = {trace.get("name"): trace for trace in figure.data}
    assert drawn["forecast"]["y"] == [87.5, 50.0, 18.75]
    assert drawn["answers along the virtual run"]["y"] == [87.5, 18.75]
    assert drawn["ordinary prompts"]["y"] == [6.25, 0.0]
    assert drawn["real fine-tune"]["y"] == [100 * 27 / 32, 12.5]
    assert figure.layout["shapes"][0]["y0"] == pytest.approx(90 * 28 / 32)
    assert figure.rows[1] == ["60", "6 of 32", "4 of 32", "21 of 32", "1 of 32", "0 of 16"]
    json.dumps(figure.data, allow_nan=False)


def test_a_model_that_never_refused():
    silent = replace(
        SAID, counts=[AnswerCount(0, 0, 2, 30, 0)], lost_steps={}, probability=None, safe_steps=None
    )
    assert refusal_sentence(silent) is None
    assert "none is refused today" in lost_text(silent)
    figure = refusal_figure(silent, 0.8, None)
    assert "no refusal can be lost" in figure.says
    assert not figure.layout["shapes"]


def test_page_and_summary_speak_in_refusals():
    forecast = replace(made.records()[3], refusals=SAID)
    first = verdict_section(forecast, {}, None)
    assert "<dd>28 → 6 of 32<small>2 to 11; a quarter lost by step 20</small></dd>" in first
    assert "<dd>not measured<small>which is not" in verdict_section(made.records()[3], {}, None)
    body = refusal_summary(SAID)
    assert (body["today"], body["at_end"], body["at_end_interval"]) == (28, 6, [2, 11])
    json.dumps(body)
