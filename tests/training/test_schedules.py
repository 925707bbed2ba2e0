"""Schedules against `transformers.get_scheduler`, and what they share."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from arisk.base.errors import ConfigError
from arisk.config import names
from arisk.config.plan import TrainingConfig
from arisk.training.recipe import recipe_of, step_batches, warmup_steps
from arisk.training.schedules import SCHEDULES, flow_times, learning_rates, schedule_named

#: Arguments of every schedule; several sets where they change its shape.
ARGUMENTS = {
    "constant": [{}],
    "constant_with_warmup": [{}],
    "linear": [{}],
    "cosine": [{}, {"num_cycles": 1.5}],
    "cosine_with_restarts": [{}, {"num_cycles": 3}],
    "cosine_with_min_lr": [{"min_lr": 1e-4}, {"min_lr_rate": 0.25, "num_cycles": 1.0}],
    "cosine_warmup_with_min_lr": [{"min_lr": 1e-4}, {"min_lr_rate": 0.25, "warmup_lr_rate": 0.1}],
    "polynomial": [{}, {"power": 2.0, "lr_end": 1e-4}],
    "inverse_sqrt": [{}, {"timescale": 50}],
    "warmup_stable_decay": [
        {"num_decay_steps": 6},
        {"num_decay_steps": 6, "num_stable_steps": 4, "decay_type": "linear", "min_lr_ratio": 0.1},
        {"num_decay_steps": 6, "decay_type": "1-sqrt", "warmup_type": "1-sqrt"},
        {"num_decay_steps": 6, "warmup_type": "cosine", "num_cycles": 0.3},
    ],
}
CASES = [(name, arguments) for name, sets in ARGUMENTS.items() for arguments in sets]


def test_every_schedule_is_held_to_the_library():
    assert set(ARGUMENTS) == set(SCHEDULES) == set(names.SCHEDULES)


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=str)
@pytest.mark.parametrize(("total", "warmup"), [(24, 0), (24, 5), (10, 1), (1, 0)])
@pytest.mark.filterwarnings("ignore:Both num_training_steps")
def test_rates_are_the_librarys(name, arguments, total, warmup):
    transformers = pytest.importorskip("transformers")
    peak = 3e-3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = transformers.get_scheduler(name, optimizer, warmup, total, dict(arguments))
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    found = learning_rates(peak, total, schedule=name, warmup_steps=warmup, arguments=arguments)
    assert found.tolist() == pytest.approx(expected, rel=1e-13, abs=1e-18)


def test_the_first_step_of_a_warmup_does_not_move():
    found = learning_rates(1.0, 6, schedule="constant_with_warmup", warmup_steps=4)
    assert found.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rates(0.5, 3, warmup_steps=2).tolist() == [0.5, 0.5, 0.5]


def test_cosine_formula():
    rates = learning_rates(1.0, 8, schedule="cosine")
    assert rates.tolist() == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)])


@given(st.integers(1, 300), st.integers(0, 400), st.sampled_from(["constant", "linear", "cosine"]))
def test_rates_stay_between_zero_and_peak(steps, warmup, schedule):
    rates = learning_rates(0.3, steps, schedule=schedule, warmup_steps=warmup)
    assert rates.shape == (steps,)
    assert bool((rates >= 0).all())
    assert bool((rates <= 0.3 + 1e-12).all())


def test_a_share_of_the_run_is_rounded_up():
    training = TrainingConfig(schedule="linear", warmup_ratio=0.03)
    assert [warmup_steps(training, steps) for steps in (1, 100, 101)] == [1, 3, 4]
    assert recipe_of(training, 101).rates[:5].tolist() == pytest.approx(
        [0, 5e-5, 1e-4, 1.5e-4, 2e-4], abs=1e-12
    )


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"schedule": "linear", "schedule_args": {"power": 2}}, "training.schedule_args"),
        ({"schedule": "warmup_stable_decay"}, "training.schedule_args"),
        ({"schedule": "cosine_with_min_lr"}, "training.schedule_args"),
        ({"schedule": "polynomial", "schedule_args": {"lr_end": 1.0}}, "training.schedule_args"),
    ],
)
def test_what_is_not_known_is_an_error(settings, where):
    with pytest.raises(ConfigError) as caught:
        recipe_of(TrainingConfig(**settings), 20)
    assert caught.value.where == where
    with pytest.raises(ConfigError):
        schedule_named("cosin", {})
    with pytest.raises(ValidationError, match="did you mean 'cosine'"):
        TrainingConfig(schedule="cosin")
    with pytest.raises(ValidationError, match="no plan can tell it"):
        TrainingConfig(schedule="greedy")


def test_a_further_schedule_is_one_entry(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "steep", lambda i, span, *, base=0.5: base**i)
    training = TrainingConfig(schedule="steep", schedule_args={"base": 0.1}, learning_rate=1.0)
    assert recipe_of(training, 3).rates.tolist() == pytest.approx([1, 0.1, 0.01])
    with pytest.raises(ConfigError):
        schedule_named("steep", {"bass": 1})


def test_epochs_end_with_a_short_step():
    # Five micro-batches, two a step: the third step of an epoch has one.
    assert [list(step_batches(k, 2, 5)) for k in range(1, 6)] == [[0, 1], [2, 3], [4], [5, 6], [7, 8]]
    assert [list(step_batches(k, 3, None)) for k in (1, 2)] == [[0, 1, 2], [3, 4, 5]]
    assert [list(step_batches(k, 4, 1)) for k in (1, 2)] == [[0], [1]]


def test_flow_times_are_what_torch_sgd_moves_under_a_unit_gradient():
    rates = learning_rates(0.1, 20, schedule="linear", warmup_steps=3)
    theta = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=0.1, momentum=0.8)
    moved = [0.0]
    for rate in rates.tolist():
        optimizer.param_groups[0]["lr"] = rate
        theta.grad = -torch.ones_like(theta)
        optimizer.step()
        moved.append(theta.item())
    assert flow_times(rates, momentum=0.8).tolist() == pytest.approx(moved)
