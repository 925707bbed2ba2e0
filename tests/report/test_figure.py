"""Figures as files: the colours of the page, the field's names, a clear refusal without the extra."""

import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from arisk.base.errors import MissingExtraError
from arisk.report import figure as images
from arisk.report.page import figures_of
from tests.report import records as made


def figures():
    return figures_of(made.sections(check=made.checked()), {})


def test_the_light_colours_are_those_of_the_style_sheet():
    style = (resources.files("arisk.report") / "style.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"--(\w+): light-dark\((#\w+),", style))
    assert {name: light[name] for name in images.LIGHT} == images.LIGHT
    assert (light["grid"], light["line"]) == (images.GRID, images.LINE)
    script = (resources.files("arisk.report") / "page.js").read_text(encoding="utf-8")
    for name, scale in images.SCALES.items():
        (keys,) = re.findall(rf"\b{name}: \[(.*?)\]", script)
        assert tuple(light[key] for key in re.findall(r'"(\w+)"', keys)) == scale


def strings(value, key=""):
    """Every string of a specification with its key."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from strings(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from strings(part, key)
    elif isinstance(value, str):
        yield key, value


def test_no_colour_is_left_by_name():
    for figure in figures().values():
        found = [text for key, text in strings(images.image_spec(figure)) if key.endswith("color")]
        assert not set(found) & {*images.LIGHT, *images.SCALES}
        assert not [t for key, t in strings(images.image_spec(figure)) if key == "colorscale" and t[0] != "#"]


def test_the_figure_itself_is_left_as_it_was():
    figure = figures()["forecast"]
    before = repr(figure)
    images.image_spec(figure)
    assert repr(figure) == before


def test_without_the_extra_asked_figures_are_refused_and_automatic_ones_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(images.shutil, "which", lambda name: None)
    with pytest.raises(MissingExtraError) as refused:
        images.report_images(figures(), tmp_path, "png")
    assert refused.value.exit_code == 7
    assert "arisk[figures]" in refused.value.fix
    assert images.report_images(figures(), tmp_path, "auto") == []
    assert images.report_images(figures(), tmp_path, "none") == []
    assert list(tmp_path.iterdir()) == []


def test_figures_that_cannot_be_drawn_are_refused_before_any_work(tmp_path):
    config = Path(__file__).parents[2] / "configs" / "demo.yaml"
    command = [sys.executable, "-m", "arisk", "run", str(config), "--run-dir", str(tmp_path / "run")]
    nowhere = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(
        [*command, "--set", "report.figures=png"], env=nowhere, capture_output=True, text=True, check=False
    )
    assert done.returncode == 7
    assert "where: report.figures" in done.stderr
    assert not (tmp_path / "run" / "collect").exists()


def needs_drawing():
    """Skip where nothing draws; in CI that is a failure."""
    if reason := images.drawable():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


def test_the_two_known_files_and_the_rest(tmp_path):
    needs_drawing()
    files = images.report_images(figures(), tmp_path, "auto")
    assert [file.name for file in files] == ["safety_decay_forecast.png", "sensitivity_map.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000 for file in files)
    (drawing,) = images.write_images(figures(), tmp_path, "svg", ["truth"])
    text = drawing.read_text(encoding="utf-8")
    assert drawing.name == "truth.svg"
    assert text.startswith("<svg")
    assert "The real run" in text
