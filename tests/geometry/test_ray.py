import pytest
import torch

from arisk.geometry.dynamics import interpolate_rows, ray_positions, ray_speeds


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
