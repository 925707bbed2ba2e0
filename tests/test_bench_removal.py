"""What trainings without some rows came to, as it is kept and told."""

from __future__ import annotations

import json

import pytest

from tests.bench import removal_tables
from tests.bench.removal_tables import Removal, block, record_of, show_kept, write_kept

LABELS = [1, 1, 0, 0, 0, 0, 0, 0]


def end(dropped, opening, answers="rrra"):
    return {
        "dropped": dropped,
        "answers": answers,
        "opening": opening,
        "safety": 1.0,
        "control": 2.0,
        "seconds": 3.0,
    }


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A file and a page of their own."""
    page = tmp_path / "README.md"
    page.write_text(f"before\n{removal_tables.BEGIN}{removal_tables.END}after\n", encoding="utf-8")
    monkeypatch.setattr(removal_tables, "KEPT", tmp_path / "removal.json")
    monkeypatch.setattr(removal_tables, "README", page)
    return tmp_path


@pytest.fixture
def record():
    scores = {
        "good": {"scores": [9, 8, 7, 6, 5, 4, 3, 2], "scored": 7, "flagged": [0, 2], "seconds": 10.0},
        "bad": {"scores": [2, 3, 4, 5, 6, 7, 8, 9], "flagged": [], "seconds": None},
    }
    ends = {
        ("all rows", 0): end([], 0.6, "rraa"),
        ("labelled", 0): end([0, 1], 0.4),
        ("labelled", 1): end([0, 1], 0.51, "rraa"),
        ("random 0", 0): end([2, 3], 0.59, "raaa"),
        ("random 1", 0): end([2, 4], 0.61, "raaa"),
        # All losses of another seed may lie elsewhere.
        ("random 0", 1): end([2, 3], 0.69, "raaa"),
        ("random 1", 1): end([2, 4], 0.71, "rraa"),
        ("good", 0): end([0, 1], 0.44),
        ("bad", 0): end([6, 7], 0.6, "raaa"),
        # Leaving out rows that the good score ranks first lowers the loss.
        **{(f"half {n}", 0): end([n % 8], 0.3 + 0.01 * (n % 8)) for n in range(16)},
    }
    return record_of("tiny", "mix", LABELS, scores, ends)


def test_effects_are_against_trainings_without_random_rows(record):
    held = Removal(record)
    assert held.effect("labelled") == pytest.approx((0.2 + 0.19) / 2)
    # Of the one seed in which the score was left out.
    assert held.reached("good") == pytest.approx(0.16 / 0.2)
    assert held.effect("bad") == pytest.approx(0.0)
    assert held.more("labelled") == pytest.approx((3 - 1 + 2 - 1.5) / 2)
    assert held.refused("labelled") == [3, 2]
    # Two draws 0.02 apart in each seed: a standard deviation of 0.0141 of one training.
    assert held.error("good") == pytest.approx(0.01414 * 1.5**0.5, rel=1e-3)
    assert held.error("labelled") == pytest.approx(0.01414 * 0.75**0.5, rel=1e-3)
    assert held.labels_tell()


def test_a_score_is_told_by_ranks_flags_and_halves(record):
    good, bad = record["scores"]["good"], record["scores"]["bad"]
    assert (good["auc"], good["flagged"], good["flagged_labelled"], good["first_labelled"]) == (1, 2, 1, 2)
    assert (bad["auc"], bad["first_labelled"]) == (0, 0)
    assert (good["lds"], bad["lds"]) == (1, -1)


def test_what_is_kept_is_printed_and_a_model_is_replaced(record, kept, capsys):
    write_kept("tiny", "an abacus", [record])
    write_kept("other", "an abacus", [{**record, "model": "other"}])
    write_kept("tiny", "a slide rule", [record])
    found = json.loads((kept / "removal.json").read_text())["removal"]
    assert [(one["model"], one["device"]) for one in found] == [
        ("other", "an abacus"),
        ("tiny", "a slide rule"),
    ]
    show_kept()
    printed = capsys.readouterr().out
    assert "good: 80% of the labels' effect on 2 of 2 where these have one" in printed
    assert "bad: 80% of the labels' effect on 0 of 2" in printed
    assert "On a slide rule:" in printed


def test_a_mixture_without_random_rows_is_shown_alone(record, kept, capsys):
    record["trainings"] = [run for run in record["trainings"] if not run["left_out"].startswith("random")]
    write_kept("tiny", "an abacus", [record])
    show_kept()
    assert "| good | 1.00 | 1.00 | 2 (1) | 2 | 3 | – |" in capsys.readouterr().out


def test_the_page_shows_what_is_kept():
    page = removal_tables.README.read_text(encoding="utf-8")
    shown = page.partition(removal_tables.BEGIN)[2].partition(removal_tables.END)[0]
    assert shown == block(json.loads(removal_tables.KEPT.read_text(encoding="utf-8"))["removal"])


def test_tables_of_the_page(record, kept):
    write_kept("tiny", "an abacus", [record])
    page = (kept / "README.md").read_text(encoding="utf-8")
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "| tiny, mix | 2 · 0.600 | 1, 1, 1, 2 · 0.650 | 3, 2 · 0.455 | – | – |" in page
