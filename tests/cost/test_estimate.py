"""What a plan takes, before it starts: weighed by what a backward pass keeps, told in one sentence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from arisk.base.errors import ConfigError
from arisk.base.task import SampleSet, Task
from arisk.config.plan import Config
from arisk.cost import estimate as module
from arisk.cost.check import plan_text
from arisk.cost.estimate import calibrate

CONFIG = Config.model_validate(
    {"model": {"source": "python", "entry": "nowhere:make"}, "training": {"batch_size": 4}}
)
WIDE = 4096


def loss(model, batch):
    return model(batch).square().mean(1)


def task(batch: int = 4) -> Task:
    """Two layers with one hidden tensor of `WIDE` numbers a row."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, WIDE), nn.Tanh(), nn.Linear(WIDE, 8))
    rows = [torch.randn(batch, 8) for _ in range(3)]
    return Task(
        model=model,
        safety=SampleSet("safety", rows, loss),
        finetune=SampleSet("finetune", rows, loss),
        parameter_names=[name for name, _ in model.named_parameters()],
    )


def test_memory_is_what_the_backward_pass_keeps() -> None:
    """Tanh keeps its output, which the second layer shares; beside it inputs and outputs of eight numbers."""
    found = calibrate(task(), CONFIG)
    trained = sum(p.numel() for p in task().model.parameters()) * 4
    kept = 4 * (WIDE + 8 + 8) * 4
    step = 3 * trained + (1 + module.WORKSPACE) * kept
    assert found.step_gb == pytest.approx(step / 1e9, rel=0.05)
    assert found.seconds["gradient rows"] > found.seconds["forward rows"] > 0


def test_a_larger_batch_weighs_more_and_leaves_the_model_as_it_was() -> None:
    one, eight = task(1), task(8)
    before = [p.detach().clone() for p in eight.model.parameters()]
    light, heavy = calibrate(one, CONFIG).step_gb, calibrate(eight, CONFIG).step_gb
    per_row = (1 + module.WORKSPACE) * (WIDE + 16) * 4 / 1e9
    assert heavy - light == pytest.approx(7 * per_row, rel=0.05)
    assert all(torch.equal(p, q) for p, q in zip(eight.model.parameters(), before, strict=True))
    assert all(p.grad is None for p in eight.model.parameters())


def test_no_room_for_one_step_is_refused_with_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, timed = task(), calibrate(task(), CONFIG)
    monkeypatch.setattr(module, "_available", lambda: timed.step_gb * 1.01)
    module._refuse_small(plan, timed)
    monkeypatch.setattr(module, "_available", lambda: 0.0)
    with pytest.raises(ConfigError) as caught:
        module._refuse_small(plan, timed)
    assert f"{timed.step_gb:.2f} GB" in caught.value.what
    assert "training.batch_size" in caught.value.fix


@pytest.mark.parametrize(
    ("verdict", "real", "carried", "told"),
    [
        (40.0, 130.0, False, "forecast: about 40 s · really doing it: about 2.2 min → run it"),
        (400.0, 130.0, False, "`arisk verify` answers this sooner"),
        (90.0, 90.0, True, "`arisk run` carries so short a plan out"),
    ],
)
def test_it_ends_with_what_to_do(verdict: float, real: float, carried: bool, told: str) -> None:
    plan = {
        "stages": {},
        "seconds": 1.0,
        "memory_gb": 1.0,
        "warnings": [],
        "verdict_seconds": verdict,
        "real_seconds": real,
        "carried_out": carried,
    }
    assert told in plan_text({"plan": plan}).splitlines()[-1]
