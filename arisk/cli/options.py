"""Options and helpers that several verbs share."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from arisk.base.errors import ConfigError, GateError, InconclusiveError
from arisk.base.processes import is_first
from arisk.cli.completion import complete_config, complete_run, complete_setting

__all__ = [
    "ConfigPath",
    "ForceOption",
    "JsonOption",
    "QuietOption",
    "RunDirOption",
    "SetOption",
    "Stage",
    "gate",
    "print_outcome",
    "refuse_gate_without_verdict",
    "reproducing",
    "reusable",
    "show",
]

Stage = Literal["collect", "subspace", "score", "rollout", "forecast", "report"]
ConfigPath = Annotated[
    Path, typer.Argument(help="YAML config; `arisk init` writes one.", autocompletion=complete_config)
]
RunDirOption = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        help="Run directory; default: run.dir, or runs/<name of the config>.",
        autocompletion=complete_run,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one config value; repeatable.",
        autocompletion=complete_setting,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Run the stages even where they are fresh.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


def show(quiet: bool) -> Any:
    """Progress display on stderr: a moving line in a terminal, a line per stage in a pipe, or nothing."""
    from arisk.base.terminal import StageDisplay

    return StageDisplay(quiet=quiet or not is_first(), resume=shlex.join(["arisk", *sys.argv[1:]]))


def print_outcome(outcome: Any, as_json: bool) -> None:
    """The result of a run on stdout: the verdict table, or JSON."""
    from arisk.base.tables import outcome_text

    if not is_first():
        return

    typer.echo(json.dumps(outcome.as_json(), indent=2) if as_json else outcome_text(outcome))


def gate(level: str, fail_on: str, why: str) -> None:
    """Turn the verdict into an exit code for continuous integration.

    Args:
        level: of the verdict, or of the worst of several.
        fail_on: the level that fails.
        why: the verdict's sentence, or the names of the runs that have it.

    Raises:
        GateError: the verdict reached the level.
        InconclusiveError: the verdict cannot be vouched for.
    """
    order = ["low", "elevated", "high"]
    if level == "inconclusive":
        raise InconclusiveError(
            f"a gate was asked for and the verdict is inconclusive: {why}",
            where=f"--fail-on {fail_on}",
            fix="read the reasons in the report, and measure more (`score.probe_points`, more safety rows)",
        )
    if order.index(level) >= order.index(fail_on):
        raise GateError(
            f"the verdict is {level}: {why}",
            where=f"--fail-on {fail_on}",
            fix="lower the learning rate or the steps (see the what-if grid), or change the data",
        )


def refuse_gate_without_verdict(fail_on: str | None, last: str | None) -> None:
    """A gate that never sees a verdict must not pass.

    Raises:
        ConfigError: the run is to stop before its verdict is written.
    """
    if fail_on and last not in (None, "report"):
        raise ConfigError(
            f"a run that stops after {last} has no verdict for the gate",
            where=f"--fail-on {fail_on} --until {last}",
            fix="leave out --until, or --fail-on",
        )


def reproducing(config: Path, run_dir: Path | None, overrides: list[str] | None, verb: str = "run") -> str:
    """The command that reproduces this run."""
    parts = ["arisk", verb, str(config)]
    if run_dir:
        parts += ["--run-dir", str(run_dir)]
    return shlex.join([*parts, *[part for item in overrides or [] for part in ("--set", item)]])


def reusable(given: list[Path] | None, *, again: bool) -> list[Path]:
    """The run directories of `--reuse`.

    Args:
        given: what was named.
        again: stages are to be run again even where they are fresh.

    Raises:
        ArtifactError: one is no run directory.
        ConfigError: stages are to be run again and to be taken over.
    """
    from arisk.engine.reuse import check_run_dir

    if given and again:
        raise ConfigError(
            "--reuse takes stages over, and --force and --from run them again",
            where="--reuse",
            fix="leave one of them out",
        )
    for source in given or []:
        check_run_dir(source)
    return given or []
