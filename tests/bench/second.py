"""What a run costs that differs from a finished one in its learning rate: CPU time beside the first run's."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile

from tests.bench.measure import print_table

CONFIG = "configs/demo.yaml"
OTHER = ("--set", "training.learning_rate=3e-4")


def main() -> None:
    """Print the table, with the rollout and without."""
    rows: list[list[str]] = []
    for name, extra in (("with rollout", ()), ("without", ("--set", "rollout.enabled=false"))):
        with tempfile.TemporaryDirectory() as folder:
            run = ("run", CONFIG, "--run-dir", folder, "-q", *extra)
            first, second, same = _cpu(*run), _cpu(*run, *OTHER), _cpu(*run, *OTHER)
            asked = _cpu("what-if", folder, "--learning-rate", "1e-4")
        shares = [f"{seconds:.1f} s ({seconds / first:.0%})" for seconds in (second, same, asked)]
        rows.append([name, f"{first:.1f} s", *shares])
    header = ["demo (LoRA)", "first run", "another learning rate", "nothing changed", "what-if"]
    print_table("CPU time of a second run", header, rows)


def _cpu(*arguments: str) -> float:
    """CPU time of one command, starting and loading included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "arisk", *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
