"""What trainings without some rows came to, as it is kept and told."""

from __future__ import annotations

import json

import pytest

from tests.bench import removal_tables
from tests.bench.removal_tables import Removal, record_of, show_kept, write_kept

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
def record():
    scores = {
        "good": {"scores": [9, 8, 7, 6, 5, 4, 3, 2], "flagged": [0, 2], "seconds": 10.0},
        "bad": {"scores": [2, 3, 4, 5, 6, 7, 8, 9], "flagged": [], "seconds": None},
    }
    ends = {
        ("all rows", 0): end([], 0.6, "rraa"),
        ("labelled", 0): end([0, 1], 0.4),
        ("labelled", 1): end([0, 1], 0.42, "rraa"),
        ("random 0", 0): end([2, 3], 0.59, "raaa"),
        ("random 1", 0): end([2, 4], 0.61, "raaa"),
        ("good", 0): end([0, 1], 0.44),
        ("bad", 0): end([6, 7], 0.6, "raaa"),
        # Leaving out rows that the good score ranks first lowers the loss.
        **{(f"half {n}", 0): end([n % 8], 0.3 + 0.01 * (n % 8)) for n in range(16)},
    }
    return record_of("tiny", "mix", LABELS, scores, ends)


def test_effects_are_against_trainings_without_random_rows(record):
    held = Removal(record)
    assert held.effect("labelled") == pytest.approx(0.19)
    assert held.reached("good") == pytest.approx(0.16 / 0.19)
    assert held.effect("bad") == pytest.approx(0.0)
    assert held.more("labelled") == pytest.approx(2.5 - 1)
    assert held.refused("labelled") == [3, 2]
    # Two draws 0.02 apart: a standard deviation of 0.0141 of one training.
    assert held.error("labelled") == pytest.approx(0.01414, rel=1e-3)
    assert held.labels_tell()


def test_a_score_is_told_by_ranks_flags_and_halves(record):
    good, bad = record["scores"]["good"], record["scores"]["bad"]
    assert (good["auc"], good["flagged"], good["flagged_labelled"], good["first_labelled"]) == (1, 2, 1, 2)
    assert (bad["auc"], bad["first_labelled"]) == (0, 0)
    assert (good["lds"], bad["lds"]) == (1, -1)


def test_what_is_kept_is_printed_and_a_model_is_replaced(record, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(removal_tables, "KEPT", tmp_path / "removal.json")
    write_kept("tiny", "an abacus", [record])
    write_kept("other", "an abacus", [{**record, "model": "other"}])
    write_kept("tiny", "a slide rule", [record])
    kept = json.loads((tmp_path / "removal.json").read_text())["removal"]
    assert [(one["model"], one["device"]) for one in kept] == [
        ("other", "an abacus"),
        ("tiny", "a slide rule"),
    ]
    show_kept()
    printed = capsys.readouterr().out
    assert "good: 80% of the labels' effect on 2 of 2 where these have one" in printed
    assert "bad: 80% of the labels' effect on 0 of 2" in printed
    assert "On a slide rule:" in printed


def test_a_mixture_without_random_rows_is_shown_alone(record, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(removal_tables, "KEPT", tmp_path / "removal.json")
    record["trainings"] = [run for run in record["trainings"] if not run["left_out"].startswith("random")]
    write_kept("tiny", "an abacus", [record])
    show_kept()
    assert "| good | 1.00 | 1.00 | 2 (1) | 2 | 3 | – |" in capsys.readouterr().out


NAMED = {"smollm2-refusing": "SmolLM2", "gemma-refusing": "gemma"}


KEPT = json.loads(removal_tables.KEPT.read_text(encoding="utf-8"))["removal"]


def told():
    """Rows of the table in `tests/bench/README.md`."""
    page = (removal_tables.KEPT.parents[1] / "README.md").read_text(encoding="utf-8")
    part = page.partition("| model and mixture | labelled |")[2].partition("\n\n")[0]
    return part.replace("**", "").splitlines()[2:]


def test_every_row_of_the_table_is_kept():
    assert len(told()) == len(KEPT)


@pytest.mark.parametrize("kept", KEPT)
def test_the_table_tells_what_is_kept(kept):
    held = Removal(kept)
    name = f"{NAMED[kept['model']]}, {kept['mixture'].removeprefix('ordinary, ')}"
    row = next(line for line in told() if line.startswith(f"| {name}"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    names = ("labelled", "point, opening", "path, opening")
    assert cells[1:7] == [
        f"{kept['labelled']} of {kept['rows']}",
        str(*held.refused("all rows")),
        ", ".join(str(run["answers"].count("r")) for run in held.random),
        *(str(*held.refused(name)) for name in names),
    ]
    means = [sum(run["opening"] for run in held.random) / len(held.random)]
    means += [held.runs[name][0]["opening"] for name in names]
    assert [float(number) for number in cells[7].split("·")] == pytest.approx(means, abs=0.0011)
    ranks = [kept["scores"][name]["auc"] for name in names[1:]]
    assert [float(number) for number in cells[8].split(",")] == pytest.approx(ranks, abs=0.0051)


def test_dull_numbers_are_told_as_they_are_kept():
    page = (removal_tables.KEPT.parents[1] / "README.md").read_text(encoding="utf-8")
    rows = page.partition("| left out | compliance 10 | AUC | worst slices |")[2].partition("\n\n")[0]
    held = {one["mixture"]: Removal(one) for one in KEPT if one["model"] == "smollm2-refusing"}
    named = [line.strip("| ").split(" | ") for line in rows.splitlines()[4:]]
    assert [cells[0] for cells in named] == ["gradient norm", "loss", "−cos at θ*", "length", "prompt length"]
    for name, *cells in named:
        for mixture, count, rank in (
            ("compliance 10", *cells[:2]),
            ("ordinary, worst slices", *cells[2:]),
        ):
            one = held[mixture]
            assert count == f"{one.refused(name)[0]} · {one.runs[name][0]['opening']:.3f}".replace(
                " 0.", " ."
            )
            assert float(rank) == pytest.approx(one.record["scores"][name]["auc"], abs=0.0051)
