"""Tail probabilities, false discoveries and rank correlation against definitions and properties."""

import math

import pytest
import torch

from arisk.geometry.statistics import discoveries, positive_share, rank_correlation, tail_probabilities


def student_tail(z, points=400_001):
    """P(T₃ > z) by the trapezoid rule in u = arctan(t/√3), where the density is 2 cos²u/π."""
    u = torch.linspace(math.atan(z / math.sqrt(3)), math.pi / 2, points, dtype=torch.float64)
    return float(torch.trapezoid(2 * torch.cos(u).square() / math.pi, u))


def test_the_tail_is_that_of_students_t_with_three_degrees_of_freedom():
    null = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) * 2 + 5
    z = torch.tensor([-3.0, 0.0, 0.5, 4.0, 50.0, 1e5], dtype=torch.float64)
    found = tail_probabilities(5 + 2 * 1.4826 * z, null)
    for value, expected in zip(found[:-1].tolist(), map(student_tail, z[:-1].tolist()), strict=True):
        assert value == pytest.approx(expected, rel=1e-6)
    # Far out: 2·3√3/(3π z³).
    assert float(found[-1]) == pytest.approx(2 * 3**1.5 / (3 * math.pi * 1e15), rel=1e-6)
    assert bool((found.diff() < 0).all())


def test_a_null_without_spread_lets_only_higher_scores_out():
    found = tail_probabilities(torch.tensor([0.0, 1.0, 2.0]), torch.ones(5))
    assert found.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2, 0.9])
def test_discoveries_are_those_of_the_definition(rate):
    generator = torch.Generator().manual_seed(1)
    p = torch.rand(200, generator=generator, dtype=torch.float64).pow(3)
    ordered = sorted(p.tolist())
    largest = max((k for k in range(1, 201) if ordered[k - 1] <= k * rate / 200), default=0)
    found = discoveries(p, rate)
    assert sorted(p[found].tolist()) == ordered[:largest]
    assert largest > 0


def test_nothing_is_discovered_among_even_probabilities():
    assert len(discoveries(torch.linspace(0.1, 1, 50, dtype=torch.float64), 0.05)) == 0


def test_the_share_counts_positive_scores_only():
    scores = torch.tensor([3.0, -5.0, 1.0])
    assert positive_share(scores, torch.tensor([0, 1])) == pytest.approx(0.75)
    assert math.isnan(positive_share(-scores.abs(), torch.tensor([0])))


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
