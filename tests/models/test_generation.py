"""Greedy answers: those of a plain argmax loop, whatever the batch and the model's own settings."""

from pathlib import Path

import pytest
import torch

from arisk.base.errors import InputError
from arisk.config.plan import Config
from arisk.models import load_task
from arisk.models.answers import BATCH

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"


def task(heldout=True, **safety):
    data = {name: {"path": str(FIXTURES / "data" / f"{name}.jsonl")} for name in ("safety", "safety_heldout")}
    return load_task(
        Config.model_validate(
            {
                "model": {"path": str(FIXTURES / "tiny-aligned")},
                "safety": {**data["safety"], "max_samples": 20, **safety},
                "finetune": {"path": str(FIXTURES / "data" / "risky.jsonl")},
                "verify": {"safety": data["safety_heldout"]} if heldout else {},
            }
        ),
        device=torch.device("cpu"),
    )


def plain_answer(model, tokenizer, prompt, limit):
    """One token after the other, no padding and no cache."""
    ids, made = list(prompt), []
    for _ in range(limit):
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if best == tokenizer.eos_token_id:
            break
        ids.append(best)
        made.append(best)
    return tokenizer.decode(made).strip()


def test_answers_are_the_likeliest_tokens():
    loaded = task()
    loaded.model.generation_config.repetition_penalty = 5.0
    for samples in (loaded.safety, loaded.heldout):
        answers = samples.generate
        rows = list(range(0, len(samples.rows), len(samples.rows) // (BATCH + 3)))
        assert len(rows) > BATCH
        found = answers(loaded.model, rows, 12)
        for i, text in zip(rows, found, strict=True):
            rendered = answers.rendered[i]
            assert rendered.row.prompt == samples.rows[i]["prompt"]
            prompt = rendered.tokens[: rendered.response_start]
            assert text == plain_answer(loaded.model, answers.tokenizer, prompt, 12)
            assert text


def test_held_out_rows_are_a_set_of_their_own():
    loaded = task()
    assert loaded.heldout.name == "heldout"
    assert len(loaded.heldout.rows) == 64
    assert not {r["prompt"] for r in loaded.heldout.rows} & {r["prompt"] for r in loaded.safety.rows}
    assert "heldout" not in str(loaded.description)
    assert task(heldout=False).heldout is None


def test_plain_text_and_fine_tuning_rows_have_no_prompt_to_answer():
    assert task(heldout=False, format="text", text_column="response").safety.generate is None
    assert task().finetune.generate is None


def test_a_model_that_cannot_generate_is_one_clear_error():
    loaded = task()
    with pytest.raises(InputError, match="cannot generate") as caught:
        loaded.safety.generate(torch.nn.Linear(2, 2), [0], 3)
    assert "verify.generate: 0" in caught.value.fix
