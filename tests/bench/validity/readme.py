"""The benchmark's tables as they stand in `tests/bench/README.md`, made from the stored result alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arisk.forecast.worth import BY_GROUP, REAL

ROOT = Path(__file__).parents[3]
README, STORED = ROOT / "tests" / "bench" / "README.md", ROOT / "arisk" / "forecast" / "validity.json"
BEGIN, END = "<!-- validity: begin -->\n", "<!-- validity: end -->\n"
MEASURES = ("ρ final", "AUC", "× rise", "× step", "within 2×", "false-safe", "late false-safe", "false-alarm")
GROUPS = ("full adamw", "full sgd", "lora adamw", "lora sgd")
PARTS = {
    "Fresh mixtures": "Mixtures of data sets that nobody looked at before the method was final",
    "Data sets not tuned on": "Data sets that no constant was chosen on",
}
SHORT = ("combined", "rollout", "pilot", "20 real steps, loss extrapolated", "local", "peer")


def block(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The Markdown between the two marks."""
    parts: list[str] = []
    for title, heading in PARTS.items():
        if title not in tables:
            continue
        rows = list(tables[title])
        parts.append(f"**{heading}** ({rows[0]['jobs']} jobs of 200 steps):\n\n{table(rows, MEASURES)}")
        numbers = tables[f"{title}: plain numbers"]
        parts.append(f"Plain numbers known before training:\n\n{table(numbers, ('ρ final', 'AUC'))}")
    fresh = next(title for title in PARTS if title in tables)
    kept = [row for row in tables[f"{fresh}: ρ by group"] if row["name"] in SHORT]
    parts.append(f"ρ within each mode and optimizer, fresh mixtures:\n\n{table(kept, GROUPS)}")
    ahead = tables[f"{fresh}: what ρ of `combined` is ahead of"]
    parts.append(
        f"ρ of `combined` minus ρ of the others, paired, same jobs:\n\n{table(ahead, ('Δρ', '90 %'))}"
    )
    verdicts = [
        {"name": title, **{row["name"]: f"{row['collapsed']} / {row['did not']}" for row in tables[key]}}
        for title, key in (
            ("fresh mixtures", "Fresh mixtures: verdicts"),
            ("not tuned on", "Data sets not tuned on: verdicts"),
            ("tuned on", "Data sets tuned on: verdicts"),
            ("0.5 % and 2 % harmful rows", "Low contamination: verdicts"),
            ("1000 and 2000 steps", "Long runs: verdicts"),
        )
        if key in tables
    ]
    levels = ("low", "elevated", "inconclusive", "high")
    parts.append(f"Verdicts, as jobs that collapsed / did not:\n\n{table(verdicts, levels)}")
    held_out = tables.get(BY_GROUP, [])
    if held_out:
        columns = [column for column in held_out[0] if column != "name"]
        parts.append(
            "The same by mode and optimizer, fresh mixtures and sets not tuned on together (what the report "
            f"shows beside a verdict):\n\n{table(held_out, columns)}"
        )
    covers = [
        {**row, "name": f"{row['name']}, {title.lower()}"}
        for title in ("Fresh mixtures", "Data sets not tuned on", "Long runs")
        for row in tables.get(f"{title}: coverage of 80 % intervals", [])
        if row["name"] != "pilot"
    ]
    columns = ("cover change", "cover final", "cover step")
    parts.append(f"Share of truths inside the 80 % intervals:\n\n{table(covers, columns)}")
    for title, heading in (
        ("Low contamination", "**Few harmful rows** (2 and 8 of 400)"),
        ("Long runs", "**Long runs** (1000 and 2000 steps; schedules, decay, clipping, momentum)"),
    ):
        if title in tables:
            kept = [row for row in tables[title] if row["name"] in SHORT]
            parts.append(f"{heading}, {kept[0]['jobs']} jobs:\n\n{table(kept, MEASURES)}")
    costs = [
        {**row, "name": f"{row['name']}"}
        for key in ("Fresh mixtures: cost", "Long runs: cost")
        for row in tables.get(key, [])
    ]
    columns = ("median share", "largest share")
    parts.append(f"Gradient evaluations, pilot included, as a share of the run:\n\n{table(costs, columns)}")
    for key, heading in (
        ("Ceiling: the same jobs with another seed", "**Ceiling**: a second seed of the same real runs"),
        (
            "What-if: a third or a quarter of a learning rate, read off its rollout",
            "**What-if**: a third or a quarter of a learning rate, read off the rollout at the full one",
        ),
        ("Ablation: the rollout with one part changed", "**Ablation** of the rollout"),
    ):
        if key in tables:
            jobs = tables[key][0]["jobs"]
            parts.append(f"{heading}, {jobs} jobs:\n\n{table(tables[key], MEASURES)}")
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A Markdown table; an interval stands behind its number."""
    lines = ["| " + " | ".join(["", *columns]) + " |", "| --- " * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [cell(row.get(c), row.get(f"{c} 90 %")) for c in columns]
        # A bar would end the cell.
        lines.append("| " + " | ".join([row["name"].replace("|", "‖"), *cells]) + " |")
    return "\n".join(lines)


def cell(value: Any, ends: Sequence[Any] | None) -> str:
    """A number with its interval; – where there is none."""
    text = number(value)
    return text if ends is None or text == "–" else f"{text} ({number(ends[0])}–{number(ends[1])})"


def number(value: Any) -> str:
    """Two digits."""
    if value is None:
        return "–"
    if isinstance(value, list):
        return "–".join(number(end) for end in value)
    if value == "inf":
        return "∞"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def publish(tables: Mapping[str, Any]) -> None:
    """Write the stored result, the other bench's table kept, and the block of `tests/bench/README.md`."""
    known = json.loads(STORED.read_text(encoding="utf-8"))
    tables = {**tables, **({REAL: known[REAL]} if REAL in known else {})}
    STORED.write_text(json.dumps(tables, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    README.write_text(text[:start] + block(tables) + text[end:], encoding="utf-8")
