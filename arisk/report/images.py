"""Figures as files of their own, PNG or SVG, by the optional package kaleido and an installed browser.

The page needs none of this. Nothing is fetched: kaleido draws with the plotly.js that the page carries,
in a browser that is on this machine.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from arisk.base.errors import MissingExtraError
from arisk.report.figure import Figure

__all__ = ["drawable", "image_spec", "report_images", "require_drawable", "write_images"]

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
