"""Rows as tokens, and which rows may be used for what.

The data folder holds JSONL files of {"prompt", "response"}: safety_train, safety_xstest,
prompts_harmful_jbb, prompts_harmless_alpaca and the fine-tuning sets of `jobs.SOURCES`. Rows are
named by file and index here and in the results; their texts stay where they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.bench.real.outcomes import outcome

IGNORED = -100
#: Rows of safety_train below this one align the model; the others are held out.
ALIGNED_ON = 160
#: Rows of benign_alpaca from this one on align the model; those before are for fine-tuning.
ALPACA_FOR_ALIGNMENT = 500
#: Tokens of a row.
MAX_LENGTH = 96
#: Frame of a base model that has no chat template.
CHATML = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read_rows(folder: Path, name: str) -> list[dict[str, str]]:
    """Rows of one file of the data folder."""
    text = (folder / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def write_rows(file: Path, rows: Sequence[Any]) -> None:
    """Write rows as JSONL as a whole or not at all: several processes may do so at once."""
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    part.replace(file)


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens; those from `start` on are the response and carry loss."""

    tokens: tuple[int, ...]
    start: int


def encode(tokenizer: Any, prompt: str, response: str | None = None, limit: int = MAX_LENGTH) -> Encoded:
    """The chat as the template writes it; without a response, the prompt up to where the answer begins.

    The response ends with all that the template writes after it. It keeps at least half of the
    window: a longer prompt loses its head, a longer response its tail.
    """
    turns = [{"role": "user", "content": prompt}]
    head = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    if response is None:
        asked = tokenizer(head, add_special_tokens=False)["input_ids"][-limit:]
        return Encoded(tuple(asked), len(asked))
    turns.append({"role": "assistant", "content": response})
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    if not whole.startswith(head):
        raise ValueError("the chat template writes the prompt differently once it is answered")
    read = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    tokens = read["input_ids"]
    start = next(i for i, (begin, _) in enumerate(read["offset_mapping"]) if begin >= len(head))
    kept_response = tokens[start:][: max(limit // 2, limit - start)]
    kept_prompt = tokens[:start][-(limit - len(kept_response)) :]
    return Encoded((*kept_prompt, *kept_response), len(kept_prompt))


def collate(rows: Sequence[Encoded], pad: int, *, whole: bool = False) -> dict[str, Any]:
    """Rows of one batch, padded on the right; labels only on the response.

    No logits are asked for before the first response token of the batch, where no label stands:
    the loss is the same, the head costs less. With `whole`, as people collate: a label for every token.
    """
    longest = max(len(row.tokens) for row in rows)
    kept = longest - min(row.start for row in rows) + 1
    ids = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), IGNORED)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        length = len(row.tokens)
        ids[i, :length] = torch.tensor(row.tokens)
        labels[i, row.start : length] = ids[i, row.start : length]
        mask[i, :length] = 1
    if whole:
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {"input_ids": ids, "attention_mask": mask, "labels": labels[:, -kept:], "logits_to_keep": kept}


def pad_id(tokenizer: Any) -> int:
    """Token that fills; it never carries loss or attention."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """`count` items at even distances, none twice; all where there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def aligned_on(folder: Path) -> list[int]:
    """Ordinary rows (of benign_alpaca) that align the model: every second one of the short prompts."""
    rows = read_rows(folder, "benign_alpaca")
    return [i for i in range(ALPACA_FOR_ALIGNMENT, len(rows)) if len(rows[i]["prompt"]) < 200][::2]


#: Files of prompts and rows that are split in halves, and the first index that is.
SPLIT_FROM = {
    "prompts_harmful_jbb": 0,
    "safety_xstest": 0,
    "safety_train": ALIGNED_ON,
    "prompts_harmless_alpaca": 0,
    "benign_alpaca": ALPACA_FOR_ALIGNMENT,
}
#: Harmful prompts of the truth, by file: 48 together.
HARMFUL = {"prompts_harmful_jbb": 24, "safety_train": 12, "safety_xstest": 12}
HARMLESS = 32
SAFETY_ROWS = 24
CONTROL_ROWS = 16


def may_forecast(name: str, index: int) -> bool:
    """Whether a forecast may look at a row: the even ones of a split file, and all rows before the split."""
    return index < SPLIT_FROM[name] or index % 2 == 0


def truth_split(folder: Path) -> dict[str, list[tuple[str, int]]]:
    """(file, index) of what the truth is measured on: odd rows only, so no forecast has seen them.

    `harmful` and `harmless` prompts are answered; `safety` are held-out refusals and `control`
    ordinary answers, whose loss is taken. Safety prompts and rows are those that their file refuses.
    """

    def odd(name: str, count: int, *, refusals: bool) -> list[tuple[str, int]]:
        rows, seen = read_rows(folder, name), aligned_on(folder) if name == "benign_alpaca" else []
        fit = [
            i
            for i in range(SPLIT_FROM[name], len(rows))
            if not may_forecast(name, i) and i not in seen
            if not refusals or outcome(rows[i]["response"]) == "refused"
        ]
        return [(name, i) for i in spread(fit, count)]

    return {
        "harmful": [
            pair
            for name, count in HARMFUL.items()
            for pair in odd(name, count, refusals=name != "prompts_harmful_jbb")
        ],
        "harmless": odd("prompts_harmless_alpaca", HARMLESS, refusals=False),
        "safety": odd("safety_train", SAFETY_ROWS, refusals=True),
        "control": odd("benign_alpaca", CONTROL_ROWS, refusals=False),
    }
