"""What a figure is, the pieces every figure uses, and figures as files of their own, PNG or SVG.

Files are made by the optional package kaleido, which draws with the plotly.js that the page carries, in a
browser that is on this machine. Nothing is fetched, and the page needs none of this.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from arisk.base.errors import MissingExtraError

__all__ = [
    "LEGEND",
    "TABLE_ROWS",
    "Figure",
    "axes",
    "clean",
    "drawable",
    "image_spec",
    "reference_line",
    "report_images",
    "require_drawable",
    "step_lines",
    "thin",
    "threshold_line",
    "write_images",
]

#: Rows of a table alternative; longer series are thinned.
TABLE_ROWS = 24
#: Above the plot, where it cannot cover the axis title however many lines it takes on a phone.
LEGEND = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"}


@dataclass(frozen=True)
class Figure:
    """One figure of the page.

    Attributes:
        id: fixed element id.
        title: heading.
        data, layout: plotly's two halves; None data for a figure that was not measured.
        reading: how to read it.
        equation: the formula behind it.
        header, rows: the same numbers as a table.
        missing: why there is nothing to show; None when there is.
        says: what the figure shows in this run, in one sentence made from its numbers.
        worth: what this predictor was worth where it was compared with real fine-tunes.
        file: name of its image file where the field knows it by one; `report.figures: auto` draws these.
    """

    id: str
    title: str
    data: Sequence[dict[str, Any]]
    layout: dict[str, Any]
    reading: str
    equation: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    missing: str | None = None
    says: str = ""
    worth: str = ""
    file: str = ""


def clean(values: Sequence[float | None]) -> list[float | None]:
    """JSON has no NaN or infinity; plotly leaves a gap at null."""
    return [v if v is not None and math.isfinite(v) else None for v in values]


def thin(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """About `TABLE_ROWS` of the rows, the last one among them."""
    step = max(1, math.ceil(len(rows) / TABLE_ROWS))
    kept = list(rows[::step])
    return kept if not rows or kept[-1] is rows[-1] else [*kept, rows[-1]]


def axes(x: str, y: str, **extra: Any) -> dict[str, Any]:
    """Layout with titled axes, and whatever else is given."""
    return {
        "xaxis": {"title": {"text": x}, "automargin": True},
        "yaxis": {"title": {"text": y}, "automargin": True},
        **extra,
    }


def reference_line(*, horizon: float | None = None, step: int | None = None, text: str) -> dict[str, Any]:
    """A labelled reference line across the plot, horizontal or vertical."""
    style = {"type": "line", "line": {"color": "#8a8a8a", "width": 1.2, "dash": "dot"}}
    note = {"text": text, "showarrow": False, "font": {"size": 11}}
    if horizon is not None:
        shape = {**style, "xref": "paper", "x0": 0, "x1": 1, "y0": horizon, "y1": horizon}
        where = {"xref": "paper", "x": 0.01, "xanchor": "left", "y": horizon, "yanchor": "bottom"}
    else:
        shape = {**style, "yref": "paper", "y0": 0, "y1": 1, "x0": step, "x1": step}
        where = {"x": step, "xanchor": "left", "yref": "paper", "y": 1, "yanchor": "top"}
    return {"shape": shape, "annotation": {**note, **where}}


def threshold_line(threshold: float, crossed: int | None, horizon: int) -> dict[str, Any]:
    """The collapse threshold, its label at the end away from where the curve crosses it.

    Args:
        threshold: collapse threshold (nats).
        crossed: step at which the curve to read reaches it; None where it does not.
        horizon: last step of the axis.
    """
    line = reference_line(horizon=threshold, text=f"collapse threshold +{threshold:g}")
    if crossed is not None and crossed < horizon / 2:
        line["annotation"].update(x=0.99, xanchor="right")
    return line


def step_lines(marks: Sequence[tuple[int, str]], horizon: int) -> list[dict[str, Any]]:
    """Labelled vertical lines whose labels do not cover one another.

    Args:
        marks: steps with their labels.
        horizon: last step; labels in the right half are written to the left of their line.
    """
    lines: list[dict[str, Any]] = []
    for level, (step, text) in enumerate(sorted(marks)):
        line = reference_line(step=step, text=text)
        line["annotation"]["y"] = 1 - 0.065 * level
        if step > horizon / 2:
            line["annotation"]["xanchor"] = "right"
        lines.append(line)
    return lines


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
WIDTH, HEIGHT, SCALE = 960, 540, 2
#: What the page's style sheet says of the light theme; a test compares them.
LIGHT = {"ink": "#171a1e", "soft": "#4a515a", "card": "#ffffff"}
GRID, LINE = "#e9ecef", "#d7dbe0"
SCALES = {
    "cool": ("#f4f8fc", "#6baed6", "#08306b"),
    "warm": ("#f4f8fc", "#f08b4b", "#7f2704"),
    "diverging": ("#1f5fa0", "#f4f8fc", "#a63603"),
}


def drawable() -> str | None:
    """Why figures cannot be drawn here, in a few words; None where they can."""
    if importlib.util.find_spec("kaleido") is None:
        return "the package kaleido is not installed"
    if not any(shutil.which(name) for name in BROWSERS):
        return "no Chromium or Chrome is installed"
    return None


def require_drawable() -> None:
    """Refuse where figures cannot be drawn.

    Raises:
        MissingExtraError: kaleido or a browser is missing.
    """
    if reason := drawable():
        raise _missing(reason)


def write_images(
    figures: Mapping[str, Figure], folder: Path, kind: Literal["png", "svg"], only: Sequence[str] = ()
) -> list[Path]:
    """Draw figures into files of their own, one browser for all.

    Args:
        figures: by id; those that were not measured are passed over.
        folder: where the files go, `<name>.<kind>`.
        kind: file format.
        only: ids to draw; all of them by default.

    Returns:
        The files written.

    Raises:
        MissingExtraError: kaleido or a browser is missing, or the browser does not start.
    """
    require_drawable()
    import kaleido

    chosen = [figure for name, figure in figures.items() if not figure.missing and (not only or name in only)]
    files = [folder / f"{figure.file or figure.id}.{kind}" for figure in chosen]
    options = {"width": WIDTH, "height": HEIGHT, "scale": SCALE if kind == "png" else 1, "format": kind}
    jobs = [
        {"fig": image_spec(figure), "path": str(path), "opts": options}
        for figure, path in zip(chosen, files, strict=True)
    ]
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    try:
        # Without MathJax: it would be fetched, and no label needs it.
        kaleido.write_fig_from_object_sync(jobs, kopts={"mathjax": False, "path": browser})
    except (OSError, RuntimeError, TimeoutError, ValueError) as err:
        raise _missing(f"{browser} does not draw ({type(err).__name__})") from err
    return files


def report_images(
    figures: Mapping[str, Figure], folder: Path, asked: Literal["none", "auto", "png", "svg"]
) -> list[Path]:
    """The files that `report.figures` asks for; `auto` writes those with a name, or none where it cannot.

    Raises:
        MissingExtraError: png or svg was asked for and cannot be drawn.
    """
    if asked in ("png", "svg"):
        return write_images(figures, folder, asked)
    if asked == "none" or drawable():
        return []
    try:
        named = [name for name, figure in figures.items() if figure.file]
        return write_images(figures, folder, "png", named)
    except MissingExtraError:
        return []


def _missing(reason: str) -> MissingExtraError:
    return MissingExtraError(
        f"figures as files cannot be drawn: {reason}",
        where="report.figures",
        fix='pip install "arisk[figures]" and install Chromium or Chrome; or set `report.figures: none`',
    )


def image_spec(figure: Figure) -> dict[str, Any]:
    """The figure for plotly, in the light colours of the page and with its title."""
    axis = {"gridcolor": GRID, "zerolinecolor": LINE, "linecolor": LINE, "tickfont": {"color": LIGHT["soft"]}}
    layout = _coloured(figure.layout)
    for key in ("xaxis", "yaxis", "yaxis2"):
        if key in layout or key != "yaxis2":
            layout[key] = {**axis, **layout.get(key, {})}
        if key in layout:
            layout[key]["title"] = {"standoff": 12, **layout[key].get("title", {}), "font": {"size": 14}}
    for note in layout.get("annotations", []):
        note.update(bgcolor=LIGHT["card"], font={"size": 13, "color": LIGHT["ink"]})
    layout.update(
        paper_bgcolor=LIGHT["card"],
        plot_bgcolor=LIGHT["card"],
        font={"family": "sans-serif", "size": 14, "color": LIGHT["ink"]},
        title={"text": f"<b>{figure.title}</b>", "x": 0.02, "xanchor": "left", "font": {"size": 18}},
        margin={"l": 70, "r": 30, "t": 96, "b": 60},
    )
    return {"data": [_coloured(trace) for trace in figure.data], "layout": layout}


def _coloured(value: Any, key: str = "") -> Any:
    """A copy with the page's named colours and scales put in, as its script does."""
    if isinstance(value, Mapping):
        return {name: _coloured(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [_coloured(part, key) for part in value]
    if isinstance(value, str):
        if key == "colorscale" and value in SCALES:
            return [[i / 2, colour] for i, colour in enumerate(SCALES[value])]
        if key.endswith("color"):
            return LIGHT.get(value, value)
    return value
