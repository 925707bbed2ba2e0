"""Polyak's step on a penalty: its factor, its freedom of scale, and where it stops."""

import pytest
import torch
from torch import nn

from arisk.base.errors import NumericsError
from arisk.guard import relax


@pytest.mark.parametrize("factor", [0.5, 1.5, 2.0])
def test_relaxation_of_one_curvature_is_a_plain_factor(factor):
    x = nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
    before, after = relax(lambda: 7.3 * x.square().sum(), [x], factor=factor, repeats=2)
    shrunk = (1 - factor / 2) ** 2
    assert torch.allclose(x.detach(), shrunk * torch.tensor([3.0, -4.0], dtype=torch.float64))
    assert before == pytest.approx(7.3 * 25)
    assert after == pytest.approx(7.3 * 25 * shrunk**2, abs=1e-12)


def test_relaxation_does_not_depend_on_the_scale_and_moves_nothing_at_zero():
    start = torch.tensor([1.0, 2.0], dtype=torch.float64)
    curvature = torch.tensor([1.0, 9.0], dtype=torch.float64)
    found = []
    for scale in (1.0, 1e6):
        x = nn.Parameter(start.clone())
        relax(lambda x=x, scale=scale: scale * (curvature * x.square()).sum(), [x], factor=1.0, repeats=4)
        found.append(x.detach())
    assert torch.allclose(*found)
    assert float((curvature * found[0].square()).sum()) < float((curvature * start.square()).sum())
    x = nn.Parameter(torch.zeros(2))
    assert relax(lambda: x.square().sum(), [x], factor=1.0, repeats=3) == (0.0, 0.0)
    assert not x.any()


def test_a_penalty_that_is_not_finite_says_so_and_moves_nothing():
    x = nn.Parameter(torch.tensor([1.0]))
    with pytest.raises(NumericsError, match="diverges"):
        relax((x * float("nan")).sum, [x], factor=1.0, repeats=1)
    assert float(x.detach()) == 1


def test_a_penalty_that_the_last_step_makes_infinite_says_so():
    x = nn.Parameter(torch.tensor([1.0]))
    with pytest.raises(NumericsError, match="its value is inf"):
        relax(lambda: x.sum() if x.item() == 1 else x.sum() * float("-inf"), [x], factor=2.0, repeats=1)
