"""What a screened row costs beside a plain training pass, and memory as the rows grow."""

from __future__ import annotations

import time
from typing import Any

import torch

from arisk.base.task import SampleSet, Task
from arisk.config.plan import AdapterConfig, ScreenConfig, TrainingConfig
from arisk.gradients import layout_of, mean_gradient, measuring
from arisk.gradients.layout import parameters_of
from arisk.models.losses import per_sample_nll
from arisk.models.selection import attach_adapter, select_parameters
from arisk.screening.estimates import by_differences, by_first_tokens, by_sketches
from arisk.screening.points import Place, RowGroup, row_products
from arisk.screening.record import ScreenPoint
from arisk.screening.run import screen
from tests.bench.gradients import BATCH, batches, llama
from tests.bench.measure import cpu_seconds, in_own_process, print_table

TOKENS = 16


def ratio(mode: str, tokens: int) -> dict[str, float]:
    """CPU seconds of a plain pass, and of scoring and sketching the same rows, interleaved."""
    torch.set_num_threads(1)
    model = llama()
    if mode == "lora":
        model = attach_adapter(model, AdapterConfig(r=8), seed=0)
    layout = layout_of(model, select_parameters(model, "auto"))
    data = batches(tokens)[: 4 if tokens > 64 else 16]
    directions = torch.randn(3, layout.numel).T
    theta = torch.cat([p.detach().reshape(-1) for p in parameters_of(model, layout)])
    place = Place(ScreenPoint(0, 0.0, None, 1.0), theta, directions, torch.ones(layout.numel))
    spent = {"plain": 0.0, "scored": 0.0, "differences": 0.0, "first tokens": 0.0, "sketched": 0.0}
    side, rows = ScreenConfig().sketch_side, RowGroup(range(BATCH), data[0])
    with (
        measuring(model, layout),
        by_differences(model, layout, place, per_sample_nll, [rows]) as slopes,
        by_first_tokens(model, layout, place, per_sample_nll, "hooks") as beginnings,
        by_sketches(model, layout, place, per_sample_nll, side, "hooks") as sketches,
    ):
        for number, batch in enumerate(data):
            group = RowGroup(range(BATCH), batch)
            plain = cpu_seconds(lambda b=batch: mean_gradient(model, b, per_sample_nll, layout))
            scored = cpu_seconds(
                lambda g=group: row_products(model, g, per_sample_nll, layout, directions, engine="hooks")
            )
            sloped = cpu_seconds(lambda g=group: slopes([g]))
            begun = cpu_seconds(lambda g=group: beginnings([g]))
            sketched = cpu_seconds(lambda g=group: sketches([g]))
            if number:
                spent["differences"] += sloped
                spent["first tokens"] += begun
                spent["sketched"] += sketched
                spent["plain"] += plain
                spent["scored"] += scored
    return {**spent, "parameters": layout.numel, "rows": (len(data) - 1) * BATCH}


class Drawn:
    """Rows made when asked for, so that the data set itself takes no memory."""

    def __init__(self, rows: int) -> None:
        self.rows, self.size = rows, BATCH

    @property
    def row_count(self) -> int:
        """Different rows."""
        return self.rows

    def indices(self, number: int) -> list[int]:
        """Rows of a micro-batch."""
        return [(number * self.size + i) % self.rows for i in range(self.size)]

    def of(self, rows: Any) -> dict[str, torch.Tensor]:
        """A batch of these rows."""
        ids = torch.stack(
            [torch.randint(0, 430, (TOKENS,), generator=torch.Generator().manual_seed(r)) for r in rows]
        )
        labels = ids.clone()
        labels[:, : TOKENS // 2] = -100
        positions = torch.arange(TOKENS).expand(len(ids), TOKENS).contiguous()
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}

    def sample(self, count: int) -> list[int]:
        """The first rows."""
        return list(range(min(count, self.rows)))

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return self.of(self.indices(number))

    def __iter__(self) -> Any:
        number = 0
        while True:
            yield self[number]
            number += 1


def growing(rows: int) -> dict[str, float]:
    """Seconds of a whole screening of so many short rows on the embedded model with LoRA."""
    from arisk.cli.demo import embedded_folder
    from arisk.config.plan import ModelConfig
    from arisk.models.loading import load_model

    torch.set_num_threads(1)
    config = ModelConfig(path=str(embedded_folder() / "tiny-aligned"))
    model = attach_adapter(load_model(config, torch.device("cpu")), AdapterConfig(r=8), seed=0)
    drawn = Drawn(rows)
    task = Task(
        model=model,
        safety=SampleSet("safety", [Drawn(32).of(range(8 * i, 8 * i + 8)) for i in range(4)], per_sample_nll),
        finetune=SampleSet("finetune", drawn, per_sample_nll),
        control=SampleSet("control", Drawn(32), per_sample_nll),
        parameter_names=select_parameters(model, "auto"),
    )
    settings = ScreenConfig(points="start", batch_size=16, batches=2)
    started, wall = time.process_time(), time.perf_counter()
    screen(task, config=settings, training=TrainingConfig(max_grad_norm=None), steps=200)
    return {"cpu": time.process_time() - started, "wall": time.perf_counter() - wall}


def cost_tables() -> None:
    """Print both tables."""
    rows: list[list[str]] = []
    for mode, tokens in (("lora", 16), ("lora", 128), ("lora", 512), ("full", 16), ("full", 128)):
        found, memory = in_own_process(ratio, mode, tokens)
        rows.append(
            [
                f"{mode}, P = {found['parameters'] / 1e6:.1f}M",
                str(tokens),
                f"{1e3 * found['plain'] / found['rows']:.0f} ms",
                f"{found['scored'] / found['plain']:.2f} ×",
                f"{found['differences'] / found['plain']:.2f} ×",
                f"{found['first tokens'] / found['plain']:.2f} ×",
                f"{found['sketched'] / found['plain']:.2f} ×",
                f"{memory:.1f} GB",
            ]
        )
    header = [
        "selection",
        "tokens per row",
        "plain forward + backward per row",
        "scored",
        "differences",
        "first tokens",
        "sketched",
        "peak RSS",
    ]
    print_table("A screened row, 30M Llama, one thread", header, rows)
    rows = []
    for count in (500, 2000, 8000):
        found, memory = in_own_process(growing, count)
        rate = count / found["cpu"]
        rows.append(
            [
                str(count),
                f"{found['cpu']:.1f} s",
                f"{rate:.0f}",
                f"{1e5 / rate / 60:.0f} min",
                f"{memory:.2f} GB",
            ]
        )
    header = ["rows", "CPU time", "rows per second", "100 000 rows", "peak RSS"]
    print_table("Short rows on the embedded model, LoRA: whole stage", header, rows)
