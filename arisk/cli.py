"""The command line: Typer verbs. `main()` is the one place where errors become exit codes.

Results go to stdout, progress and errors to stderr. No torch is imported here: `--help` and
`status` answer at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from arisk.errors import AriskError, GateError, InconclusiveError

__all__ = ["app", "main"]

app = typer.Typer(
    name="arisk",
    help="Will this fine-tune break the model's safety, when, and because of which data and layers?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 ok, 2 config, 3 input, 4 artifact, 5 shape, 6 numerics, 7 missing extra, "
    "10 gate failed, 11 inconclusive gate, 130 interrupted.",
)

Stage = Literal["collect", "subspace", "score", "rollout", "forecast", "report"]
ConfigPath = Annotated[Path, typer.Argument(help="YAML config; `arisk init` writes one.")]
RunDirOption = Annotated[
    Path | None,
    typer.Option("--run-dir", help="Run directory; default: run.dir, or runs/<name of the config>."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one config value; repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Run the stages even where they are fresh.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(version("arisk"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options before the command."""
    del version
    if debug:
        os.environ["ARISK_DEBUG"] = "1"


@app.command()
def run(
    config: ConfigPath,
    run_dir: RunDirOption = None,
    overrides: SetOption = None,
    first: Annotated[Stage | None, typer.Option("--from", help="Re-run this stage and all after it.")] = None,
    last: Annotated[Stage | None, typer.Option("--until", help="Stop after this stage.")] = None,
    force: ForceOption = False,
    fail_on: Annotated[
        Literal["elevated", "high"] | None,
        typer.Option("--fail-on", help="Exit 10 when the verdict reaches this level, 11 if inconclusive."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run all stages, skipping the fresh ones; ends with the verdict and the report's path.

    Example: arisk run configs/demo.yaml --set training.learning_rate=1e-4
    """
    from arisk.configfile import load_config, run_directory
    from arisk.pipeline import run_stages

    loaded = load_config(config, overrides or [])
    outcome = run_stages(
        loaded,
        run_dir=run_directory(loaded, config, run_dir),
        first=first,
        last=last,
        force=force,
        show=_show(quiet),
        command=_command(config, run_dir, overrides),
    )
    _print_outcome(outcome, as_json)
    if fail_on and outcome.summary:
        _gate(outcome.summary["verdict"]["level"], fail_on)


def _stage_command(stage: Stage) -> None:
    """Register `arisk <stage>`, which runs one stage and names the command for a stale upstream."""

    def command(
        config: ConfigPath,
        run_dir: RunDirOption = None,
        overrides: SetOption = None,
        force: ForceOption = False,
        with_upstream: Annotated[
            bool, typer.Option("--with-upstream", help="Also run the stages before it that are not fresh.")
        ] = False,
        as_json: JsonOption = False,
        quiet: QuietOption = False,
    ) -> None:
        from arisk.configfile import load_config, run_directory
        from arisk.pipeline import run_stages

        loaded = load_config(config, overrides or [])
        outcome = run_stages(
            loaded,
            run_dir=run_directory(loaded, config, run_dir),
            only=None if with_upstream else stage,
            last=stage,
            force=force,
            show=_show(quiet),
            command=_command(config, run_dir, overrides),
        )
        _print_outcome(outcome, as_json)

    command.__doc__ = f"Run the stage {stage} alone; its upstream must be fresh."
    app.command(stage)(command)


for _stage in ("collect", "subspace", "score", "rollout", "forecast", "report"):
    _stage_command(_stage)


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
        show=_show(quiet),
        command=_command(config, run_dir, overrides, "verify") + reach,
        report_command=_command(config, run_dir, overrides),
    )
    typer.echo(json.dumps(outcome.as_json(), indent=2, allow_nan=False) if as_json else verify_text(outcome))


@app.command()
def status(
    config: ConfigPath,
    run_dir: RunDirOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show each stage as fresh or stale and why, with size and time; runs nothing."""
    from arisk.configfile import load_config, run_directory
    from arisk.status import describe, status_rows

    loaded = load_config(config, overrides or [])
    rows = status_rows(loaded, run_directory(loaded, config, run_dir))
    typer.echo(json.dumps(rows, indent=2) if as_json else describe(rows))


@app.command()
def check(config: ConfigPath, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Validate config, files, rows and adapter targets, and print the planned work; trains nothing."""
    from arisk.configfile import load_config
    from arisk.models import check_task
    from arisk.terminal import check_text

    report = check_task(load_config(config, overrides or []))
    typer.echo(json.dumps(report, indent=2, default=str) if as_json else check_text(report))


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("arisk.yaml"),
    model: Annotated[str, typer.Option(help="Model folder or hub id.")] = "path/to/model",
    safety: Annotated[str, typer.Option(help="Safety rows (prompt + safe response).")] = "safety.jsonl",
    finetune: Annotated[str, typer.Option(help="Fine-tuning rows.")] = "finetune.jsonl",
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a commented config.

    Example: arisk init my.yaml --model ./model --safety refusals.jsonl --finetune train.jsonl
    """
    from arisk.configfile import starter_config
    from arisk.errors import ConfigError

    if path.exists() and not force:
        raise ConfigError(
            f"{path} exists already", where=str(path), fix="choose another name, or give --force"
        )
    path.write_text(starter_config(model, safety, finetune), encoding="utf-8")
    typer.echo(f"wrote {path}; next: arisk check {path} && arisk run {path}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the config (for editors)."""
    from arisk.configfile import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def demo(
    mode: Annotated[
        Literal["full", "lora"], typer.Option(help="What the planned fine-tune trains.")
    ] = "lora",
    output_dir: Annotated[Path, typer.Option("--output-dir", help="Run directory.")] = Path("runs/demo"),
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run everything on the embedded model and data; no network, about a minute on two cores."""
    from arisk.demo import demo_config
    from arisk.pipeline import run_stages

    outcome = run_stages(
        demo_config(mode),
        run_dir=output_dir,
        force=force,
        show=_show(quiet),
        command=f"arisk demo --mode {mode} --output-dir {output_dir}",
    )
    _print_outcome(outcome, as_json)


@app.command("what-if")
def what_if(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of a finished run.")],
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


def _show(quiet: bool) -> Any:
    """Progress display on stderr: bars in a terminal, a line per stage in a pipe, or nothing."""
    from arisk.terminal import StageDisplay

    return StageDisplay(quiet=quiet)


def _print_outcome(outcome: Any, as_json: bool) -> None:
    from arisk.terminal import outcome_text

    typer.echo(json.dumps(outcome.as_json(), indent=2) if as_json else outcome_text(outcome))


def _gate(level: str, fail_on: str) -> None:
    """Turn the verdict into an exit code for continuous integration."""
    order = ["low", "elevated", "high"]
    if level == "inconclusive":
        raise InconclusiveError(
            "a gate was asked for and the verdict is inconclusive",
            where=f"--fail-on {fail_on}",
            fix="read the reasons in the report, and measure more (`score.probe_points`, more safety rows)",
        )
    if order.index(level) >= order.index(fail_on):
        raise GateError(
            f"the verdict is {level}",
            where=f"--fail-on {fail_on}",
            fix="lower the learning rate or the steps (see the what-if grid), or change the data",
        )


def _command(config: Path, run_dir: Path | None, overrides: list[str] | None, verb: str = "run") -> str:
    """The command that reproduces this run."""
    parts = [f"arisk {verb}", str(config)]
    if run_dir:
        parts += ["--run-dir", str(run_dir)]
    return " ".join(parts + [f"--set {item}" for item in overrides or []])


def main() -> None:
    """Entry point of the `arisk` command: errors become three lines on stderr and an exit code."""
    # Threads that wait by spinning make a shared machine many times slower; read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except AriskError as err:
        if os.environ.get("ARISK_DEBUG"):
            raise
        typer.echo("\n".join(err.lines()), err=True)
        sys.exit(err.exit_code)
