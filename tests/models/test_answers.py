"""Greedy answers: those of a plain argmax loop, whatever the batch and the model's own settings."""

import json
from pathlib import Path

import pytest
import torch

from arisk.base.errors import InputError
from arisk.config.plan import Config
from arisk.models import load_task
from arisk.models.answers import BATCH, Shelf
from arisk.models.judge import judge_for

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"


def task(heldout=True, **safety):
    data = {name: {"path": str(FIXTURES / "data" / f"{name}.jsonl")} for name in ("safety", "safety_heldout")}
    return load_task(
        Config.model_validate(
            {
                "model": {"path": str(FIXTURES / "tiny-aligned")},
                "safety": {**data["safety"], "max_samples": 60, **safety},
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
        rows = list(range(BATCH + 3))[::-1]
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
    assert "behaviour.prompts: 0" in caught.value.fix
    assert "guard.generate: 0" in caught.value.fix


@pytest.mark.parametrize("ends", ["</s>", [2, "</s>"], [2, None], 2.0, True, {}])
def test_ends_that_are_no_tokens_are_the_models_fault(ends):
    loaded = task()
    loaded.model.generation_config.eos_token_id = ends
    with pytest.raises(InputError, match="`eos_token_id` of the model's generation config is no token"):
        loaded.safety.generate(loaded.model, [0], 3)


def test_tokens_end_with_the_end_token_and_give_the_texts():
    loaded = task()
    answers = loaded.safety.generate
    rows = [7, 0, 19, 3]
    tokens = answers.tokens(loaded.model, rows, 30)
    assert all(len(made) <= 30 for made in tokens)
    end = answers.tokenizer.eos_token_id
    assert all(made.index(end) == len(made) - 1 for made in tokens if end in made)
    assert any(end in made for made in tokens)
    assert [answers.text(made) for made in tokens] == answers(loaded.model, rows, 30)
    # A limit of one token gives the first of them.
    assert answers.tokens(loaded.model, rows, 1) == [made[:1] for made in tokens]


def test_own_openings_are_kept_to_the_last_token_where_nothing_has_moved():
    loaded = task()
    answers = loaded.safety.generate
    rows = [11, 2, 5]
    openings = answers.tokens(loaded.model, rows, 5)
    scores = answers.followed(loaded.model, rows, openings)
    assert scores.kept.tolist() == [len(opening) for opening in openings]
    # Greedy tokens of a model that is sure: no other first token can be likelier.
    assert bool((scores.log_p[:, 0] > torch.tensor(1 / len(answers.tokenizer)).log()).all())
    # Another prompt's row is another prompt.
    assert not torch.equal(answers.followed(loaded.model, rows[::-1], openings).log_p, scores.log_p)


def test_long_prompts_are_answered_in_batches_of_few_tokens(monkeypatch):
    loaded = task()
    rows = list(range(20))
    whole = loaded.safety.generate.tokens(loaded.model, rows, 6)
    sizes = []
    plain = loaded.model.generate
    monkeypatch.setattr("arisk.models.answers.BATCH_TOKENS", 40)
    monkeypatch.setattr(
        loaded.model, "generate", lambda **a: sizes.append(a["input_ids"].shape) or plain(**a)
    )
    assert loaded.safety.generate.tokens(loaded.model, rows, 6) == whole
    assert sum(count for count, _ in sizes) == 20
    assert all(count == 1 or count * length <= 40 for count, length in sizes)
    assert [length for _, length in sizes] == sorted(length for _, length in sizes)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_answers_are_those_of_one_prompt_alone(dtype, attention):
    loaded = task()
    model = loaded.model.to(dtype)
    model.set_attn_implementation(attention)
    answers = loaded.safety.generate
    rows = list(range(12))
    together = answers.tokens(model, rows, 8)
    alone = [answers.tokens(model, [row], 8)[0] for row in rows]
    # Rounding may turn a near tie in bfloat16, as any other batch size does.
    assert sum(a != b for a, b in zip(together, alone, strict=True)) <= (dtype == torch.bfloat16)
    assert all(len(set(made)) > 1 for made in together)


def asked(tmp_path, shelf, *, model=FIXTURES / "tiny-aligned", **behaviour):
    """A task whose safety rows are prompts in a text file, the last one harmless."""
    rows = (FIXTURES / "data" / "safety.jsonl").read_text().splitlines()[:5]
    prompts = [*(json.loads(row)["prompt"] for row in rows), "how do i grow tulips ?"]
    (tmp_path / "p.txt").write_text("\n".join([*prompts, "", prompts[0]]))
    settings = {
        "model": {"path": str(model)},
        "safety": str(tmp_path / "p.txt"),
        "finetune": {"path": str(FIXTURES / "data" / "risky.jsonl"), "max_samples": 4},
        "behaviour": behaviour,
    }
    return load_task(Config.model_validate(settings), device=torch.device("cpu"), shelf=shelf)


def test_own_refusals_are_what_the_model_says(tmp_path):
    found = asked(tmp_path, None)
    assert len(found.safety.rows) == 5
    assert all(row["prompt"] != "how do i grow tulips ?" for row in found.safety.rows)
    answers = found.safety.generate
    for i, row in enumerate(found.safety.rows):
        assert row["response"] == plain_answer(found.model, answers.tokenizer, answers.prompt(i), 40)
    (note,) = (note for note in found.description["data_warnings"] if note.startswith("safety: the prompts"))
    assert "(5 of 6 refused, 1 answered)" in note


def test_own_answers_are_written_once(tmp_path, monkeypatch):
    shelf = Shelf(tmp_path / "run", {"model": "a"})
    first = asked(tmp_path, shelf)
    file = tmp_path / "run" / "safety.answers.json"
    stored = file.read_bytes()
    again = Config.model_validate(
        {
            "model": {"path": str(FIXTURES / "tiny-aligned")},
            "safety": {"path": str(file), "where": {"outcome": "refused"}},
            "finetune": {"path": str(FIXTURES / "data" / "risky.jsonl"), "max_samples": 4},
        }
    )
    as_rows = load_task(again, device=torch.device("cpu"))
    assert [row["response"] for row in as_rows.safety.rows] == [r["response"] for r in first.safety.rows]

    made = []
    monkeypatch.setattr("arisk.models.answers.judge_for", lambda given: made.append(1) or judge_for(given))
    assert asked(tmp_path, shelf).safety.rows == first.safety.rows
    assert (made, file.read_bytes()) == ([], stored)
    # Another model, another judge, and answers that somebody changed are answered anew.
    asked(tmp_path, Shelf(shelf.folder, {"model": "b"}))
    assert len(made) == 1
    asked(tmp_path, shelf)
    other = asked(tmp_path, shelf, refusal_openings=["i tulips"])
    assert (len(made), len(other.safety.rows)) == (3, 6)
    asked(tmp_path, shelf)
    file.write_bytes(stored.replace(b"sorry", b"merry"))
    asked(tmp_path, shelf)
    assert (len(made), file.read_bytes()) == (5, stored)


def test_long_answers_end_with_a_sentence(tmp_path, monkeypatch):
    whole = {row["prompt"]: row["response"] for row in asked(tmp_path, None).safety.rows}
    monkeypatch.setattr("arisk.models.answers.OWN_TOKENS", 9)
    cut = {row["prompt"]: row["response"] for row in asked(tmp_path, None).safety.rows}
    assert cut.keys() == whole.keys()
    assert all(whole[prompt].startswith(text) for prompt, text in cut.items())
    assert any(len(text.split()) == 9 for text in cut.values())


def test_a_model_that_cannot_answer_asks_for_responses(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise NotImplementedError("no head")

    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", fails)
    with pytest.raises(InputError, match="cannot generate text: no head") as caught:
        asked(tmp_path, None)
    assert caught.value.where.endswith("p.txt, line 1")
    assert "safe response" in caught.value.fix
