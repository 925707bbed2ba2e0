"""What a sketch of per-sample gradients costs beside a plain pass, and how far its inner products are off."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from arisk.gradients import ParameterLayout, layout_of, mean_gradient, measuring, per_sample_gradients
from arisk.gradients.store import Sketch, per_sample_sketches, sketch_products
from arisk.models.losses import per_sample_nll
from arisk.models.selection import select_parameters
from tests.bench.gradients import batches, llama
from tests.bench.measure import cpu_seconds, print_table

TOKENS, BATCHES, SIDES = 64, 2, (16, 32, 64)


def main() -> None:
    """Print the table: 30M Llama, all parameters, one thread."""
    torch.set_num_threads(1)
    model = llama()
    layout = layout_of(model, select_parameters(model, "full"))
    data = batches(TOKENS)[:BATCHES]
    rows: list[list[str]] = []
    with measuring(model, layout):
        exact = _gram(torch.cat([_dense(model, batch, layout) for batch in data]))
        lengths = exact.diagonal().sqrt()

        def plain() -> None:
            for batch in data:
                mean_gradient(model, batch, per_sample_nll, layout)

        plain()
        for side in SIDES:
            sketch = Sketch(layout, side=side, dtype=torch.float32, device=torch.device("cpu"))
            made: list[Tensor] = []

            def sketched(sketch: Sketch = sketch, made: list[Tensor] = made) -> None:
                run = partial(per_sample_sketches, model, loss_fn=per_sample_nll, layout=layout)
                made[:] = [run(batch=batch, sketch=sketch)[1] for batch in data]

            cost = cpu_seconds(sketched) / cpu_seconds(plain)
            found = torch.cat(made)
            errors = (sketch_products(found, found) - exact) / lengths.outer(lengths)
            off = float(errors.square().mean().sqrt())
            rows.append([str(side), f"{sketch.numel:,}", f"{cost:.2f} ×", f"{off:.3f}"])
    header = ["rows a side", "numbers a sample", "plain forward + backward", "rms error of a cosine"]
    print_table(f"Sketches, P = {layout.numel / 1e6:.1f}M, {TOKENS} tokens a row, one thread", header, rows)


def _dense(model: torch.nn.Module, batch: dict[str, Tensor], layout: ParameterLayout) -> Tensor:
    blocks: list[Tensor] = []
    per_sample_gradients(
        model,
        batch,
        per_sample_nll,
        layout,
        lambda _, block: blocks.append(block.flatten(1)),
        engine="hooks",
    )
    return torch.cat(blocks, 1)


def _gram(rows: Tensor) -> Tensor:
    wide = rows.double()
    return wide @ wide.T
