"""Rows, rendering, batching and the loss, on the embedded tokenizer and model."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from arisk.base.errors import ConfigError
from arisk.base.task import SampleSet
from arisk.config.plan import DataConfig, ModelConfig
from arisk.gradients import slice_batch
from arisk.models.batching import PlannedBatches, collate
from arisk.models.loading import load_model, load_tokenizer
from arisk.models.losses import per_sample_nll, sample_labels
from arisk.models.rendering import IGNORED, render_rows
from arisk.models.rows import read_rows

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
MODEL = ModelConfig(path=str(FIXTURES / "tiny-aligned"))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL, torch.device("cpu")).eval()


def data(path, **settings):
    return DataConfig(path=str(path), **settings)


SAFETY = data(FIXTURES / "data" / "safety.jsonl")


def rows(config=SAFETY):
    return read_rows(config, section="safety", seed=0)


def test_loss_is_on_the_response_alone(tokenizer):
    for rendered in render_rows(rows()[:5], tokenizer, SAFETY, section="safety"):
        text = tokenizer.decode(rendered.tokens[rendered.response_start : -1])
        assert text == rendered.row.response
        assert rendered.tokens[-1] == tokenizer.eos_token_id
        batch = collate([rendered], tokenizer.pad_token_id)
        assert int((batch["labels"] != IGNORED).sum()) == len(rendered.tokens) - rendered.response_start


def test_nll_against_a_loop_over_tokens(tokenizer, model):
    rendered = render_rows(rows()[:4], tokenizer, SAFETY, section="safety")
    batch = collate(rendered, tokenizer.pad_token_id)
    with torch.no_grad():
        found = per_sample_nll(model, batch)
        for i, row in enumerate(rendered):
            logits = model(input_ids=torch.tensor([row.tokens])).logits[0]
            log_p = torch.log_softmax(logits, -1)
            losses = [-float(log_p[t - 1, row.tokens[t]]) for t in range(row.response_start, len(row.tokens))]
            assert float(found[i]) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_prompt_positions_are_spared_the_vocabulary(tokenizer, model):
    rendered = render_rows(rows()[:4], tokenizer, SAFETY, section="safety")
    batch = collate(rendered, tokenizer.pad_token_id)
    widths = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda _m, _i, out: widths.append(out.shape[1])
    )
    with torch.no_grad():
        kept = per_sample_nll(model, batch)
        part = per_sample_nll(model, slice_batch(batch, 1, 3))
        whole = per_sample_nll(model, {k: v for k, v in batch.items() if k != "logits_to_keep"})
    handle.remove()
    longest = batch["labels"].shape[1]
    assert widths == [longest - min(r.response_start for r in rendered) + 1] * 2 + [longest]
    assert torch.allclose(kept, whole, atol=1e-6)
    assert torch.allclose(part, whole[1:3], atol=1e-6)


def test_planned_order_covers_every_epoch_with_a_short_last_batch(tokenizer):
    rendered = render_rows(rows()[:7], tokenizer, SAFETY, section="safety")
    batches = PlannedBatches(rendered, 3, tokenizer.pad_token_id, seed=1)
    assert [len(batches.indices(number)) for number in range(6)] == [3, 3, 1] * 2
    order = [i for number in range(9) for i in batches.indices(number)]
    assert all(sorted(order[e * 7 : e * 7 + 7]) == list(range(7)) for e in range(3))
    assert order[:7] != order[7:14]
    again = PlannedBatches(rendered, 3, tokenizer.pad_token_id, seed=1)
    for a, b in zip(islice(batches, 4), islice(again, 4), strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])
    tiny = PlannedBatches(rendered[:2], 5, tokenizer.pad_token_id, seed=1)
    assert next(iter(tiny))["input_ids"].shape[0] == 2
    assert PlannedBatches(rendered, 3, 0, seed=1, drop_last=True).per_epoch == 2
    standing = PlannedBatches(rendered, 3, 0, seed=1, shuffled=False)
    assert [i for number in range(3) for i in standing.indices(number)] == list(range(7))


def test_sampled_labels_follow_the_model(tokenizer, model):
    rendered = render_rows(rows()[:8], tokenizer, SAFETY, section="safety")
    batch = collate(rendered, tokenizer.pad_token_id)
    state = torch.get_rng_state()
    (first,) = sample_labels(model, SampleSet("safety", [batch], per_sample_nll), 0).batches
    (again,) = sample_labels(model, SampleSet("safety", [batch], per_sample_nll), 0).batches
    assert torch.equal(first["labels"], again["labels"])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first["labels"] == IGNORED, batch["labels"] == IGNORED)
    counted = batch["labels"] != IGNORED
    agreement = float((first["labels"] == batch["labels"])[counted].float().mean())
    assert 0.8 < agreement < 1.0  # the model is sure of most tokens and not of all
    with pytest.raises(ConfigError, match="labels"):
        sample_labels(model, SampleSet("safety", [torch.zeros(2)], per_sample_nll), 0)
