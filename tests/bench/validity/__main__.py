"""`just bench-validity [--quick]`: forecasts made before training against many real fine-tunes.

Computes what is missing below the folder (resumable; two processes), then writes `results.json` and
`results.md` there and prints the tables. What real fine-tunes did is kept in `truths.json` here, and taken
from there: about one hour on two cores, two with --anew, minutes with --quick.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from tests.bench.validity.readme import publish
from tests.bench.validity.report import all_tables, render
from tests.bench.validity.truth import keep_truths
from tests.bench.validity.work import compute_all, items

FOLDER = Path("runs/validity")


def main() -> None:
    """Compute, evaluate, print."""
    parser = argparse.ArgumentParser(prog="just bench-validity", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="twelve jobs of three data sets")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where results are kept")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--publish", action="store_true", help="put the tables into bench/README and report")
    parser.add_argument("--tables-only", action="store_true", help="compute nothing")
    parser.add_argument("--anew", action="store_true", help="train really, also where a truth has been kept")
    parser.add_argument("--keep-truths", action="store_true", help="put the truths into truths.json here")
    given = parser.parse_args()
    failed: list[str] = []
    if not given.tables_only:
        failed = compute_all(items(quick=given.quick), given.folder, workers=given.workers, anew=given.anew)
    tables = all_tables(given.folder, quick=given.quick)
    text = render(tables)
    plain = _plain(tables)
    given.folder.mkdir(parents=True, exist_ok=True)
    (given.folder / "results.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    (given.folder / "results.md").write_text(text, encoding="utf-8")
    print(text)
    if given.keep_truths:
        print(f"{keep_truths(given.folder)} truths are kept")
    if given.publish and not given.quick:
        publish(plain)
    if failed:
        sys.exit("these results are missing:\n" + "\n".join(failed))


def _plain(value: Any) -> Any:
    """Strict JSON, four digits: what is not a number is null, infinity a string."""
    if isinstance(value, float):
        if math.isinf(value):
            return "inf"
        return None if math.isnan(value) else round(value, 4)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


if __name__ == "__main__":
    main()
