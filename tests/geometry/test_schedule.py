import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arisk.training.schedules import flow_times, learning_rates


def test_constant():
    assert learning_rates(0.5, 3).tolist() == [0.5, 0.5, 0.5]


def test_warmup_reaches_the_peak_at_its_last_step():
    assert learning_rates(1.0, 6, warmup_steps=4).tolist() == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_starts_at_the_peak_and_falls(schedule):
    rates = learning_rates(2.0, 50, schedule=schedule, warmup_steps=10)
    assert rates[10] == 2.0
    assert bool((torch.diff(rates[10:]) < 0).all())
    assert 0 < rates[-1] < 0.2


def test_cosine_formula():
    rates = learning_rates(1.0, 8, schedule="cosine")
    expected = [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert rates.tolist() == pytest.approx(expected)


@given(st.integers(1, 300), st.integers(0, 400), st.sampled_from(["constant", "linear", "cosine"]))
def test_rates_stay_between_zero_and_peak(steps, warmup, schedule):
    rates = learning_rates(0.3, steps, schedule=schedule, warmup_steps=warmup)
    assert rates.shape == (steps,)
    assert bool((rates >= 0).all())
    assert bool((rates <= 0.3 + 1e-12).all())


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
