"""Per-sample gradients of a 30M-parameter Llama against plain training passes, one thread."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from arisk.config import AdapterConfig, CollectConfig
from arisk.gradients import layout_of, mean_gradient, measuring, per_sample_gradients
from arisk.models.adapters import attach_adapter
from arisk.models.losses import per_sample_nll
from arisk.models.selection import select_parameters
from arisk.stages.collect import collect
from arisk.task import SampleSet, Task
from tests.bench.measure import cpu_seconds, in_own_process, print_table

SAMPLES, BATCH = 128, 8


def llama() -> Any:
    """About 30M parameters: width 512, 8 layers, vocabulary 8192, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=8,
            num_attention_heads=8,
            tie_word_embeddings=True,
            attn_implementation="eager",
            use_cache=False,
        )
    )


def batches(tokens: int) -> list[dict[str, torch.Tensor]]:
    """N samples of equal length; the loss is on the second half."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(SAMPLES // BATCH):
        ids = torch.randint(0, 8192, (BATCH, tokens), generator=generator)
        labels = ids.clone()
        labels[:, : tokens // 2] = -100
        positions = torch.arange(tokens).expand(BATCH, tokens).contiguous()
        mask = torch.ones_like(ids)
        made.append({"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels})
    return made


def one_case(mode: str, tokens: int) -> dict[str, float]:
    """CPU seconds of each way over the same samples; `loop` on an eighth of them, scaled."""
    torch.set_num_threads(1)
    model = llama()
    if mode == "lora":
        model = attach_adapter(model, AdapterConfig(r=8), seed=0)
    names = select_parameters(model, "auto")
    layout = layout_of(model, names)
    data = batches(tokens)

    def plain() -> None:
        for batch in data:
            mean_gradient(model, batch, per_sample_nll, layout)

    def engine(name: str, chosen: list[dict[str, torch.Tensor]]) -> None:
        for batch in chosen:
            per_sample_gradients(model, batch, per_sample_nll, layout, lambda *_: None, engine=name)

    with measuring(model, layout):
        mean_gradient(model, data[0], per_sample_nll, layout)
        engine("hooks", data[:1])
        times = {
            "plain": cpu_seconds(plain),
            "hooks": cpu_seconds(lambda: engine("hooks", data)),
            "loop": 8 * cpu_seconds(lambda: engine("loop", data[: len(data) // 8])),
        }
    task = Task(model, SampleSet("safety", data, per_sample_nll), SampleSet("f", [], per_sample_nll), names)
    with tempfile.TemporaryDirectory() as folder:
        config = CollectConfig(disk_budget_gb=40)
        times["collect"] = cpu_seconds(lambda: collect(task, config, Path(folder)))
    return {**times, "parameters": layout.numel}


def main() -> None:
    """Print the table."""
    rows = []
    for mode, tokens in (("full", 16), ("full", 128), ("lora", 16), ("lora", 128)):
        times, memory = in_own_process(one_case, mode, tokens)
        plain = times["plain"]
        rows.append(
            [
                f"{mode}, P = {times['parameters'] / 1e6:.1f}M",
                str(tokens),
                f"{plain:.1f} s",
                f"{times['hooks'] / plain:.2f} ×",
                f"{times['loop'] / plain:.2f} ×",
                f"{times['loop'] / times['hooks']:.2f} ×",
                f"{times['collect'] / plain:.2f} ×",
                f"{memory:.1f} GB",
            ]
        )
    header = [
        "selection",
        "tokens per sample",
        "plain forward + backward",
        "hooks",
        "loop",
        "loop / hooks",
        "whole stage collect (self-tests, store, Gram)",
        "peak RSS",
    ]
    print_table(f"Per-sample gradients, 30M Llama, N = {SAMPLES}", header, rows)
