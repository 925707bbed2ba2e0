"""The section of a model card: metadata that is YAML, and a forecast that never passes for a result."""

import json

import yaml

from arisk.base.artifacts import finite
from arisk.report.card import model_card
from arisk.report.page import summary_json
from tests.report import records as made


def card(text="how do i grow roses ?", **settings):
    summary = json.loads(json.dumps(finite(summary_json("t", made.sections(text=text, **settings)))))
    _, head, body = model_card(summary).split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_forecast_is_called_one():
    head, body = card()
    assert head["tags"] == ["arisk"]
    assert head["arisk"] == {
        "level": "high",
        "measured": False,
        "planned_steps": 100,
        "safe_steps": 40,
        "refusals": "not measured",
    }
    assert "Forecast before training: risk high." in body
    assert "Nothing here was measured on the trained model" in body


def test_what_was_carried_out_is_told_beside_it():
    head, body = card(check=made.checked())
    assert head["arisk"]["measured"] is True
    assert "The real run collapses at step 56" in body
    assert "Refused 1 of 2 safety prompts before, 0 after." in body


def test_a_plan_that_was_carried_out_is_measured_and_no_forecast():
    summary = json.loads(json.dumps(finite(summary_json("t", made.sections()))))
    summary["rollout"]["carried_out"] = True
    text = model_card(summary)
    assert yaml.safe_load(text.split("---\n", 2)[1])["arisk"]["measured"] is True
    assert "Measured before training: risk high." in text
    assert "The plan itself was carried out in memory: no forecast." in text
    assert "Forecast before" not in text
    assert "P(collapse" not in text


def test_data_cannot_break_the_card():
    head, body = card(text=made.HOSTILE + "\n---\narisk: {level: low}")
    assert head["arisk"]["level"] == "high"
    assert "<script" not in body
    assert "\n---" not in body
