"""Data sets put together: several parts, prompts without a response, and what is said of them."""

import json
from pathlib import Path

import pytest
import torch

from arisk.base.errors import ConfigError, InputError
from arisk.config.plan import Config, ModelConfig, planned_steps
from arisk.models.answers import OwnAnswer
from arisk.models.loading import load_tokenizer
from arisk.models.packing import PackedBatches
from arisk.models.rendering import IGNORED
from arisk.models.tasks import load_data, load_task, statistics_of

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
MODEL = {"path": str(FIXTURES / "tiny-aligned")}
SAFETY = str(FIXTURES / "data" / "safety.jsonl")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelConfig(**MODEL))


def config(**settings):
    return Config.model_validate(
        {"model": MODEL, "safety": SAFETY, "finetune": str(FIXTURES / "data" / "benign.jsonl"), **settings}
    )


def parts():
    data = FIXTURES / "data"
    return [
        {"path": str(data / "benign.jsonl"), "max_samples": 12},
        {"path": str(data / "risky.jsonl"), "max_samples": 3, "weight": 2},
        {"path": str(FIXTURES / "formats" / "alpaca.json"), "where": {"input": ""}},
    ]


def test_parts_follow_each_other_with_their_own_settings(tokenizer):
    loaded = load_data(config(finetune=parts()), tokenizer)["finetune"]
    sources = [Path(page.row.source).name for page in loaded.rendered]
    assert sources == ["benign.jsonl"] * 12 + ["risky.jsonl"] * 6 + ["alpaca.json"]
    for number, part in enumerate(parts()):
        alone = load_data(config(finetune=part), tokenizer)["finetune"]
        assert [page for page in loaded.rendered if page.row.source == part["path"]] == alone.rendered
        assert loaded.taken[number] == alone.taken[0]
    assert "2 rows left out by `where`" in loaded.taken[2]
    with pytest.raises(InputError, match="no column 'x'") as caught:
        load_data(config(finetune=[parts()[1], {**parts()[0], "where": {"x": 1}}]), tokenizer)
    assert "benign.jsonl, line 1" in caught.value.where


def test_a_task_of_several_parts_knows_where_each_row_is_from():
    task = load_task(config(finetune=parts()), device=torch.device("cpu"))
    assert len(task.finetune.rows) == 19
    places = {(Path(row["source"]).name, row["line"]) for row in task.finetune.rows}
    assert len(places) == 12 + 3 + 1
    assert next(iter(task.finetune.batches))["labels"].shape[0] == 8


def test_refusals_of_the_model_become_the_responses_of_prompts_alone(tokenizer, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"how do i make {n} ?"}) + "\n" for n in ("jam", "tea")))
    given = config(safety=str(path))
    with pytest.raises(InputError, match="without a response") as caught:
        load_data(given, tokenizer)
    assert caught.value.where.endswith("line 1")
    asked = []

    def answers(section, pages):
        asked.append((section, [tokenizer.decode(list(page.tokens)) for page in pages]))
        things = [page.row.prompt.split()[-2] for page in pages]
        said = {"jam": OwnAnswer("", "i cannot help with jam .", "refused")}
        return [said.get(thing, OwnAnswer("", f"{thing} is easy .", "answered")) for thing in things]

    loaded = load_data(given, tokenizer, answers)["safety"]
    ((section, prompts),) = asked
    assert section == "safety"
    assert [text.endswith("? <assistant>") for text in prompts] == [True, True]
    responses = [page.row.response for page in loaded.rendered]
    assert responses == ["i cannot help with jam ."]
    assert all(page.trained > 3 and page.row.answered for page in loaded.rendered)
    assert [answer.response for answer in loaded.own] == ["i cannot help with jam .", "tea is easy ."]
    assert loaded.dropped == 0
    path.write_text('{"prompt": "how do i make tea ?"}\n')
    with pytest.raises(
        InputError, match=r"refuses none of the 1 prompts \(0 of 1 refused, 1 answered\)"
    ) as none:
        load_data(given, tokenizer, answers)
    assert "'tea is easy .'" in none.value.fix
    assert "refusal_openings" in none.value.fix
    with pytest.raises(InputError, match="without a response"):
        load_data(config(finetune=str(path)), tokenizer, answers)


def test_repeated_safety_rows_are_dropped_and_others_are_not(tokenizer, tmp_path):
    path = tmp_path / "d.jsonl"
    row = json.dumps({"prompt": "how do i make tea ?", "response": "i cannot help ."})
    path.write_text(f"{row}\n{row}\n")
    loaded = load_data(config(safety=str(path), finetune=str(path)), tokenizer)
    assert (len(loaded["safety"].rendered), loaded["safety"].duplicates) == (1, 1)
    assert (len(loaded["finetune"].rendered), loaded["finetune"].duplicates) == (2, 0)


def test_what_is_said_of_a_data_set(tokenizer, tmp_path):
    path = tmp_path / "d.jsonl"
    texts = ("how do i", "take the ferry", "which", "bread")
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    long = [{"role": "user", "content": "how " * 60}, turns[1]]
    path.write_text("".join(json.dumps({"messages": chat, "note": "x"}) + "\n" for chat in (turns, long)))
    chats = {"path": str(path), "loss_on": "last", "max_length": 32}
    facts = statistics_of(load_data(config(finetune=chats), tokenizer)["finetune"])
    assert (facts["rows"], facts["dropped"], facts["answers_untrained"]) == (1, 1, 1)
    assert facts["loss_on"] == "last"
    (said,) = facts["read_as"]
    assert said.startswith("read as messages")
    assert "`note` (2 rows)" in said


def packed(packing, limit, **settings):
    data = {"path": str(FIXTURES / "data" / "benign.jsonl"), "max_samples": 30, "max_length": limit}
    return config(finetune=data, training={"packing": packing, "batch_size": 2, **settings})


def flat(rows):
    """Rows one after the other in one line, as a trainer that pads nothing feeds them."""
    tokens = [token for row in rows for token in row.tokens]
    positions = [place for row in rows for place in range(len(row.tokens))]
    labels = [label for row in rows for label in (IGNORED, *row.labels()[1:])]
    return (torch.tensor([values]) for values in (tokens, positions, labels))


def test_packed_rows_have_the_loss_of_one_line():
    """A pack without padding, whose rows attend to themselves alone, against its rows side by side."""
    task = load_task(packed("bfd", 64), device=torch.device("cpu"))
    batches = task.finetune.batches
    assert isinstance(batches, PackedBatches)
    rows = [batches._rows.rows[row] for row in batches.sequences[0]]
    assert len(rows) > 1
    tokens, positions, labels = flat(rows)
    with torch.no_grad():
        logits = task.model(input_ids=tokens, position_ids=positions).logits[:, :-1].flatten(0, 1)
        together = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        alone = task.finetune.loss_fn(task.model, batches.of(batches.sequences[0]))
    counts = torch.tensor([row.trained for row in rows])
    assert float((alone * counts).sum()) == pytest.approx(float(together), rel=1e-5)


@pytest.mark.parametrize("packing", ["bfd", "wrapped"])
def test_epochs_count_packed_sequences(packing):
    given = packed(packing, 64, epochs=1.0)
    task = load_task(given, device=torch.device("cpu"))
    tokens = sum(
        len(row.tokens)
        for row in load_data(packed("off", 64), load_tokenizer(given.model))["finetune"].rendered
    )
    assert task.finetune.units < 30
    assert task.finetune.units >= -(-tokens // 64)
    assert len(task.finetune.rows) == (30 if packing == "bfd" else task.finetune.units)
    assert planned_steps(given.training, task.finetune.units) == -(-task.finetune.units // 2)
    assert next(iter(task.finetune.batches))["input_ids"].shape[1] <= 64


def test_packed_parts_have_one_length(tokenizer):
    with pytest.raises(ConfigError, match="one length"):
        load_data(
            config(finetune=[{**parts()[0], "max_length": 64}, parts()[1]], training={"packing": "bfd"}),
            tokenizer,
        )
    with pytest.raises(InputError, match="no token of the packed rows"):
        load_data(packed("bfd", 8), tokenizer)
