"""The verb `guard`: the planned fine-tune with and without protection."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from arisk.cli.app import app
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
def guard(
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
    """Really fine-tune plain and protected, and measure what protection costs and brings.

    The model's files are not changed. Example: arisk guard configs/demo.yaml --set guard.steps=100
    """
    from arisk.configfile import load_config, run_directory
    from arisk.guard_run import guard_text, run_guard

    given = overrides or []
    loaded = load_config(config, [*given, f"guard.steps={steps}"] if steps else given)
    reach = f" --steps {steps}" if steps else ""
    outcome = run_guard(
        loaded,
        run_dir=run_directory(loaded, config, run_dir),
        force=force,
        show=show(quiet),
        command=reproducing(config, run_dir, overrides, "guard") + reach,
        report_command=reproducing(config, run_dir, overrides),
    )
    typer.echo(json.dumps(outcome.as_json(), indent=2, allow_nan=False) if as_json else guard_text(outcome))
