"""What `arisk status` shows: each stage fresh or stale and why, with size and time. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arisk.base.tables import table
from arisk.config.plan import Config
from arisk.engine.fingerprints import DigestCache, input_fingerprints
from arisk.engine.freshness import StageState, plan
from arisk.engine.rundir import RunDir
from arisk.engine.stage import Catalogue

__all__ = ["describe", "status_rows"]


def status_rows(catalogue: Catalogue, config: Config, run_dir: Path) -> list[dict[str, Any]]:
    """One mapping per stage: name, fresh, optional, state, reasons, seconds, bytes, whether it can resume.

    `state` is fresh, stale, or "not run" for an optional stage, which makes nothing stale.
    """
    rundir = RunDir(run_dir)
    cache = DigestCache(run_dir / ".digests.json")
    states = plan(catalogue, config, input_fingerprints(config, cache), rundir)
    cache.save()
    optional = catalogue.optional
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
                "optional": state.stage in optional,
                "state": _state(state, state.stage in optional),
                "reasons": [reason.sentence() for reason in state.reasons],
                "seconds": manifest["seconds"] if manifest else None,
                "bytes": sum(output["bytes"] for output in outputs),
                "partial": partial.is_dir(),
            }
        )
    return rows


def describe(rows: Sequence[dict[str, Any]], *, width: int | None = None, command: str = "") -> str:
    """The rows as a table of reasons, with the total size and the command to type next.

    Args:
        rows: of `status_rows`.
        width: columns of the terminal; None: no wrapping.
        command: the command that brings the stages up to date; empty: not said.
    """
    cells = [
        [
            row["stage"],
            row["state"],
            "–" if row["seconds"] is None else f"{row['seconds']:.1f} s",
            _size(row["bytes"]),
            _why(row) + (" (resumes what a killed run left)" if row["partial"] else ""),
        ]
        for row in rows
    ]
    total = sum(row["bytes"] for row in rows)
    lines = [table(cells, ["stage", "state", "time", "size", "why"], width=width), ""]
    lines.append(f"total size: {_size(total)}")
    if command:
        stale = any(row["state"] == "stale" for row in rows)
        lines.append(f"next: {command}" if stale else "next: nothing to do, all is fresh")
    return "\n".join(lines)


def _state(state: StageState, optional: bool) -> str:
    if state.fresh:
        return "fresh"
    missing = any(reason.kind == "missing" for reason in state.reasons)
    return "not run" if optional and missing else "stale"


def _why(row: Mapping[str, Any]) -> str:
    if row["state"] == "not run":
        return f"optional; `arisk {row['stage']}` runs it"
    return "; ".join(row["reasons"])


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count else "–"
