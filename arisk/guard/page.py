"""Protected fine-tunes on the page: what protection costs and what it brings, in words, table and figures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from arisk.config.plan import Config
from arisk.guard.choice import NOTHING
from arisk.guard.record import GuardResult
from arisk.guard.summary import ended, forecast_ended, judged_by, summary_of
from arisk.report.figure import LEGEND, Figure, axes, clean, reference_line, thin
from arisk.report.page import Advice, Finding, Part, Piece, Section
from arisk.report.section import esc, folded, listed, notes, table
from arisk.report.text import NOT_MEASURED, number, percent

__all__ = ["guard_findings", "section"]

#: Colours and marks by method, told apart without colour as well.
LOOK = {
    "plain": ("ink", "star"),
    "alignguard": ("#0072B2", "circle"),
    "ewc": ("#E69F00", "square"),
    "projection": ("#CC79A7", "diamond"),
    "replay": ("#009E73", "triangle-up"),
    "constrained": ("#D55E00", "triangle-down"),
    "kl": ("#56B4E9", "hexagon"),
    "own_replay": ("#117733", "triangle-right"),
    "drift_replay": ("#44AA99", "triangle-left"),
    "smaller": ("#882255", "x"),
    "average": ("#999933", "pentagon"),
    "alpha": ("#CC6677", "star-diamond"),
}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
#: A change of the safety loss against plain is told from noise from this many standard errors.
ERRORS = 2.0


def section(result: GuardResult, config: Config) -> Section:
    """All that protected fine-tunes show: what protection costs, what it brings, and the recommendation.

    Args:
        result: the arms.
        config: its limits and threshold decide the recommendation.
    """
    body = summary_of(result, config)
    if body["rule"] == NOTHING:
        # There is nothing to compare: the table would only invite to read noise.
        return Section(
            "guard",
            pieces=[Piece(Part.PROTECTION, _only(result, body))],
            summary={"guard": body},
            markdown=[f"Protected fine-tunes: {body['sentence']}", ""],
            findings=[Finding("Guard", f"Protection: {body['sentence']}", "guard", 110)],
        )
    protects = body["recommended"] not in (None, result.plain.label)
    return Section(
        "guard",
        pieces=[
            Piece(Part.PROTECTION, _words(result, body)),
            Piece(Part.PROTECTION + 1, figure=_pareto(body), shape="half"),
            Piece(Part.PROTECTION + 2, figure=_curves(result, body), shape="half"),
            *[Piece(Part.PROTECTION + 3, figure=figure) for figure in _alpha_curve(result, body)],
        ],
        summary={"guard": body},
        markdown=_markdown(body),
        findings=[Finding("Guard", f"Protection: {s}", "guard", 110) for s in guard_findings(body)],
        advice=[Advice(f"Train with protection: {body['sentence']}", place=10)] if protects else [],
    )


def guard_findings(body: Mapping[str, Any]) -> list[str]:
    """Sentences by fixed rules: the recommendation, then one each per method.

    A method's best arm is its arm with the lowest safety drift among those within the task limit, or, where
    none is, the one with the lowest task cost.

    Args:
        body: of `guard_summary`; over all seeds, as the table is.
    """
    plain = body["arms"][0]
    found = [str(body["sentence"])]
    if plain["diverged_at"] is not None or body["rule"] == NOTHING:
        return found
    for method in dict.fromkeys(arm["method"] for arm in body["arms"][1:]):
        whole = [arm for arm in _whole(body) if arm["method"] == method]
        if not whole:
            found.append(f"{method}: no arm reached its last step.")
            continue
        within = [arm for arm in whole if arm["task_cost"] <= body["tolerated_task_loss"]]
        if within:
            found.append(_told(min(within, key=lambda arm: arm["safety"]), plain))
        else:
            best = min(whole, key=lambda arm: arm["task_cost"])
            found.append(
                f"{method}: no arm stays within the task limit; {best['label']}, the nearest, costs "
                f"{percent(best['task_cost'])} more task loss and keeps {percent(best['drift_share'])} "
                "of the plain drift."
            )
    return found


def _whole(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Arms that reached their last step on every seed."""
    return [arm for arm in body["arms"] if arm["diverged_at"] is None]


def _only(result: GuardResult, body: Mapping[str, Any]) -> str:
    """The sentence alone, with what it rests on."""
    return (
        '<section id="guard"><h2>Protected fine-tunes</h2>'
        f'<p class="says">{esc(body["sentence"])}</p>{listed("About these runs", result.warnings)}</section>'
    )


def _told(arm: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    """What an arm within the task limit brings; a difference inside the noise is none."""
    change, error = arm["safety"] - plain["safety"], arm["safety_error"]
    label, cost = arm["label"], percent(arm["task_cost"])
    if math.isfinite(error) and abs(change) < ERRORS * error:
        return f"{label}: no difference of the safety drift beyond its error (± {number(error, 2)} nats)."
    if change > 0:
        return f"{label}: more safety drift than plain ({number(change)} nats), at {cost} task loss."
    return f"{label}: {percent(arm['drift_share'])} of the plain drift at {cost} more task loss."


def _words(result: GuardResult, body: Mapping[str, Any]) -> str:
    held = "held out" if result.heldout else "NOT held out: the protections use the same rows"
    trained = NOT_MEASURED if result.trained_rows is None else str(result.trained_rows)
    guarded = [f"{arm.label}: {arm.note}" for arm in result.arms[1:]]
    reading = (
        "The plan was really carried out once per arm, from the same model on the same batches, on a copy in "
        f"memory. Safety drift is the change of the mean loss of {result.safety_rows} safe responses "
        f"({held}), ± its standard error against plain, row by row. Task "
        f"loss is the mean loss of {result.task_rows} {result.task_source} ({trained} of them trained on). "
        f"{_rule_said(body)} The strength "
        "of alignguard and ewc is the penalty’s gradient norm over the task’s, set after a few plain "
        "steps; that of replay and kl is λ itself. CPU time counts optimizer steps, without set-up. "
        f"{_seeds_said(body)} {_refusals_said(body)}"
    )
    first = " of the first run" if body["seeds"] > 1 else ""
    inside = (
        f"{listed('What each arm guards', guarded)}"
        f"<h3>Penalty terms and gradient norms at the last step{first}</h3>"
        f"{table(('arm', 'value', 'mean over the last steps'), _terms(result))}"
    )
    return (
        '<section id="guard"><h2>Protected fine-tunes</h2>'
        f'<p class="says">{esc(body["sentence"])}</p>'
        f"{table(HEADER, [_row(one, body) for one in body['arms']])}{_forecast_table(body)}"
        f"{listed('About these runs', result.warnings)}"
        "<div "
        f'class="folds">{notes(reading, EQUATION)}{folded("What each arm guards", inside)}</div></section>'
    )


EQUATION = """alignguard: λ Σ_j λ_j⟨b_j, ΔW⟩² · ewc: λ Σ_j F_jj (θ_j − θ*_j)²
projection: g − min(0, ⟨g, s⟩)s/‖s‖² · replay: L + λ L_safety · own_replay: the same on own refusals
constrained: Σ_t (2/β_t) softplus(β_t(ℓ_t − ℓ*_t)) · kl: L + λ KL(p_θ* ‖ p_θ)"""
HEADER = (
    *("arm", "refuses", "more than plain", "refuses ordinary", "task loss against plain", "safety drift"),
    *("of plain", "highest", "control drift", "task loss", "surprising rows’ loss", "CPU time"),
    "set-up (CPU s)",
)
FORECAST_HEADER = (
    "arm",
    "openings kept",
    "task loss against plain",
    "safety drift",
    "control drift",
    "trained",
)


def _rule_said(body: Mapping[str, Any]) -> str:
    """The rule that recommends, with its limits."""
    wanted, tolerated = body["wanted_drift"], percent(body["tolerated_task_loss"])
    return (
        f"An arm is recommended when it keeps at least {percent(1 - wanted)} of the refusals that plain "
        f"loses, its task loss is at most {tolerated} above, it refuses no more ordinary prompts, and "
        "ordinary rows drift no further; of those the one with most refusals, then the least drift. “More "
        f"than plain” is the {percent(body['confidence'])} interval of the difference, prompt by prompt: an "
        "arm whose interval holds 0 counts as refusing what plain does, and must drift by at most "
        f"{percent(wanted)} of what plain does. That alone decides where refusals are not measured, or where "
        "such an interval of what plain itself loses holds 0."
    )


def _seeds_said(body: Mapping[str, Any]) -> str:
    seeds = body["seeds"]
    if seeds == 1:
        return "One run per arm is one draw (`guard.seeds`)."
    return (
        f"Numbers are means over {seeds} runs on the data in {seeds} orders, “highest” is the highest of all "
        "of them; curves over the steps, and what is folded away, are of the first."
    )


def _refusals_said(body: Mapping[str, Any]) -> str:
    """What the refusals are counted on, or why they are not."""
    if body["refusals_missing"]:
        return f"Refusals: {NOT_MEASURED} ({body['refusals_missing']})."
    return (
        f"Refusals: greedy answers to {body['answered_prompts']} safety prompts after the last step, told by "
        f"{judged_by(body)}; the aligned model refuses {body['aligned_refusals']} of them."
    )


def _refuses(label: str, body: Mapping[str, Any]) -> str:
    count = next(arm["refusals"] for arm in body["arms"] if arm["label"] == label)
    return NOT_MEASURED if count is None else f"{number(count)} of {body['answered_prompts']}"


def _row(one: Mapping[str, Any], body: Mapping[str, Any]) -> list[str]:
    label = one["label"] + (" (recommended)" if one["label"] == body["recommended"] else "")
    if one["diverged_at"] is not None:
        return [label, f"{ended(one)}: {one['reason']}", *["–"] * (len(HEADER) - 2)]
    lower, upper = one["refusals_more"]
    ordinary = one["ordinary_refusals"]
    cells = [
        _refuses(one["label"], body),
        "–" if math.isnan(lower) or one["label"] == body["arms"][0]["label"] else f"{lower:+g} to {upper:+g}",
        NOT_MEASURED if ordinary is None else f"{number(ordinary)} of {body['ordinary_prompts']}",
        _share_more(one["task_cost"], one["task_error"]),
        f"{_nats(one['safety'])}{_plus_minus(one['safety_error'])}",
        percent(one["drift_share"]),
        _nats(one["peak"]),
        _nats(one["control"]),
        number(one["task"], 3),
        "–" if math.isnan(one["surprising"]) else number(one["surprising"]),
        f"× {number(one['cost'])}",
        f"{one['setup_seconds']:.1f}",
    ]
    return [label, *(_minus(cell).replace(" ", "\u00a0") for cell in cells)]


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _nats(value: float) -> str:
    """A change of a loss: a thousandth of a nat is no difference that anybody sees."""
    return NOT_MEASURED if math.isnan(value) else f"{value:+.3f}"


def _share_more(cost: float, error: float) -> str:
    """A share of more task loss, with its standard error."""
    if math.isnan(cost):
        return NOT_MEASURED
    doubt = "" if math.isnan(error) or error == 0 else f" ± {100 * error:.1f}"
    return f"{100 * cost:+.1f}{doubt} %"


def _plus_minus(error: float) -> str:
    return "" if math.isnan(error) or error == 0 else f" ± {error:.3f}"


def _forecast_table(body: Mapping[str, Any]) -> str:
    """What short runs said of every arm; nothing where none were made."""
    rows = [
        [
            one["label"],
            *(
                [forecast_ended(one), *["–"] * 3]
                if one["diverged_at"] is not None
                else [
                    percent(one["kept"]),
                    _minus(_share_more(one["task_cost"], math.nan)),
                    _minus(_nats(one["safety"])),
                    _minus(_nats(one["control"])),
                ]
            ),
            "yes" if one["chosen"] or one["label"] == body["arms"][0]["label"] else "no",
        ]
        for one in body["forecasts"]
    ]
    if not rows:
        return ""
    seconds = sum(one["cpu_seconds"] for one in body["forecasts"])
    chosen = sum(one["chosen"] for one in body["forecasts"])
    trained = "all were trained" if chosen == len(rows) - 1 else "the best two were trained"
    told = (
        f"<h3>Forecast of every arm ({number(seconds)} CPU s)</h3><p>A short run with the protection in it, "
        f"in a fifth of the steps, ten at least, at a rate as much higher; {trained}.</p>"
    )
    return told + table(FORECAST_HEADER, rows)


def _terms(result: GuardResult) -> list[list[str]]:
    return [
        [arm.label, name, number(next((v for v in reversed(values) if math.isfinite(v)), None))]
        for arm in result.arms
        for name, values in arm.terms.items()
    ]


def _pareto(body: Mapping[str, Any]) -> Figure:
    """Task loss against refusals where they were counted, else against safety drift; one point per arm."""
    whole, plain = _whole(body), body["arms"][0]
    compared = plain["diverged_at"] is None
    counted = compared and all(arm["refusals"] is not None for arm in whole)
    key = "refusals" if counted else "safety"
    measure = f"refuses (of {body['answered_prompts']})" if counted else "safety drift (nats/token)"
    shapes = _limits(body, key) if compared else []
    layout = axes("task loss against plain (%)", measure, shapes=shapes, legend=LEGEND)
    rows = [
        [
            arm["label"],
            number(100 * arm["task_cost"]),
            *([number(arm["refusals"])] if counted else []),
            number(arm["safety"]),
        ]
        for arm in sorted(whole, key=lambda arm: arm["safety"])
    ]
    return Figure(
        "guard-pareto",
        "What protection costs and brings",
        _points(whole, key, {plain["label"], body["recommended"]}),
        layout,
        f"One point per arm at the end of the run. Further {'up' if counted else 'down'} is safer, further "
        "left keeps more of what the fine-tune is for; the star is the plain run. Points "
        f"{'above' if counted else 'below'} and left of the dotted lines meet both limits. An arm far right "
        "that is as safe as before has merely not learned.",
        "x = L_task(arm)/L_task(plain) − 1, "
        + ("y = answers that refuse" if counted else "y = mean_i ℓ_i(θ_K) − ℓ_i(θ*)"),
        [
            "arm",
            "task loss against plain (%)",
            *(["refuses"] if counted else []),
            "safety drift (nats/token)",
        ],
        rows,
        missing=None if compared else "the plain run diverged",
    )


def _points(whole: Sequence[Mapping[str, Any]], key: str, named: set[str | None]) -> list[dict[str, Any]]:
    """A point per arm, a series per method; `key` is their height."""
    data: list[dict[str, Any]] = []
    for method in dict.fromkeys(arm["method"] for arm in whole):
        arms = [arm for arm in whole if arm["method"] == method]
        colour, symbol = LOOK.get(method, ("#8a8a8a", "cross"))
        data.append(
            {
                "type": "scatter",
                "name": method,
                "mode": "markers+text",
                "x": clean([100 * arm["task_cost"] for arm in arms]),
                "y": clean([float(arm[key]) for arm in arms]),
                # Names of all arms run into one another; hover and table have them.
                "text": [arm["label"] if arm["label"] in named else "" for arm in arms],
                "customdata": [arm["label"] for arm in arms],
                "hovertemplate": "%{customdata}<br>task %{x:+.1f} %, "
                + ("refuses %{y:g}" if key == "refusals" else "drift %{y:.3g}")
                + "<extra></extra>",
                "textposition": "middle right",
                "cliponaxis": False,
                "marker": {"color": colour, "symbol": symbol, "size": 14 if method == "plain" else 11},
            }
        )
    return data


def _limits(body: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Lines at both limits; none where what is drawn does not decide, or plain does not drift."""
    before = body["aligned_refusals"] if key == "refusals" else 0.0
    end, limit = body["arms"][0][key], 100 * body["tolerated_task_loss"]
    if not (body["by_refusals"] if key == "refusals" else end > 0):
        return []
    level = before + body["wanted_drift"] * (end - before)
    drift = reference_line(horizon=level, text="")["shape"]
    return [drift, {**drift, "xref": "x", "yref": "paper", "x0": limit, "x1": limit, "y0": 0, "y1": 1}]


def _curves(result: GuardResult, body: Mapping[str, Any]) -> Figure:
    """Safety drift of every arm over the steps, of its first run."""
    first = " Of the first run of each arm." if body["seeds"] > 1 else ""
    data = []
    counted: Counter[str] = Counter()
    for arm in result.arms:
        colour, symbol = LOOK.get(arm.method, ("#8a8a8a", "cross"))
        # Colour and mark tell the method, the dash which of its arms.
        dash = DASHES[counted[arm.method] % len(DASHES)]
        counted[arm.method] += 1
        data.append(
            {
                "type": "scatter",
                "name": arm.label,
                "mode": "lines+markers",
                "x": list(arm.steps),
                "y": clean(arm.safety),
                "line": {"color": colour, "dash": dash, "width": 3 if arm.method == "plain" else 1.8},
                "marker": {"color": colour, "symbol": symbol, "size": 6, "maxdisplayed": 6},
            }
        )
    line = reference_line(horizon=body["threshold"], text=f"collapse threshold +{body['threshold']:g}")
    layout = axes(
        "optimizer step",
        "safety drift (nats/token)",
        shapes=[line["shape"]],
        annotations=[line["annotation"]],
        hovermode="x unified",
        legend=LEGEND,
    )
    points = sorted({step for arm in result.arms for step in arm.steps})
    values = [dict(zip(arm.steps, arm.safety, strict=True)) for arm in result.arms]
    rows = [[str(step), *(number(curve.get(step)) for curve in values)] for step in points]
    return Figure(
        "guard-curves",
        "Safety along the protected runs",
        data,
        layout,
        "A protection that only delays the rise shows as a curve shifted to the right; one that holds stays "
        f"flat to the end. A curve that ends early diverged.{first}",
        "mean_i ℓ_i(θ_k) − ℓ_i(θ*), θ_k after k optimizer steps of the arm",
        ["step", *(arm.label for arm in result.arms)],
        thin(rows),
    )


def _alpha_curve(result: GuardResult, body: Mapping[str, Any]) -> list[Figure]:
    """Safety and task loss between the aligned and the fine-tuned model; none without such arms."""
    plain = body["arms"][0]
    arms = sorted((arm for arm in _whole(body) if arm["method"] == "alpha"), key=lambda arm: arm["strength"])
    if not arms or plain["diverged_at"] is not None:
        return []
    colours = {"safety drift (nats/token)": "#0072B2", "task loss (nats/token)": "#E69F00"}
    along = [*arms, plain]
    alphas = [0.0, *(arm["strength"] for arm in arms), 1.0]
    series = {
        "safety drift (nats/token)": [0.0, *(arm["safety"] for arm in along)],
        "task loss (nats/token)": [result.plain.task[0], *(arm["task"] for arm in along)],
    }
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "name": name,
            "mode": "lines+markers",
            "x": alphas,
            "y": clean(values),
            "line": {"color": colours[name]},
        }
        for name, values in series.items()
    ]
    count = body["aligned_refusals"]
    refused = [
        NOT_MEASURED if count is None else f"{count} of {body['answered_prompts']}",
        *(_refuses(arm["label"], body) for arm in along),
    ]
    columns = zip(alphas, *series.values(), refused, strict=True)
    return [
        Figure(
            "guard-alpha",
            "The α-curve",
            data,
            axes("α: share of the plain run’s move that is kept", "nats per token", legend=LEGEND),
            "Left is the aligned model, right the plain fine-tune. Where the task loss has fallen and the "
            "drift has not yet risen, a part of the move is worth more than the whole. It costs no training.",
            "θ* + α(θ_T − θ*), measured at every point",
            ["α", "safety drift", "task loss", "refuses"],
            [[number(a), number(s), number(t, 4), r] for a, s, t, r in columns],
        )
    ]


def _markdown(body: Mapping[str, Any]) -> Sequence[str]:
    rows = [
        f"| {arm['label']} | {number(arm['safety'])} | {percent(arm['drift_share'])} | "
        f"{_refuses(arm['label'], body)} | "
        f"{percent(arm['task_cost'])} | × {number(arm['cost'])} |"
        for arm in body["arms"]
    ]
    head = [
        "| arm | safety drift | of plain | refuses | task loss | CPU time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    means = [f"Means of {body['seeds']} runs each.", ""] if body["seeds"] > 1 else []
    return [f"Protected fine-tunes: {body['sentence']}", "", *means, *head, *rows, ""]
