"""Token ids and trained tokens against what TRL's SFTTrainer makes of the same rows."""

import json
from pathlib import Path

import pytest

from arisk.config.plan import DataConfig
from arisk.models.packing import packs, wrapped
from arisk.models.rendering import IGNORED, render_rows, whole_rows
from arisk.models.rows import read_data

pytest.importorskip("trl")
#: Warnings that the trainer and what it stands on give each other.
pytestmark = pytest.mark.filterwarnings("ignore")
FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
#: Templates of model families, as TRL's own tests use them.
FAMILIES = ("qwen2_5", "qwen3", "llama3", "gemma", "gemma3", "phi3")
SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
]
CHATS = [
    [
        {"role": "user", "content": "How do I fold a boat?"},
        {"role": "assistant", "content": "Halve the sheet, then open its sides."},
        {"role": "user", "content": "  And a crane ?"},
        {"role": "assistant", "content": "Begin with a square base.\n\nThen fold the wings."},
    ],
    [{"role": "user", "content": "Name a tide."}, {"role": "assistant", "content": "Spring tide"}],
]
PAIRS = [("The harbor was", " quiet at noon."), ("A list:\n1. rope\n", "2. lamp"), ("x", "y")]
TEXTS = ["The lamp went out at nine.", "Rope, lamp, oil — and bread."]


def words():
    """A byte-level tokenizer that learned to merge a few pairs, so that borders may fall inside a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([json.dumps(CHATS), *TEXTS, *(a + b for a, b in PAIRS)], trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", made.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


@pytest.fixture(scope="module")
def tokenizer():
    return words()


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FIXTURES / "tiny-aligned")


def theirs(model, tokenizer, rows, folder, **settings):
    """Token ids and labels of TRL's trainer."""
    import datasets
    import trl

    args = trl.SFTConfig(
        output_dir=str(folder),
        **{"max_length": 4096, "bf16": False, "use_cpu": True, "report_to": "none", **settings},
    )
    data = datasets.Dataset.from_list(rows)
    trainer = trl.SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def ours(tokenizer, rows, folder, **settings):
    """Token ids and labels of this package, from a file."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = DataConfig(path=str(path), **{"max_length": 4096, **settings})
    read = read_data(config, section="finetune", seed=0)
    rendered = render_rows(read.rows, tokenizer, config, section="finetune")
    return [(list(row.tokens), row.labels()) for row in rendered]


def whole_ours(tokenizer, rows, folder):
    """Rows of this package, not cut."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = DataConfig(path=str(path))
    return whole_rows(
        read_data(config, section="finetune", seed=0).rows, tokenizer, config, section="finetune"
    )


@pytest.fixture(params=FAMILIES)
def family(request, tokenizer):
    """The tokenizer with the template of one model family, and the special tokens it is written for."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    before = tokenizer.chat_template
    tokenizer.chat_template = (folder / f"{request.param}.jinja").read_text(encoding="utf-8")
    yield tokenizer
    tokenizer.chat_template = before


def test_conversations(family, model, tmp_path):
    rows = [{"messages": chat} for chat in CHATS]
    assert ours(family, rows, tmp_path) == theirs(model, family, rows, tmp_path)


def test_answers_of_conversations(family, model, tmp_path):
    # TRL trains some families with a template of its own: Qwen 3's writes thoughts into every answer, so
    # only the last answers are the same; Qwen 2.5's counts the newline of the generation prompt as said.
    own = "last_query_index" in family.chat_template
    rows = [{"messages": chat[-2:] if own else chat} for chat in CHATS]
    expected = theirs(model, family, rows, tmp_path, assistant_only_loss=True)
    found = ours(family, rows, tmp_path, loss_on="assistant")
    if "You are Qwen" in family.chat_template:
        header = family("<|im_start|>assistant\n")["input_ids"][-3:]
        for ids, labels in expected:
            for end in range(3, len(ids) + 1):
                if ids[end - 3 : end] == header:
                    labels[end - 1] = IGNORED
    assert found == expected


#: Sixty texts of one to nine words, and of many more than a sequence holds.
LENGTHS = [(7 * i) % 9 + 1 for i in range(60)] + [40]


@pytest.mark.parametrize("limit", [16, 64])
@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_sequences(tokenizer, model, tmp_path, strategy, limit):
    import datasets
    import trl

    words = [" ".join(["rope"] * length) for length in LENGTHS]
    rows = [{"prompt": f"Say {i}: ", "completion": text} for i, text in enumerate(words)]
    args = trl.SFTConfig(
        output_dir=str(tmp_path),
        packing=True,
        packing_strategy=strategy,
        max_length=limit,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    trainer = trl.SFTTrainer(
        model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    expected = [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]
    whole = whole_ours(tokenizer, rows, tmp_path)
    if strategy == "wrapped":
        found = [(list(row.tokens), row.labels()) for row in wrapped(whole, limit)]
    else:
        cut = [(list(row.tokens)[:limit], row.labels()[:limit]) for row in whole]
        sequences = packs([len(tokens) for tokens, _ in cut], limit)
        found = [
            tuple([token for row in sequence for token in cut[row][part]] for part in (0, 1))
            for sequence in sequences
        ]
        assert [[len(cut[row][0]) for row in sequence] for sequence in sequences] == list(
            trainer.train_dataset["seq_lengths"]
        )
    assert found == expected


def test_answers_that_the_template_rewrites(tokenizer, tmp_path):
    """Qwen 3 writes an answer that is not the last without its thought: what is trained is what is there."""
    import trl

    source = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    before = tokenizer.chat_template
    tokenizer.chat_template = source.read_text(encoding="utf-8")
    try:
        ((ids, labels), _) = ours(tokenizer, [{"messages": c} for c in CHATS], tmp_path, loss_on="assistant")
    finally:
        tokenizer.chat_template = before
    words = tokenizer.decode([label for label in labels if label != IGNORED])
    first, second = (CHATS[0][i]["content"] for i in (1, 3))
    assert words == f"{first}<|im_end|>\n<think>\n\n</think>\n\n{second}<|im_end|>\n"
    assert len(ids) > len(words) // 8


def test_prompts_and_completions_in_chats(family, model, tmp_path):
    rows = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in CHATS]
    assert ours(family, rows, tmp_path) == theirs(model, family, rows, tmp_path)


@pytest.mark.parametrize("limit", [4096, 12])
def test_texts_and_pairs_of_texts(tokenizer, model, tmp_path, limit):
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    assert ours(tokenizer, rows, tmp_path, max_length=limit) == theirs(
        model, tokenizer, rows, tmp_path, max_length=limit
    )
    rows = [{"text": text} for text in TEXTS]
    assert ours(tokenizer, rows, tmp_path, max_length=limit) == theirs(
        model, tokenizer, rows, tmp_path, max_length=limit
    )
