"""Openings against full logits in float64: selected positions, own openings, opening loss."""

import pytest
import torch
from torch import nn

from arisk.gradients.curvature import losses_between, outputs_of
from arisk.models.losses import per_sample_nll, response_logits
from arisk.models.openings import followed, losses_at_scales, response_losses
from arisk.models.rendering import IGNORED

transformers = pytest.importorskip("transformers")
VOCABULARY = 37


def small(kind="Llama", **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=64,
        **more,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def batch_of(rows, pad=0):
    """Right-padded rows of (prompt, response)."""
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    shape = (len(rows), longest)
    ids, mask = torch.full(shape, pad), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for i, (prompt, response) in enumerate(rows):
        length = len(prompt) + len(response)
        ids[i, :length] = torch.tensor(prompt + response)
        mask[i, :length] = 1
        labels[i, len(prompt) : length] = torch.tensor(response)
    positions = torch.arange(longest).expand(shape)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


ROWS = [([5, 6, 7], [8, 9, 10, 11]), ([3], [4]), ([12, 13, 14, 15, 16, 17], [18, 19]), ([20, 21], [22] * 7)]


def plain_log_p(model, prompt, response):
    """log p of each response token, one row alone, logits everywhere."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    table = torch.log_softmax(logits, -1)
    return [float(table[len(prompt) - 1 + s, token]) for s, token in enumerate(response)]


def capped():
    return small("Gemma2", head_dim=8, final_logit_softcapping=2.0, query_pre_attn_scalar=8)


class NoHead(nn.Module):
    """A causal LM that names no output head."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **inputs):
        return self.inner(**inputs)


MODELS = {"head": small, "soft-capped": capped, "no head": lambda: NoHead(small())}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_selected_logits_are_those_of_the_plain_way(name):
    model, batch = MODELS[name](), batch_of(ROWS)
    logits, where = response_logits(model, batch)
    every = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert logits.shape == (sum(len(response) for _, response in ROWS), VOCABULARY)
    assert torch.equal(where[:, :-1], batch["labels"][:, 1:] != IGNORED)
    torch.testing.assert_close(logits, every[where], rtol=1e-12, atol=1e-12)
    head = getattr(model, "lm_head", None)
    assert head is None or not head._forward_pre_hooks


def test_the_head_sees_only_the_positions_that_are_needed():
    model, batch, seen = small(), batch_of(ROWS), []
    handle = model.lm_head.register_forward_hook(lambda _m, given, _o: seen.append(given[0].shape))
    response_logits(model, batch)
    handle.remove()
    assert seen == [(1, 14, 16)]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_response_losses(name):
    model, batch = MODELS[name](), batch_of(ROWS)
    mean, opening = response_losses(model, batch, 3)
    torch.testing.assert_close(mean, per_sample_nll(model, batch), rtol=1e-12, atol=1e-12)
    for i, (prompt, response) in enumerate(ROWS):
        log_p = plain_log_p(getattr(model, "inner", model), prompt, response)
        assert float(mean[i]) == pytest.approx(-sum(log_p) / len(log_p), rel=1e-8)
        assert float(opening[i]) == pytest.approx(-sum(log_p[:3]) / len(log_p[:3]), rel=1e-8)
    everything, all_of_it = response_losses(model, batch, 100)
    torch.testing.assert_close(everything, all_of_it, rtol=1e-12, atol=0)


@torch.no_grad()
def test_followed_openings():
    model = small()
    generator = torch.Generator().manual_seed(1)
    drawn = lambda n: torch.randint(1, VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    prompts = [drawn(1 + i % 9) for i in range(21)]
    openings = [drawn(1 + i % 4) for i in range(21)]
    # Some say what the model says.
    for i in range(0, 21, 2):
        text = list(prompts[i])
        for s in range(len(openings[i])):
            openings[i][s] = int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax())
            text.append(openings[i][s])
    found = followed(model, prompts, openings, 0)
    assert found.log_p.shape == (21, 4)
    for i, (prompt, opening) in enumerate(zip(prompts, openings, strict=True)):
        wanted = plain_log_p(model, prompt, opening)
        assert found.log_p[i, : len(opening)].tolist() == pytest.approx(wanted, rel=1e-8)
        assert found.log_p[i, len(opening) :].isnan().all()
        logits = model(input_ids=torch.tensor([prompt + opening])).logits[0]
        still = [int(logits[len(prompt) - 1 + s].argmax()) == token for s, token in enumerate(opening)]
        assert int(found.kept[i]) == (still.index(False) if False in still else len(opening))
    assert found.kept[::2].tolist() == [len(opening) for opening in openings[::2]]
    assert (found.kept[1::2] == 0).any()


def test_no_prompts():
    assert followed(small(), [], [], 0).log_p.shape == (0, 0)


@pytest.mark.parametrize("piece", [20, 1_000_000])
@torch.no_grad()
def test_losses_at_scales_are_those_of_whole_logits(piece, monkeypatch):
    monkeypatch.setattr("arisk.models.openings.PIECE", piece)
    first, last, batch, scales = small(), small(), batch_of(ROWS), (0.0, 0.3, 1.0, 4.0)
    for parameter in last.parameters():
        parameter.mul_(1.1)
    (z, where), (moved, _) = response_logits(first, batch), response_logits(last, batch)
    ends = [outputs_of(model, batch, per_sample_nll) for model in (first, last)]
    wanted = losses_between(first, batch, per_sample_nll, *ends, scales)
    torch.testing.assert_close(
        losses_at_scales(z, moved, where, batch, scales), wanted, rtol=1e-12, atol=1e-12
    )
