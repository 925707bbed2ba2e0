"""`just bench [NAME …]`: run benchmarks and print their tables; default all that need no download."""

from __future__ import annotations

import sys

from tests.bench import (
    check,
    compare,
    cost,
    gpu,
    gradients,
    growth,
    guard,
    guard_arms,
    guard_forecast,
    guard_smollm2,
    lds,
    peer,
    processes,
    removal,
    screening,
    second,
    sketch,
    smollm2,
    store,
)
from tests.bench.real import score

BENCHES = {
    "check": check.main,
    "compare": compare.main,
    "cost": cost.main,
    "gpu": gpu.main,
    "gradients": gradients.main,
    "store": store.main,
    "growth": growth.main,
    "peer": peer.main,
    "processes": processes.main,
    "lds": lds.main,
    "removal": removal.main,
    "second": second.main,
    "sketch": sketch.main,
    "guard-cost": guard.main,
    "guard": lambda: (guard.main(), guard_arms.main([])),
    "guard-forecast": guard_forecast.main,
    "guard-smollm2": guard_smollm2.main,
    "screen": screening.main,
    "smollm2": smollm2.main,
}


def _is_option(text: str, given: list[str]) -> bool:
    """Whether an argument is an option, stands behind one that takes a value, or is a config."""
    before = given[given.index(text) - 1] if given.index(text) else ""
    return (
        text.startswith("--")
        or text.endswith((".yaml", ".yml"))
        or before in ("--sizes", "--samples", "--device")
    )


def main() -> None:
    """Run the named benchmarks; all that follows `score` or `removal` belongs to it."""
    if sys.argv[1:2] == ["score"]:
        score.main(sys.argv[2:])
        return
    if sys.argv[1:2] == ["cost"]:
        cost.main()
        return
    if sys.argv[1:2] == ["removal"]:
        removal.main()
        return
    given = sys.argv[1 : sys.argv.index("--data")] if "--data" in sys.argv else sys.argv[1:]
    # What follows a name belongs to that benchmark.
    names = [name for name in given if name in BENCHES or not _is_option(name, given)] or [
        "store",
        "gradients",
    ]
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        sys.exit(f"unknown benchmark {unknown[0]!r}; choose from {', '.join(BENCHES)}")
    for name in names:
        BENCHES[name]()


if __name__ == "__main__":
    main()
