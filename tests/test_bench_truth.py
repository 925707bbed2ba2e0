"""A whole job on a small random model: the Trainer's run is measured, and goes on where it was stopped."""

import json

import pytest

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("peft")

from tests.bench.real import truth  # noqa: E402
from tests.bench.real.jobs import Job  # noqa: E402
from tests.bench.real.rows import CHATML, truth_split  # noqa: E402

WORDS = ["I'm", "sorry,", "but", "I", "cannot", "help.", "how", "to", "do", "thing", "yes,", "take", "some"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    refusal, answer = "I'm sorry, but I cannot help.", "yes, take some thing"
    for name, count, response in (
        ("safety_train", 220, refusal),
        ("safety_xstest", 60, refusal),
        ("prompts_harmful_jbb", 60, ""),
        ("prompts_harmless_alpaca", 70, ""),
        ("benign_alpaca", 640, answer),
    ):
        rows = [{"prompt": f"how to do thing {i % 7}", "response": response} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    marks = ["<pad>", "<|im_start|>", "<|im_end|>", "user", "assistant", "\n"]
    vocabulary = {word: i for i, word in enumerate([*marks, *WORDS, *"0123456"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split("\n", "isolated"),
            tokenizers.pre_tokenizers.Split(" ", "removed"),
        ]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<|im_end|>", bos_token="<|im_start|>"
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _numbers(result):
    """What a run found, without what the clock says."""
    return {key: result[key] for key in ("job", "rows", "train", "points")}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_job_that_was_stopped_ends_as_if_it_had_not_been(tmp_path, model, data, mode):
    job = Job(1, "alpaca", mode, 1e-2, 15, "cosine", 0.1, weight_decay=0.01, batch=2, accumulation=2)
    whole = truth.run(job, model, data, tmp_path / "whole")
    assert [point["step"] for point in whole["points"]] == [0, 5, 10, 15]
    assert len(whole["train"]["loss"]) == 15
    assert whole["train"]["loss"][-1] < whole["train"]["loss"][0] - 0.1
    assert "answers_harmful" in whole["points"][-1]
    assert sum(whole["points"][-1]["answers_harmful"]["counts"].values()) == 48

    asked = []

    def at_the_second_measure():
        asked.append(True)
        return len(asked) == 2

    parts = tmp_path / "parts"
    assert truth.run(job, model, data, parts, stop=at_the_second_measure) is None
    assert not list(parts.glob("01-*.json"))
    assert _numbers(truth.run(job, model, data, parts)) == _numbers(whole)
    # Nothing of the way is kept, and what is there is not made again.
    assert not list(parts.glob("*.run"))
    assert truth.run(job, model, data, parts, stop=lambda: pytest.fail("ran again")) is not None


def test_truth_rows_are_odd_and_not_those_that_aligned(data):
    split = truth_split(data)
    assert {kind: len(pairs) for kind, pairs in split.items()} == {
        "harmful": 48,
        "harmless": 32,
        "safety": 24,
        "control": 16,
    }
    assert all(index % 2 == 1 for pairs in split.values() for _, index in pairs)
    assert all(index >= 160 for name, index in split["safety"] if name == "safety_train")
