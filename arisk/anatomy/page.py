"""Figures of the safety subspace: spectrum, layers, and overlap with its nulls.

Losses measured along a straight virtual move: where local theory ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from arisk.anatomy.record import CollectResult, ScoreResult, SubspaceResult
from arisk.forecast.first_screen import layer_sentence
from arisk.report.figure import LEGEND, TABLE_ROWS, Figure, axes, clean, reference_line, step_lines, thin
from arisk.report.section import Column, esc, rows_table, table
from arisk.report.text import NOT_MEASURED, layer_and_type, number, percent
from arisk.report.worth import worth_line

__all__ = ["conditions", "examples", "fisher_map", "harm_map", "overlap", "spectrum", "virtual_move"]

OBSERVED, CONTROL, NULL = "#D55E00", "#CC79A7", "#8a8a8a"


def spectrum(space: SubspaceResult) -> Figure:
    """Eigenvalues of the safety Fisher matrix, and the share of the trace they reach."""
    values = space.spectrum.tolist()
    shares = (torch.cumsum(space.spectrum, 0) / space.trace).tolist()
    index = list(range(1, len(values) + 1))
    data = [
        {
            "type": "bar",
            "name": "eigenvalue",
            "x": index,
            "y": values,
            "marker": {"color": ["#0072B2" if i <= space.rank else "#9fb8c8" for i in index]},
        },
        {
            "type": "scatter",
            "name": "share of tr F",
            "x": index,
            "y": shares,
            "yaxis": "y2",
            "mode": "lines",
            "line": {"color": "#D55E00", "width": 2},
        },
    ]
    layout = axes(
        "direction j",
        "eigenvalue λ_j (nats² / θ²)",
        yaxis2={
            "title": {"text": "share of tr F"},
            "overlaying": "y",
            "side": "right",
            "range": [0, 1.02],
            "tickformat": ".0%",
            "tickvals": [0, 0.25, 0.5, 0.75, 1],
            "showgrid": False,
            "automargin": True,
        },
        legend=LEGEND,
    )
    layout["yaxis"].update(type="log", dtick=1, exponentformat="power")
    marks = [(space.rank, f"kept: {space.rank}")]
    if math.isfinite(space.effective_rank):
        marks.append((round(space.effective_rank), f"effective rank {space.effective_rank:.1f}"))
    lines = step_lines(marks, len(values))
    layout.update(
        shapes=[line["shape"] for line in lines], annotations=[line["annotation"] for line in lines]
    )
    rows = [[str(i), number(v), number(s)] for i, v, s in zip(index, values, shares, strict=True)]
    return Figure(
        "spectrum",
        "Safety subspace",
        data,
        layout,
        "Bars are the eigenvalues of the safety Fisher matrix (left axis), dark where kept; the line is the "
        "share of the whole trace they add up to (right axis). Few tall bars mean that safety hangs on few "
        "directions; a flat spectrum means that no small subspace protects it.",
        "F = GᵀG/N, K = GGᵀ = N U Λ Uᵀ; rank: smallest k with Σ_{j≤k} λ_j ≥ target · tr F",
        ["direction", "eigenvalue", "cumulative share"],
        thin(rows),
        says=f"{space.rank} of {len(values)} directions hold {percent(space.explained)} of the trace; "
        f"effective rank {number(space.effective_rank)}; {percent(space.heldout_energy)} of held-out safety "
        "gradient energy lies inside.",
        worth="A description, not a predictor. A subspace that holds little held-out energy does not "
        "generalise, and overlap with it says little.",
    )


def fisher_map(collected: CollectResult, space: SubspaceResult) -> Figure:
    """Fisher mass by module: where the safety loss is sensitive."""
    return _module_map(
        collected,
        space.module_traces,
        ("fisher-map", "Where safety lives", "tr F by module", "nats² per unit of θ²"),
        "tr F^(l) = (1/N) Σ_i ‖G_i^(l)‖²",
        says=layer_sentence(collected.modules, space.module_traces, "safety Fisher trace") or "",
        worth="A description: it says where safety is sensitive, not whether this fine-tune goes there.",
    )


def harm_map(collected: CollectResult, scored: ScoreResult) -> Figure:
    """Second-order harm of the first update by module: where it meets what safety is sensitive to."""
    return _module_map(
        collected,
        scored.module_second_order,
        ("harm-map", "Where the first update does harm", "⟨F u, u⟩ by module", "nats² per flow time²"),
        "⟨F u, u⟩ = Σ_l ⟨(F u)^(l), u^(l)⟩, u = −D g; a part may be negative",
        says=layer_sentence(collected.modules, scored.module_second_order, "second-order harm") or "",
        worth=worth_line("lr T sqrt(d'Fd)", "The root of its sum over modules, times the length of the run"),
        warm=True,
    )


def _module_map(
    collected: CollectResult,
    values: torch.Tensor,
    names: tuple[str, str, str, str],
    equation: str,
    *,
    says: str,
    worth: str,
    warm: bool = False,
) -> Figure:
    """A quantity by module: module types × layers where names tell layers, else bars.

    Args:
        collected: has the modules.
        values: (L,) the quantity.
        names: id, title, quantity, unit.
        equation: the formula behind it.
        says: what it shows here.
        worth: what it was worth elsewhere.
        warm: in the colours of harm.
    """
    figure_id, title, quantity, unit = names
    named = [
        (*layer_and_type(m), m, float(v)) for m, v in zip(collected.modules, values.tolist(), strict=True)
    ]
    layered = [entry for entry in named if entry[0] is not None]
    rows = [[m, number(v)] for _, _, m, v in sorted(named, key=lambda e: -abs(e[3]))]
    header = ["module", f"{quantity} ({unit})"]
    finite = [e[3] for e in named if math.isfinite(e[3])]
    missing = None if finite else "no module has a finite value"
    if len({entry[0] for entry in layered}) >= 2:
        data, layout = _heat(layered, quantity, warm)
        reading = (
            f"{quantity[0].upper()}{quantity[1:]}, in {unit}: a column per layer, from input to output, a "
            "row per kind of module; stronger colour is more. Modules outside the layers are in the table."
        )
    else:
        top = sorted(named, key=lambda e: -abs(e[3]))[:30][::-1]
        bars = {"type": "bar", "orientation": "h", "x": clean([e[3] for e in top]), "y": [e[2] for e in top]}
        data, layout = [{**bars, "marker": {"color": "#0072B2"}}], axes(f"{quantity} ({unit})", "")
        reading = f"{quantity[0].upper()}{quantity[1:]}, in {unit}; the longest bars carry most of it."
    return Figure(
        figure_id,
        title,
        data,
        layout,
        reading,
        equation,
        header,
        rows[: 2 * TABLE_ROWS],
        missing,
        says=says,
        worth=worth,
    )


def _heat(
    layered: Sequence[tuple[int | None, str, str, float]], quantity: str, warm: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Heatmap of module types × layers; an absent module is a gap, below zero has its own colour."""
    layers = sorted({entry[0] for entry in layered if entry[0] is not None})
    kinds = list(dict.fromkeys(entry[1] for entry in layered))[::-1]
    cells: dict[tuple[int | None, str], float] = {(e[0], e[1]): e[3] for e in layered}
    grid = [clean([cells.get((layer, kind)) for layer in layers]) for kind in kinds]
    known = [value for row in grid for value in row if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    far = max(abs(low), abs(high)) or 1.0
    signed = low < 0
    heat = {
        "type": "heatmap",
        "x": [str(layer) for layer in layers],
        "y": _short(kinds),
        "z": grid,
        "zmin": -far if signed else 0,
        "zmax": far,
        "colorscale": "diverging" if signed else "warm" if warm else "cool",
        "xgap": 1,
        "ygap": 1,
        "colorbar": {"thickness": 10, "len": 1, "outlinewidth": 0, "nticks": 5, "exponentformat": "power"},
        "customdata": [[kind] * len(layers) for kind in kinds],
        "hovertemplate": f"layer %{{x}}, %{{customdata}}<br>{quantity} %{{z:.3g}}<extra></extra>",
    }
    layout = axes("layer", "")
    layout["xaxis"].update(type="category", showgrid=False, nticks=20, tickangle=0)
    layout["yaxis"].update(type="category", showgrid=False)
    return [heat], layout


def _short(kinds: Sequence[str]) -> list[str]:
    """The last part of each name where that still tells them apart."""
    ends = [kind.rsplit(".", 1)[-1] for kind in kinds]
    return ends if len(set(ends)) == len(ends) else list(kinds)


def overlap(scored: ScoreResult) -> Figure:
    """The overlap of the first update with the safety subspace, beside every null it has."""
    o = scored.overlap
    bars = [
        ("this fine-tune", o.ratio, OBSERVED),
        ("ordinary data", o.control, CONTROL),
        ("shuffled, largest", o.permuted_max, NULL),
        ("shuffled, mean", o.permuted_mean, NULL),
        ("random, √(k/P)", o.random, NULL),
        ("this, in ΔW space", o.delta_w, OBSERVED),
        ("random, in ΔW space", o.delta_w_random, NULL),
    ]
    shown = [bar for bar in bars if bar[1] is not None and math.isfinite(bar[1])][::-1]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "x": [bar[1] for bar in shown],
            "y": [bar[0] for bar in shown],
            "text": [number(bar[1], 2) for bar in shown],
            "textposition": "outside",
            "cliponaxis": False,
            "marker": {
                "color": [bar[2] for bar in shown],
                "pattern": {"shape": ["/" if bar[2] == NULL else "" for bar in shown]},
            },
            "hovertemplate": "%{y}: %{x:.3g}<extra></extra>",
        }
    ]
    layout = axes("‖P u‖ / ‖u‖, from 0 to 1", "")
    longest = max((bar[1] for bar in shown if bar[1] is not None), default=1.0)
    layout["xaxis"]["range"] = [0, 1.2 * longest or 1]
    return Figure(
        "overlap",
        "Overlap and its nulls",
        data,
        layout,
        "Share of the first update's length that lies in the safety subspace. Alone it says nothing: compare "
        "it with ordinary data (pink) and with its nulls (hatched): the same update shuffled inside each "
        "tensor, and a random direction.",
        "‖P u‖² = Σ_j (u_jᵀ G u)² / (N λ_j); p = (1 + #{shuffled ≥ observed}) / (1 + permutations)",
        ["direction", "overlap"],
        [[label, number(value)] for label, value, _ in bars] + [["permutation p", number(o.p_value, 2)]],
        None if shown else "the overlap is not defined here",
        says=_against(scored),
        worth=worth_line("overlap |Pg|/|g|"),
    )


def _against(scored: ScoreResult) -> str:
    """The overlap as a multiple of its nulls."""
    o = scored.overlap
    if not math.isfinite(o.ratio):
        return ""
    says = f"{number(o.ratio_to_random, 2)} × a random direction"
    if o.control is not None and math.isfinite(o.control) and o.control > 0:
        says += f", {number(o.ratio / o.control, 2)} × ordinary data"
    return f"{says}; permutation p = {number(o.p_value, 2)}."


def virtual_move(scored: ScoreResult, threshold: float) -> Figure:
    """Measured losses of safety, control and fine-tuning data along the first update direction."""
    title, reading = (
        "Measured along the first update direction",
        "The model was moved along the planned optimizer's first direction and put back; the losses are "
        "measured. The quadratic model is what local theory predicts for the same move: where it leaves the "
        "measured safety line, theory ends.",
    )
    equation = "L(θ* + t u) − L(θ*), with u = −D g and t in units of Σ η"
    header = ["flow time t", "safety", "quadratic model", "control", "fine-tuning"]
    if scored.probe_times is None or scored.probe_safety is None or scored.probe_finetune is None:
        return Figure("move", title, [], {}, reading, equation, header, [], "score.probe_points is 0")
    times = scored.probe_times.tolist()
    c = scored.c_update[:, None] * scored.probe_times[None]
    curves = {
        "safety": (scored.probe_safety.mean(0).tolist(), "#D55E00", "solid"),
        "quadratic model": ((c + 0.5 * c**2).mean(0).tolist(), "#0072B2", "dash"),
        "fine-tuning": (scored.probe_finetune.tolist(), "#009E73", "dashdot"),
    }
    control = scored.probe_control
    if control is not None:
        curves["control"] = (control.tolist(), "#CC79A7", "dot")
    data = [
        {
            "type": "scatter",
            "name": name,
            "mode": "lines+markers",
            "x": times[1:],
            "y": clean(values[1:]),
            "line": {"color": colour, "dash": dash},
        }
        for name, (values, colour, dash) in curves.items()
    ]
    line = reference_line(horizon=threshold, text=f"collapse threshold +{threshold:g}")
    layout = axes(
        "flow time t = Σ η (log)",
        "change of loss (nats / token)",
        shapes=[line["shape"]],
        annotations=[line["annotation"]],
        hovermode="x unified",
        legend=LEGEND,
    )
    layout["xaxis"].update(type="log", dtick=1, exponentformat="power")
    measured = [v for values, _, _ in curves.values() for v in values if math.isfinite(v)]
    low = min([0.0, *measured])
    high = max([threshold * 2, *[v for v in curves["safety"][0] if math.isfinite(v)]])
    layout["yaxis"]["range"] = [max(1.1 * low, -2 * high), 1.15 * high]
    rows = [
        [
            number(times[i]),
            number(curves["safety"][0][i]),
            number(curves["quadratic model"][0][i]),
            "not measured" if control is None else number(float(control[i])),
            number(curves["fine-tuning"][0][i]),
        ]
        for i in range(len(times))
    ]
    return Figure(
        "move",
        title,
        data,
        layout,
        reading,
        equation,
        header,
        thin(rows),
        says=_says(times, curves["safety"][0], threshold),
        worth=worth_line("ray"),
    )


def _says(times: list[float], safety: list[float], threshold: float) -> str:
    """Where along the move safety goes."""
    first = next((t for t, value in zip(times, safety, strict=True) if value >= threshold), None)
    if first is None:
        return f"Along this one direction safety does not lose {threshold:g} nats/token as far as measured."
    return f"Along this one direction safety has lost {threshold:g} nats/token by flow time {number(first)}."


def conditions(scored: ScoreResult) -> str:
    """The three conditions of the theory, with what was measured for each."""
    words = {True: "holds", False: "does not hold", None: NOT_MEASURED}
    rows = [(c["name"], words[c["holds"]], c["evidence"]) for c in scored.aic_conditions]
    facts = f"γ̂ = {number(scored.gamma_hat)}, ε̂ = {number(scored.epsilon_hat)}"
    return (
        '<section id="conditions"><h2>Alignment Instability Condition</h2>'
        '<p class="reading"><b>How to read this.</b> Where all three hold, theory says that safety decays '
        "like t⁴ even though training starts almost orthogonal to it. Theory and measurement are shown side "
        f"by side; the verdict follows measurement. {esc(facts)}.</p>"
        f"{table(('condition', 'here', 'evidence'), rows)}</section>"
    )


#: Headings of the riskiest rows, with the keys of `ScoreResult.examples` behind them.
COLUMNS = (
    (Column("row"), "line"),
    (Column("second order", "descending"), "second_order"),
    (Column("first order"), "first_order"),
    (Column("loss"), "loss"),
    (Column("gradient norm"), "gradient_norm"),
    (Column("tokens"), "tokens"),
)


def examples(scored: ScoreResult, show_text: bool, limit: int, says: str | None = None) -> str:
    """The riskiest rows, sortable, their text folded away.

    Args:
        scored: has the rows.
        show_text: show prompts and responses, or only their numbers.
        limit: rows shown.
        says: what the ranking shows, in one sentence.
    """
    head = '<section id="examples"><h2>Riskiest training rows</h2>'
    ranked = sorted(scored.examples, key=_harm, reverse=True)
    if not ranked:
        return (
            f'{head}<p class="missing">Not measured: score.examples is 0. '
            "That is not the same as no risk.</p></section>"
        )
    told = [([_value(row, key) for _, key in COLUMNS], row) for row in ranked[:limit]]
    takeaway = f'<p class="says">{esc(says)}</p>' if says else ""
    return (
        f"{head}{takeaway}{rows_table([column for column, _ in COLUMNS], told, show_text, 'riskiest rows')}"
        '<dl class="notes"><div><dt>How to read this.</dt><dd>'
        f"{min(limit, len(ranked))} of the {len(ranked)} rows of the first batches that were scored one by "
        "one, the most harmful first; a heading sorts. Positive means that a step on this row alone pushes "
        "towards harm: first order along the safety gradient, second order along what the whole first update "
        "does to the safety subspace. The ranking is local: it says who pushes, not how far.</dd></div>"
        '<div><dt>Equation</dt><dd class="equation">first order: −⟨ḡ_s, D g_j⟩ (nats / unit learning rate)\n'
        "second order: ⟨F u, −D g_j⟩ (nats² / unit learning rate²)</dd></div>"
        f"<div><dt>Worth</dt><dd>{esc(worth_line('second order', 'This ranking of single rows'))}</dd></div>"
        "</dl></section>"
    )


def _harm(row: Mapping[str, Any]) -> float:
    """Sort key: what was not measured comes last."""
    value = row.get("second_order")
    return float(value) if value is not None and math.isfinite(value) else -math.inf


def _value(row: Mapping[str, Any], key: str) -> Any:
    if key == "line":
        return row.get("line", row.get("index"))
    value = row.get(key)
    return None if value is None else float(value)
