"""What the truth measures, against plain passes row by row on a small random model."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tests.bench.real import measure  # noqa: E402
from tests.bench.real.rows import Encoded, encode  # noqa: E402


class Letters:
    """A tokenizer of single characters whose template has a fixed opening and an end of turn (token 1)."""

    eos_token_id, pad_token_id = 1, 0

    def apply_chat_template(self, turns, *, tokenize, add_generation_prompt=False):
        text = "@@@@" + "".join(f"<{turn['content']}>" for turn in turns)
        return text + "<" if add_generation_prompt else text

    def __call__(self, text, *, add_special_tokens, return_offsets_mapping=False):
        ids = [1 if c == ">" else 2 + ord(c) % 60 for c in text]
        return {"input_ids": ids, "offset_mapping": [(i, i + 1) for i in range(len(text))]}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=62, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0,
        eos_token_id=1, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).requires_grad_(False)


PROMPTS = ["abc", "a", "tell me more", "xyzw"]
RESPONSES = ["no", "I will not", "yes", "q"]


def test_a_response_is_all_that_the_template_writes_after_the_prompt():
    row = encode(Letters(), "ab", "no")
    head = encode(Letters(), "ab")
    assert row.tokens[: row.start] == head.tokens
    # n, o and the end of the turn.
    assert len(row.tokens) - row.start == 3
    assert row.tokens[-1] == Letters.eos_token_id


def test_a_long_row_keeps_half_its_window_for_the_response():
    row = encode(Letters(), "a" * 50, "b" * 50, limit=20)
    assert (len(row.tokens), row.start) == (20, 10)
    row = encode(Letters(), "a" * 50, "b", limit=20)
    assert (len(row.tokens), row.start) == (20, 18)


def test_scores_are_those_of_each_row_alone(model):
    rows = [encode(Letters(), p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    scored = measure.score(model, rows, pad=0)
    for row, found in zip(rows, scored, strict=True):
        ids = torch.tensor([row.tokens])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids).logits[0].float()
        expected = torch.log_softmax(logits, -1)[row.start - 1 : -1].gather(1, ids[0, row.start :, None])[
            :, 0
        ]
        assert found.log_probs == pytest.approx(expected.tolist(), abs=0.03)
        assert found.loss(2) == pytest.approx(-expected[:2].mean().item(), abs=0.03)
        assert len(found.likeliest) == len(row.tokens) - row.start


def test_answers_are_greedy_and_end_at_the_end_token(model):
    said = measure.answer_tokens(model, Letters(), PROMPTS, tokens=6)
    for prompt, answer in zip(PROMPTS, said, strict=True):
        ids = list(encode(Letters(), prompt).tokens)
        assert Letters.eos_token_id not in answer
        opening = Encoded((*ids, *answer), len(ids))
        # What the model says is what it finds likeliest, token by token (rounding may turn a near tie).
        (scored,) = measure.score(model, [opening], pad=0)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            best = torch.log_softmax(model(input_ids=torch.tensor([opening.tokens])).logits[0].float(), -1)
        top = best.max(-1).values[len(ids) - 1 : -1]
        assert torch.tensor(scored.log_probs) == pytest.approx(top.numpy(), abs=0.05)


def test_openings_of_a_model_are_its_own(model):
    rows = [
        Encoded((*encode(Letters(), p).tokens, *answer), len(encode(Letters(), p).tokens))
        for p, answer in zip(PROMPTS, measure.answer_tokens(model, Letters(), PROMPTS, 5), strict=True)
        if answer
    ]
    kept = [row.opens(3) for row in measure.score(model, rows, 0)]
    assert sum(kept) >= len(kept) - 1


def test_frozen_matrices_in_bfloat16_change_no_bit(model):
    ids = torch.randint(2, 62, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(input_ids=ids).logits
    embedding = model.get_input_embeddings().weight.clone()
    measure.freeze_in_bfloat16(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(before, model(input_ids=ids).logits)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.get_input_embeddings().weight, embedding)


def test_measuring_leaves_mode_and_random_state(model):
    model.train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    measure.score(model, [encode(Letters(), "a", "b")], 0)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    model.eval()
