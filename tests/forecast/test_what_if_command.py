"""Number lists and the tables of `arisk what-if`."""

import json
import math
from dataclasses import replace

import pytest

from arisk.base.errors import ConfigError
from arisk.forecast.record import WhatIfCell, WhatIfGrid, WhatIfRow
from arisk.forecast.what_if_command import grid_json, grid_text, number_list


def grid():
    plan = [
        WhatIfCell(50, "measured", "rollout", False, 0.02, 0.01, math.inf, 0.03, math.inf),
        WhatIfCell(100, "not_measured", "none"),
    ]
    fast = [
        WhatIfCell(50, "measured", "local", True, 0.31, 0.2, 0.4, 0.31, 0.4, collapse_step=20),
        WhatIfCell(100, "collapses", "rollout", collapse_step=40),
    ]
    rows = [
        WhatIfRow(1e-3, 1.0, plan, plan[1], 60, at_least=True),
        WhatIfRow(4e-3, 4.0, fast, fast[1], 7, False, True),
    ]
    return WhatIfGrid(1e-3, 100, 0.1, 0.03, [50, 100], rows, ["a note"])


def test_lists():
    assert number_list(None, int, "--steps") is None
    assert number_list("1e-4, 2e-4", float, "--learning-rate") == [1e-4, 2e-4]
    assert number_list("5", int, "--steps") == [5]


@pytest.mark.parametrize(
    ("text", "kind", "what"),
    [
        ("", float, "'' is not a number"),
        ("1e-4,,2", float, "'' is not a number"),
        ("x", float, "'x' is not a number"),
        ("nan", float, "nan is not a positive number"),
        ("inf", float, "inf is not a positive"),
        ("-1", float, "-1 is not a positive"),
        ("0", int, "0 is not a positive whole number"),
        ("1.5", int, "'1.5' is not a whole number"),
        ("100000000", int, "up to 10000000"),
        (",".join("1" * 65), int, "65 values are too many"),
    ],
)
def test_bad_lists_say_what_and_how(text, kind, what):
    with pytest.raises(ConfigError) as caught:
        number_list(text, kind, "--option")
    assert what in caught.value.what
    assert "--option" in caught.value.fix


def test_the_tables_tell_every_state_apart():
    text = grid_text(grid())
    ends, collapses, *rest = text.split("\n\n")
    plan, fast = ends.splitlines()[3:]
    assert plan.startswith("*0.001 (1 × plan)")
    assert plan.split()[-2:] == ["0.02", "?"]
    assert fast.split()[-2:] == ["~0.31!", "!"]
    assert [line.split()[-2:] for line in collapses.splitlines()[3:]] == [["none", "?"], ["20", "40"]]
    rest = "\n".join(rest)
    assert "≥ 60" in rest
    assert "~7" in rest
    assert "local, rollout" in rest
    assert "note: a note" in rest


def test_counted_refusals_have_a_table_of_their_own():
    made = grid()
    refused = {"refused": 0.3, "refused_lower": 0.2, "refused_upper": 0.5, "refusals_kept": False}
    rows = [replace(row, cells=[replace(row.cells[0], **refused), row.cells[1]]) for row in made.rows]
    counted = replace(made, rows=rows, prompts=20, today=18, refusals_lost=0.1)
    first, *_ = grid_text(counted).split("\n\n")
    assert "safety prompts refused after so many steps (of 20; 18 today)" in first
    assert [line.split()[-2:] for line in first.splitlines()[3:]] == [["6!", "?"], ["~6!", "?"]]
    lines = grid_text(counted, cells=True).splitlines()
    assert "refused of 20" in lines[0]
    assert "6! (4 to 10)" in lines[2]
    body = json.loads(json.dumps(grid_json(counted), allow_nan=False))
    assert body["rows"][0]["cells"][0]["refused"] == 0.3
    assert body["rows"][0]["cells"][1]["refused"] is None
    assert "safety prompts refused" not in grid_text(made)


def test_cells_in_a_few_characters():
    def text(change, threshold=0.1, **changes):
        return WhatIfCell(5, "measured", "rollout", change=change, **changes).text(threshold)

    assert [text(v) for v in (0.0, -0.001, -0.02, 0.314, 12.0)] == ["0.00", "0.00", "−0.02", "0.31", "12.00"]
    assert text(0.0123, threshold=0.02) == "0.012"
    assert text(5e4, collapse_step=3) == "> 1e3!"
    assert WhatIfCell(5, "diverges", "rollout", rough=True, collapse_step=3).text(0.1) == "~×"


def test_long_form_and_json():
    lines = grid_text(grid(), cells=True).splitlines()
    assert "+0.01 … +inf" in lines[2]
    assert "not measured" in lines[3]
    assert lines[3].split()[-1] == "none"
    body = json.loads(json.dumps(grid_json(grid()), allow_nan=False))
    assert body["rows"][0]["cells"][0]["upper"] is None
    assert body["rows"][0]["cells"][1]["change"] is None
    assert body["rows"][1]["cells"][1]["state"] == "collapses"
