"""Sets that overlap answer for each other, and a run says so."""

import json
from pathlib import Path

import pytest
import torch

from arisk.config.plan import Config, ForecastConfig
from arisk.forecast.verdict import decide
from arisk.models import load_task
from tests.report import records

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
SAFETY, RISKY = (FIXTURES / "data" / f"{name}.jsonl" for name in ("safety", "risky"))


def warnings(**files):
    values = {"model": {"path": str(FIXTURES / "tiny-aligned")}}
    heldout = files.pop("heldout", None)
    values |= {name: {"path": str(path), "max_samples": 6} for name, path in files.items()}
    if heldout:
        values["verify"] = {"safety": {"path": str(heldout), "max_samples": 6}}
    return load_task(Config.model_validate(values), device=torch.device("cpu")).description["data_warnings"]


@pytest.fixture
def apart(tmp_path):
    """Rows that no other set has."""
    file = tmp_path / "apart.jsonl"
    rows = [{"prompt": f"how do i grow roses {i} ?", "response": "with water"} for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_sets_apart_say_nothing(apart):
    assert warnings(safety=SAFETY, finetune=apart) == []


def test_the_same_file_for_two_sets_is_said(apart):
    assert warnings(safety=SAFETY, finetune=SAFETY) == ["finetune: 6 of 6 rows are rows of safety too."]
    found = warnings(safety=SAFETY, finetune=apart, control=apart, heldout=SAFETY)
    assert sorted(found) == [
        "control: 6 of 6 rows are rows of finetune too.",
        "verify.safety: 6 of 6 rows are rows of safety too.",
    ]


def test_an_overlap_is_a_caveat_of_the_verdict(apart):
    curve = records.curve("combined")
    for files in ({"safety": SAFETY, "finetune": SAFETY}, {"safety": SAFETY, "finetune": apart}):
        found = warnings(**files)
        verdict = decide({"combined": curve}, ForecastConfig(), 100, warnings=[*found, "Something else."])
        assert [caveat for caveat in verdict.caveats if caveat in (*found, "Something else.")] == found


def test_prompts_with_another_answer_are_said(apart, tmp_path):
    rows = [json.loads(line) for line in apart.read_text().splitlines()]
    other = tmp_path / "other.jsonl"
    changed = [
        {**row, "response": "no"} if i < 4 else {**row, "prompt": str(i)} for i, row in enumerate(rows)
    ]
    other.write_text("".join(json.dumps(row) + "\n" for row in changed))
    assert warnings(safety=apart, finetune=other) == ["finetune: 4 of 6 rows have a prompt of safety."]
