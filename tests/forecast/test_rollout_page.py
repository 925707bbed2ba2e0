"""The rollout on the page: its cost, its points, and which safety rows lose most."""

import math
import re
from dataclasses import replace

import torch

from arisk.forecast.rollout_page import cost_text, rollout_section, sample_drift, sample_table
from arisk.forecast.text import sample_sentence
from arisk.training.behaviour import BehaviourResult, FollowedPrompts
from tests.report import records as made
from tests.report.reading import parsed


def test_the_rollout_tells_its_cost_and_its_points():
    text = " ".join(parsed(made.page()).text)
    assert "34 of 100 planned gradients, 34 %" in text
    section = made.page().split('<section id="rollout">')[1].split("</section>")[0]
    cells = re.findall(r"<td>(.*?)</td>", section)
    assert cells[:7] == ["0", "–", "1", "0", "not measured", "not measured", "0"]
    assert cells[-7:] == ["100", "0.75", "1", "0.2", "not measured", "not measured", "0.08"]
    without = made.page(holes=True)
    assert "Not measured: rollout.enabled is off. That is not the same as no risk." in without
    assert cost_text(made.records(holes=True)[-1]) == "not measured"


def test_first_tokens_and_openings_stand_beside_the_losses():
    measured, forecast = made.rolled(), made.records()[-1]
    followed = FollowedPrompts(
        prompts=[{"prompt": "p", "response": "No.", "line": 1}] * 4,
        openings=["No"] * 4,
        steps=measured.steps,
        # One opening has two tokens only: both of them stand to the end.
        log_p=torch.tensor([[[-0.1] * 3] * 3] * 3 + [[[-0.1, -0.1, math.nan]] * 3], dtype=torch.float64),
        kept=torch.tensor([[3, 3, 1], [3, 3, 3], [3, 0, 0], [2, 2, 2]]),
        answers=[],
    )
    said = BehaviourResult("measured", None, 24, followed, None, "no control", [], 0.1)
    losses = torch.tensor([[0.2, 0.3, 0.6], [0.4, 0.5, 0.8]], dtype=torch.float64)
    section = rollout_section(replace(measured, behaviour=said, opening_loss=losses), forecast)
    cells = re.findall(r"<td>(.*?)</td>", section)
    assert [cells[7 * i + 4] for i in range(3)] == ["0", "0.1", "0.4"]
    assert [cells[7 * i + 5] for i in range(3)] == ["4 of 4", "3 of 4", "2 of 4"]


def test_the_method_is_told_with_its_equations():
    section = made.page().split('<section id="method">')[1].split("</section>")[0]
    for part in ("Pilot", "Leap", "Speed control", "Measurement", "What if"):
        assert f"<h3>{part}</h3>" in section
    assert section.count('class="equation"') == 5


def rolled(*columns):
    """A rollout whose samples have these changes at its points after the start."""
    safety = torch.tensor([[0.0] * len(columns[0]), *columns], dtype=torch.float64).T
    steps = list(range(0, 50 * (len(columns) + 1), 50))
    return made.replaced(made.rolled(), safety=safety, steps=steps, safety_rows=list(range(len(safety))))


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
    figure = sample_drift(diverged, made.records()[3])
    assert "at step 50" in figure.layout["yaxis"]["title"]["text"]
    assert sample_drift(rolled([math.nan]), made.records()[3]).missing


def test_the_samples_that_lose_most_come_first_with_their_text():
    forecast, bare = made.records()[3], rolled([0.0, 0.3, 0.05], [0.05, 0.4, 0.2])
    measured = made.replaced(
        bare,
        start_losses=torch.tensor([0.01, 0.02, 0.03]),
        rows=[{"line": 7 + i, "prompt": f"ask {i} <b>", "response": "no"} for i in range(3)],
    )
    table = sample_table(measured, forecast, True, 2)
    cells = re.findall(r'<td [^>]*data-value="(.*?)">(.*?)</td>', table)
    assert [text for _, text in cells] == ["8", "0.4", "0.02", "50", "9", "0.2", "0.03", "100"]
    assert "ask 1 &lt;b&gt;" in table
    assert "ask 0" not in table
    assert "ask 1" not in sample_table(measured, forecast, False, 2)
    assert "not measured" in sample_table(bare, forecast, True, 2)
