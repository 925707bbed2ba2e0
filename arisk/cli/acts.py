"""Verbs that act on a plan beyond its run: verify, what-if."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from arisk.cli.app import app
from arisk.cli.completion import complete_run
from arisk.cli.options import (
    ConfigPath,
    ForceOption,
    JsonOption,
    QuietOption,
    RunDirOption,
    SetOption,
    reproducing,
    show,
)

__all__: list[str] = []


@app.command()
def verify(
    config: ConfigPath,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after this many steps, on the schedule of the whole plan."),
    ] = None,
    run_dir: RunDirOption = None,
    overrides: SetOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Really fine-tune as planned, measure safety along the way, and lay it over the forecast.

    The model's files are not changed. Example: arisk verify configs/demo.yaml --steps 100
    """
    from arisk.configfile import load_config, run_directory
    from arisk.pipeline import run_verify
    from arisk.terminal import verify_text

    given = overrides or []
    loaded = load_config(config, [*given, f"verify.steps={steps}"] if steps else given)
    reach = f" --steps {steps}" if steps else ""
    outcome = run_verify(
        loaded,
        run_dir=run_directory(loaded, config, run_dir),
        force=force,
        show=show(quiet),
        command=reproducing(config, run_dir, overrides, "verify") + reach,
        report_command=reproducing(config, run_dir, overrides),
    )
    typer.echo(json.dumps(outcome.as_json(), indent=2, allow_nan=False) if as_json else verify_text(outcome))


@app.command("what-if")
def what_if(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="Run directory of a finished run.", autocompletion=complete_run
        ),
    ],
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
    from arisk.what_if import grid_json, grid_text, number_list, reforecast

    grid = reforecast(
        run,
        rates=number_list(learning_rate, float, "--learning-rate"),
        lengths=number_list(steps, int, "--steps"),
    )
    typer.echo(json.dumps(grid_json(grid), indent=2) if as_json else grid_text(grid, cells=cells))
