import torch

from arisk.geometry.spectrum import lanczos


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
