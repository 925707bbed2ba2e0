import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arisk.geometry.dynamics import (
    aic_lower_bound,
    bootstrap_means,
    diffusion,
    first_crossing,
    interpolated_crossing,
    local_change,
)


def test_local_change_is_gradient_plus_fisher():
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(11, 30, dtype=torch.float64, generator=generator)
    delta = torch.randn(30, dtype=torch.float64, generator=generator)
    expected = g.mean(0) @ delta + 0.5 * delta @ (g.T @ g / 11) @ delta
    assert float(local_change(g @ delta).mean()) == pytest.approx(float(expected))


def test_bound_at_an_orthogonal_start_is_quartic():
    t = torch.tensor([0.0, 1.0, 2.0])
    assert aic_lower_bound(t, 3.0, 0.0).tolist() == pytest.approx([0.0, 9 / 8, 9 * 16 / 8])


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 10))
def test_bound_is_never_negative_and_falls_with_overlap(gamma, epsilon, more):
    t = torch.linspace(0, 5, 20, dtype=torch.float64)
    low = aic_lower_bound(t, gamma, epsilon + more)
    assert bool((low >= 0).all())
    assert bool((low <= aic_lower_bound(t, gamma, epsilon)).all())


def test_diffusion_against_a_random_walk():
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(6, 8, dtype=torch.float64, generator=generator)
    noise = torch.randn(8, 5000, dtype=torch.float64, generator=generator)
    rates = torch.full((30,), 0.1, dtype=torch.float64)
    expected = diffusion(g @ noise, rates)
    walks = torch.randn(8, 4000, 30, dtype=torch.float64, generator=generator).sum(2) * 0.1
    measured = 0.5 * (g @ walks).square().mean()
    assert float(expected[-1]) == pytest.approx(float(measured), rel=0.1)
    assert diffusion(torch.zeros(4, 1), rates) is None


def test_bootstrap_means_centre_on_the_mean():
    values = torch.arange(12.0).reshape(6, 2)
    means = bootstrap_means(values, 4000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(means.mean(0), values.to(torch.float64).mean(0), rtol=0.02, atol=0)
    assert float(means[:, 0].std()) == pytest.approx(
        float(values[:, 0].std(correction=0)) / math.sqrt(6), rel=0.1
    )


def test_crossings():
    steps = [0, 1, 2, 4, 8]
    values = torch.tensor([0.0, 0.01, 0.04, 0.16, 0.64], dtype=torch.float64)
    assert first_crossing(steps, values, 0.1) == 4
    assert interpolated_crossing(steps, values, 0.09) == 3  # √ΔL is linear here: exact
    assert interpolated_crossing(steps, values, 0.36) == 6
    assert interpolated_crossing(steps, values, 1.0) is None
    assert first_crossing(steps, torch.tensor([0.0, 0.0, math.nan, 0, 0]), 0.1) == 2
