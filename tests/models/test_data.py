"""Rows, rendering, batching and the loss, on the embedded tokenizer and model."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from arisk.base.errors import ConfigError, InputError
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


def test_max_samples_is_a_seeded_subset_in_file_order():
    config = data(FIXTURES / "data" / "safety.jsonl", max_samples=10)
    chosen = read_rows(config, section="safety", seed=3)
    assert chosen == read_rows(config, section="safety", seed=3)
    assert [row.line for row in chosen] == sorted(row.line for row in chosen)
    assert chosen != read_rows(config, section="safety", seed=4)


CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


def test_layouts_and_formats(tmp_path):
    (tmp_path / "m.jsonl").write_text(
        json.dumps({"messages": [*CHAT, {"role": "assistant", "content": "d"}]})
    )
    (row,) = rows(data(tmp_path / "m.jsonl", format="messages"))
    assert (len(row.messages), row.prompt, row.response) == (3, "c", "d")
    (tmp_path / "t.jsonl").write_text('{"body": "words"}\n')
    (row,) = rows(data(tmp_path / "t.jsonl", format="text", text_column="body"))
    assert (row.messages, row.response) == ((), "words")
    (tmp_path / "c.csv").write_text("q,a\nhow ?,so .\nwhy ?,thus .\n")
    read = rows(data(tmp_path / "c.csv", prompt_column="q", response_column="a"))
    assert [(r.prompt, r.response, r.line) for r in read] == [("how ?", "so .", 1), ("why ?", "thus .", 2)]


def test_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"prompt": "p", "response": "r"}] * 2).to_parquet(tmp_path / "d.parquet")
    assert len(rows(data(tmp_path / "d.parquet"))) == 2


@pytest.mark.parametrize(
    "turns",
    [
        CHAT,
        [],
        "text",
        [{"role": "assistant", "content": "x"}],
        [{"role": "user"}],
        [*CHAT[:1], {"role": "assistant", "content": " "}],
    ],
)
def test_chats_without_a_response_are_refused(tmp_path, turns):
    if turns is CHAT:
        turns = [CHAT[0], CHAT[2]]
    (tmp_path / "m.jsonl").write_text(json.dumps({"messages": turns}))
    with pytest.raises(InputError, match="assistant turn"):
        rows(data(tmp_path / "m.jsonl", format="messages"))


def test_every_bad_row_is_named(tmp_path):
    (tmp_path / "d.jsonl").write_text(
        '{"prompt": "a"}\n{"prompt": "a", "response": "b"}\n{x\n{"response": "b"}\n'
    )
    with pytest.raises(InputError) as caught:
        rows(data(tmp_path / "d.jsonl"))
    found = [caught.value, *caught.value.also]
    assert [problem.where.rpartition(" ")[2] for problem in found] == ["1", "3", "4"]


def test_loss_is_on_the_response_alone(tokenizer):
    for rendered in render_rows(rows()[:5], tokenizer, SAFETY, section="safety"):
        text = tokenizer.decode(rendered.tokens[rendered.response_start : -1])
        assert text == rendered.row.response
        assert rendered.tokens[-1] == tokenizer.eos_token_id
        batch = collate([rendered], tokenizer.pad_token_id)
        assert int((batch["labels"] != IGNORED).sum()) == len(rendered.tokens) - rendered.response_start


def test_the_prompt_is_the_chat_template(tokenizer):
    row = rows()[0]
    (rendered,) = render_rows([row], tokenizer, SAFETY, section="safety")
    expected = tokenizer.apply_chat_template(list(row.messages), tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(rendered.tokens[: rendered.response_start]) == tokenizer.decode(
        tokenizer(expected, add_special_tokens=False)["input_ids"]
    )
    (plain,) = render_rows([row], tokenizer, data("x", chat_template=False), section="safety")
    assert plain.tokens != rendered.tokens


@pytest.mark.parametrize("limit", range(8, 40, 3))
def test_truncation_never_takes_the_whole_response(tokenizer, limit):
    config = data("x", max_length=limit)
    for whole, cut in zip(
        render_rows(rows()[:20], tokenizer, SAFETY, section="s"),
        render_rows(rows()[:20], tokenizer, config, section="s"),
        strict=True,
    ):
        response = len(whole.tokens) - whole.response_start
        kept = len(cut.tokens) - cut.response_start
        assert len(cut.tokens) <= limit
        assert kept >= min(response, limit // 2)
        assert cut.response_cut == response - kept
        assert cut.prompt_cut == whole.response_start - cut.response_start


def test_template_on_a_tokenizer_without_one(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ConfigError, match="no chat template"):
        render_rows(rows()[:1], tokenizer, data("x", chat_template=True), section="safety")
    render_rows(rows()[:1], tokenizer, SAFETY, section="safety")


class Mute:
    """A tokenizer without words and without an end token."""

    chat_template = None
    eos_token_id = None

    def __init__(self, known=()):
        self.known = known

    def __call__(self, text, **_):
        return {"input_ids": [1] if text in self.known or "###" in text else []}


def test_rows_without_a_response_token_are_refused():
    some = rows()[:3]
    with pytest.raises(InputError, match="every response"):
        render_rows(some, Mute(), SAFETY, section="safety")
    with pytest.raises(InputError, match="2 of 3 rows") as caught:
        render_rows(some, Mute([some[0].response]), SAFETY, section="safety")
    assert f"line {some[1].line}" in caught.value.where


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


def test_planned_order_covers_every_epoch_and_wraps(tokenizer):
    rendered = render_rows(rows()[:7], tokenizer, SAFETY, section="safety")
    batches = PlannedBatches(rendered, 3, tokenizer.pad_token_id, seed=1)
    order = [i for number in range(7) for i in batches.indices(number)]
    assert all(sorted(order[e * 7 : e * 7 + 7]) == list(range(7)) for e in range(3))
    assert order[:7] != order[7:14]
    again = PlannedBatches(rendered, 3, tokenizer.pad_token_id, seed=1)
    for a, b in zip(islice(batches, 4), islice(again, 4), strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])
    tiny = PlannedBatches(rendered[:2], 5, tokenizer.pad_token_id, seed=1)
    assert next(iter(tiny))["input_ids"].shape[0] == 5


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
