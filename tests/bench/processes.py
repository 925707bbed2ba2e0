"""Stage collect by one and by two processes on one machine: wall time, three rounds in turn.

A fixed task (5M parameters, full, N = 128 rows of real length) by `python -m arisk` with one thread, the
same with two threads, and `torchrun` with two processes of one thread. Wall times are those of the stage
itself, which its manifest holds: starting and loading are not in them. They mean nothing while something
else runs; the CPU time of all processes, starting included, is beside them.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.growth import SETTINGS
from tests.bench.measure import print_table

ROUNDS = 3
CASE = "5M full 128"
WAYS = {"one process, one thread": (1, 1), "one process, two threads": (1, 2), "two processes": (2, 1)}


def main() -> None:
    """Print the medians and their ratios."""
    rows: list[list[str]] = []
    busy = f"load average before: {os.getloadavg()[0]:.1f}"
    for store in ("gradients", "gram"):
        took: dict[str, list[float]] = {way: [] for way in WAYS}
        used: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(1 if "--quick" in sys.argv else ROUNDS):
            for way, (count, threads) in WAYS.items():
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                took[way].append(_seconds(store, count, threads))
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                used[way].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        first = statistics.median(took["one process, one thread"])
        for way, times in took.items():
            median = statistics.median(times)
            spread = ", ".join(f"{t:.1f}" for t in times)
            cpu = f"{statistics.median(used[way]):.1f} s"
            rows.append([store, way, f"{median:.1f} s ({spread})", f"{first / median:.2f} ×", cpu])
    print_table(
        f"Stage collect, {CASE} rows, two cores ({busy})",
        ["store", "", "wall time", "speed-up", "CPU time"],
        rows,
    )


def _seconds(store: str, count: int, threads: int) -> float:
    """Wall time of the stage."""
    env = {**os.environ, "ARISK_BENCH_CASE": CASE, "OMP_NUM_THREADS": str(threads)}
    env["ARISK_BENCH_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "processes.yaml"
        text = SETTINGS.format(disk=20).replace("threads: 1", f"threads: {threads * count}")
        config.write_text(text, encoding="utf-8")
        several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"]
        command = [sys.executable, "-m", *(several if count > 1 else []), "arisk", "collect", str(config)]
        command += ["--run-dir", f"{folder}/run", "-q", "--set", f"collect.store={store}"]
        subprocess.run(command, env=env, check=True, capture_output=True)
        manifest = Path(folder) / "run" / "collect" / "manifest.json"
        return json.loads(manifest.read_text(encoding="utf-8"))["seconds"]
