"""The loss of trained tokens alone against cross entropy over whole logits."""

import pytest
import torch

from arisk.models.losses import summed_nll, token_nll, trained_sums
from tests.models.test_openings import MODELS, ROWS, batch_of


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_are_those_of_whole_logits(name, dtype):
    model, batch = MODELS[name]().to(dtype), batch_of(ROWS)
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    weights = torch.tensor([0.3, 1.0, -0.4, 2.0], dtype=dtype)
    found = {}
    for sums in (summed_nll, trained_sums):
        model.zero_grad()
        losses = sums(model, batch)
        (losses * weights).sum().backward()
        found[sums] = [losses.detach(), *(p.grad for p in model.parameters())]
    assert len(found[summed_nll]) > 10
    for plain, own in zip(found[summed_nll], found[trained_sums], strict=True):
        assert own.dtype == dtype
        torch.testing.assert_close(own, plain, **close)


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_pieces_change_nothing(rows, monkeypatch):
    monkeypatch.setattr("arisk.models.losses.PIECE", 14)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, 7, generator=generator, dtype=torch.float64) * 5
    labels = torch.randint(7, (rows,), generator=generator)
    own, plain = (logits.clone().requires_grad_() for _ in range(2))
    token_nll(own, labels).square().sum().backward()
    torch.nn.functional.cross_entropy(plain, labels, reduction="none").square().sum().backward()
    torch.testing.assert_close(own.grad, plain.grad, rtol=1e-12, atol=1e-14)


def test_narrow_logits_are_widened_for_the_sum_and_keep_a_narrow_gradient():
    logits = (torch.randn(5, 300, generator=torch.Generator().manual_seed(1)) * 4).bfloat16().requires_grad_()
    labels = torch.arange(5)
    losses = token_nll(logits, labels)
    wanted = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    torch.testing.assert_close(losses, wanted, rtol=1e-6, atol=1e-6)
    losses.sum().backward()
    assert logits.grad.dtype == torch.bfloat16
    (slope,) = torch.autograd.grad(wanted.sum(), logits)
    torch.testing.assert_close(logits.grad, slope, rtol=0.01, atol=1e-6)
