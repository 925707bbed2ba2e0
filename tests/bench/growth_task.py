"""A task of a size given by the environment, for `tests.bench.growth`: a random Llama and random rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from arisk.base.task import SampleSet, Task
from arisk.config.plan import AdapterConfig, ModelConfig
from arisk.models.loading import load_model
from arisk.models.losses import per_sample_nll
from arisk.models.selection import attach_adapter, lora_pairs, select_parameters
from tests.bench.gradients import batches

#: Name → vocabulary, width, inner width, layers; about 0.5M, 5M and 50M parameters.
SIZES = {
    "0.5M": (1024, 96, 256, 4),
    "5M": (4096, 256, 688, 5),
    "50M": (16384, 640, 1728, 8),
}
SMOLLM2 = Path("models/smollm2-135m-instruct")
#: Rows of the planned fine-tune and of a micro-batch.
FINETUNE, FINETUNE_BATCH = 64, 4


def model(size: str) -> Any:
    """The random Llama of a size, or SmolLM2."""
    if size == "135M":
        return load_model(ModelConfig(path=str(SMOLLM2)), torch.device("cpu"))
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, width, inner, layers = SIZES[size]
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=8,
            tie_word_embeddings=True,
            attn_implementation="eager",
            use_cache=False,
        )
    )


def make() -> Task:
    """The task of `ARISK_BENCH_CASE`, such as `5M lora 128`."""
    size, mode, samples = os.environ["ARISK_BENCH_CASE"].split()
    torch.set_num_threads(int(os.environ.get("ARISK_BENCH_THREADS", "1")))
    net = model(size)
    vocabulary = net.config.vocab_size
    if mode == "lora":
        net = attach_adapter(net, AdapterConfig(r=8), seed=0)
    names = select_parameters(net, "auto")
    return Task(
        model=net,
        safety=_rows("safety", int(samples), 8, vocabulary),
        finetune=_rows("finetune", FINETUNE, FINETUNE_BATCH, vocabulary),
        parameter_names=names,
        lora_pairs=lora_pairs(net, names),
    )


def _rows(name: str, count: int, batch: int, vocabulary: int) -> SampleSet:
    rows = [{"prompt": "", "response": "", "tokens": 0, "line": i} for i in range(count)]
    made = batches(None, count, batch=batch, vocabulary=vocabulary)
    return SampleSet(name, made, per_sample_nll, rows, {"rows": count})
