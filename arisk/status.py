"""What `arisk status` shows: each stage fresh or stale and why, with size and time. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arisk.config import Config
from arisk.fingerprints import DigestCache, input_fingerprints
from arisk.plan import plan
from arisk.rundir import RunDir
from arisk.terminal import table

__all__ = ["describe", "status_rows"]


def status_rows(config: Config, run_dir: Path) -> list[dict[str, Any]]:
    """One mapping per stage: name, fresh, reasons, seconds, bytes, whether it can resume."""
    rundir = RunDir(run_dir)
    cache = DigestCache(run_dir / ".digests.json")
    states = plan(config, input_fingerprints(config, cache), rundir)
    cache.save()
    rows: list[dict[str, Any]] = []
    for state in states:
        damaged = any(reason.kind == "damaged" for reason in state.reasons)
        manifest = None if damaged else rundir.manifest(state.stage)
        outputs = manifest["outputs"].values() if manifest else []
        partial = run_dir / ".partial" / f"{state.stage}-{state.key[:16]}"
        rows.append(
            {
                "stage": state.stage,
                "fresh": state.fresh,
                "reasons": [reason.sentence() for reason in state.reasons],
                "seconds": manifest["seconds"] if manifest else None,
                "bytes": sum(output["bytes"] for output in outputs),
                "partial": partial.is_dir(),
            }
        )
    return rows


def describe(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table of reasons."""
    cells = [
        [
            row["stage"],
            "fresh" if row["fresh"] else "stale",
            "–" if row["seconds"] is None else f"{row['seconds']:.1f} s",
            _size(row["bytes"]),
            "; ".join(row["reasons"]) + (" (resumes what a killed run left)" if row["partial"] else ""),
        ]
        for row in rows
    ]
    return table(cells, ["stage", "state", "time", "size", "why"])


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count else "–"
