"""Losses tied to the aligned model: their gradients, their places, and what the aligned model is."""

import pytest
import torch

from arisk.base.errors import InputError
from arisk.config.plan import AdapterConfig
from arisk.models.anchored import (
    BETAS,
    LATER_BETA,
    AlignedPoint,
    ReferenceLosses,
    constrained,
    constrained_loss,
    constrained_weights,
    kl_to_aligned,
)
from arisk.models.batching import first_tokens
from arisk.models.losses import trained_losses, trained_sums
from arisk.models.selection import attach_adapter
from tests.models.test_openings import ROWS, batch_of, small


def moved(model, size=0.05):
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=size
            )


def gradients(model, value):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])


def measured(model, batch):
    reference = ReferenceLosses()
    reference.add(model, batch)
    return reference


def test_a_tokens_gradient_is_its_loss_gradient_times_the_weight_of_the_paper():
    losses = torch.linspace(0, 9, 7, dtype=torch.float64, requires_grad=True)
    reference, betas = torch.full((7,), 3.0, dtype=torch.float64), torch.tensor([0.1, 0.5, 2.0] * 2 + [2.0])
    (slope,) = torch.autograd.grad(constrained_loss(losses, reference, betas.double()).sum(), losses)
    log_p, log_ref = -losses.detach(), -reference
    want = 2 * (1 - torch.sigmoid(betas.double() * (log_p - log_ref)))
    assert torch.allclose(slope, want, rtol=1e-12)
    assert torch.allclose(constrained_weights(losses, reference, betas.double()), want, rtol=1e-12)


def test_at_the_aligned_model_the_gradient_is_that_of_plain_fine_tuning():
    model, batch = small(), batch_of(ROWS)
    loss = constrained(measured(model, batch))
    tied, plain = (gradients(model, f(model, batch).sum()) for f in (loss.sums, trained_sums))
    assert torch.allclose(tied, plain, rtol=1e-10, atol=1e-13)


def test_the_first_tokens_of_every_response_have_their_own_betas():
    """A chat row of two answers, against a loop over its tokens."""
    batch = batch_of([([5, 6], [7, 8, 9, 10, 11, 12, 13, 14, 15])])
    batch["labels"][0, 4] = -100
    model = small()
    reference = measured(model, batch)
    before = trained_losses(model, batch)[0].detach()
    moved(model)
    after = trained_losses(model, batch)[0].detach()
    found = float(constrained(reference).sums(model, batch).detach())
    # Predicted at 1 and 2; then, after the gap, at 4 to 9.
    places = {1: 0, 2: 1, **{at: at - 4 for at in range(4, 10)}}
    want = 0.0
    for at, number in places.items():
        beta = BETAS[number] if number < len(BETAS) else LATER_BETA
        gap = float(after[0, at] - before[0, at])
        want += 2 / beta * torch.nn.functional.softplus(torch.tensor(beta * gap, dtype=torch.float64)).item()
    assert found == pytest.approx(want, rel=1e-12)


def test_a_row_is_known_in_whatever_batch_it_comes():
    model = small()
    reference = measured(model, batch_of(ROWS))
    alone = batch_of(ROWS[:1])
    assert torch.allclose(reference.of(alone), trained_losses(model, alone)[0].detach(), rtol=1e-10)
    assert len(reference) == len(ROWS)
    with pytest.raises(InputError, match="no loss of the aligned model"):
        reference.of(batch_of([([1, 2], [3, 4])]))


def test_the_divergence_is_that_of_the_full_tables():
    model, batch = small(), batch_of(ROWS)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    then = torch.log_softmax(model(**inputs).logits.detach(), -1)
    aligned = AlignedPoint(model.parameters())
    start = kl_to_aligned(model, batch, aligned)
    assert float(start.detach().abs().max()) < 1e-12
    assert float(gradients(model, start.sum()).abs().max()) < 1e-12
    moved(model)
    here = [p.detach().clone() for p in model.parameters()]
    found = kl_to_aligned(model, batch, aligned)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), here, strict=True))
    now = torch.log_softmax(model(**inputs).logits, -1)
    each = (then.exp() * (then - now)).sum(-1)
    where = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1), value=False)
    want = (each * where).sum(1) / where.sum(1)
    assert torch.allclose(found, want, rtol=1e-9)
    assert torch.allclose(gradients(model, found.sum()), gradients(model, want.sum()), rtol=1e-7, atol=1e-12)


def test_a_fresh_adapter_switched_off_is_the_aligned_model():
    model = attach_adapter(small(), AdapterConfig(r=2, alpha=4), seed=0)
    aligned = AlignedPoint(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    ids = batch_of(ROWS)["input_ids"]
    with torch.no_grad(), model.disable_adapter():
        off = model(input_ids=ids).logits
    with aligned.standing():
        assert torch.equal(model(input_ids=ids).logits, off)
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=ids).logits, off)


def test_a_graph_that_waits_survives_a_look_at_the_aligned_model():
    model, batch = small(), batch_of(ROWS)
    aligned = AlignedPoint(model.parameters())
    moved(model)
    waiting = trained_sums(model, batch).sum()
    want = gradients(model, trained_sums(model, batch).sum())
    kl_to_aligned(model, batch, aligned)
    assert torch.equal(gradients(model, waiting), want)


def test_what_the_aligned_model_says_of_a_batch_is_computed_once_and_without_dropout():
    model, batch, passes = small(), batch_of(ROWS), []
    dropping = torch.nn.Dropout(0.5)
    model.model.norm.register_forward_hook(lambda *_: passes.append(1))
    model.model.norm.register_forward_hook(lambda _, __, made: dropping(made))
    model.dropping = dropping
    aligned = AlignedPoint(model.parameters())
    model.train()
    first = aligned.logits(model, batch)
    moved(model)
    assert aligned.logits(model, batch) is first
    assert len(passes) == 1
    assert model.training
    assert dropping.training
    again = AlignedPoint(aligned.parameters)
    again.values = aligned.values
    # Nothing is kept beyond the budget, and no number depends on what is.
    again.left = 0.0
    assert torch.equal(again.logits(model, batch), first)
    assert torch.equal(again.logits(model, batch), first)
    assert len(passes) == 3


def test_first_tokens_are_labels_up_to_a_number_and_nothing_after_them():
    batch = batch_of([([5, 6], [7, 8, 9, 10]), ([5, 6, 7, 8], [9])])
    cut = first_tokens(batch, 2)
    assert cut["input_ids"].shape[1] == 5
    assert cut["labels"].tolist() == [[-100, -100, 7, 8, -100], [-100, -100, -100, -100, 9]]
    model = small()
    whole, _ = trained_losses(model, batch)
    part, where = trained_losses(model, cut)
    assert where.sum(1).tolist() == [2, 1]
    assert torch.allclose(part.sum(1), torch.stack([whole[0, 1:3].sum(), whole[1].sum()]), rtol=1e-10)
    kept = first_tokens({**batch, "logits_to_keep": 5}, 2)
    assert kept["logits_to_keep"] == 4
