"""Where safety lives and what the first update does to it, on the page.

Figures of the subspace, of layers and of the overlap with its nulls; losses along a straight virtual move,
where local theory ends; and the riskiest rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from arisk.anatomy.record import CollectResult, ScoreResult, SubspaceResult
from arisk.anatomy.text import layer_and_type, layer_sentence, overlap_sentence, probed_sentence, row_sentence
from arisk.report.figure import LEGEND, TABLE_ROWS, Figure, axes, clean, reference_line, step_lines, thin
from arisk.report.page import Finding, Part, Piece, Section
from arisk.report.section import Column, coded, esc, notes, rows_table, table
from arisk.report.text import NOT_MEASURED, number, percent

__all__ = [
    "conditions",
    "examples",
    "fisher_map",
    "harm_map",
    "left_out",
    "overlap",
    "section",
    "spectrum",
    "virtual_move",
]

#: What modules carry, in words.
HARM = "harm of the first update (second order)"
SENSITIVITY = "sensitivity of the safety loss (Fisher trace)"
OBSERVED, CONTROL, NULL = "#D55E00", "#CC79A7", "#8a8a8a"
#: Headings of the riskiest rows, with the keys of `ScoreResult.examples` behind them.
COLUMNS = (
    (Column("row"), "line"),
    (Column("harm, second order", "descending"), "second_order"),
    (Column("harm, first order"), "first_order"),
    (Column("loss"), "loss"),
    (Column("gradient norm"), "gradient_norm"),
    (Column("tokens"), "tokens"),
)


def _no_worth(name: str, what: str | None = None) -> str:
    """Nothing is said where nobody keeps a record of what predictors were worth."""
    del name, what
    return ""


def section(
    collected: CollectResult,
    space: SubspaceResult,
    scored: ScoreResult,
    *,
    threshold: float,
    show_text: bool,
    max_examples: int,
    specificity_told: bool = False,
    rows_told: bool = False,
    worth: Callable[[str, str | None], str] = _no_worth,
) -> Section:
    """Why, and where safety lives: all that collect, subspace and score show.

    Args:
        collected: safety side.
        space: safety subspace.
        scored: how the first update meets it.
        threshold: rise of the safety loss that counts as collapse (nats per response token).
        show_text: show prompts and responses, or only their numbers.
        max_examples: rows of the table of riskiest rows.
        specificity_told: somebody who measured further along already says how specific the harm is.
        rows_told: somebody who looked at more rows, or further along, already says which push.
        worth: what a predictor was worth on real fine-tunes, as a sentence: of its name, and how to call it.
    """
    harm_worth = worth("lr T sqrt(d'Fd)", "The root of its sum over modules, times the length of the run")
    figures = (
        Piece(Part.SPACE, figure=virtual_move(scored, threshold, worth("ray", None)), shape="half"),
        Piece(Part.SPACE + 20, figure=fisher_map(collected, space), shape="half"),
        Piece(Part.SPACE + 30, figure=harm_map(collected, scored, harm_worth), shape="half"),
        Piece(Part.SPACE + 40, figure=spectrum(space), shape="half"),
        Piece(Part.SPACE + 10, figure=overlap(scored, worth("overlap |Pg|/|g|", None)), shape="half"),
    )
    findings = _findings(collected, space, scored, specificity_told, rows_told)
    told = worth("second order", "This ranking of single rows")
    rows = "" if rows_told else examples(scored, show_text, max_examples, worth=told)
    return Section(
        "anatomy",
        pieces=[*figures, Piece(Part.ROWS, rows), Piece(Part.SPACE + 50, conditions(scored))],
        summary={
            **_summary(collected, space, scored),
            "why": {
                "findings": [finding.sentence for finding in findings],
                "missing": None,
                "lowered": dict(scored.lowered),
            },
        },
        findings=findings,
        quality=_quality(collected, space, scored),
        warnings=[*collected.warnings, *space.warnings, *scored.warnings],
    )


def left_out(how: str, *, looked: bool = False, dear: bool = False) -> Section:
    """What stands in its place where none of it was measured.

    Args:
        how: what adds it, as the end of a sentence.
        looked: whether rows and layers have been given a first look.
        dear: whether that would have taken more than its share of what the verdict took.
    """
    why = ", as that would take more than its share of what the verdict took" if dear else ""
    what = " (its subspace and curvature)" if looked else ", and which layers and rows carry the harm,"
    said = f"Where safety lives{what} was not measured{why}: {how}."
    html = f'<section id="why"><h2>Why</h2><p class="missing">{coded(said)}</p></section>'
    return Section("anatomy", [Piece(Part.ROWS, html)], summary={"why": {"findings": [], "missing": said}})


def _summary(collected: CollectResult, space: SubspaceResult, scored: ScoreResult) -> dict[str, Any]:
    """Plain values for `summary.json`."""
    return {
        "overlap": asdict(scored.overlap),
        "gamma_hat": scored.gamma_hat,
        "epsilon_hat": scored.epsilon_hat,
        "subspace": {
            "rank": space.rank,
            "explained": space.explained,
            "trace": space.trace,
            "heldout_energy": space.heldout_energy,
        },
        "samples": len(collected.losses),
        "finetune_rows": scored.finetune_rows or None,
    }


def _findings(
    collected: CollectResult,
    space: SubspaceResult,
    scored: ScoreResult,
    specificity_told: bool,
    rows_told: bool,
) -> list[Finding]:
    """Every rule that has something to say."""
    modules, traces, harm = collected.modules, space.module_traces, scored.module_second_order
    rows = None if rows_told else row_sentence(scored.examples, scored.finetune_rows)
    said = [
        ("Specificity", None if specificity_told else probed_sentence(scored), "drift", 40, True),
        ("Training rows", rows, "examples", 30, True),
        ("Safety lives", layer_sentence(modules, traces, SENSITIVITY), "fisher-map", 80, False),
        ("Harm enters", layer_sentence(modules, harm, HARM), "harm-map", 70, True),
        ("Overlap", overlap_sentence(scored), "overlap", 90, False),
    ]
    return [
        Finding(topic, sentence, at, place, cause) for topic, sentence, at, place, cause in said if sentence
    ]


def _quality(
    collected: CollectResult, space: SubspaceResult, scored: ScoreResult
) -> list[tuple[str, str, str]]:
    """What was checked about the measurements: (what, value, note)."""
    held, empirical = space.heldout_energy, collected.fisher == "empirical"
    return [
        ("safety samples", str(len(collected.losses)), f"{collected.dropped_duplicates} duplicates dropped"),
        ("mean safety loss", f"{number(float(collected.losses.mean()))} nats/token", "at the aligned point"),
        ("Fisher matrix", collected.fisher, "labels of the data" if empirical else "own labels"),
        ("gradient engine", str(collected.engine.get("name")), f"error against loop {_parity(collected)}"),
        ("batch invariance", number(collected.batch_invariance, 6), "cosine, wanted ≥ .999"),
        (
            "coverage",
            percent(collected.coverage.get("parameters")),
            "of selected parameters have a gradient yet",
        ),
        ("held-out energy", percent(held), f"± {number(space.heldout_energy_std, 2)} over random halves"),
        ("Hessian products", scored.hvp_method, f"relative error {number(scored.hvp_error, 2)}"),
        ("gradient store", _store(collected), "per-sample safety gradients"),
        *(
            (f"score.{name}", f"{taken} of {asked}", "lowered by `why: auto`; `--why full` takes all")
            for name, (taken, asked) in scored.lowered.items()
        ),
    ]


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
    figure = _module_map(
        collected,
        space.module_traces,
        ("fisher-map", "Where safety lives", "tr F by module", "nats² per unit of θ²"),
        "tr F^(l) = (1/N) Σ_i ‖G_i^(l)‖²",
        says=layer_sentence(collected.modules, space.module_traces, SENSITIVITY) or "",
        worth="A description: it says where safety is sensitive, not whether this fine-tune goes there.",
    )
    return replace(figure, file="sensitivity_map")


def harm_map(collected: CollectResult, scored: ScoreResult, worth: str = "") -> Figure:
    """Second-order harm of the first update by module: where it meets what safety is sensitive to."""
    return _module_map(
        collected,
        scored.module_second_order,
        ("harm-map", "Where the first update does harm", "⟨F u, u⟩ by module", "nats² per flow time²"),
        "⟨F u, u⟩ = Σ_l ⟨(F u)^(l), u^(l)⟩, u = −D g; a part may be negative",
        says=layer_sentence(collected.modules, scored.module_second_order, HARM) or "",
        worth=worth,
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


def overlap(scored: ScoreResult, worth: str = "") -> Figure:
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
        worth=worth,
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


def virtual_move(scored: ScoreResult, threshold: float, worth: str = "") -> Figure:
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
        worth=worth,
    )


def _says(times: list[float], safety: list[float], threshold: float) -> str:
    """Where along the move safety goes."""
    first = next((t for t, value in zip(times, safety, strict=True) if value >= threshold), None)
    if first is None:
        return f"Along this one direction safety does not lose {threshold:g} nats/token as far as measured."
    return f"Along this one direction safety has lost {threshold:g} nats/token by flow time {number(first)}."


CONDITIONS = (
    "Where all three hold, theory says that safety decays like t⁴ even though training starts almost "
    "orthogonal "
    "to it. Theory and measurement are shown side by side; the verdict follows measurement. "
)


def conditions(scored: ScoreResult) -> str:
    """The three conditions of the theory, with what was measured for each."""
    words = {True: "holds", False: "does not hold", None: NOT_MEASURED}
    rows = [(c["name"], words[c["holds"]], c["evidence"]) for c in scored.aic_conditions]
    facts = f"γ̂ = {number(scored.gamma_hat)}, ε̂ = {number(scored.epsilon_hat)}"
    return (
        '<section id="conditions"><h2>Alignment Instability Condition</h2>'
        f"{table(('condition', 'here', 'evidence'), rows)}"
        f"{notes(CONDITIONS + facts + '.')}</section>"
    )


EQUATION = """first order: −⟨ḡ_s, D g_j⟩ (nats / unit learning rate)
second order: ⟨F u, −D g_j⟩ (nats² / unit learning rate²)"""
MEANING = (
    "Harm of a row: how much a step on it alone raises the loss of safe responses, to first order, and to "
    "second order through what safety is most sensitive to; positive is harmful. `arisk screen` looks at "
    "every row."
)
#: Rows shown at once.
FIRST = 5


def examples(scored: ScoreResult, show_text: bool, limit: int, worth: str = "") -> str:
    """The riskiest rows, sortable, their text folded away.

    Args:
        scored: has the rows.
        show_text: show prompts and responses, or only their numbers.
        limit: rows shown.
        worth: what the ranking was worth where it was compared with real fine-tunes.
    """
    head = '<section id="examples"><h2>Riskiest training rows, a first look</h2>'
    ranked = sorted(scored.examples, key=_harm, reverse=True)
    if not ranked:
        return (
            f'{head}<p class="missing">Not measured: score.examples is 0. '
            "That is not the same as no risk.</p></section>"
        )
    told = [([_value(row, key) for _, key in COLUMNS], row) for row in ranked[:limit]]
    says = row_sentence(scored.examples, scored.finetune_rows)
    takeaway = f'<p class="says">{esc(says)}</p>' if says else ""
    takeaway += f'<p class="note">{coded(MEANING)}</p>'
    reading = (
        f"{min(limit, len(ranked))} of the {len(ranked)} rows of the first batches that were scored one by "
        "one, the "
        "most harmful first; a heading sorts. First order is along the safety gradient, second order along "
        "what the whole first update does to the safety subspace. The ranking is local: it says who pushes, "
        "not how far."
    )
    columns = [column for column, _ in COLUMNS]
    return (
        f"{head}{takeaway}{rows_table(columns, told, show_text, 'riskiest rows', first=FIRST)}"
        f"{notes(reading, EQUATION, worth)}</section>"
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


def _parity(collected: CollectResult) -> str:
    parity = collected.engine.get("parity", {}).get(collected.engine.get("name"))
    return number(parity, 2)


def _store(collected: CollectResult) -> str:
    """The store, and its dtype where that is not the gradients' own."""
    return collected.store + ("" if collected.store_dtype == "float32" else f", {collected.store_dtype}")
