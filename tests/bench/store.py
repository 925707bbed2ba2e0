"""Does `collect.store: auto` take the cheaper way? And: from stored gradients to the subspace.

A small grid of parameters, samples and tokens, one thread. A run is collect and the dozen products that
later stages take of the gradients (11 with sixteen directions, one weighted sum; each is measured once
and counted so often). Ways: both stores, and Gram matrices from blocks or from factors ("ghost") for all
parameters that have them, where `arisk` decides parameter by parameter by a count of multiplications.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arisk.anatomy.collect import GRADIENTS_FOLDER, collect
from arisk.anatomy.subspace import recomputed_side, stored_side
from arisk.base.task import SampleSet, Task
from arisk.config.plan import AdapterConfig, CollectConfig
from arisk.geometry.spectrum import eigenpairs
from arisk.gradients import GradientStore, layout_of
from arisk.gradients import factors as products
from arisk.models.losses import per_sample_nll
from arisk.models.selection import attach_adapter, select_parameters
from tests.bench.gradients import batches
from tests.bench.growth_task import model as llama
from tests.bench.measure import cpu_seconds, in_own_process, print_table

SAMPLES, BATCH, WIDTH = 128, 8, 1000
#: Size, selection, samples, tokens.
GRID = (
    ("0.5M", "full", 32, 8),
    ("0.5M", "full", 64, 64),
    ("5M", "full", 32, 8),
    ("5M", "full", 128, 8),
    ("5M", "full", 64, 32),
    ("5M", "full", 32, 128),
    ("5M", "lora", 32, 64),
)
DOTS, DIRECTIONS = 11, 16
#: What a way decides of `is_ghost`; None leaves it to the count of multiplications.
GHOSTS = {"counted": None, "never": False, "always": True}
WAYS = (("gradients", "counted"), ("gradients", "never"), ("gradients", "always"), ("gram", "counted"))


def one_way(size: str, mode: str, samples: int, tokens: int, store: Any, ghost: str) -> tuple[float, ...]:
    """CPU seconds of collect and of the later products, and what `auto` chose."""
    torch.set_num_threads(1)
    net = llama(size)
    vocabulary = net.config.vocab_size
    if mode == "lora":
        net = attach_adapter(net, AdapterConfig(r=8), seed=0)
    names = select_parameters(net, "auto")
    rows = batches(tokens, samples, vocabulary=vocabulary)
    safety = SampleSet("safety", rows, per_sample_nll)
    task = Task(net, safety, SampleSet("finetune", [], per_sample_nll), names)
    layout = layout_of(net, names)
    forced = GHOSTS[ghost]
    if forced is not None:
        counted = products.is_ghost

        def always(parts: Any, shape: Any) -> bool:
            factored = not any(isinstance(part, torch.Tensor) for own in parts for part in own)
            return forced and factored

        products.is_ghost = always if forced else lambda *_: False
        assert products.is_ghost is not counted
    with tempfile.TemporaryDirectory() as folder:
        kept: list[Any] = []
        took = cpu_seconds(lambda: kept.append(collect(task, CollectConfig(store=store), Path(folder))))
        if kept[0].store == "gradients":
            side = stored_side(GradientStore(Path(folder) / GRADIENTS_FOLDER), layout)
        else:
            side = recomputed_side(task, layout, kept[0].engine["name"], BATCH)
        directions = torch.randn(layout.numel, DIRECTIONS, generator=torch.Generator().manual_seed(0))
        dots = cpu_seconds(lambda: side.dots(directions))
        summed = cpu_seconds(lambda: side.weighted_sum(torch.ones(samples, dtype=torch.float64)))
    return took, DOTS * dots + summed, float(kept[0].store == "gram")


def choices() -> None:
    """Every way of every case, beside the one that `auto` takes."""
    header = ["case", *(f"{store}, ghost {ghost}" for store, ghost in WAYS), "auto", "auto / best"]
    print_table("CPU time of collect + later products, by store and Gram path", header, [])
    for case in GRID:
        ways = {way: in_own_process(one_way, *case, *way)[0] for way in WAYS}
        chosen = in_own_process(one_way, *case, "auto", "counted")[0]
        best = min(took + later for took, later, _ in ways.values())
        taken = ways["gram" if chosen[2] else "gradients", "counted"]
        size, mode, samples, tokens = case
        row = [
            f"{size} {mode}, N = {samples}, S = {tokens}",
            *(f"{took:.1f} + {later:.1f} s" for took, later, _ in ways.values()),
            "gram" if chosen[2] else "gradients",
            f"{(taken[0] + taken[1]) / best:.2f} ×",
        ]
        print(f"| {' | '.join(row)} |", flush=True)


def model() -> nn.Module:
    """Five square layers: 5M parameters."""
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(5)])


def fill(folder: str) -> None:
    """Write random gradients, a shard per batch."""
    names = [name for name, _ in model().named_parameters()]
    store, generator = GradientStore(Path(folder)), torch.Generator().manual_seed(0)
    for index in range(SAMPLES // BATCH):
        store.write_shard(index, {n: torch.randn(BATCH, WIDTH * WIDTH, generator=generator) for n in names})


def subspace(folder: str) -> tuple[float, float]:
    """CPU seconds of the sweep (Gram, mean, diagonal) and of the eigenpairs."""
    torch.set_num_threads(1)
    net = model()
    layout = layout_of(net, [name for name, _ in net.named_parameters()])
    store = GradientStore(Path(folder))
    kept: list[torch.Tensor] = []
    sweep = cpu_seconds(lambda: kept.append(store.sweep(layout)[0]))
    return sweep, cpu_seconds(lambda: eigenpairs(kept[0].sum(0)))


def svd(folder: str) -> float:
    """CPU seconds of the plain alternative: all gradients in memory, float64 SVD."""
    torch.set_num_threads(1)
    net = model()
    layout = layout_of(net, [name for name, _ in net.named_parameters()])
    store = GradientStore(Path(folder))
    g = torch.cat([store.rows(n, 0, WIDTH * WIDTH) for n in layout.names], dim=1).double()
    return cpu_seconds(lambda: torch.linalg.svd(g, full_matrices=False))


def main() -> None:
    """Print both tables."""
    choices()
    with tempfile.TemporaryDirectory() as folder:
        in_own_process(fill, folder)
        (sweep, eigen), memory = in_own_process(subspace, folder)
        plain, plain_memory = in_own_process(svd, folder)
    rows = [
        ["arisk: Gram sweep from disk", f"{sweep:.2f} s", f"{memory:.1f} GB"],
        ["arisk: eigenpairs", f"{eigen:.3f} s", "–"],
        [
            "plain: float64 SVD in memory",
            f"{plain:.1f} s ({plain / (sweep + eigen):.0f} ×)",
            f"{plain_memory:.1f} GB",
        ],
    ]
    print_table("Subspace from N = 128 gradients of P = 5M", ["way", "CPU time", "peak RSS"], rows)
