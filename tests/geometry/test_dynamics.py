"""Planned optimizers on the local model against torch, exact flows, and runs along one straight direction."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arisk.geometry.dynamics import (
    LocalModel,
    Recursion,
    aic_lower_bound,
    bootstrap_means,
    diffusion,
    first_crossing,
    interpolate_rows,
    interpolated_crossing,
    krylov_path,
    local_change,
    optimizer_path,
    quadratic_path,
    ray_positions,
    ray_speeds,
    read_at_flow,
    recorded_steps,
)
from arisk.geometry.spectrum import lanczos
from arisk.training.schedules import learning_rates

P, T = 9, 60


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(P, P, dtype=torch.float64, generator=generator)
    return (
        (a + a.T) / 4,
        torch.randn(P, dtype=torch.float64, generator=generator),
        torch.randn(P, dtype=torch.float64, generator=generator),
    )


def torch_path(h, g, theta, optimizer_class, rates, clip=None, **settings):
    """Displacements of the real torch optimizer on the quadratic loss gᵀδ + ½ δᵀHδ."""
    point = theta.clone().requires_grad_()
    optimizer = optimizer_class([point], lr=1.0, **settings)
    path = [torch.zeros_like(theta)]
    for rate in rates.tolist():
        optimizer.param_groups[0]["lr"] = rate
        point.grad = g + h @ (point.detach() - theta)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([point], clip)
        optimizer.step()
        path.append(point.detach() - theta)
    return torch.stack(path)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_krylov_path_is_torch_sgd(seed, momentum, schedule):
    h, g, theta = problem(seed)
    rates = learning_rates(0.02, T, schedule=schedule, warmup_steps=7)
    krylov = lanczos(lambda v: h @ v, g, P)
    path = krylov_path(krylov.projected, krylov.beta, rates, momentum=momentum) @ krylov.basis.tensor().T
    truth = torch_path(h, g, theta, torch.optim.SGD, rates, momentum=momentum)
    torch.testing.assert_close(path, truth, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("optimizer", "decay", "clip"),
    list(itertools.product(["sgd", "adamw"], [0.0, 0.1], [None, 0.5])),
)
def test_optimizer_path_is_torch(optimizer, decay, clip):
    h, g, theta = problem(4)
    rates = learning_rates(0.01, T, schedule="cosine", warmup_steps=5)
    scale = 1 / (g.abs() + 0.1)
    krylov = lanczos(lambda v: scale.sqrt() * (h @ (scale.sqrt() * v)), scale.sqrt() * g, P)
    basis = krylov.basis.tensor() / scale.sqrt()[:, None]
    model = LocalModel(g, basis, krylov.projected, torch.zeros(P, dtype=torch.float64), theta)
    settings = {"momentum": 0.9} if optimizer == "sgd" else {"betas": (0.8, 0.95), "eps": 1e-8}
    recipe = Recursion(rates, optimizer, weight_decay=decay, max_grad_norm=clip, **settings)
    steps = recorded_steps(T, 1000)
    path = torch.stack([delta for _, delta in optimizer_path(model, recipe, steps)])
    which = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    truth = torch_path(h, g, theta, which, rates, clip, weight_decay=decay, **settings)
    # torch clips with norm + 1e-6 in the denominator.
    torch.testing.assert_close(path, truth, rtol=1e-6, atol=1e-9 if clip is None else 1e-6)


def test_adamw_noise_enters_the_second_moment():
    """Against the mean of many real AdamW runs with noisy gradients: without noise it is far off."""
    generator = torch.Generator().manual_seed(0)
    g = torch.full((200,), 0.05, dtype=torch.float64)
    ends = torch.zeros_like(g)
    for _ in range(20):
        point = torch.zeros_like(g).requires_grad_()
        optimizer = torch.optim.AdamW([point], lr=1e-3, weight_decay=0.0)
        for _ in range(100):
            point.grad = g + torch.randn(200, dtype=torch.float64, generator=generator)
            optimizer.step()
        ends += point.detach() / 20
    nothing = torch.zeros(200, 1, dtype=torch.float64)
    model = LocalModel(g, nothing, torch.zeros(1, 1, dtype=torch.float64), torch.ones_like(g))
    recipe = Recursion(learning_rates(1e-3, 100), "adamw")
    _, delta = next(iter(optimizer_path(model, recipe, [100])))
    assert float(delta.mean()) == pytest.approx(float(ends.mean()), rel=0.25)
    assert float(delta.mean()) > -0.02  # the noiseless recursion gives -0.1


def test_recorded_steps():
    assert recorded_steps(5, 10) == [0, 1, 2, 3, 4, 5]
    assert recorded_steps(10, 2) == [0, 10]
    thin = recorded_steps(100_000, 64)
    assert thin[0] == 0
    assert thin[-1] == 100_000
    assert len(thin) <= 64
    assert all(b / a < 1.35 for a, b in itertools.pairwise(thin) if a > 10)


def test_divergence_is_not_hidden():
    t = torch.tensor([[3000.0]], dtype=torch.float64)
    assert not bool(torch.isfinite(krylov_path(t, 1.0, learning_rates(1.0, 400))).all())


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


def test_positions_follow_gradient_flow_on_a_parabola():
    """L(x) = ½ h (x − m)² with slope −hm at 0: flow x(t) = m (1 − e^{−ht})."""
    h, m = 0.8, 2.0
    times = torch.linspace(0, 4, 2001, dtype=torch.float64)
    change = 0.5 * h * (times - m) ** 2 - 0.5 * h * m**2
    increments = torch.full((300,), 0.02, dtype=torch.float64)
    # In flow time the start has speed 1, so x solves dx/dt = 1 − x/m.
    positions = ray_positions(times, change, increments, slope=h * m)
    t = torch.cumsum(increments, 0)
    torch.testing.assert_close(positions[1:], m * (1 - torch.exp(-t / m)), rtol=0.01, atol=1e-3)


def test_speeds_are_clipped_and_stop_at_bad_losses():
    times = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    change = torch.tensor([0.0, -3.0, -3.5, -3.4, float("nan")])
    assert ray_speeds(times, change, slope=1.0).tolist() == pytest.approx([1.0, 0.5, 0.0, 0.0])


def test_position_is_held_at_the_end_of_the_range():
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    positions = ray_positions(times, torch.tensor([0.0, -1.0]), torch.full((5,), 0.4), slope=1.0)
    assert positions.tolist() == pytest.approx([0, 0.4, 0.8, 1.0, 1.0, 1.0])


def test_interpolation_hits_the_points_and_holds_the_ends():
    times = torch.tensor([0.0, 1.0, 3.0])
    values = torch.tensor([[0.0, 2.0, 6.0], [1.0, 1.0, 0.0]])
    got = interpolate_rows(times, values, torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0, 9.0]))
    assert got[0].tolist() == pytest.approx([0, 1, 2, 4, 6, 6])
    assert got[1].tolist() == pytest.approx([1, 1, 1, 0.5, 0, 0])
