"""Per-sample gradients of a 30M-parameter Llama against plain training passes, one thread."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from arisk.anatomy.collect import collect
from arisk.anatomy.record import CollectResult
from arisk.anatomy.subspace import subspace
from arisk.base.task import SampleSet, Task
from arisk.config.plan import AdapterConfig, CollectConfig, SubspaceConfig
from arisk.gradients import layout_of, mean_gradient, measuring, per_sample_gradients
from arisk.models.losses import KEEP, per_sample_nll
from arisk.models.selection import attach_adapter, select_parameters
from tests.bench.measure import cpu_seconds, in_own_process, print_table

SAMPLES, BATCH, VOCABULARY = 128, 8, 8192


def llama() -> Any:
    """About 30M parameters: width 512, 8 layers, vocabulary 8192, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=8,
            num_attention_heads=8,
            tie_word_embeddings=True,
            attn_implementation="eager",
            use_cache=False,
        )
    )


def batches(
    tokens: int | None, samples: int = SAMPLES, *, batch: int = BATCH, vocabulary: int = VOCABULARY
) -> list[dict[str, Any]]:
    """N samples of equal length, or (None) of lengths like refusals in a chat template, sorted by length.

    Those are 97 ± 15 tokens of which the last 55 % are the response. Batches are padded, ask for the
    logits of the responses alone, and so are what `arisk` itself makes of such rows.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = torch.full((samples,), tokens or 0)
    if tokens is None:
        drawn = 97 + 15 * torch.randn(samples, generator=generator)
        lengths = drawn.clamp(40, 150).long().sort().values
    made = []
    for start in range(0, samples, batch):
        own = lengths[start : start + batch]
        longest = int(own.max())
        ids = torch.randint(1, vocabulary, (len(own), longest), generator=generator)
        place = torch.arange(longest)
        inside = place < own[:, None]
        first = (own * 0.45).long()
        ids[~inside] = 0
        labels = torch.where(inside & (place >= first[:, None]), ids, -100)
        made.append(
            {
                "input_ids": ids,
                "attention_mask": inside.long(),
                "position_ids": place.expand(len(own), longest).contiguous(),
                "labels": labels,
                KEEP: longest - int(first.min()) + 1,
            }
        )
    return made


def one_case(mode: str, tokens: int | None) -> dict[str, float]:
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

    def engine(name: str, chosen: list[dict[str, Any]]) -> None:
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
    for store in ("gram", "gradients"):
        times[store], times["subspace"] = _stages(task, store)
    return {**times, "parameters": layout.numel}


def _stages(task: Task, store: Any) -> tuple[float, float]:
    """CPU seconds of collect and of subspace."""
    kept: list[CollectResult] = []
    with tempfile.TemporaryDirectory() as folder:
        config = CollectConfig(store=store, disk_budget_gb=40)
        seconds = cpu_seconds(lambda: kept.append(collect(task, config, Path(folder))))
    return seconds, cpu_seconds(lambda: subspace(kept[0], SubspaceConfig(), seed=0))


#: Selection and tokens a sample; None: lengths of real refusals.
CASES = (("full", 16), ("full", None), ("full", 256), ("lora", 16), ("lora", None))


def main() -> None:
    """Print the table."""
    rows = []
    for mode, tokens in CASES:
        times, memory = in_own_process(one_case, mode, tokens)
        plain = times["plain"]
        rows.append(
            [
                f"{mode}, P = {times['parameters'] / 1e6:.1f}M",
                str(tokens or "97 ± 15"),
                f"{plain:.1f} s",
                f"{times['hooks'] / plain:.2f} ×",
                f"{times['loop'] / plain:.2f} ×",
                f"{times['loop'] / times['hooks']:.2f} ×",
                f"{times['gram'] / plain:.2f} ×",
                f"{times['gradients'] / plain:.2f} ×",
                f"{times['subspace'] / times['gram']:.1%}",
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
        "stage collect, store gram",
        "stage collect, store gradients",
        "subspace / collect",
        "peak RSS",
    ]
    print_table(f"Per-sample gradients, 30M Llama, N = {SAMPLES}", header, rows)
