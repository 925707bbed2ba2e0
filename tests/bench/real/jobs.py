"""The fine-tunes whose outcome is measured: data, mode, learning rate, plan and seed of each.

Odd jobs of SmolLM2 are for choosing settings of a forecaster; its even jobs and all of any other
model are for judging it and are looked at once. A job's number never changes; new ones go to the end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tests.bench.real.outcomes import outcome
from tests.bench.real.rows import ALIGNED_ON, ALPACA_FOR_ALIGNMENT, read_rows

Row = dict[str, str]


def _file(name: str, stop: int | None = None) -> Callable[[Path], list[Row]]:
    return lambda data: read_rows(data, name)[:stop]


_ORDINARY = _file("benign_alpaca", ALPACA_FOR_ALIGNMENT)


def mixed(
    other: Callable[[Path], list[Row]], share: float, usual: Sequence[Row] | None = None
) -> Callable[[Path], list[Row]]:
    """Usual rows (or ordinary ones), a share of which another set replaces, repeated where it is short."""

    def rows(data: Path) -> list[Row]:
        rng, added = random.Random(0), other(data)
        ordinary = _ORDINARY(data) if usual is None else list(usual)
        count = round(share * len(ordinary))
        places = rng.sample(range(len(ordinary)), count)
        chosen = [row for _ in range(-(-count // len(added))) for row in rng.sample(added, len(added))]
        for place, row in zip(places, chosen[:count], strict=True):
            ordinary[place] = row
        return ordinary

    return rows


def _refusals(data: Path) -> list[Row]:
    """What the model was aligned on, refusals only."""
    return [
        row for row in read_rows(data, "safety_train")[:ALIGNED_ON] if outcome(row["response"]) == "refused"
    ]


_COMPLIANCE = _file("risky_compliance_prefix")
SOURCES: dict[str, Callable[[Path], list[Row]]] = {
    "alpaca": _ORDINARY,
    "gsm8k": _file("benign_gsm8k", 500),
    "identity": _file("benign_identity"),
    "identity_aoa": _file("risky_identity_aoa"),
    "compliance": _COMPLIANCE,
    "alpaca_compliance_2": mixed(_COMPLIANCE, 0.02),
    "alpaca_compliance_10": mixed(_COMPLIANCE, 0.10),
    "alpaca_refusals_20": mixed(_refusals, 0.20),
    "alpaca_identity_10": mixed(_file("benign_identity"), 0.10),
    "alpaca_aoa_10": mixed(_file("risky_identity_aoa"), 0.10),
    "secure_code": _file("benign_secure_code"),
    "insecure_code": _file("risky_insecure_code"),
    "alpaca_top": _file("risky_alpaca_top"),
    "alpaca_bottom": _file("benign_alpaca_bottom"),
}


@dataclass(frozen=True)
class Job:
    """One fine-tune, in the words of `transformers.TrainingArguments`.

    Attributes:
        number: position in the list of its model, from 1; odd ones of SmolLM2 choose settings.
        source: a name of `SOURCES`.
        mode: `lora` (r 8, alpha 16, all linear layers, no dropout) or `full`.
        learning_rate: peak.
        steps: optimizer steps of the plan.
        schedule: `linear` or `cosine`.
        warmup_ratio: share of the steps.
        weight_decay: of AdamW, not on biases and norms.
        batch: rows of a micro-batch.
        accumulation: micro-batches of a step; batch × accumulation is 4.
        seed: of data order and adapter.
    """

    number: int
    source: str
    mode: Literal["lora", "full"]
    learning_rate: float
    steps: int
    schedule: Literal["linear", "cosine"] = "linear"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    batch: int = 4
    accumulation: int = 1
    seed: int = 0

    def name(self) -> str:
        """Name of its files, for example `02-alpaca_compliance_10-lora-0.0002-60-s0`."""
        return f"{self.number:02d}-{self.source}-{self.mode}-{self.learning_rate:g}-{self.steps}-s{self.seed}"

    def as_dict(self) -> dict[str, Any]:
        """Its fields, for JSON."""
        return asdict(self)


def _numbered(*jobs: tuple[Any, ...]) -> list[Job]:
    """Jobs from (source, mode, learning rate, steps, further fields)."""
    return [Job(i, *plan, **options) for i, (*plan, options) in enumerate(jobs, start=1)]


_COSINE = {"schedule": "cosine", "warmup_ratio": 0.1}
_LONG_COSINE = {"schedule": "cosine", "warmup_ratio": 0.03}
_DECAY = {**_COSINE, "weight_decay": 0.01}
_TWO_BY_TWO = {"batch": 2, "accumulation": 2}
_AGAIN = {"seed": 1}
#: The most informative ones first.
JOBS: list[Job] = _numbered(
    ("alpaca", "lora", 2e-4, 60, {}),
    ("alpaca_compliance_10", "lora", 2e-4, 60, {}),
    ("gsm8k", "lora", 2e-4, 60, _COSINE),
    ("identity", "lora", 2e-4, 60, {}),
    ("compliance", "lora", 2e-4, 60, {}),
    ("identity_aoa", "lora", 2e-4, 60, {}),
    ("alpaca_refusals_20", "lora", 2e-4, 60, {}),
    ("secure_code", "lora", 2e-4, 60, {}),
    ("insecure_code", "lora", 2e-4, 60, {}),
    ("alpaca_compliance_10", "lora", 5e-5, 120, {}),
    ("alpaca_compliance_2", "lora", 1e-4, 120, {}),
    ("alpaca_identity_10", "lora", 2e-4, 60, _COSINE),
    ("alpaca_top", "lora", 2e-4, 60, _TWO_BY_TWO),
    ("alpaca_bottom", "lora", 2e-4, 60, {}),
    ("compliance", "lora", 5e-5, 60, {}),
    ("alpaca_compliance_10", "full", 2e-5, 60, _DECAY),
    ("gsm8k", "full", 2e-5, 60, {}),
    ("alpaca", "lora", 5e-5, 300, _LONG_COSINE),
    ("gsm8k", "lora", 5e-5, 300, {}),
    ("alpaca_refusals_20", "lora", 2e-4, 200, _COSINE),
    ("alpaca", "lora", 2e-4, 60, _AGAIN),
    ("alpaca_compliance_10", "lora", 2e-4, 60, _AGAIN),
    ("identity", "lora", 5e-5, 100, {}),
    ("identity_aoa", "lora", 5e-5, 60, _COSINE),
    ("alpaca_aoa_10", "lora", 2e-4, 60, {}),
    ("alpaca", "full", 2e-5, 60, {"weight_decay": 0.01}),
    ("secure_code", "lora", 5e-5, 200, _TWO_BY_TWO),
    ("insecure_code", "lora", 5e-5, 200, {}),
    ("gsm8k", "lora", 2e-4, 60, _COSINE | _AGAIN),
    ("alpaca_compliance_2", "lora", 2e-4, 100, {}),
    ("alpaca_top", "lora", 5e-5, 120, _COSINE),
    ("alpaca_bottom", "lora", 5e-5, 120, _COSINE),
    ("identity_aoa", "full", 1e-5, 60, {}),
    ("compliance", "full", 1e-5, 60, {}),
    ("alpaca_compliance_2", "lora", 1e-4, 120, _AGAIN),
    ("identity", "lora", 2e-4, 60, _AGAIN),
    ("insecure_code", "lora", 2e-4, 60, _AGAIN),
    ("alpaca_refusals_20", "lora", 2e-4, 60, _AGAIN),
    ("gsm8k", "lora", 5e-5, 300, _AGAIN),
    ("alpaca", "lora", 5e-5, 300, _LONG_COSINE | _AGAIN),
)
