"""From stored gradients to the subspace: N = 128, P = 5M, one thread."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from arisk.geometry.spectrum import eigenpairs
from arisk.gradients import GradientStore, layout_of
from tests.bench.measure import cpu_seconds, in_own_process, print_table

SAMPLES, BATCH, WIDTH = 128, 8, 1000


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
    """Print the table."""
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
