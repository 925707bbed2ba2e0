"""What each predictor was worth on real fine-tunes: the stored result of the validity benchmark."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arisk.report.section import notes, table
from arisk.report.text import NOT_MEASURED, percent, wilson

__all__ = ["counted", "record_line", "validity", "worth", "worth_line", "worth_rows"]

#: Rows of the table: name in the benchmark, and in the report.
FORECASTERS = {
    "combined": "combined (the verdict rests on it)",
    "rollout": "rollout",
    "pilot": "pilot, outputs extrapolated",
    "30 real steps, loss extrapolated": "30 real steps, loss extrapolated",
    "20 real steps, loss extrapolated": "20 real steps, loss extrapolated",
    "local": "local model at the aligned point",
    "ray": "ray: one measured direction",
    "bound": "bound of the theory, read as a forecast",
    "peer": "quartic forecast of the one earlier package",
}
NUMBERS = {
    "initial fine-tuning loss": "fine-tuning loss before training",
    "lr T |Dg|": "learning rate × steps × ‖Dg‖",
    "lr T sqrt(d'Fd)": "learning rate × steps × √(dᵀFd)",
    "gamma": "curvature coupling γ̂",
    "overlap |Pg|/|g|": "overlap ‖Pg‖/‖g‖",
    "gradient conflict": "gradient conflict −cos(ḡ_s, g)",
}
COLUMNS = ("ρ final", "AUC", "× step", "false-safe", "false-alarm")
#: The part of the benchmark that is shown: data sets that no choice was made on.
SHOWN = "Fresh mixtures"


@functools.cache
def validity() -> Mapping[str, list[dict[str, Any]]]:
    """Tables of the benchmark by title, as `just bench-validity` wrote them."""
    return json.loads((Path(__file__).parent / "validity.json").read_text(encoding="utf-8"))


def worth_line(name: str, what: str | None = None) -> str:
    """What one predictor was worth on real fine-tunes, as a sentence with its numbers.

    Args:
        name: row of the benchmark, a forecaster or a plain number.
        what: how the sentence calls it; default: as the table of the page does.

    Returns:
        The sentence; that it was not benchmarked, where it was not.
    """
    called = what or {**NUMBERS, **FORECASTERS}.get(name, name)
    forecaster = _found(SHOWN).get(name)
    found = forecaster or _found(f"{SHOWN}: plain numbers").get(name)
    if found is None:
        return f"{called}: not benchmarked against real fine-tunes; read it as a description."
    said = f"ρ {_cell(found, 'ρ final')} with the real final change, AUC {_cell(found, 'AUC')} for collapse"
    if forecaster is not None:
        said += (
            f", collapse step off by × {_cell(found, '× step')}, {_share(found, 'false-safe')} of collapses "
            f"called safe, {_share(found, 'false-alarm')} false alarms"
        )
    return f"{called}: {said} ({found['jobs']} real fine-tunes of a small aligned model)."


#: Forecasters that verdicts rest on.
JUDGED = ("combined", "rollout")
#: Held-out jobs of the benchmark, by mode and optimizer.
BY_GROUP = "Held-out verdicts by mode and optimizer"
#: Held-out real fine-tunes of refusing models, by mode and optimizer (`just bench-real publish`).
REAL = "Real models, refusals: held-out jobs by mode and optimizer"
NOT_YET = "How right forecasts of refusals are has not been measured for this optimizer."


def record_line(name: str, training: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    """The record of the verdicts in one line: by refusals on real models, else by loss on a small one.

    Args:
        name: forecaster that a verdict rests on.
        training: the plan; the record is that of its optimizer.
        task: what the loader says of the model; the record is that of its mode, LoRA or all weights.

    Returns:
        Counts with 95 % Wilson intervals, never pooled over modes and optimizers; that there is no record,
        where there is none for this one.
    """
    if name not in JUDGED:
        return worth_line(name)
    mode = "lora" if task.get("adapter") else "full"
    # Trainer's names for AdamW are adamw_torch, adamw_torch_fused and so on.
    optimizer = str(training.get("optimizer") or "").partition("_")[0]
    called = f"{'LoRA' if mode == 'lora' else 'all weights'} with {optimizer or 'this optimizer'}"
    real, small = (_of(title, f"{mode} {optimizer}") for title in (REAL, BY_GROUP))
    if real is None and small is None:
        return f"No record yet of {called}: check it with `arisk verify`. {NOT_YET}"
    said = [_in_refusals(real)] if real is not None else [NOT_YET, *([_in_loss(small)] if small else [])]
    return f"Record of {called}: {' '.join(said)}"


def _in_refusals(found: Mapping[str, Any]) -> str:
    missed = counted(found["lost a quarter: low"], found["lost a quarter"], least=False)
    false = counted(found["lost under a tenth: high"], found["lost under a tenth"], least=False)
    between = found["lost under a tenth: elevated"]
    close = counted(found["within 10 points"], found["jobs"], least=True)
    return (
        f"on two real models (135M and 270M parameters), of the fine-tunes that lost a quarter of the "
        f"refusals {missed} were called low, of those that lost under a tenth {false} were called high and "
        f"{between} elevated; the refusal rate was right within 10 points in {close}."
    )


def _in_loss(found: Mapping[str, Any]) -> str:
    hit = counted(found["collapsed: high"], found["collapsed"], least=True)
    false = counted(found["did not: high"], found["did not"], least=False)
    return (
        f"By loss, on a small model with an artificial language: {hit} real collapses were called high, "
        f"{false} harmless fine-tunes were."
    )


def _of(title: str, name: str) -> Mapping[str, Any] | None:
    return next((row for row in validity().get(title, ()) if row["name"] == name), None)


def counted(hits: int, of: int, *, least: bool) -> str:
    """A count with the end of its interval that matters: `48 of 49 (89 % at least)`.

    Args:
        hits: of them.
        of: how many there are.
        least: give the lower end, else the upper one.
    """
    if not of:
        return "none of none"
    low, high = wilson(hits, of)
    return f"{hits} of {of} ({percent(low if least else high)} at {'least' if least else 'most'})"


def worth_rows() -> dict[str, tuple[str, ...]]:
    """Cells of `COLUMNS` by forecaster, for a table that has a row for each."""
    return {name: tuple(_cell(row, column) for column in COLUMNS) for name, row in _found(SHOWN).items()}


READING = (
    "Full and LoRA, SGD and AdamW, two learning rates, mixtures of data that no choice was made on. ρ is the "
    "rank correlation; collapse is a rise of 0.1 nats per response token. Made by `just bench-validity`; "
    "intervals and harder cases are in tests/bench/README.md."
)


def worth() -> str:
    """What each predictor was worth on real fine-tunes, as a section of the page."""
    rows = [_row(FORECASTERS, found) for found in _ordered(SHOWN, FORECASTERS)]
    rows += [_row(NUMBERS, found) for found in _ordered(f"{SHOWN}: plain numbers", NUMBERS)]
    jobs = validity()[SHOWN][0]["jobs"]
    header = (
        "predictor",
        "ρ with final safety drift",
        "AUC for collapse",
        "× off on the collapse step",
        "collapses called safe",
        "false alarms",
    )
    return (
        '<section id="worth"><h2>What each predictor is worth</h2>'
        f'<p class="note">Benchmark, not this run: what was said before {jobs} real fine-tunes of a small '
        f"aligned model, against what then happened to the loss of held-out safety prompts.</p>"
        f"{table(header, rows)}"
        f"{notes(READING)}"
        '<p class="note">Sources: Alignment Instability Condition, arXiv 2602.15799; AlignGuard-LoRA, arXiv '
        "2508.02079; prior package: alignment-risk.</p></section>"
    )


def _found(title: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in validity().get(title, [])}


def _ordered(title: str, names: Mapping[str, str]) -> list[dict[str, Any]]:
    found = _found(title)
    return [found[name] for name in names if name in found]


def _row(names: Mapping[str, str], found: Mapping[str, Any]) -> tuple[str, ...]:
    return (names[found["name"]], *(_cell(found, column) for column in COLUMNS))


def _cell(found: Mapping[str, Any], column: str) -> str:
    value = found.get(column)
    if value is None:
        return "–"
    return "∞" if value == "inf" else f"{value:.2f}"


def _share(found: Mapping[str, Any], column: str) -> str:
    value = found.get(column)
    return NOT_MEASURED if value is None else percent(value)
