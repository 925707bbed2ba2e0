"""What `arisk check` predicts beside what `arisk run` then takes: both modes of the demo, or given configs.

`python -m tests.bench check`, or `python -m tests.bench check my.yaml` for a config of one's own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

from arisk.cli.demo import demo_config
from arisk.config.yaml import dump_config
from tests.bench.measure import print_table


def main() -> None:
    """Ratios predicted / measured, a table each."""
    given = [argument for argument in sys.argv if argument.endswith((".yaml", ".yml"))]
    for path in given:
        with tempfile.TemporaryDirectory() as name:
            _compared(path, Path(path), Path(name))
    if given:
        return
    modes: tuple[Literal["lora", "full"], ...] = ("lora", "full")
    for mode in modes:
        with tempfile.TemporaryDirectory() as name:
            config = Path(name) / "demo.yaml"
            config.write_text(dump_config(demo_config(mode)), encoding="utf-8")
            _compared(f"demo ({mode})", config, Path(name))


def _compared(title: str, config: Path, folder: Path) -> None:
    plan = json.loads(_arisk("check", str(config), "--json")[0])["plan"]
    run = str(folder / "run")
    _, peak = _arisk("run", str(config), "--run-dir", run, "-q")
    rows = [["whole run, peak memory", f"{plan['memory_gb']:.2f} GB", f"{peak:.2f} GB"]]
    rows[0].append(f"{plan['memory_gb'] / peak:.2f}")
    total = 0.0
    for stage, cost in plan["stages"].items():
        manifest = folder / "run" / stage / "manifest.json"
        if not manifest.exists():
            continue
        took = json.loads(manifest.read_text(encoding="utf-8"))["seconds"]
        total += took
        rows.append(
            [stage, f"{cost['seconds']:.1f} s", f"{took:.1f} s", f"{cost['seconds'] / max(took, 1e-3):.2f}"]
        )
    for stage in ("verify", "screen", "guard"):
        _, peak = _arisk(stage, str(config), "--run-dir", run, "-q")
        cost, manifest = plan["stages"][stage], folder / "run" / stage / "manifest.json"
        took = json.loads(manifest.read_text(encoding="utf-8"))["seconds"]
        rows.append(
            [stage, f"{cost['seconds']:.1f} s", f"{took:.1f} s", f"{cost['seconds'] / max(took, 1e-3):.2f}"]
        )
        memory = cost["memory_gb"]
        rows.append([f"{stage}, peak memory", f"{memory:.2f} GB", f"{peak:.2f} GB", f"{memory / peak:.2f}"])
    rows.append(["whole run", f"{plan['seconds']:.1f} s", f"{total:.1f} s", f"{plan['seconds'] / total:.2f}"])
    print_table(f"arisk check beside arisk run, {title}", ["", "predicted", "measured", "ratio"], rows)


def _arisk(*arguments: str) -> tuple[str, float]:
    """Standard output of the command, and its peak resident memory in GB."""
    code = (
        "import resource, sys\nsys.argv[0] = 'arisk'\nfrom arisk.cli import main\n"
        "try: main()\nfinally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6 * 1.024,"
        " file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    return done.stdout, float(done.stderr.splitlines()[-1])
