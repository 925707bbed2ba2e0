import math

import pytest
import torch

from arisk.geometry.statistics import rank_correlation


def slow(a, b):
    """Mean ranks by counting, then the correlation coefficient."""

    def ranks(values):
        return [sum(o < v for o in values) + (sum(o == v for o in values) - 1) / 2 for v in values]

    x, y = ranks(a), ranks(b)
    mx, my = sum(x) / len(x), sum(y) / len(y)
    top = sum((p - mx) * (q - my) for p, q in zip(x, y, strict=True))
    return top / math.sqrt(sum((p - mx) ** 2 for p in x) * sum((q - my) ** 2 for q in y))


@pytest.mark.parametrize("seed", range(5))
def test_it_agrees_with_counting_ties_included(seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(0, 6, (25,), generator=generator).double()
    b = a + 3 * torch.randn(25, generator=generator, dtype=torch.float64).round()
    assert rank_correlation(a, b) == pytest.approx(slow(a.tolist(), b.tolist()), abs=1e-12)


def test_any_rising_curve_is_one_and_what_is_undefined_is_nan():
    x = torch.linspace(0.1, 3, 20, dtype=torch.float64)
    assert rank_correlation(x, x.exp()) == pytest.approx(1)
    assert rank_correlation(x, 1 / x) == pytest.approx(-1)
    assert math.isnan(rank_correlation(x, torch.ones(20)))
    assert math.isnan(rank_correlation(x, torch.full((20,), math.nan)))
    assert math.isnan(rank_correlation(x[:1], x[:1]))
    beyond = torch.where(x > 2, math.inf, x)
    assert rank_correlation(x, beyond) == pytest.approx(slow(x.tolist(), beyond.tolist()))
