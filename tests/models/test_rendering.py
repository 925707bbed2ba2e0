"""Rows as tokens: what carries loss, what is cut, and templates that fail, hang or refuse a role."""

import json
import time
from pathlib import Path

import pytest

from arisk.base.errors import ConfigError, InputError
from arisk.config.plan import DataConfig, ModelConfig
from arisk.models import rendering, templates
from arisk.models.batching import collate
from arisk.models.formats import Row
from arisk.models.loading import load_tokenizer
from arisk.models.rendering import IGNORED, loss_on, render_rows, token_rows
from arisk.models.rows import read_rows
from arisk.models.templates import PLAIN_TEMPLATE

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
SAFETY = DataConfig(path=str(FIXTURES / "data" / "safety.jsonl"))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelConfig(path=str(FIXTURES / "tiny-aligned")))


@pytest.fixture
def template(tokenizer, monkeypatch):
    """Puts a chat template in the tokenizer's place."""
    return lambda text: monkeypatch.setattr(tokenizer, "chat_template", text)


def rows(config=SAFETY):
    return read_rows(config, section="safety", seed=0)


def data(**settings):
    return DataConfig(path="x", **settings)


def chat(*texts, first="user", **extra):
    """A chat in which user and assistant take turns."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    turns = tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))
    return Row(turns, format="messages", source="d.jsonl", line=3, **extra)


def trained(rendered, tokenizer):
    """The text of each run of trained tokens."""
    return [tokenizer.decode(list(rendered.tokens[a:b])) for a, b in rendered.spans]


def render(row, tokenizer, section="finetune", **settings):
    (page,) = render_rows([row], tokenizer, data(**settings), section=section)
    return page


FOUR = chat("how do i", "take the ferry", "which things", "for bread")


@pytest.mark.parametrize(
    ("section", "settings", "expected"),
    [
        (
            *("finetune", {}),
            [
                "<bos> <user> how do i <assistant> take the ferry <eos> "
                "<user> which things <assistant> for bread <eos>"
            ],
        ),
        ("finetune", {"loss_on": "assistant"}, ["take the ferry <eos>", "for bread <eos>"]),
        ("finetune", {"loss_on": "last"}, ["for bread <eos>"]),
        ("finetune", {"loss_on": "completion"}, ["for bread <eos>"]),
        ("control", {}, ["take the ferry <eos>", "for bread <eos>"]),
        ("safety", {}, ["for bread <eos>"]),
        ("verify.safety", {}, ["for bread <eos>"]),
    ],
)
@pytest.mark.parametrize("marks", [True, False])
def test_what_is_trained_of_a_conversation(tokenizer, template, section, settings, expected, marks):
    if not marks:
        text = tokenizer.chat_template
        template(text.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    page = render(FOUR, tokenizer, section, **settings)
    assert trained(page, tokenizer) == expected
    whole = tokenizer.apply_chat_template(list(FOUR.messages), tokenize=False)
    assert list(page.tokens) == tokenizer(whole, add_special_tokens=False)["input_ids"]
    labels = page.labels()
    assert all(label in (IGNORED, token) for label, token in zip(labels, page.tokens, strict=True))
    assert sum(label != IGNORED for label in labels[1:]) == page.trained


def test_turns_that_are_not_trained_are_counted(tokenizer):
    for mode, count in (("all", 0), ("assistant", 0), ("last", 1), ("completion", 1)):
        assert render(FOUR, tokenizer, loss_on=mode).untrained == count
    weighted = chat("how do i", "take the ferry", "which things", "for bread")
    weighted.messages[1]["weight"] = 0
    page = render(weighted, tokenizer)
    assert (page.mode, page.untrained, trained(page, tokenizer)) == ("assistant", 1, ["for bread <eos>"])


def test_a_completion_of_several_turns_is_trained_from_where_it_begins(tokenizer):
    row = chat("how do i", "take the ferry", "which things", "for bread", start=1)
    assert trained(render(row, tokenizer, loss_on="completion"), tokenizer) == [
        "take the ferry <eos> <user> which things <assistant> for bread <eos>"
    ]
    row = chat("how do i", "take the ferry", "which things", "for bread", start=3)
    assert trained(render(row, tokenizer, loss_on="assistant"), tokenizer) == ["for bread <eos>"]


def test_defaults_follow_the_layout():
    for layout, mode in (
        *(("messages", "all"), ("sharegpt", "all"), ("text", "all"), ("alpaca", "completion")),
        *(("prompt_completion", "completion"), ("transcript", "assistant")),
    ):
        row = Row(FOUR.messages, format=layout)
        assert loss_on(row, data(), "finetune") == mode
        assert loss_on(row, data(), "safety") == "last"
        assert loss_on(row, data(loss_on="all"), "safety") == "all"


def test_the_response_is_what_the_template_writes_and_no_end_token_more(tokenizer):
    for page in render_rows(rows()[:5], tokenizer, SAFETY, section="safety"):
        prompt = tokenizer.apply_chat_template(
            list(page.row.messages[:1]), tokenize=False, add_generation_prompt=True
        )
        assert (
            list(page.tokens[: page.response_start])
            == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        )
        assert tokenizer.decode(page.tokens[page.response_start : -1]) == page.row.response
        assert page.tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in page.tokens[:-1]
        (plain,) = render_rows([page.row], tokenizer, data(chat_template=False), section="safety")
        assert plain.tokens != page.tokens


def test_turns_end_as_the_template_ends_them(tokenizer, template):
    """With an end of turn that is no end token, none is added; what follows a turn is not its own."""
    template(
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} . {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    page = render(FOUR, tokenizer, loss_on="assistant")
    assert trained(page, tokenizer) == ["take the ferry .", "for bread ."]
    assert tokenizer.eos_token_id not in page.tokens


def test_without_a_template_there_is_a_plain_layout(tokenizer, template):
    template(None)
    system = {"role": "system", "content": "be brief"}
    row = Row((system, *FOUR.messages), format="messages")
    expected = (
        "be brief\n\n### Instruction:\nhow do i\n\n### Response:\ntake the ferry<eos>\n\n"
        "### Instruction:\nwhich things\n\n### Response:\nfor bread<eos>"
    )
    assert tokenizer.apply_chat_template(
        list(row.messages), tokenize=False, chat_template=PLAIN_TEMPLATE
    ) == (expected)
    page = render(row, tokenizer, loss_on="assistant")
    assert list(page.tokens) == tokenizer(expected)["input_ids"]
    assert [text.split() for text in trained(page, tokenizer)] == [
        ["take", "the", "ferry", "<eos>"],
        ["for", "bread", "<eos>"],
    ]
    both = [{"role": "user", "content": "i\nx", "instruction": "i", "input": "x"}]
    assert (
        tokenizer.apply_chat_template(both, tokenize=False, chat_template=PLAIN_TEMPLATE)
        == "### Instruction:\ni\n\n### Input:\nx\n\n"
    )
    with pytest.raises(InputError, match="refuses the role 'tool'"):
        render(Row((*FOUR.messages[:1], {"role": "tool", "content": "x"}, *FOUR.messages[1:])), tokenizer)


def test_texts_are_joined_as_they_are(tokenizer):
    row = Row(text=("how do i", " grow tulips"), format="prompt_completion")
    page = render(row, tokenizer)
    assert list(page.tokens) == tokenizer("how do i grow tulips<eos>")["input_ids"]
    assert trained(page, tokenizer) == ["grow tulips <eos>"]
    asked = render(row, tokenizer, chat_template=True)
    assert tokenizer.decode(list(asked.tokens)).startswith("<bos> <user> how do i <assistant>")


def test_prompts_alone_have_no_loss_and_stay(tokenizer):
    row = Row(FOUR.messages[:1], format="prompts", answered=False)
    page = render(row, tokenizer, "safety")
    assert (page.trained, page.labels()) == (0, [IGNORED] * len(page.tokens))
    assert page.response_start == len(page.tokens)
    assert tokenizer.decode(list(page.tokens)) == "<bos> <user> how do i <assistant>"


@pytest.mark.parametrize("limit", range(8, 40, 3))
def test_truncation_never_takes_the_whole_response(tokenizer, limit):
    for whole, cut in zip(
        render_rows(rows()[:20], tokenizer, SAFETY, section="safety"),
        render_rows(rows()[:20], tokenizer, data(max_length=limit), section="safety"),
        strict=True,
    ):
        response = len(whole.tokens) - whole.response_start
        kept = len(cut.tokens) - cut.response_start
        assert len(cut.tokens) <= limit
        assert kept >= min(response, limit // 2)
        assert cut.response_cut == response - kept
        assert cut.prompt_cut == whole.response_start - cut.response_start
        assert cut.trained == kept


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end", "keep_response", "drop"])
@pytest.mark.parametrize("mode", ["all", "assistant"])
def test_truncation_keeps_a_window_of_tokens_and_labels(tokenizer, truncation, mode):
    (whole,) = render_rows([FOUR], tokenizer, data(loss_on=mode), section="finetune")
    for limit in range(8, len(whole.tokens) + 2):
        config = data(loss_on=mode, max_length=limit, truncation=truncation)
        try:
            pages = render_rows([FOUR, FOUR], tokenizer, config, section="finetune")
        except InputError:
            assert truncation == "drop"
            continue
        if truncation == "drop":
            assert limit >= len(whole.tokens)
        count, n = min(limit, len(whole.tokens)), len(whole.tokens)
        starts = {"keep_start": [0], "keep_end": [n - count]}.get(truncation, range(n - count + 1))
        window = (list(pages[0].tokens), pages[0].labels())
        assert window in [(list(whole.tokens[s : s + count]), whole.labels()[s : s + count]) for s in starts]
        assert pages[0].prompt_cut + pages[0].response_cut == n - count


def test_trained_rows_that_keep_no_loss_are_left_out_and_measured_ones_are_errors(tokenizer):
    long = chat("how " * 30, "take the ferry")
    config = data(max_length=16, loss_on="assistant", truncation="keep_start")
    assert len(render_rows([long, FOUR], tokenizer, config, section="finetune")) == 1
    with pytest.raises(InputError, match="1 of 2 rows have no response token") as caught:
        render_rows([long, FOUR], tokenizer, config, section="control")
    assert caught.value.where == "d.jsonl, line 3"
    with pytest.raises(InputError, match="every response"):
        render_rows([long], tokenizer, config, section="finetune")


def test_template_on_a_tokenizer_without_one(tokenizer, template):
    template(None)
    with pytest.raises(ConfigError, match="no chat template"):
        render_rows(rows()[:1], tokenizer, data(chat_template=True), section="safety")
    render_rows(rows()[:1], tokenizer, SAFETY, section="safety")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{% for x in %}", "not valid"),
        ("{% for i in range(10**9) %}{% endfor %}x", "fails on this row"),
        ("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}", "does not end"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails on this row"),
        ("{{ 'a' * 10**11 }}", "memory"),
        ("{{ 9**(9**9) }}", "does not end"),
        ("{{ messages[5].content }}", "fails on this row"),
        ("{{ raise_exception('no') }}", "no"),
        ("{{ messages.pop() }}", "fails on this row"),
        ("{{ ().__class__.__bases__[0].__subclasses__() }}", "fails on this row"),
        ("{% set x = 1 / 0 %}", "fails on this row"),
        ({"default": "a", "other": "{% for x in %}"}, "writes nothing"),
        ({"one": "a", "two": "b"}, "fails"),
    ],
)
def test_templates_that_fail_or_hang_are_one_error_in_seconds(tokenizer, template, monkeypatch, text, what):
    monkeypatch.setattr(templates, "SECONDS", 1)
    template(text)
    began = time.monotonic()
    with pytest.raises(InputError, match=what) as caught:
        render(FOUR, tokenizer)
    assert "d.jsonl" in caught.value.where or what == "writes nothing"
    assert len(str(caught.value)) < 800
    assert time.monotonic() - began < 60


def test_a_template_that_hangs_on_one_row_of_many(tokenizer, template, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 1)
    loop = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    template("{% if messages[0].content == 'stop' %}" + loop + "{% endif %}" + tokenizer.chat_template)
    some = [*rows()[:5], chat("stop", "now")]
    with pytest.raises(InputError, match="does not end") as caught:
        render_rows(some, tokenizer, SAFETY, section="safety")
    assert caught.value.where == "d.jsonl, line 3"


@pytest.mark.parametrize("marks", [True, False])
def test_long_chats_have_time_and_portions_are_joined(tokenizer, template, monkeypatch, marks):
    if not marks:
        text = tokenizer.chat_template
        template(text.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    monkeypatch.setattr(templates, "SECONDS", 1)
    monkeypatch.setattr(templates, "ROWS_AT_ONCE", 3)
    monkeypatch.setattr(templates, "CHARACTERS_AT_ONCE", 600)
    some = [chat(*(["how do i", "take the ferry"] * n)) for n in (1, 1, 60, 1, 2, 3, 4)]
    pages = render_rows(some, tokenizer, data(loss_on="assistant"), section="finetune")
    assert [page.row for page in pages] == some
    for page in pages:
        assert trained(page, tokenizer) == ["take the ferry <eos>"] * (len(page.row.messages) // 2)


def test_a_role_that_the_template_refuses(tokenizer):
    row = Row(({"role": "system", "content": "be kind"}, *FOUR.messages), format="messages", line=7)
    with pytest.raises(InputError, match="refuses the role 'system'") as caught:
        render_rows([FOUR, row], tokenizer, data(), section="finetune")
    assert caught.value.where.endswith("line 7")
    assert "knows the roles user, assistant" in caught.value.fix


def test_a_template_that_rewrites_what_was_asked(tokenizer, template):
    template("{% for m in messages | reverse %}<{{ m.role }}> {{ m.content }} {% endfor %}")
    with pytest.raises(InputError, match="rewrites the beginning") as caught:
        render(FOUR, tokenizer, loss_on="assistant")
    assert "line 3" in caught.value.where
    assert trained(render(FOUR, tokenizer, loss_on="all"), tokenizer)[0].startswith("<assistant>")


@pytest.mark.parametrize("section", ["finetune", "safety"])
def test_a_template_that_writes_no_answer(tokenizer, template, section):
    template("{% for m in messages if m.role == 'user' %}<user> {{ m.content }} {% endfor %}")
    with pytest.raises(InputError, match="writes nothing of the answers") as caught:
        render_rows([FOUR], tokenizer, data(loss_on="last"), section=section)
    assert f"{section}.chat_template: false" in caught.value.fix


def test_rows_as_plain_data(tokenizer):
    (found,) = token_rows([render(FOUR, tokenizer, loss_on="assistant")], tokenizer, 3)
    assert json.loads(json.dumps(found)) == found
    assert found["text"].count("«") == 2
    assert "«take the ferry <eos>»" in found["text"]
    assert len(found["input_ids"]) == len(found["tokens"]) == len(found["trained"])
    said = [token for token, mark in zip(found["tokens"], found["trained"], strict=True) if mark]
    assert said == ["take", "the", "ferry", "<eos>", "for", "bread", "<eos>"]
    assert token_rows([], tokenizer, 3) == []


def test_labels_of_a_batch_are_those_of_its_rows(tokenizer):
    pages = [render(FOUR, tokenizer, loss_on=mode) for mode in ("assistant", "last", "all")]
    batch = collate(pages, tokenizer.pad_token_id)
    for i, page in enumerate(pages):
        assert batch["labels"][i, : len(page.tokens)].tolist() == page.labels()
    assert batch["logits_to_keep"] == batch["labels"].shape[1]
    alone = collate(pages[:1], tokenizer.pad_token_id)
    # Nothing before the first trained token needs logits, but the token that predicts it.
    assert alone["logits_to_keep"] == len(pages[0].tokens) - pages[0].spans[0][0] + 1


def test_a_tokenizer_that_cannot_read_text_is_named():
    """`model_max_length: "x"` in its config: the library compares a number with text."""

    class Broken:
        def __call__(self, *args, **kwargs):
            raise TypeError("'>' not supported between instances of 'int' and 'str'")

    with pytest.raises(InputError, match="the tokenizer cannot read text") as caught:
        rendering._ids([templates.LaidOut("a", ())], Broken())
    assert caught.value.where == "model.path: tokenizer_config.json"
