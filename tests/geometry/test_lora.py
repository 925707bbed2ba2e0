import pytest
import torch

from arisk.geometry.lora import displacement_coordinates, gradient_coordinates, tangent_frame

OUT, IN, R, S = 7, 9, 3, 2.0


def case(fresh: bool, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(R, IN, dtype=torch.float64, generator=generator)
    b = (
        torch.zeros(OUT, R, dtype=torch.float64)
        if fresh
        else torch.randn(OUT, R, dtype=torch.float64, generator=generator)
    )
    full = torch.randn(5, OUT, IN, dtype=torch.float64, generator=generator)
    return a, b, full, generator


def narrow():
    """A module of fewer inputs than the adapter's rank, as routers and gates have."""
    a, b, full, generator = case(False)
    return a[:, :2], b, full[:, :, :2], generator


def dependent():
    a, b, full, generator = case(False)
    return torch.stack([a[0], a[1], a[0] - 2 * a[1]]), b, full, generator


def no_rows():
    a, b, full, generator = case(False)
    return 0 * a, b, full, generator


CASES = pytest.mark.parametrize(
    "made",
    [lambda: case(True), lambda: case(False), narrow, dependent, no_rows],
    ids=["fresh", "trained", "narrow", "dependent", "zero"],
)


def dense_tangent(a, b):
    """Orthonormal basis of {s(Y A + B X)} by brute force: SVD of the Jacobian."""
    eye_b = torch.eye(OUT * R, dtype=torch.float64).reshape(-1, OUT, R)
    eye_a = torch.eye(a.numel(), dtype=torch.float64).reshape(-1, *a.shape)
    jacobian = torch.cat([S * (eye_b @ a), S * (b @ eye_a)]).flatten(1)
    _, singular, right = torch.linalg.svd(jacobian, full_matrices=False)
    return right[singular > 1e-9 * singular[0]]


@CASES
def test_gradients_keep_the_inner_products_of_the_projected_weight_gradient(made):
    a, b, full, _ = made()
    frame = tangent_frame(a, b, S)
    rows = gradient_coordinates(frame, S * b.T @ full, S * full @ a.T)
    projected = full.flatten(1) @ dense_tangent(a, b).T
    torch.testing.assert_close(rows @ rows.T, projected @ projected.T, rtol=1e-9, atol=1e-9)
    assert frame.dimension == len(dense_tangent(a, b))


@CASES
def test_displacements_have_frobenius_length_and_pair_with_gradients(made):
    a, b, full, generator = made()
    frame = tangent_frame(a, b, S)
    step_a = torch.randn(a.shape, dtype=torch.float64, generator=generator)
    step_b = torch.randn(OUT, R, dtype=torch.float64, generator=generator)
    coordinates = displacement_coordinates(frame, step_a, step_b)
    moved = S * (step_b @ a + b @ step_a)
    assert float(coordinates.norm()) == pytest.approx(float(moved.norm()))
    rows = gradient_coordinates(frame, S * b.T @ full, S * full @ a.T)
    torch.testing.assert_close(rows @ coordinates, (full * moved).sum((1, 2)), rtol=1e-9, atol=1e-9)


def test_how_a_was_scaled_does_not_matter():
    a, b, full, _ = case(True)
    rows = gradient_coordinates(tangent_frame(a, b, S), 0 * (b.T @ full), S * full @ a.T)
    scaled = gradient_coordinates(tangent_frame(5 * a, b, S), 0 * (b.T @ full), S * full @ (5 * a).T)
    torch.testing.assert_close(rows @ rows.T, scaled @ scaled.T)
