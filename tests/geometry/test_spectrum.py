"""Spectra, overlaps and Krylov spaces against dense algebra."""

import math

import pytest
import torch

from arisk.base.errors import NumericsError
from arisk.geometry.spectrum import (
    dual_coefficients,
    effective_rank,
    eigenpairs,
    fisher_norm,
    fisher_norm_in_subspace,
    heldout_energy,
    lanczos,
    permutation_p_value,
    projection_ratio,
    random_overlap,
    randomized_eigenpairs,
    rank_for_variance,
)


def gradients(n: int = 20, p: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, p, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_eigenpairs_are_those_of_the_dense_fisher_matrix():
    g = gradients()
    values, dual = eigenpairs(g @ g.T)
    dense = torch.linalg.eigvalsh(g.T @ g / len(g)).flip(0)[: len(values)]
    torch.testing.assert_close(values, dense, rtol=1e-9, atol=0)
    basis = g.T @ dual / (len(g) * values).sqrt()
    torch.testing.assert_close(
        basis.T @ basis, torch.eye(len(values), dtype=torch.float64), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(g.T @ g / len(g) @ basis, basis * values, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 3.0, 1e5])
def test_eigenvalues_scale_with_the_square_of_the_gradients(scale):
    g = gradients()
    torch.testing.assert_close(
        eigenpairs(scale**2 * (g @ g.T))[0], scale**2 * eigenpairs(g @ g.T)[0], rtol=1e-9, atol=0
    )


def test_sample_order_and_rotation_of_parameters_change_nothing():
    g = gradients()
    order = torch.randperm(len(g), generator=torch.Generator().manual_seed(1))
    rotation = torch.linalg.qr(gradients(50, 50, 2)).Q
    expected = eigenpairs(g @ g.T)[0]
    turned = g[order] @ rotation
    torch.testing.assert_close(eigenpairs(turned @ turned.T)[0], expected, rtol=1e-9, atol=0)


def test_duplicate_samples_are_dropped_below_the_floor():
    g = gradients(5)
    g = torch.cat([g, g])
    assert len(eigenpairs(g @ g.T)[0]) == 5


def test_zero_and_nan_gram_are_refused():
    with pytest.raises(NumericsError, match="zero"):
        eigenpairs(torch.zeros(4, 4))
    with pytest.raises(NumericsError, match="NaN"):
        eigenpairs(torch.full((4, 4), float("nan")))


def test_rank_is_by_share_of_the_whole_trace():
    values = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    assert rank_for_variance(values, 10.0, 0.7, 10) == 2
    assert rank_for_variance(values, 10.0, 0.71, 10) == 3
    assert rank_for_variance(values, 10.0, 1.0, 10) == 4
    assert rank_for_variance(values, 100.0, 0.9, 10) == 4  # retained sum is 10 %: not "100 %"
    assert rank_for_variance(values, 10.0, 0.9, 2) == 2


def test_effective_rank_counts_equal_directions():
    assert effective_rank(torch.ones(7, dtype=torch.float64)) == pytest.approx(7)
    assert effective_rank(torch.tensor([1.0, 0.0])) == pytest.approx(1)


def test_randomized_agrees_on_a_decaying_spectrum():
    g = gradients(30, 60) @ torch.diag(0.5 ** torch.arange(60, dtype=torch.float64))
    gram = g @ g.T
    values, dual = randomized_eigenpairs(gram, 5, generator=torch.Generator().manual_seed(0))
    exact, exact_dual = eigenpairs(gram)
    torch.testing.assert_close(values, exact[:5], rtol=1e-6, atol=0)
    torch.testing.assert_close((dual * exact_dual[:, :5]).sum(0).abs(), torch.ones(5, dtype=torch.float64))


def test_heldout_energy_against_a_dense_projection():
    g = gradients(12, 6) @ torch.diag(torch.tensor([9.0, 4, 1, 0.3, 0.1, 0.1], dtype=torch.float64))
    got = heldout_energy(g @ g.T, 2, splits=3, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    for share in got.tolist():
        order = torch.randperm(12, generator=generator)
        a, b = g[order[:6]], g[order[6:]]
        basis = torch.linalg.svd(a).Vh[:2]
        expected = (b @ basis.T).square().sum() / b.square().sum()
        assert share == pytest.approx(float(expected), rel=1e-8)


def test_heldout_energy_is_one_in_a_shared_subspace_and_small_for_noise():
    shared = gradients(16, 2) @ gradients(2, 40, 1)
    generator = torch.Generator().manual_seed(0)
    assert float(heldout_energy(shared @ shared.T, 2, splits=4, generator=generator).min()) > 1 - 1e-9
    noise = gradients(16, 4000)
    assert float(heldout_energy(noise @ noise.T, 4, splits=4, generator=generator).max()) < 0.05


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


def symmetric(size: int, seed: int = 0) -> torch.Tensor:
    a = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (a + a.T) / 2


def test_full_space_reproduces_the_operator():
    s = symmetric(10)
    start = torch.arange(1.0, 11.0, dtype=torch.float64)
    krylov = lanczos(lambda v: s @ v, start, 10)
    q, t = krylov.basis.tensor(), krylov.projected
    torch.testing.assert_close(q.T @ q, torch.eye(10, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(q @ t @ q.T, s, atol=1e-10, rtol=0)
    torch.testing.assert_close(krylov.beta * q[:, 0], start)


def test_stops_when_the_space_closes():
    s = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    krylov = lanczos(lambda v: s @ v, torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64), 4)
    q, t = krylov.basis.tensor(), krylov.projected
    assert q.shape == (4, 2)
    torch.testing.assert_close(s @ q, q @ t)


def test_zero_operator_closes_at_once():
    krylov = lanczos(torch.zeros_like, torch.ones(5, dtype=torch.float64), 5)
    assert krylov.basis.shape == (5, 1)
    assert float(krylov.projected) == 0


def test_partial_space_matches_gradient_flow_to_order_j():
    s = symmetric(30, 1)
    g = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    krylov = lanczos(lambda v: s @ v, g, 5)
    q, t = krylov.basis.tensor(), krylov.projected
    v, z = g.clone(), krylov.beta * torch.eye(5, dtype=torch.float64)[0]
    for _ in range(4):
        v, z = s @ v, t @ z
    torch.testing.assert_close(q @ z, v, rtol=1e-9, atol=1e-9)
    assert q.shape == (30, 5)


def test_float32_basis_stays_orthonormal():
    s = symmetric(400, 3).float()
    krylov = lanczos(lambda v: s @ v, torch.ones(400), 40)
    q = krylov.basis.tensor()
    gram = q.T @ q
    assert float((gram - torch.eye(krylov.basis.shape[1])).abs().max()) < 1e-5
