"""The verb screen: which fine-tuning rows push towards harm."""

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
from arisk.errors import ConfigError

__all__: list[str] = []


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
    from arisk.configfile import load_config, run_directory
    from arisk.screening import run_screen, screen_text

    given = list(overrides or [])
    if drop is not None:
        given.append(f"screen.drop={_share(drop)!r}")
    loaded = load_config(config, given)
    shared = f" --drop {drop}" if drop is not None else ""
    outcome = run_screen(
        loaded,
        run_dir=run_directory(loaded, config, run_dir),
        force=force,
        show=show(quiet),
        command=reproducing(config, run_dir, overrides, "screen") + shared,
        report_command=reproducing(config, run_dir, given),
    )
    typer.echo(json.dumps(outcome.as_json(), indent=2, allow_nan=False) if as_json else screen_text(outcome))


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
