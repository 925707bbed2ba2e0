"""What the AlignGuard penalty costs beside a training step of a 30M-parameter Llama with LoRA."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from arisk.base.task import SampleSet
from arisk.config.plan import AdapterConfig
from arisk.guard import AlignGuardConfig, LoRAMitigator, build_mitigator
from arisk.models.losses import per_sample_nll
from arisk.models.selection import attach_adapter
from tests.bench.gradients import batches, llama
from tests.bench.measure import print_table

#: Without the overlap term a penalty may cost this share of a step of 8 rows of 128 tokens.
LIMIT = 0.25
VARIANTS: dict[str, dict[str, Any]] = {
    "all terms, overlap exact": {},
    "all terms, overlap on 64 rows a matrix": {"overlap_rows": 64},
    "all terms, overlap on 16 rows a matrix": {"overlap_rows": 16},
    "without overlap": {"alpha": 0.0},
}


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Fastest of a few runs, CPU seconds."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def main() -> None:
    """Print the table; fail where the factored terms are not small beside the step."""
    torch.set_num_threads(1)
    model = attach_adapter(llama(), AdapterConfig(r=8), seed=0)
    data = batches(128)
    safety = SampleSet("safety", data[:2], per_sample_nll)
    step = seconds(lambda: per_sample_nll(model, data[3]).mean().backward())
    rows = [["training step", f"{step:.3f}", "1"]]
    # Only directions and shapes matter here; a rank of 16 from 16 samples will do.
    made = build_mitigator(model, safety, AlignGuardConfig(rank=16))
    guards = {
        name: LoRAMitigator(model, made.sites, made.directions, AlignGuardConfig(rank=16, **settings))
        for name, settings in VARIANTS.items()
    }
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(1e-3)
    for name, guard in guards.items():
        cost = seconds(lambda guard=guard: guard.penalty().total.backward())
        rows.append([name, f"{cost:.3f}", f"{cost / step:.3f}"])
    print_table("AlignGuard penalty, forward and backward", ["what", "CPU s", "of a step"], rows)
    assert cost < LIMIT * step, f"the factored terms take {cost / step:.2f} of a step"


if __name__ == "__main__":
    main()
