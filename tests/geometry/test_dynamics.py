import itertools

import pytest
import torch

from arisk.geometry.dynamics import LocalModel, Recursion, krylov_path, optimizer_path, recorded_steps
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
