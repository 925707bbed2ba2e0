"""Budgets, and what they decide, change no number: the store, the place of vectors, the way to products."""

from pathlib import Path

import pytest
import torch

from arisk.anatomy.record import CollectResult, ScoreResult
from arisk.base.artifacts import read_record
from arisk.catalogue import catalogue
from arisk.config.yaml import load_config
from arisk.engine.run import run_stages
from arisk.forecast.record import ForecastResult

DEMO = Path(__file__).parent.parent.parent / "configs" / "demo.yaml"
SETTINGS = [
    *("safety.max_samples=8", "collect.chunk_size=4", "run.threads=1", "rollout.enabled=false"),
    *("score.batches=2", "score.hvp_batches=1", "score.krylov_dim=3", "score.nulls=3", "score.examples=2"),
    *("score.probe_points=2", "training.max_steps=30", "training.batch_size=2", "model.dtype=float64"),
    *("forecast.bootstrap_samples=5", "training.weight_decay=0.1"),
]
SMALL = ["collect.memory_budget_gb=1e-6", "collect.disk_budget_gb=1e-6"]


class Silent:
    """Shows nothing."""

    def __getattr__(self, name):
        return lambda *_, **__: None


def records(folder, *settings):
    """Records of the three stages after a run of the demo with these settings."""
    config = load_config(DEMO, [*SETTINGS, *settings])
    run_stages(catalogue(), config, run_dir=folder, show=Silent(), command="test", last="forecast")
    kinds = {"collect": CollectResult, "score": ScoreResult, "forecast": ForecastResult}
    return [read_record(folder / stage, kind) for stage, kind in kinds.items()]


@pytest.fixture(scope="module")
def with_room(tmp_path_factory):
    return records(tmp_path_factory.mktemp("room") / "run")


@pytest.mark.parametrize("settings", [SMALL, ["collect.store=gram"]], ids=["no room", "gram"])
def test_numbers_are_those_of_a_run_with_room(with_room, tmp_path, settings):
    collected, scored, forecast = records(tmp_path / "run", *settings)
    assert (with_room[0].store, collected.store) == ("gradients", "gram")
    torch.testing.assert_close(collected.gram, with_room[0].gram, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scored.c_krylov, with_room[1].c_krylov, rtol=1e-8, atol=1e-11)
    ours, theirs = (found.forecasters["local"] for found in (forecast, with_room[2]))
    assert theirs.notes == ours.notes == []  # The exact recursion of AdamW, its decay included.
    assert ours.median == pytest.approx(theirs.median, rel=1e-6, abs=1e-9)
    assert ours.upper == pytest.approx(theirs.upper, rel=1e-6, abs=1e-9)
    assert ours.collapse_step == theirs.collapse_step


def test_a_sampled_fisher_has_the_same_labels_in_every_stage(tmp_path):
    sampled = "collect.fisher=sampled"
    ours, theirs = (
        records(tmp_path / store, sampled, f"collect.store={store}")[1] for store in ("gram", "gradients")
    )
    torch.testing.assert_close(ours.c_update, theirs.c_update, rtol=1e-8, atol=1e-11)
