import math

import pytest
import torch

from arisk.geometry.dynamics import krylov_path, quadratic_path, read_at_flow
from arisk.training.schedules import learning_rates


def test_reading_is_exact_on_squares_and_knows_its_end():
    times = torch.tensor([0.0, 1.0, 3.0, 4.0], dtype=torch.float64)
    values = torch.stack([times**2, -(times**2)])
    wanted = torch.tensor([0.0, 0.5, 2.0, 3.7, 4.0, 4.0 * (1 + 1e-12), 4.1])
    found = read_at_flow(times, values, wanted.double())
    assert torch.allclose(found[0, :6], wanted[:6].double() ** 2, rtol=1e-9)
    assert torch.allclose(found[1], -found[0], equal_nan=True)
    assert torch.isnan(found[:, 6]).all()


def test_one_point_answers_for_itself_alone():
    found = read_at_flow(torch.zeros(1, dtype=torch.float64), torch.zeros(1, 1), torch.tensor([0.0, 0.1]))
    assert found[0, 0] == 0
    assert torch.isnan(found[0, 1])


def quadratic(seed=0, size=5):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, dtype=torch.float64, generator=generator)
    vectors = torch.linalg.qr(root).Q
    # A flat, a nearly flat and a negative direction among ordinary ones.
    return vectors @ torch.diag(torch.tensor([6.0, 0.5, 0.0, 1e-12, -0.3], dtype=torch.float64)) @ vectors.T


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_closed_form_is_the_recursion(schedule):
    curvature = quadratic()
    rates = learning_rates(0.3, 50, schedule=schedule, warmup_steps=4)
    found = quadratic_path(curvature, 0.7, rates, torch.ones(50))
    assert torch.allclose(found, krylov_path(curvature, 0.7, rates), rtol=1e-9, atol=1e-12)


def test_groups_of_equal_steps_are_steps():
    curvature = quadratic()
    single = quadratic_path(curvature, 0.7, torch.full((60,), 0.2, dtype=torch.float64), torch.ones(60))
    grouped = quadratic_path(
        curvature, 0.7, torch.full((3,), 0.2, dtype=torch.float64), torch.tensor([10.0, 20.0, 30.0])
    )
    assert torch.allclose(grouped, single[[0, 10, 30, 60]], rtol=1e-9, atol=1e-12)


def test_a_rate_beyond_two_over_curvature_diverges():
    path = quadratic_path(torch.eye(1).double(), 1.0, torch.full((1,), 2.5).double(), torch.tensor([1e5]))
    assert not math.isfinite(float(path[-1, 0]))
