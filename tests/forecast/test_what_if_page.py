"""The what-if map: every state of a cell, and numbers that are read on every shade."""

import pytest

from arisk.forecast.what_if_page import cell_ink, colour_at, what_if_map
from tests.report import records as made
from tests.report.reading import figure, parsed


def test_every_state_of_a_cell_is_told_apart():
    unknown, known, labels = figure(made.page(), "what-if")["data"]
    told = dict(zip(zip(labels["y"], labels["x"], strict=True), labels["text"], strict=True))
    rows = [[told[rate, step] for step in ("50", "100", "200")] for rate in ("0.0005", "0.001", "0.002")]
    assert rows == [["✓", "✓", ".20!"], ["✓", ".20!", ""], ["~.20!", "!", "×"]]
    assert [told[rate, "safe<br>steps"] for rate in ("0.0005", "0.001")] == ["<b>≥ 180</b>", "<b>70</b>"]
    assert known["z"][1][2] is None
    assert [row.count(None) for row in unknown["z"]] == [3, 2, 3]
    assert unknown["z"][1][2] == 1
    told = known["customdata"]
    assert "by the rollout" in told[0][0]
    assert "[−0.0005, −0.002]" in told[0][0]
    assert "rough: noise" in told[2][0]
    assert told[1][2].endswith("not measured: would need its own run<br>beyond")
    frames = figure(made.page(), "what-if")["layout"]["shapes"]
    inks = {f["line"]["color"]: (f["x0"], f["y0"]) for f in frames}
    assert (inks["#0072B2"], inks["#009E73"]) == ((0.5, 0.5), (0.5, -0.5))
    text = " ".join(parsed(made.page()).text)
    assert "? (none)" in text
    assert "grey: would need a run of its own." in text
    assert "That cell has the green frame." in text


def test_where_no_rate_stays_safe_for_the_whole_plan_the_longest_run_is_named():
    grid = made.grid()
    rows = [made.replaced(row, at_plan=row.cells[2] if row.factor < 1 else row.at_plan) for row in grid.rows]
    shown = what_if_map(made.replaced(grid, rows=rows))
    assert shown.says.startswith("At none of these learning rates do all 100 steps stay within the limits")
    assert "50 steps at 0.001" in shown.says


def test_where_refusals_were_counted_the_map_speaks_of_them():
    grid = made.grid()
    kept = {"refused": 1.0, "refused_lower": 0.95, "refused_upper": 1.0, "refusals_kept": True}
    gone = {"refused": 0.25, "refused_lower": 0.1, "refused_upper": 0.4, "refusals_kept": False}
    rows = [
        made.replaced(
            row,
            cells=[
                made.replaced(row.cells[0], **kept),
                made.replaced(row.cells[1], **gone),
                made.replaced(row.cells[2], refusals_kept=False),
            ],
        )
        for row in grid.rows
    ]
    shown = what_if_map(made.replaced(grid, rows=rows, prompts=20, today=20, refusals_lost=0.1))
    unknown, known, labels = shown.data
    assert labels["text"][:6] == ["✓", "5!", ".20!", "✓", "5!", ""]
    assert [row[:2] for row in known["z"]] == [[0.0, 0.75]] * 3
    assert "refuses 5 of 20 at its end [2, 8]" in known["customdata"][0][1]
    assert "refusals: would need its own run" in known["customdata"][0][2]
    assert shown.rows[0][4].startswith("5! refused; ")
    assert "how many of 20 safety prompts" in shown.reading
    assert unknown["z"][1][2] == 1
    alone = what_if_map(grid)
    assert "refuses" not in " ".join([alone.reading, *alone.data[1]["customdata"][0]])


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
