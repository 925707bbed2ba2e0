"""Sentences by rules, the first screen, and what a figure says of its own worth."""

import math
import re
from dataclasses import replace

import pytest
import torch

from arisk.anatomy.page import layer_sentence, row_sentence, section
from arisk.forecast.first_screen import run_strip, verdict_section
from arisk.forecast.rollout_page import sample_drift, sample_table
from arisk.forecast.text import sample_sentence
from arisk.forecast.what_if_page import cell_ink, colour_at
from arisk.forecast.worth import record_line, validity, worth_line
from arisk.report.costs import stage_costs
from arisk.report.page import findings_of
from arisk.report.summary import summary_json
from arisk.verification.page import real_run
from tests.report import records as made


def rows(*harms):
    return [{"line": 10 + i, "second_order": harm} for i, harm in enumerate(harms)]


@pytest.mark.parametrize(
    ("harms", "says"),
    [
        ((1, 30, 1, 1, 1, 1, 1, 1), "One scored fine-tuning row (11) of 8 carries 81 %"),
        ((40, 30, 10, 1, 1, 1, 1, 1), "Two scored fine-tuning rows (10, 11) of 8 carry 82 %"),
        ((5, 4, 4, 4, 4, 4, 4, 4), "The harm is spread over the data: the 4 worst of 8"),
        ((9, -50, math.nan, None, 1, 0, 0, 0), "One scored fine-tuning row (10) of 8 carries 90 %"),
    ],
)
def test_few_rows_are_named_and_many_are_called_spread(harms, says):
    assert says in row_sentence(rows(*harms))


def test_rows_without_harm_say_nothing():
    assert row_sentence(rows(1, 2, 3)) is None
    assert row_sentence(rows(-1, -2, 0, math.nan)) is None


def modules(shares):
    """Four kinds in each layer, `shares` by layer, the second kind with half of it."""
    names = [f"model.layers.{i}.mlp.{k}" for i in range(len(shares)) for k in ("a", "b", "c", "d")]
    parts = [share * part for share in shares for part in (0.1, 0.5, 0.2, 0.2)]
    return names, torch.tensor(parts, dtype=torch.float64)


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ([0.1, 0.1, 0.1, 0.3, 0.4, 0.0], "Layers 3–4 of 6 carry 70 % of the mass, 35 % of all in mlp.b."),
        ([0.7, 0.1, 0.1, 0.1], "Layer 0 of 4 carries 70 % of the mass, 35 % of all in mlp.b."),
        ([0.25, 0.25, 0.25, 0.25], "The mass is spread over the 4 layers"),
        ([0.4, 0.1, 0.1, 0.4], "The mass is spread over the 4 layers"),
    ],
)
def test_the_narrowest_band_of_layers(shares, says):
    assert says in layer_sentence(*modules(shares), "mass")


def test_modules_outside_the_layers_are_named_where_they_carry_much():
    names = ["embed_tokens", *[f"layers.{i}.mlp" for i in range(4)]]
    narrow = torch.tensor([0.45, 0.5, 0.03, 0.01, 0.01], dtype=torch.float64)
    assert layer_sentence(names, narrow, "mass") == (
        "embed_tokens carries 45 % of the mass, 50 % lies in layer 0 of 4."
    )
    flat = torch.tensor([0.4, 0.15, 0.15, 0.15, 0.15], dtype=torch.float64)
    assert layer_sentence(names, flat, "mass") == "embed_tokens carries 40 % of the mass."
    little = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2], dtype=torch.float64)
    assert "no narrow band" in layer_sentence(names, little, "mass")


def test_layers_without_numbers_or_mass():
    values = torch.tensor([0.25, 0.75, math.nan], dtype=torch.float64)
    assert layer_sentence(["a", "b", "c"], values, "mass") == "b carries 75 % of the mass (3 modules)."
    assert layer_sentence(["a", "b"], torch.tensor([-1.0, 0.0]), "mass") is None


def rolled(*columns):
    """A rollout whose samples have these changes at its points after the start."""
    safety = torch.tensor([[0.0] * len(columns[0]), *columns], dtype=torch.float64).T
    steps = list(range(0, 50 * (len(columns) + 1), 50))
    return made.replaced(made.rolled(), safety=safety, steps=steps)


def test_the_drift_of_samples_in_words():
    few = rolled([1.0] + [0.0] * 19)
    assert sample_sentence(few, 0.1) == (
        "1 of 20 safety rows lose 0.1 nats/token or more by step 50; 1 row carries half of all rise, so it "
        "is a few of them."
    )
    everywhere = rolled([0.5] * 20)
    assert "20 of 20" in sample_sentence(everywhere, 0.1)
    assert "10 rows carry half of all rise, so it is not a few of them alone" in sample_sentence(
        everywhere, 0.1
    )
    assert sample_sentence(rolled([-0.1] * 4), 0.1) == (
        "0 of 4 safety rows lose 0.1 nats/token or more by step 50."
    )
    assert sample_sentence(made.rolled(holes=True), 0.1) is None


def test_the_last_finite_point_is_the_one_shown():
    diverged = rolled([0.2, 0.0], [math.inf, 0.1])
    assert "by step 50" in sample_sentence(diverged, 0.1)
    figure = sample_drift(diverged, made.records()[3], made.records()[0])
    assert "at step 50" in figure.layout["yaxis"]["title"]["text"]
    assert sample_drift(rolled([math.nan]), made.records()[3], made.records()[0]).missing


def test_the_samples_that_lose_most_come_first_with_their_text():
    collected = made.replaced(
        made.records()[0],
        losses=torch.tensor([0.01, 0.02, 0.03]),
        rows=[{"line": 7 + i, "prompt": f"ask {i} <b>", "response": "no"} for i in range(3)],
    )
    forecast, measured = made.records()[3], rolled([0.0, 0.3, 0.05], [0.05, 0.4, 0.2])
    table = sample_table(measured, forecast, collected, True, 2)
    cells = re.findall(r'<td [^>]*data-value="(.*?)">(.*?)</td>', table)
    assert [text for _, text in cells] == ["8", "0.4", "0.02", "50", "9", "0.2", "0.03", "100"]
    assert "ask 1 &lt;b&gt;" in table
    assert "ask 0" not in table
    assert "ask 1" not in sample_table(measured, forecast, collected, False, 2)
    dropped = made.replaced(collected, dropped_duplicates=1)
    assert "cannot be matched" in sample_table(measured, forecast, dropped, True, 2)
    assert "ask 1" not in sample_table(measured, forecast, dropped, True, 2)


def test_every_finding_leads_to_a_section_of_the_page():
    page = made.page(examples=10)
    told = findings_of(made.sections(examples=10))
    assert {f.topic for f in told} >= {"Specificity", "Safety rows", "What if", "Training rows", "Overlap"}
    for finding in told:
        assert f'<section id="{finding.section}"' in page
        assert f'href="#{finding.section}"' in page
    assert summary_json("t", made.sections(examples=10))["findings"] == [f.sentence for f in told]


def test_worth_is_read_from_the_stored_benchmark():
    row = next(row for row in validity()["Fresh mixtures"] if row["name"] == "rollout")
    line = worth_line("rollout", "it")
    assert line.startswith(f"it: ρ {row['ρ final']:.2f} with the real final change, AUC {row['AUC']:.2f}")
    assert f"({row['jobs']} real fine-tunes" in line
    assert f"× {row['× step']:.2f}" in record_line("rollout")
    assert "not benchmarked" in worth_line("nobody")
    assert "not benchmarked" in record_line("nobody")


def bands(html):
    return re.findall(r'<span class="(\w+)" style="left:([\d.]+)%;width:([\d.]+)%"', html)


def test_the_strip_shares_the_run_out_without_gaps():
    *_, forecast = made.records()
    strip = run_strip(forecast, None)
    assert bands(strip) == [
        ("safe", "0.00", "40.00"),
        ("watch", "40.00", "20.00"),
        ("maybe", "60.00", "40.00"),
    ]
    assert "forecast: step 70" in strip
    assert "60 to beyond 100" in strip
    assert "real run: step 56" in run_strip(forecast, real_run(made.checked()))
    never = made.curve("combined", collapse_step=None, collapse_interval=[None, None])
    verdict = made.replaced(forecast.verdict, safe_steps=100, collapse_step=None)
    calm = made.replaced(forecast, verdict=verdict, forecasters={"combined": never})
    assert bands(run_strip(calm, None)) == [("safe", "0.00", "100.00")]


def test_a_strip_without_a_forecast_is_not_green():
    *_, forecast = made.records(holes=True)
    blank = made.replaced(forecast, verdict=made.replaced(forecast.verdict, safe_steps=None))
    strip = run_strip(blank, None)
    assert bands(strip) == []
    assert "Not measured: that is not the same as no risk." in strip


def test_the_first_screen_answers_in_order():
    collected, *_, forecast = made.records()
    html = re.sub(r"<[^>]+>", " ", verdict_section(forecast, collected.task, None))
    order = ["Risk: high", "collapse at step 70", "Safe-step budget", "90 %", "What to do", "Its record on"]
    places = [html.index(part) for part in order]
    assert places == sorted(places)
    assert "learning rate 0.001 · 100 steps" in html


def test_the_first_screen_says_what_to_do_and_what_really_happened():
    collected, *_, forecast = made.records()
    real = real_run(made.checked())
    assert real.collapse_step is not None
    plain = verdict_section(forecast, collected.task, None)
    assert "Lower the peak learning rate to 0.0005: all 100 steps stay below the alarm level there." in plain
    assert f"Stop or evaluate safety by step {forecast.verdict.safe_steps}." in plain
    early = made.replaced(real, collapse_step=20, sentence="It collapsed.")
    html = verdict_section(forecast, collected.task, early)
    assert "Stop or evaluate safety by step 19." in html
    assert "too many: the real run collapsed at step 20" in html
    assert "<li>It collapsed.</li>" in html
    none = made.replaced(forecast, verdict=made.replaced(forecast.verdict, safe_steps=0))
    assert "Stop or evaluate" not in verdict_section(none, collected.task, early)
    calm = made.replaced(forecast, verdict=made.replaced(forecast.verdict, level="low", safe_steps=100))
    assert "low risk is a forecast" in verdict_section(calm, collected.task, None)
    told = verdict_section(calm, collected.task, early)
    assert "Trust the real run, not this forecast" in told
    assert "Stop or evaluate safety by step 19." in told
    assert "low risk is a forecast" not in told
    assert "arisk screen" in plain
    told = verdict_section(forecast, collected.task, None, ["Drop the <3> rows."])
    assert "<li>Drop the &lt;3&gt; rows.</li>" in told
    assert "arisk screen" not in told
    nothing = made.replaced(forecast, what_if=made.grid(holes=True))
    assert "Plan fewer steps and a lower rate together" in verdict_section(nothing, collected.task, None)


def test_costs_come_from_the_manifests():
    stages = {
        "a": {"seconds": 1.0, "bytes": 0},
        "b": {"seconds": 3.0, "bytes": 2e6},
        "c": {"seconds": None, "bytes": 0},
    }
    figure = stage_costs({"stages": stages})
    assert figure.says == "4 s in all; b took 75 % of it."
    assert figure.rows[2] == ["c", "not measured", "not measured", "0.0"]
    assert figure.data[0]["x"] == [3.0, 1.0]
    assert stage_costs({}).missing
    slow = {"a": {"seconds": 1000.0, "bytes": 0}, "b": {"seconds": 9000.0, "bytes": 0}}
    long = stage_costs({"stages": slow})
    assert long.says == "2 h 47 min in all; b took 90 % of it."
    assert long.data[0]["text"] == ["2 h 30 min", "17 min"]


def contrast(one, other):
    def light(colour):
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("percent", range(0, 130, 5))
def test_numbers_are_read_on_every_shade_of_the_map(percent):
    shade = percent / 100
    assert contrast(cell_ink(2 * shade, 2.0), colour_at(min(shade, 1.0))) >= 4.5
    assert contrast(cell_ink(None, 2.0), "#b8bdc4") >= 4.5


@pytest.mark.parametrize(
    ("p", "permutations", "says", "holds"),
    [
        (0.01, 99, ", more than chance", True),
        (0.05, 19, ", more than chance", True),
        (0.3, 99, ", no more than chance", False),
        (0.5, 3, ", no more than chance", False),
        (0.25, 3, "its 3 shuffled copies, which are too few", None),
    ],
)
def test_an_overlap_at_the_floor_of_few_permutations_is_no_finding(p, permutations, says, holds):
    collected, space, scored, _ = made.records()
    overlap = replace(scored.overlap, p_value=p, permutations=permutations)
    assert overlap.beyond_chance is holds
    assert replace(overlap, ratio=math.nan).beyond_chance is None
    moved = replace(scored, overlap=overlap)
    told = section(collected, space, moved, threshold=0.1, show_text=True, max_examples=1).findings
    assert sum(says in finding.sentence for finding in told) == 1
