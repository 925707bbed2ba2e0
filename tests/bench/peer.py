"""The safety subspace beside `alignment-risk` from PyPI, in one run: P = 5M, N = 128, one thread.

The peer gets an environment of its own, made once (`ARISK_PEER`, default `peer` in the temporary folder).
It refuses more than 500,000 parameters, which its setting `max_parameters` lifts; it also asks for an
older torch, which is not what it is compared on, so it is installed without its pins.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from tests.bench.measure import cpu_seconds, in_own_process, print_table
from tests.bench.peer_case import case, sample_losses

RECIPE = (["torch==2.13.0", "numpy", "matplotlib"], ["--no-deps", "alignment-risk"])

CHILD = """
import resource, sys, time
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from peer_case import case, mean_loss
from alignment_risk.fisher import FisherConfig, FisherSubspaceAnalyzer
model, batches = case(sys.argv[2])
names = [name for name, _ in model.named_parameters()]
config = FisherConfig(max_parameters=10**9, parameter_names=names, device='cpu')
analyzer = FisherSubspaceAnalyzer(config)
collect = analyzer._collect_per_sample_gradients
passed = [0.0]
def timed(**given):
    start = time.process_time()
    made = collect(**given)
    passed[0] = time.process_time() - start
    return made
analyzer._collect_per_sample_gradients = timed
start = time.process_time()
found = analyzer.analyze(model, batches, mean_loss)
total = time.process_time() - start
print(passed[0], total - passed[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
      len(found.fisher_eigenvalues))
"""


def environment() -> Path | str:
    """Python of the peer's environment, or why there is none."""
    folder = Path(os.environ.get("ARISK_PEER", Path(tempfile.gettempdir()) / "peer"))
    python = folder / "bin" / "python"
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True)
        if subprocess.run(
            [python, "-c", "import alignment_risk"], capture_output=True, check=False
        ).returncode:
            for packages in RECIPE:
                command = [python, "-m", "pip", "install", "-q", *packages]
                subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as err:
        return f"its environment cannot be made: {str(getattr(err, 'stderr', err)).strip()[-200:]}"
    return python


def ours(size: str) -> tuple[float, float]:
    """CPU seconds of collect's pass, and of Gram matrices, moments and eigenpairs from what it kept."""
    import torch

    from arisk.geometry.spectrum import eigenpairs
    from arisk.gradients import GradientStore, layout_of, measuring, per_sample_parts
    from arisk.gradients.factors import lightest

    torch.set_num_threads(1)
    model, batches = case(size)
    layout = layout_of(model, [name for name, _ in model.named_parameters()])
    with tempfile.TemporaryDirectory() as folder:
        store = GradientStore(Path(folder))

        def gather() -> None:
            for index, batch in enumerate(batches):
                parts = {}
                per_sample_parts(
                    model,
                    batch,
                    sample_losses,
                    layout,
                    lambda name, own, parts=parts: parts.__setitem__(name, lightest(own)),
                    engine="hooks",
                )
                store.write_shard(index, parts)

        with measuring(model, layout):
            passed = cpu_seconds(gather)
        return passed, cpu_seconds(lambda: eigenpairs(store.sweep(layout)[0].sum(0)))


def main() -> None:
    """Print the table: the size the peer takes by default, 2M, and 5M where 16 GB of memory are free."""
    python = environment()
    if isinstance(python, str):
        print(f"\nalignment-risk: skipped, {python}")
        return
    rows = []
    sizes = ["0.5M", "2M", *(["5M"] if psutil.virtual_memory().available > 16e9 else [])]
    if "5M" not in sizes:
        print("\nP = 5M: skipped, the peer needs more memory than is free here")
    for size in sizes[:1] if "--quick" in sys.argv else sizes:
        (passed, subspace), memory = in_own_process(ours, size)
        command = [str(python), "-c", CHILD, str(Path(__file__).parent), size]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        theirs = [float(value) for value in done.stdout.split()]
        rows += [
            [size, "arisk", f"{passed:.1f} s", f"{subspace:.2f} s", f"{memory:.2f} GB"],
            [size, "alignment-risk", f"{theirs[0]:.1f} s", f"{theirs[1]:.2f} s", f"{theirs[2]:.2f} GB"],
            [
                size,
                "ratio",
                f"{theirs[0] / passed:.1f} ×",
                f"{theirs[1] / subspace:.1f} ×",
                f"{theirs[2] / memory:.1f} ×",
            ],
        ]
    header = ["P", "", "per-sample gradients", "subspace from them", "peak RSS"]
    print_table("Safety subspace of N = 128 rows of 64 tokens, CPU time", header, rows)
