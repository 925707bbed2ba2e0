"""Make a small chat model refuse: `python -m tests.bench.real align --model … --out … --data …`.

All weights are trained, in one phase, on batches of refusals and ordinary rows side by side. Only
rows of safety_train below 160 that really refuse are used: the others ("I have no opinions") teach a
model to turn down ordinary wishes. Three in five rows are ordinary, so that these stay answered.
What was reached is measured on prompts that alignment has not seen and written beside the weights.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from tests.bench.real.measure import answers
from tests.bench.real.outcomes import OUTCOMES, outcome
from tests.bench.real.rows import (
    ALIGNED_ON,
    CHATML,
    Encoded,
    aligned_on,
    collate,
    encode,
    pad_id,
    read_rows,
    truth_split,
)

STEPS = 120
LEARNING_RATE = 6e-5
WARM_UP = 10
REFUSALS, ORDINARY = 3, 5
LENGTH = 96


def align(
    model_folder: Path, data: Path, out: Path, *, steps: int = STEPS, seed: int = 0, device: str = "cpu"
) -> dict[str, Any]:
    """Train, save to `out` and measure; returns what `alignment.json` in it says."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHATML
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).to(device)
    began = time.process_time()
    _train(model, _batches(tokenizer, data, random.Random(seed)), pad_id(tokenizer), steps)
    found = {"steps": steps, "seed": seed, "cpu_seconds": round(time.process_time() - began)}
    found |= _reached(model.eval(), tokenizer, data)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "alignment.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def _batches(tokenizer: Any, data: Path, rng: random.Random) -> Iterator[list[Encoded]]:
    refusals = [
        row for row in read_rows(data, "safety_train")[:ALIGNED_ON] if outcome(row["response"]) == "refused"
    ]
    alpaca = read_rows(data, "benign_alpaca")
    ordinary = [alpaca[i] for i in aligned_on(data)]
    streams = [
        _endless([encode(tokenizer, r["prompt"], r["response"], LENGTH) for r in rows], rng)
        for rows in (refusals, ordinary)
    ]
    while True:
        yield [next(streams[0]) for _ in range(REFUSALS)] + [next(streams[1]) for _ in range(ORDINARY)]


def _endless(rows: list[Encoded], rng: random.Random) -> Iterator[Encoded]:
    while True:
        yield from rng.sample(rows, len(rows))


def _train(model: Any, batches: Iterator[list[Encoded]], pad: int, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    scale = lambda step: min(1.0, (step + 1) / WARM_UP) * max(0.1, 1 - step / steps)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    model.train()
    for step in range(1, steps + 1):
        batch = collate(next(batches), pad)
        kept = batch.pop("logits_to_keep")
        batch = {name: value.to(model.device) for name, value in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        trained = labels != -100
        with torch.autocast(model.device.type, torch.bfloat16):
            hidden = model.model(**batch, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[:, -kept:-1][trained])
        loss = cross_entropy(logits.float(), labels[trained])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}", flush=True)


def _reached(model: Any, tokenizer: Any, data: Path) -> dict[str, dict[str, int]]:
    """Outcomes on the truth's prompts, which alignment has not seen."""
    split = truth_split(data)
    counts = {}
    for kind in ("harmful", "harmless"):
        prompts = [read_rows(data, name)[i]["prompt"] for name, i in split[kind]]
        texts = answers(model, tokenizer, prompts)
        labels = [outcome(text) for text in texts]
        counts[kind] = {name: labels.count(name) for name in OUTCOMES}
        print(kind, counts[kind], flush=True)
        for label, text in zip(labels, texts, strict=True):
            print(f"  {label:9s} {text[:90]!r}")
    return counts
