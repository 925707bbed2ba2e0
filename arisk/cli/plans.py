"""Verbs that lay plans side by side: `what-if` for other rates and lengths, `compare` for several plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from arisk.base.processes import is_first
from arisk.base.terminal import say
from arisk.catalogue import catalogue
from arisk.cli.app import app
from arisk.cli.options import (
    ForceOption,
    JsonOption,
    QuietOption,
    SetOption,
    complete_run,
    complete_run_or_config,
    gate,
    show,
    usable_path,
)

__all__: list[str] = []

FinishedRun = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="Run directory of a finished run.",
        parser=usable_path,
        autocompletion=complete_run,
    ),
]


@app.command("what-if")
def what_if(
    run: FinishedRun,
    learning_rate: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Peak learning rates, e.g. 1e-4,2e-4; default: around the plan."),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Optimizer steps, e.g. 100,500; default: around the plan."),
    ] = None,
    cells: Annotated[
        bool, typer.Option("--cells", help="One line per cell: interval, peak, collapse step, basis.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Re-forecast other learning rates and lengths from the artifacts of a run; loads no model.

    Example: arisk what-if runs/my --learning-rate 1e-4,2e-4 --steps 100,500
    """
    from arisk.forecast.what_if_command import grid_json, grid_text, number_list, reforecast

    grid = reforecast(
        run,
        rates=number_list(learning_rate, float, "--learning-rate"),
        lengths=number_list(steps, int, "--steps"),
    )
    say(json.dumps(grid_json(grid), indent=2) if as_json else grid_text(grid, cells=cells))


@app.command()
def card(
    run: FinishedRun,
) -> None:
    """Print the section of a model card: the forecast, what was measured, and YAML metadata; loads no model.

    Example: arisk card runs/my >> README.md
    """
    from arisk.base.artifacts import read_json
    from arisk.engine.freshness import check_run_dir, made_from
    from arisk.engine.job import SUMMARY_FILE
    from arisk.engine.report import REPORT
    from arisk.engine.rundir import RunDir
    from arisk.report.card import model_card

    check_run_dir(run)
    rundir, spec = RunDir(run), catalogue().get(REPORT)
    there = [name for name in catalogue().names if rundir.stage_dir(name).exists()]
    made_from(rundir, spec, reads=there)
    say(model_card(read_json(rundir.stage_dir(REPORT) / SUMMARY_FILE)).rstrip())


@app.command()
def compare(
    plans: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_OR_CONFIG…",
            help="Run directories and YAML configs, two or more.",
            parser=usable_path,
            autocompletion=complete_run_or_config,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            metavar="<path>",
            help="Folder of compare.html, compare.json and compare.md.",
            parser=usable_path,
        ),
    ] = Path("runs/compare"),
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--run-dir",
            metavar="<path>",
            parser=usable_path,
            help="Configs run in folders of this one, by their names; default: run.dir, or runs/<name>.",
        ),
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="Heading of the page.")] = None,
    overrides: SetOption = None,
    last: Annotated[
        Literal["forecast", "report"],
        typer.Option("--until", help="Last stage run for configs; forecast leaves out their own reports."),
    ] = "report",
    force: ForceOption = False,
    fail_on: Annotated[
        Literal["elevated", "high"] | None,
        typer.Option("--fail-on", help="Exit 10 when a plan reaches this level, 11 if one is inconclusive."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Rank several planned fine-tunes of one model; configs are run first, as far as they are not up to date.

    The safety side is measured once and shared. Example: arisk compare runs/a runs/b plan.yaml
    """
    from arisk.compare import compare_plans
    from arisk.compare.record import worst_level
    from arisk.compare.text import compare_text

    found = compare_plans(
        catalogue(),
        plans,
        output=output,
        show=show(quiet),
        command=_reproducing(plans, output, run_dir, title, overrides),
        overrides=overrides or [],
        base=run_dir,
        last=last,
        force=force,
        title=title,
    )
    if is_first():
        text = compare_text(found.told, str(found.page))
        say(json.dumps(found.as_json(), indent=2, allow_nan=False) if as_json else text)
    if fail_on:
        level, names = worst_level(found.told.runs, fail_on)
        gate(level, fail_on, names)


def _reproducing(
    plans: list[Path], output: Path, run_dir: Path | None, title: str | None, overrides: list[str] | None
) -> str:
    """The command that makes this comparison again."""
    import shlex

    parts = ["arisk", "compare", *map(str, plans), "--output", str(output)]
    parts += ["--run-dir", str(run_dir)] if run_dir else []
    parts += ["--title", title] if title else []
    return shlex.join([*parts, *(part for item in overrides or [] for part in ("--set", item))])
