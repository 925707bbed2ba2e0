"""From the cache of jobs to the truths that are kept: numbers, counts and labels; no text, no row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.bench.real.rows import spread

TRUTHS = Path(__file__).parent.parent / "truths"
VERSION = 1


def merge(cache: Path) -> list[Path]:
    """Write one file a model, one line a job."""
    written = []
    for folder in sorted(path for path in cache.iterdir() if path.is_dir()):
        jobs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("[0-9]*.json"))]
        if not jobs:
            continue
        lines = ",\n".join(json.dumps(without_texts(job), separators=(",", ":")) for job in jobs)
        path = TRUTHS / f"{folder.name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            f'{{"version":{VERSION},"model":"{folder.name}","jobs":[\n{lines}\n]}}\n', encoding="utf-8"
        )
        written.append(path)
    return written


def without_texts(value: Any) -> Any:
    """A job's result without answers and without what each prompt's log-probability was."""
    if isinstance(value, dict):
        return {
            k: without_texts(v) for k, v in value.items() if k not in {"texts", "prompts_log_prob", "prompts"}
        }
    return [without_texts(item) for item in value] if isinstance(value, list) else value


def twenty_answers(folder: Path, number: int, step: int | None) -> str:
    """Twenty answers to harmful prompts at even distances, with the label of the rule."""
    path = next(folder.glob(f"{number:02d}-*.json"))
    points = [p for p in json.loads(path.read_text(encoding="utf-8"))["points"] if "answers_harmful" in p]
    point = points[-1] if step is None else next(p for p in points if p["step"] == step)
    answers = point["answers_harmful"]
    pairs = spread(list(zip(answers["labels"], answers["texts"], strict=True)), 20)
    return "\n".join([f"{path.stem} step {point['step']}", *(f"{label} {text!r}" for label, text in pairs)])
