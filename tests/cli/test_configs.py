"""Rows and protections by the configurations that come with the project, at a size for every change."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT / "fixtures" / "data"
#: The embedded model stands in for SmolLM2, and few rows and steps for the plan.
SMALL = {
    "model.path": ROOT / "fixtures" / "tiny-aligned",
    "safety.path": DATA / "safety.jsonl",
    "control.path": DATA / "control.jsonl",
    "finetune.path": DATA / "mixed.jsonl",
    "safety.max_samples": 12,
    "control.max_samples": 20,
    "finetune.max_samples": 40,
    "training.max_steps": 12,
    "run.threads": 1,
}
SCREEN = {"screen.max_steps": 5, "screen.batches": 2, "screen.examples": 3, "screen.what_if": False}
GUARD = {
    "guard.methods": "[replay,own_replay,kl,alpha]",
    "guard.task_samples": 8,
    "guard.generate": 8,
    "guard.ordinary": 4,
}


@pytest.mark.parametrize("name", ["smollm2-gsm8k", "smollm2-identity-aoa"])
def test_a_config_screens_and_guards(arisk, tmp_path, name):
    def call(verb, settings):
        given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        code, out, err = arisk(verb, ROOT / "configs" / f"{name}.yaml", "--run-dir", tmp_path / "run", *given)
        assert code == 0, err
        return out

    call("screen", SMALL | SCREEN)
    rows = sum(
        len((tmp_path / "run/screen" / f).read_text().splitlines()) for f in ("kept.jsonl", "flagged.jsonl")
    )
    assert rows == 40
    call("guard", SMALL | GUARD)
    record = json.loads((tmp_path / "run/guard/record.json").read_text())
    assert "own_replay 0.3" in json.dumps(record)
