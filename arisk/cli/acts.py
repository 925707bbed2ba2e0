"""Verbs that act on a plan beyond its run: verify, screen, guard, what-if.

The verb `compare`: several planned fine-tunes of one model, ranked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import typer

from arisk.base.errors import ConfigError
from arisk.base.processes import is_first
from arisk.cli.app import app
from arisk.cli.options import (
    ConfigPath,
    ForceOption,
    JsonOption,
    QuietOption,
    RunDirOption,
    SetOption,
    complete_run,
    complete_run_or_config,
    gate,
    reproducing,
    show,
    usable_path,
)

__all__ = []

__all__: list[str] = []

#: Verbs that really fine-tune, with their help.
REAL_RUNS = {
    "verify": "Really fine-tune as planned, measure safety along the way, and lay it over the forecast.",
    "guard": "Really fine-tune plain and protected, and measure what protection costs and brings.",
}


def _real_run_command(stage: str) -> None:
    """Register a verb that really fine-tunes, on the schedule of the whole plan however early it stops."""

    def command(
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
        common = _Common(config, run_dir, overrides, force, as_json, quiet)
        given = [f"{stage}.steps={steps}"] if steps else []
        _ask(stage, common, given=given, told=f" --steps {steps}" if steps else "")

    command.__doc__ = (
        f"{REAL_RUNS[stage]}\n\nThe model's files are not changed. "
        f"Example: arisk {stage} configs/demo.yaml --steps 100"
    )
    app.command(stage)(command)


for _stage in REAL_RUNS:
    _real_run_command(_stage)


@app.command()
def screen(
    config: ConfigPath,
    drop: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Flag this share of the rows (5% or 0.05) in place of the rule."),
    ] = None,
    run_dir: RunDirOption = None,
    overrides: SetOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Rank the fine-tuning rows by the harm they push; write kept.jsonl and flagged.jsonl.

    Example: arisk screen configs/demo.yaml --drop 5%
    """
    common = _Common(config, run_dir, overrides, force, as_json, quiet)
    # The share decides what the record holds, so the report has to be asked for with it.
    shared = [] if drop is None else [f"screen.drop={_share(drop)!r}"]
    _ask("screen", common, shared=shared, told="" if drop is None else f" --drop {drop}")


class _Common(NamedTuple):
    """What every such verb is given."""

    config: Path
    run_dir: Path | None
    overrides: list[str] | None
    force: bool
    as_json: bool
    quiet: bool


def _ask(
    stage: str,
    common: _Common,
    *,
    given: Sequence[str] = (),
    shared: Sequence[str] = (),
    told: str = "",
) -> None:
    """Carry an optional stage out and print what it found.

    Args:
        stage: its name.
        common: the options that all have.
        given: settings of this stage alone, by its own options.
        shared: the same, where the report has to be asked for with them as well.
        told: those options as typed.
    """
    from arisk.config.yaml import load_config, run_directory
    from arisk.engine.run import asked_text, run_asked

    config, run_dir, overrides, force, as_json, quiet = common
    loaded = load_config(config, [*(overrides or []), *given, *shared])
    outcome = run_asked(
        stage,
        loaded,
        run_dir=run_directory(loaded, config, run_dir),
        force=force,
        show=show(quiet),
        command=reproducing(config, run_dir, overrides, stage) + told,
        report_command=reproducing(config, run_dir, [*(overrides or []), *shared]),
    )
    typer.echo(json.dumps(outcome.as_json(), indent=2, allow_nan=False) if as_json else asked_text(outcome))


def _share(text: str) -> float:
    """`5%` or `0.05`, strictly between 0 and 1."""
    body = text.strip()
    try:
        value = float(body[:-1]) / 100 if body.endswith("%") else float(body)
    except ValueError:
        value = float("nan")
    if not 0 < value < 1:
        raise ConfigError(
            f"{text!r} is no share of the rows",
            where="--drop",
            fix="give a percentage such as 5%, or a number strictly between 0 and 1",
        )
    return value


@app.command("what-if")
def what_if(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="Run directory of a finished run.",
            parser=usable_path,
            autocompletion=complete_run,
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
    from arisk.forecast.what_if_command import grid_json, grid_text, number_list, reforecast

    grid = reforecast(
        run,
        rates=number_list(learning_rate, float, "--learning-rate"),
        lengths=number_list(steps, int, "--steps"),
    )
    typer.echo(json.dumps(grid_json(grid), indent=2) if as_json else grid_text(grid, cells=cells))


__all__: list[str] = []


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
    """Rank several planned fine-tunes of one model; configs are run first, as far as they are not fresh.

    The safety side is measured once and shared. Example: arisk compare runs/a runs/b plan.yaml
    """
    from arisk.compare import compare_plans
    from arisk.compare.record import worst_level
    from arisk.compare.text import compare_text

    found = compare_plans(
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
        typer.echo(json.dumps(found.as_json(), indent=2, allow_nan=False) if as_json else text)
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
