"""The page of a comparison: ranks and words, hostile names, holes, and a real browser."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from arisk.base.artifacts import finite
from arisk.compare.page import drift_scatter, forecast_lines, refusal_lines, render_comparison
from arisk.compare.text import cells, compare_findings, compare_json, compare_markdown, compare_text, headline
from arisk.forecast.record import ProbeForecast
from tests.compare import plans
from tests.report import browser as web
from tests.report.reading import parsed

plan, compared, refusing, HOSTILE = plans.plan, plans.compared, plans.refusing, plans.HOSTILE
QUIZ = ProbeForecast(
    name="quiz",
    measure="choice",
    rows=20,
    tokens=None,
    measured_steps=[0, 100],
    measured=[0.8, 0.5],
    steps=[0, 100],
    median=[0.8, 0.5],
    lower=[0.8, 0.4],
    upper=[0.8, 0.6],
    horizon=100,
    notes=[],
)


def three(**changes):
    return [
        plan("risky", level="high", probability=1.0, peak=1.2, collapse_step=20, **changes),
        plan("mild", level="elevated", probability=0.3, peak=0.09, **changes),
        plan("benign", level="low", probability=0.0, peak=0.002, **changes),
    ]


def holes():
    return [
        plan("unsure", level="inconclusive", probability=None, control_change=None, overlap_to_random=None),
        plan("nothing", level="inconclusive", probability=None, peak=None, control_change=None),
        plan("wild", level="high", probability=1.0, peak=math.inf, collapse_step=3, finetune_rows=0),
    ]


def rendered(runs, **settings):
    return render_comparison(compared(runs, **settings), Path("runs/compare"))


def test_equal_runs_give_equal_bytes_in_any_order():
    assert rendered(three()) == rendered(three()[::-1])
    assert len(rendered(three()).encode()) < 7e6


def test_the_answer_comes_first_and_the_table_in_order():
    text = " ".join(parsed(rendered(three())).text)
    assert "Safest: benign (low); riskiest: risky (high)." in text
    body = text[text.index("Ranking") :]
    assert body.index("benign") < body.index("mild") < body.index("risky")
    assert text.index("Findings") < text.index("Forecasts of all plans") < text.index("Provenance")


def test_hostile_names_stay_text_everywhere():
    runs = [plan(f"{HOSTILE}{i}", level=level, sentence=HOSTILE) for i, level in enumerate(("low", "high"))]
    told = compared(runs, title=HOSTILE, notes=[HOSTILE], command=HOSTILE)
    page = render_comparison(told, Path("runs/compare"))
    structure = parsed(page)
    assert structure.tags.count("script") == 5
    assert "img" not in structure.tags
    assert not any(key.startswith("on") for _, key, _ in structure.attributes)
    (figures,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page)
    json.loads(figures)
    markdown = compare_markdown(told)
    assert "<script" not in markdown
    assert "<img" not in markdown
    json.dumps(finite(compare_json(told)), allow_nan=False)
    assert compare_text(told, "page.html").splitlines()[-1] == "report: page.html"


def test_nothing_is_fetched_and_reports_are_linked_relatively(tmp_path):
    runs = [*three(), plan("d", report=str(tmp_path / "runs" / "d & e" / "report.html"))]
    structure = parsed(render_comparison(compared(runs), tmp_path / "out"))
    links = [v for tag, key, v in structure.attributes if key in ("href", "src", "srcset")]
    assert links.count("../runs/d & e/report.html") == 1
    assert all(v.startswith(("#", "data:", "../runs/")) for v in links)


def test_what_was_not_measured_is_never_a_number_nor_safe():
    told = compared(holes())
    row = {entry.run.name: cells(entry) for entry in told.ranked}
    assert row["nothing"][0] == "–"
    assert row["nothing"][2:9] == ["not measured"] * 7
    assert row["unsure"][0] == "–"
    assert row["unsure"][2] == "inconclusive"
    assert "unbounded" in row["wild"][7]
    assert row["wild"][11] == "wild.jsonl, unknown number of rows"
    assert "safest" not in headline(told).lower()
    assert "2 of 3 cannot be ranked" in headline(told)
    by_name = {run["name"]: run for run in finite(compare_json(told))["runs"]}
    assert by_name["nothing"]["rank"] is None
    assert by_name["nothing"]["final"] is None
    assert by_name["nothing"]["control_change"] is None
    assert by_name["wild"]["final"]["median"] is None


def test_no_plan_is_called_safe_where_none_is_low():
    runs = [plan("a", level="high", probability=1.0), plan("b", level="elevated", probability=0.2)]
    assert headline(compared(runs)) == "No plan is low risk; least bad: b (elevated)."
    assert "none has a conclusive forecast" in headline(compared(holes()[:2]))


def test_plans_that_are_not_told_apart_are_named_together():
    runs = [plan("a", peak=0.02), plan("b", peak=0.025), plan("c", level="high", probability=1.0, peak=2.0)]
    assert headline(compared(runs)) == "Safest: a and b (low, not told apart); riskiest: c (high)."
    assert any("the order is not sure: a and b." in sentence for sentence in compare_findings(compared(runs)))


@pytest.mark.parametrize(
    ("spans", "apart"),
    [
        (((20, 40), (90, None)), True),
        (((20, 40), (30, 60)), False),
        (((20, 40), (None, None)), True),
        ((None, (30, 60)), False),
    ],
)
def test_collapse_steps_far_apart_tell_plans_apart(spans, apart):
    runs = []
    for name, span in zip("ab", spans, strict=True):
        made = plan(name, level="high", probability=1.0, peak=0.5)
        curve = dataclasses.replace(made.curve, collapse_interval=span)
        runs.append(dataclasses.replace(made, curve=curve))
    unsure = any("the order is not sure" in sentence for sentence in compare_findings(compared(runs)))
    assert unsure is not apart


def test_general_drift_and_specific_drift_are_told_apart():
    runs = [
        plan("general", safety_change=0.2, control_change=0.19),
        plan("specific", safety_change=0.2, control_change=0.01),
        plan("still", safety_change=0.001, control_change=0.2),
    ]
    said = [sentence for sentence in compare_findings(compared(runs)) if "drift" in sentence]
    assert any("forgetting): general." in sentence for sentence in said)
    assert any("specific to safety): specific." in sentence for sentence in said)
    assert not any("still" in sentence for sentence in said)


def test_the_overlap_is_said_to_disagree_only_where_it_does():
    def said(first, second):
        runs = [plan("a", peak=0.01, overlap_to_random=first), plan("b", peak=0.02, overlap_to_random=second)]
        return any(
            "overlap" in sentence and "otherwise" in sentence for sentence in compare_findings(compared(runs))
        )

    assert said(9.0, 2.0)
    assert not said(2.0, 9.0)
    assert not said(None, 2.0)


def test_refusals_stand_in_every_form_and_bands_that_overlap_are_not_told_apart():
    runs = [
        plan("safe", refusals=refusing(28, (2, 1)), probes=[QUIZ]),
        plan("near", refusals=refusing(26, (3, 2))),
        plan("far", refusals=refusing(5, (2, 2), lost=12)),
    ]
    told = compared(runs)
    assert [cells(entry)[3] for entry in told.ranked] == [
        "28 of 32 (26 to 29; 28 today)",
        "26 of 32 (23 to 28; 28 today)",
        "5 of 32 (3 to 7; 28 today)",
    ]
    assert headline(told) == "Safest: safe and near (low, not told apart); riskiest: far (low)."
    found = {run["name"]: run for run in finite(compare_json(told))["runs"]}
    assert found["far"]["refusals"] == {
        "prompts": 32,
        "today": 28,
        "at_end": 5,
        "at_end_interval": [3, 7],
        "threshold": 0.1,
        "lost_step": 12,
    }
    assert found["safe"]["probes"][0]["at_end"] == 0.5
    assert "28 of 32 (26 to 29; 28 today)" in compare_text(told, "page.html")
    page = rendered(runs)
    assert "Refusals of all plans" in page
    assert "What else the plans cost" in page
    assert "80 % → 50 %" in page
    lines = [trace["name"] for trace in refusal_lines(told).data if trace.get("name")]
    assert lines == ["safe", "near", "far"]
    without = rendered(three())
    assert "Refusals of all plans" not in without
    assert "What else the plans cost" not in without
    assert "Refusals do not enter" in without


def test_figures_carry_bands_and_say_what_is_missing():
    figure = forecast_lines(compared(three()))
    named = [trace["name"] for trace in figure.data if trace.get("name")]
    assert named == ["benign", "mild", "risky"]
    assert len(figure.data) == 9
    assert drift_scatter(compared(holes()[:2])).missing
    page = rendered(holes()[:2])
    assert "That is not the same as no risk." in page
    assert page.count("<summary>How to read this</summary>") >= 4
    assert page.count("The numbers as a table") == 3


@pytest.fixture(scope="module")
def browser():
    with web.started() as running:
        yield running


@pytest.mark.parametrize(
    ("runs", "figures", "width", "theme"),
    [
        (three(), 3, 360, "dark"),
        (holes(), 2, 1440, "dark"),
        ([plan(f"{HOSTILE}{i}") for i in range(2)], 3, 360, "light"),
        ([plan(f"n{i}", peak=0.01 * i) for i in range(12)], 3, 1440, "light"),
    ],
    ids=["ordinary", "holes", "hostile", "many"],
)
def test_a_browser_draws_it_quietly(browser, tmp_path, runs, figures, width, theme):
    page = rendered(runs, title="w" * 200, notes=["w" * 200]).replace("<details>", "<details open>")
    path = tmp_path / "compare.html"
    path.write_text(page, encoding="utf-8")
    with web.opened(browser, path, width=width, theme=theme) as got:
        assert got.console == []
        assert got.requests == []
        assert got.page.title() != "owned"
        assert got.overflow() <= 0
        assert got.page.evaluate("document.documentElement.dataset.theme") == theme
        assert got.drawn() == [figures, figures]
