"""One task, two ways in: the command line and Python give equal records."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from arisk import PipelineConfig, assess
from arisk.anatomy.record import CollectResult, ScoreResult, SubspaceResult
from arisk.base.artifacts import read_record
from arisk.base.terminal import StageDisplay
from arisk.catalogue import catalogue
from arisk.config.yaml import load_config
from arisk.engine.run import run_stages
from arisk.forecast.record import ForecastResult, RolloutResult
from arisk.models import load_task

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
SMALL = [
    "safety.max_samples=8",
    "control.max_samples=8",
    "collect.chunk_size=4",
    "score.batches=2",
    "score.hvp_batches=1",
    "score.krylov_dim=2",
    "score.nulls=3",
    "score.examples=4",
    "score.probe_points=2",
    "training.max_steps=12",
    "training.batch_size=2",
    "rollout.enabled=false",
    "behaviour.prompts=0",
    "forecast.bootstrap_samples=20",
    "run.threads=1",
]
RECORDS = {
    "collect": ("collected", CollectResult),
    "subspace": ("space", SubspaceResult),
    "score": ("scored", ScoreResult),
    "rollout": ("rollout", RolloutResult),
    "forecast": ("forecasted", ForecastResult),
}


def same(a, b, place):
    """Equal in every field: tensors to the bit, NaN like NaN."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(torch.nan_to_num(a, 7.5), torch.nan_to_num(b, 7.5)), place
    elif dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            same(getattr(a, field.name), getattr(b, field.name), f"{place}.{field.name}")
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            same(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), place
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            same(left, right, f"{place}[{index}]")
    else:
        nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
        assert nan or a == b, (place, a, b)


def both(tmp_path, *settings):
    """The records of `arisk run`, and the report of `arisk.assess` on the same task and settings."""
    config = load_config(DEMO, [*SMALL, *settings])
    folder = tmp_path / "run"
    run_stages(
        catalogue(),
        config,
        run_dir=folder,
        show=StageDisplay(quiet=True),
        command="arisk run",
        last="forecast",
    )
    sections = ("training", "collect", "subspace", "score", "behaviour", "rollout", "forecast")
    given = {name: getattr(config, name).model_dump() for name in sections}
    report = assess(
        load_task(config, device=torch.device("cpu")),
        PipelineConfig(mode="lora", seed=config.run.seed, **given),
    )
    return {name: read_record(folder / name, kind) for name, (_, kind) in RECORDS.items()}, report


@pytest.mark.parametrize(
    "settings", [("collect.store=gram",), ("collect.store=gradients", "collect.fisher=sampled")]
)
def test_records_are_equal(tmp_path, settings):
    stored, report = both(tmp_path, *settings)
    for stage, (attribute, _) in RECORDS.items():
        made = getattr(report, attribute)
        same(stored[stage], made, stage)


def test_sampled_labels_are_not_the_data_labels(tmp_path):
    sampled, report = both(tmp_path / "a", "collect.fisher=sampled")
    empirical, _ = both(tmp_path / "b")
    assert report.collected.fisher == "sampled"
    assert not torch.equal(report.collected.gram, empirical["collect"].gram)
    assert torch.equal(report.collected.gram, sampled["collect"].gram)
