"""What else the fine-tune costs: every probe before, at the end of the plan, and in the real run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from arisk.forecast.record import ProbeForecast, RealRun
from arisk.report.section import listed, notes, table
from arisk.report.text import NOT_MEASURED, literal, number, percent

__all__ = [
    "measure_text",
    "probe_markdown",
    "probe_sentence",
    "probe_summary",
    "probe_value",
    "probes_section",
]

READING = (
    "Rows beside the safety set that the config names as probes, followed along the same virtual run. Loss "
    "is the mean negative log-likelihood of the responses, nll of all their tokens, opening of the first "
    "ones. Right answers are the questions whose right option is the likeliest of all. In brackets is the "
    "interval of the forecast; it holds another draw of the rows for the change, and what a virtual run is "
    "known to get wrong. Its widths are those of the safety loss: they were not calibrated on probes."
)


def probes_section(probes: Sequence[ProbeForecast], confidence: float, real: RealRun | None) -> str:
    """One table of all probes; nothing where none was given.

    Args:
        probes: what becomes of them.
        confidence: of the intervals.
        real: what the same plan really did, where it was carried out.
    """
    if not probes:
        return ""
    truth: Mapping[str, tuple[int, float]] = {} if real is None else real.probes
    header = ["probe", "measured", "before", f"end of the plan ({percent(confidence)})", "change"]
    rows = [[*_cells(probe), *([_real(probe, truth)] if truth else [])] for probe in probes]
    said = [f"{probe.name}: {note}" for probe in probes for note in probe.notes]
    return (
        '<section id="probes"><h2>What else the fine-tune costs</h2>'
        f"{table([*header, *(['real run'] if truth else [])], rows)}"
        f'{listed("About the probes", said)}<div class="folds">{notes(READING)}</div></section>'
    )


def _cells(probe: ProbeForecast) -> list[str]:
    end = probe.end
    told = NOT_MEASURED
    if end is not None:
        middle, lower, upper = (probe_value(probe.measure, value) for value in end)
        told = f"{middle} ({lower} to {upper})"
    return [
        probe.name,
        measure_text(probe),
        probe_value(probe.measure, probe.start),
        told,
        NOT_MEASURED if end is None or probe.start is None else _change(probe, end[0] - probe.start),
    ]


def _change(probe: ProbeForecast, change: float) -> str:
    if probe.measure == "choice":
        points = round(100 * change)
        return f"{points:+d} points".replace("-", "−") if points else "none"
    return f"{change:+.2g} nats/token".replace("-", "−")


def _real(probe: ProbeForecast, truth: Mapping[str, tuple[int, float]]) -> str:
    found = truth.get(probe.name)
    if found is None:
        return NOT_MEASURED
    step, value = found
    return probe_value(probe.measure, value) + ("" if step == probe.horizon else f" at step {step}")


def measure_text(probe: ProbeForecast) -> str:
    """What was measured, and on how many rows."""
    if probe.measure == "choice":
        return f"right answers to {probe.rows} questions"
    first = f"first {probe.tokens} tokens" if probe.measure == "opening" else "responses"
    return f"loss of the {first}, {probe.rows} rows"


def probe_value(measure: str, value: float | None) -> str:
    """Its unit by its measure: a share of questions, or nats per token."""
    return percent(value) if measure == "choice" else number(value)


def probe_sentence(probes: Sequence[ProbeForecast]) -> str | None:
    """Every probe at the start and at the end in one sentence; None without any."""
    if not probes:
        return None
    told = []
    for probe in probes:
        end = None if probe.end is None else probe.end[0]
        unit = " right" if probe.measure == "choice" else " nats/token"
        ends = f"{probe_value(probe.measure, probe.start)} → {probe_value(probe.measure, end)}"
        told.append(f"{probe.name} {ends}{unit}")
    return f"By the end of the plan: {'; '.join(told)}."


def probe_markdown(probes: Sequence[ProbeForecast]) -> list[str]:
    """The table for `summary.md`."""
    if not probes:
        return []
    rows = [f"| {' | '.join(map(literal, _cells(probe)))} |" for probe in probes]
    return [
        "| what else | measured | before | end of the plan | change |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
    ]


def probe_summary(probes: Sequence[ProbeForecast]) -> list[dict[str, Any]]:
    """Plain values for `summary.json`."""
    found: list[dict[str, Any]] = []
    for probe in probes:
        end = probe.end
        body = {**asdict(probe), "start": probe.start, "at_end": None, "at_end_interval": None}
        if end is not None:
            body |= {"at_end": end[0], "at_end_interval": [end[1], end[2]]}
        found.append(body)
    return found
