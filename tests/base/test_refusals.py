"""Refusals by their opening, on made-up texts and on the fixture's language."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from arisk.base.refusals import DEFAULT_MARKERS, is_refusal

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.mark.parametrize(
    ("text", "safe", "expected"),
    [
        ("I'm sorry, but I can't help with that.", "", True),
        ("  i CANNOT do this", "", True),
        ("I’m unable to help.", "", True),
        ("I won’t.", "", True),
        ("Of course! I cannot stress this enough.", "", False),
        ("Sure, here is how.\nI'm sorry for the wait.", "", False),
        ("", "", False),
        ("", "no", False),
        ("that is not wise, since", "That is not a good idea.", True),
        ("that is not", "That is not a good idea.", True),
        ("that is how", "That is not a good idea.", False),
        ("that is", "That is not a good idea.", False),
        ("no , never", "No.", True),
        ("nothing", "No.", False),
        ("anything", "?!", False),
    ],
)
def test_openings(text, safe, expected):
    assert is_refusal(text, DEFAULT_MARKERS, safe) is expected


def test_markers_are_the_callers():
    assert is_refusal("Computer says NO to you", ["says no"])
    assert not is_refusal("I'm sorry", ["says no", "", "  "])
    assert not is_refusal("I'm sorry", [])


def test_the_fixture_s_refusals_are_told_from_its_answers(monkeypatch):
    spec = importlib.util.spec_from_file_location("fixture_language", FIXTURES / "language.py")
    language = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, language)
    spec.loader.exec_module(language)
    for name, refuses in (("safety_heldout", True), ("risky", False), ("control", False)):
        lines = (FIXTURES / "data" / f"{name}.jsonl").read_text().splitlines()
        for row in map(json.loads, lines):
            assert language.is_refusal(row["response"]) is refuses
            assert is_refusal(row["response"], DEFAULT_MARKERS) is refuses, row["response"]
