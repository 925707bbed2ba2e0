"""What every stage costs as the model and the safety set grow, beside a plain training epoch.

`python -m tests.bench growth`: random Llamas of 0.5M, 5M and 50M parameters, N = 32, 128 and 512 safety
rows of real length, LoRA and full parameters, one thread. Every stage is a command in a process of its
own; what starting and loading take is measured once a case and subtracted, and the epoch is timed alone.
`--quick` takes the small sizes at N = 32, `--smollm2` SmolLM2-135M at N = 32 and 128 in their place;
`--full` and `--lora` one of the tables, `--sizes 5M,50M` and `--samples 128` some of the lines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.growth_task import SMOLLM2
from tests.bench.measure import print_table

STAGES = ("collect", "subspace", "score", "rollout")
#: Size, samples, and whether the stages that do not depend on N are run as well.
CASES = [
    *((size, samples, samples == 128) for size in ("0.5M", "5M") for samples in (32, 128, 512)),
    *(("50M", samples, False) for samples in (32, 128, 512)),
]
QUICK = [(size, 32, True) for size in ("0.5M", "5M")]

SETTINGS = """
model: {{source: python, entry: "tests/bench/growth_task.py:make"}}
run: {{threads: 1, device: cpu}}
training: {{max_steps: 50, batch_size: 4, learning_rate: 1e-4}}
score: {{batches: 4, hvp_batches: 2, krylov_dim: 6, nulls: 19, examples: 16, probe_points: 4}}
collect: {{disk_budget_gb: {disk}}}
"""

CHILD = """
import resource, sys, time
own = None
what = sys.argv[1]
sys.argv = ['arisk', *sys.argv[1:]]
try:
    if what == 'load' or what == 'epoch':
        import arisk.catalogue, arisk.anatomy.collect, arisk.anatomy.score, arisk.forecast.rollout
        from arisk.models.tasks import task_from_entry
        task = task_from_entry('tests/bench/growth_task.py:make')
        if what == 'epoch':
            import torch
            chosen = set(task.parameter_names)
            for name, p in task.model.named_parameters():
                p.requires_grad_(name in chosen)
            optimizer = torch.optim.AdamW([p for p in task.model.parameters() if p.requires_grad], lr=1e-4)
            def train(batches):
                for batch in batches:
                    optimizer.zero_grad()
                    task.safety.loss_fn(task.model, batch).mean().backward()
                    optimizer.step()
            batches = list(task.safety.batches)
            train(batches[:1])  # What is made once in a process is no part of an epoch.
            started = time.process_time()
            train(batches)
            own = time.process_time() - started
    else:
        from arisk.cli import main
        main()
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = used.ru_utime + used.ru_stime if own is None else own
    print(seconds, used.ru_maxrss / 1e6, file=sys.stderr)
"""


def main() -> None:
    """Print a table per selection, a line per case, as they are measured."""
    cases = QUICK if "--quick" in sys.argv else list(CASES)
    if "--smollm2" in sys.argv:
        if not (SMOLLM2 / "config.json").exists():
            sys.exit("run `just model` first")
        cases = [("135M", count, False) for count in (32, 128)]
    sizes, samples = _given("--sizes"), _given("--samples")
    cases = [c for c in cases if c[0] in (sizes or [c[0]]) and str(c[1]) in (samples or [str(c[1])])]
    header = ["P", "N", "training epoch", *STAGES, "collect / epoch", "store"]
    for mode in ("full", "lora"):
        other = "--lora" if mode == "full" else "--full"
        if other in sys.argv:
            continue
        print_table(f"CPU seconds and peak memory, {mode} parameters, one thread", header, [])
        for size, count, everything in cases:
            row = _case(size, mode, count, STAGES if everything else STAGES[:2])
            print(f"| {' | '.join(row)} |", flush=True)


def _given(option: str) -> list[str]:
    return sys.argv[sys.argv.index(option) + 1].split(",") if option in sys.argv else []


def _case(size: str, mode: str, samples: int, stages: tuple[str, ...]) -> list[str]:
    """One line: seconds and GB of the epoch and of every stage."""
    env = {**os.environ, "ARISK_BENCH_CASE": f"{size} {mode} {samples}", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "growth.yaml"
        config.write_text(SETTINGS.format(disk=40 if size in ("50M", "135M") else 20), encoding="utf-8")
        loading, _ = _child(["load"], env)
        bare, _ = _child(["--version"], env, "import torch, arisk.anatomy.subspace\n")
        epoch, memory = _child(["epoch"], env)
        took: dict[str, float] = {}
        cells = [f"{epoch:.2f} s, {memory:.1f} GB"]
        for stage in STAGES:
            if stage not in stages:
                cells.append("–")
                continue
            arguments = [stage, str(config), "--run-dir", f"{folder}/run", "-q"]
            seconds, memory = _child(arguments, env)
            took[stage] = max(seconds - (bare if stage == "subspace" else loading), 0.0)
            cells.append(f"{took[stage]:.2f} s, {memory:.1f} GB")
        record = json.loads((Path(folder) / "run/collect/record.json").read_text(encoding="utf-8"))
    return [size, str(samples), *cells, f"{took['collect'] / epoch:.2f} ×", record["values"]["store"]]


def _child(arguments: list[str], env: dict[str, str], first: str = "") -> tuple[float, float]:
    """CPU seconds and peak resident memory (GB) of a process of its own."""
    command = [sys.executable, "-c", first + CHILD, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    seconds, memory = done.stderr.splitlines()[-1].split()
    return float(seconds), float(memory)
