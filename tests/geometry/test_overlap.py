import math

import pytest
import torch

from arisk.geometry.spectrum import (
    dual_coefficients,
    eigenpairs,
    fisher_norm,
    fisher_norm_in_subspace,
    permutation_p_value,
    projection_ratio,
    random_overlap,
)

GENERATOR = torch.Generator().manual_seed(0)
G = torch.randn(15, 40, dtype=torch.float64, generator=GENERATOR)
V = torch.randn(40, dtype=torch.float64, generator=GENERATOR)
VALUES, DUAL = eigenpairs(G @ G.T)
BASIS = G.T @ DUAL / (len(G) * VALUES).sqrt()


def test_coefficients_are_dot_products_with_the_dense_basis():
    torch.testing.assert_close(dual_coefficients(G @ V, VALUES, DUAL), BASIS.T @ V, rtol=1e-9, atol=1e-12)
    many = torch.stack([V, 2 * V], dim=1)
    torch.testing.assert_close(
        dual_coefficients(G @ many, VALUES, DUAL), BASIS.T @ many, rtol=1e-9, atol=1e-12
    )


def test_projection_ratio_against_the_dense_projector():
    k = 4
    coefficients = dual_coefficients(G @ V, VALUES[:k], DUAL[:, :k])
    dense = BASIS[:, :k] @ BASIS[:, :k].T @ V
    assert projection_ratio(coefficients, float(V.norm())) == pytest.approx(float(dense.norm() / V.norm()))


def test_ratio_is_one_inside_zero_outside_and_nan_for_zero():
    inside = G.T @ torch.ones(15, dtype=torch.float64)
    assert projection_ratio(
        dual_coefficients(G @ inside, VALUES, DUAL), float(inside.norm())
    ) == pytest.approx(1)
    outside = V - BASIS @ (BASIS.T @ V)
    assert projection_ratio(dual_coefficients(G @ outside, VALUES, DUAL), float(outside.norm())) < 1e-12
    assert math.isnan(projection_ratio(torch.zeros(3), 0.0))


def test_fisher_norms_against_the_dense_matrix():
    fisher = G.T @ G / len(G)
    assert fisher_norm(G @ V) == pytest.approx(float((V @ fisher @ V).sqrt()))
    full = fisher_norm_in_subspace(dual_coefficients(G @ V, VALUES, DUAL), VALUES)
    assert full == pytest.approx(float((V @ fisher @ V).sqrt()))


def test_random_overlap_is_what_random_vectors_have():
    vectors = torch.randn(40, 4000, dtype=torch.float64, generator=GENERATOR)
    inside = (BASIS[:, :6].T @ vectors).square().sum(0) / vectors.square().sum(0)
    assert float(inside.mean().sqrt()) == pytest.approx(random_overlap(6, 40), rel=0.03)
    assert random_overlap(8, 4) == 1.0


def test_p_value_is_never_zero():
    assert permutation_p_value(1.0, torch.tensor([0.1, 0.2, 0.3])) == 0.25
    assert permutation_p_value(0.0, torch.tensor([0.1, 0.2, 0.3])) == 1.0
    assert permutation_p_value(1.0, torch.zeros(0)) is None
