"""Stage collect by one and by two processes on one machine: wall time, three rounds in turn.

A fixed task (5M parameters, full, N = 128 rows of real length) by one process with one thread, the same with
two threads, and `torchrun` with two processes of one thread. Wall times are those of the stage alone, taken
once every process has loaded its model. They mean nothing while something else runs; the CPU time of all
processes, starting included, is beside them.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from arisk.anatomy.collect import collect
from arisk.base.processes import barrier, is_first, join
from arisk.config.plan import CollectConfig
from tests.bench.growth_task import make
from tests.bench.measure import print_table

ROUNDS = 3
CASE = "5M full 128"
WAYS = {"one process, one thread": (1, 1), "one process, two threads": (1, 2), "two processes": (2, 1)}
#: Set for the processes that are measured: the store.
MEASURED = "ARISK_BENCH_STORE"


def main() -> None:
    """Print the medians and their ratios."""
    if MEASURED in os.environ:
        _measured(os.environ[MEASURED], Path(sys.argv[-1]))
        return
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
    """Wall time of the stage, as the first process measures it."""
    env = {**os.environ, "ARISK_BENCH_CASE": CASE, "OMP_NUM_THREADS": str(threads)}
    env |= {"ARISK_BENCH_THREADS": str(threads), MEASURED: store}
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", *(several if count > 1 else []), "tests.bench.processes", folder]
        done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def _measured(store: str, folder: Path) -> None:
    """Run the stage in this process, with the others that torchrun started."""
    join()
    task = make()
    settings = CollectConfig.model_validate({"store": store})
    barrier()
    started = time.perf_counter()
    collect(task, settings, folder)
    barrier()
    if is_first():
        print(time.perf_counter() - started)


if __name__ == "__main__":
    main()
