"""Verbs that make or inspect a run: run, one per stage, status, check, init, schema, demo."""

from __future__ import annotations

import inspect
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from arisk.base.terminal import say
from arisk.catalogue import catalogue
from arisk.cli.app import app
from arisk.cli.options import (
    AllOption,
    ConfigPath,
    ForceOption,
    JsonOption,
    QuietOption,
    RunDirOption,
    SetOption,
    StageName,
    Told,
    WhyOption,
    complete_run,
    gate,
    refuse_gate_without_verdict,
    reproducing,
    reusable,
    show,
    usable_path,
    with_why,
)
from arisk.engine.stage import Stage, StageOption

__all__ = ["add_stage_verbs"]


@app.command()
def run(
    config: ConfigPath,
    run_dir: RunDirOption = None,
    overrides: SetOption = None,
    first: Annotated[
        StageName | None, typer.Option("--from", help="Re-run this stage and all that read it.")
    ] = None,
    last: Annotated[StageName | None, typer.Option("--until", help="Stop after this stage.")] = None,
    why: WhyOption = None,
    force: ForceOption = False,
    reuse: Annotated[
        list[Path] | None,
        typer.Option(
            "--reuse",
            metavar="RUN",
            parser=usable_path,
            help="Take stages with the same key from this run directory; repeatable.",
            autocompletion=complete_run,
        ),
    ] = None,
    fail_on: Annotated[
        Literal["elevated", "high"] | None,
        typer.Option("--fail-on", help="Exit 10 when the verdict reaches this level, 11 if inconclusive."),
    ] = None,
    every: AllOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run what is not up to date: the verdict, then why; ends with the report's path.

    Example: arisk run configs/demo.yaml --set training.learning_rate=1e-4
    """
    from arisk.config.yaml import load_config, run_directory
    from arisk.engine.run import run_stages

    refuse_gate_without_verdict(fail_on, last)
    overrides = with_why(overrides, why)
    loaded = load_config(config, overrides)
    told = Told(as_json, every)
    outcome = run_stages(
        catalogue(),
        loaded,
        run_dir=run_directory(loaded, config, run_dir),
        first=first,
        last=last,
        force=force,
        reuse=reusable(reuse, again=force or first is not None),
        show=show(quiet),
        command=reproducing(config, run_dir, overrides),
        decided=told.decided,
    )
    told.end(outcome)
    if fail_on and outcome.summary:
        verdict = outcome.summary["verdict"]
        gate(verdict["level"], fail_on, verdict["sentence"])


def _ordinary_verb(stage: Stage) -> None:
    """Register `arisk <stage>`, which runs one stage and names the command for a stale upstream."""

    def command(
        config: ConfigPath,
        run_dir: RunDirOption = None,
        overrides: SetOption = None,
        force: ForceOption = False,
        with_upstream: Annotated[
            bool, typer.Option("--with-upstream", help="Also run what it reads and is not up to date.")
        ] = False,
        as_json: JsonOption = False,
        quiet: QuietOption = False,
    ) -> None:
        from arisk.config.yaml import load_config, run_directory
        from arisk.engine.run import run_stages

        loaded = load_config(config, overrides or [])
        outcome = run_stages(
            catalogue(),
            loaded,
            run_dir=run_directory(loaded, config, run_dir),
            only=stage.name,
            upstream=with_upstream,
            force=force,
            show=show(quiet),
            command=reproducing(config, run_dir, overrides),
        )
        Told(as_json).end(outcome)

    command.__doc__ = (
        f"{stage.help}.\n\nThis stage alone; those that it reads must be up to date. "
        f"Example: arisk {stage.name} my.yaml --with-upstream"
    )
    app.command(stage.name)(command)


def _optional_verb(stage: Stage) -> None:
    """Register the verb of an optional stage, with the options that the stage names."""

    def command(**given: Any) -> None:
        from arisk.config.yaml import load_config, run_directory
        from arisk.engine.run import asked_text, run_asked

        config, run_dir, overrides = given["config"], given["run_dir"], given["overrides"] or []
        own: list[str] = []
        shown: list[str] = []
        told, force = "", given["force"]
        for option in stage.options:
            value = given[option.name.replace("-", "_")]
            if value is None:
                continue
            setting = f"{option.setting}={option.parse(value) if option.parse else value}"
            (shown if option.shown else own).append(setting)
            force = force or option.anew
            told += f" --{option.name}" if option.kind is bool else f" --{option.name} {value}"
        loaded = load_config(config, [*overrides, *own, *shown])
        outcome = run_asked(
            catalogue(),
            stage.name,
            loaded,
            run_dir=run_directory(loaded, config, run_dir),
            force=force,
            show=show(given["quiet"]),
            command=reproducing(config, run_dir, overrides, stage.name) + told,
            report_command=reproducing(config, run_dir, [*overrides, *shown]),
        )
        as_json = given["as_json"]
        text = json.dumps(outcome.as_json(), indent=2, allow_nan=False) if as_json else None
        say(text or asked_text(catalogue(), outcome))

    command.__doc__ = (
        f"{stage.help}.\n\nThe model's files are not changed. "
        f"Example: arisk {stage.name} configs/demo.yaml {stage.example}"
    ).rstrip()
    _signed(command, stage.options)
    app.command(stage.name)(command)


def _signed(command: Any, options: Sequence[StageOption]) -> None:
    """Give a function the arguments that a stage's verb has: its own options first, then those of all."""
    kinds: dict[str, tuple[Any, Any]] = {"config": (ConfigPath, inspect.Parameter.empty)}
    for option in options:
        made = typer.Option(f"--{option.name}", min=option.minimum, metavar=option.metavar, help=option.help)
        kinds[option.name.replace("-", "_")] = (Annotated[option.kind | None, made], None)
    kinds |= {
        "run_dir": (RunDirOption, None),
        "overrides": (SetOption, None),
        "force": (ForceOption, False),
        "as_json": (JsonOption, False),
        "quiet": (QuietOption, False),
    }
    both = inspect.Parameter.POSITIONAL_OR_KEYWORD
    command.__signature__ = inspect.Signature(
        [
            inspect.Parameter(name, both, default=start, annotation=kind)
            for name, (kind, start) in kinds.items()
        ]
    )
    command.__annotations__ = {name: kind for name, (kind, _) in kinds.items()}


def add_stage_verbs() -> None:
    """Register the verbs of all stages that have none yet; stages of other packages come late."""
    known = {command.name for command in app.registered_commands}
    for stage in catalogue():
        if stage.name not in known:
            (_optional_verb if stage.optional else _ordinary_verb)(stage)


add_stage_verbs()


@app.command()
def status(
    config: ConfigPath,
    run_dir: RunDirOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which stages are up to date, and why others are not, with size and time; runs nothing.

    Example: arisk status my.yaml --set training.learning_rate=1e-4
    """
    from arisk.base.terminal import columns
    from arisk.config.yaml import load_config, run_directory
    from arisk.engine.freshness import describe, status_rows

    loaded = load_config(config, overrides or [])
    rows = status_rows(catalogue(), loaded, run_directory(loaded, config, run_dir))
    if as_json:
        say(json.dumps(rows, indent=2))
        return
    width = columns(sys.stdout) - 1 if sys.stdout.isatty() else None
    say(describe(rows, width=width, command=reproducing(config, run_dir, overrides)))


@app.command()
def check(config: ConfigPath, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Validate config, files, rows and adapter targets, and print the planned work; trains nothing.

    Example: arisk check my.yaml
    """
    from arisk.config.starter import not_modelled
    from arisk.config.yaml import load_config, run_directory
    from arisk.cost.check import check_task, check_text, plan_text
    from arisk.cost.estimate import estimate
    from arisk.engine.job import device_of, shelf_of
    from arisk.engine.rundir import RunDir

    loaded = load_config(config, overrides or [])
    kept: dict[str, Any] = {}
    started = time.perf_counter()
    run_dir = run_directory(loaded, config, None)
    shelf = shelf_of(loaded, RunDir(run_dir)) if loaded.model.source == "hf" else None
    report = check_task(loaded, device=device_of(loaded.run.device), kept=kept, shelf=shelf)
    report["warnings"] += [f"not modelled: {line}" for line in not_modelled(config)]
    loading = time.perf_counter() - started
    if not as_json:
        say(check_text(report) + "\n")
    learnt = (lambda _: None) if as_json else say
    report["plan"] = estimate(catalogue(), loaded, run_dir, kept, loading=loading, learnt=learnt)
    say(json.dumps(report, indent=2, default=str) if as_json else "\n" + plan_text(report))


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.", parser=usable_path)] = Path("arisk.yaml"),
    imported: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="FILE",
            parser=usable_path,
            help="Config of your trainer: TrainingArguments or SFTConfig (JSON, YAML), axolotl, "
            "LLaMA-Factory, alignment handbook, torchtune, adapter_config.json; repeatable.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model folder or hub id.")] = None,
    safety: Annotated[str | None, typer.Option(help="Safety rows (prompt + safe response).")] = None,
    safety_prompts: Annotated[
        str | None,
        typer.Option(help="Prompts alone, such as a text with one per line: the model's own refusals serve."),
    ] = None,
    finetune: Annotated[str | None, typer.Option(help="Fine-tuning rows.")] = None,
    devices: Annotated[
        int, typer.Option(min=1, max=100_000, help="Devices that train side by side (with --from).")
    ] = 1,
    full: Annotated[bool, typer.Option("--full", help="Write every key with its default.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a config: a plan of about 25 lines, or that of another tool's files.

    Example: arisk init my.yaml --from axolotl.yml --safety refusals.jsonl
    """
    from arisk.base.errors import ConfigError
    from arisk.config.imports import import_files
    from arisk.config.sections import path_fault
    from arisk.config.starter import account_text, full_config, imported_config, short_config

    if path.exists() and not force:
        raise ConfigError(
            f"{path} exists already", where=str(path), fix="choose another name, or give --force"
        )
    if path.exists() and not path.is_file():
        raise ConfigError(
            "something else than a file is there", where=str(path), fix="choose another name for the config"
        )
    named = {"--model": model, "--safety": safety, "--safety-prompts": safety_prompts, "--finetune": finetune}
    for option, text in named.items():
        if text is not None and (fault := path_fault(text)):
            raise ConfigError(
                fault, where=option, fix="give a file or folder that a config can name, or a hub id"
            )
    if imported and full:
        raise ConfigError("--full shows defaults, and --from a plan", where="--full", fix="give one of them")
    if safety and safety_prompts:
        fix = "give one of them; rows with responses are the better ones"
        raise ConfigError("there are two safety sets", where="--safety-prompts", fix=fix)
    safety, alone = safety_prompts or safety, safety_prompts is not None
    if imported:
        found = import_files(imported, devices=devices)
        text = imported_config(found, model=model, safety=safety, finetune=finetune, alone=alone)
        say(account_text(found.lines) + "\n")
    else:
        write = full_config if full else short_config
        paths = (model or "path/to/model", safety or "safety.jsonl", finetune or "finetune.jsonl")
        text = write(*paths, alone=alone)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as err:
        raise ConfigError(
            f"the config cannot be written: {err.strerror}",
            where=str(path),
            fix="choose a folder that exists and may be written to",
        ) from err
    name = shlex.quote(str(path))
    say(f"wrote {path}; next: arisk check {name} && arisk run {name}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the config (for editors).

    Example: arisk schema > arisk.schema.json
    """
    from arisk.config.yaml import json_schema

    say(json.dumps(json_schema(), indent=2))


@app.command()
def demo(
    mode: Annotated[
        Literal["full", "lora"], typer.Option(help="What the planned fine-tune trains.")
    ] = "lora",
    output_dir: Annotated[
        Path, typer.Option("--output-dir", metavar="<path>", help="Run directory.", parser=usable_path)
    ] = Path("runs/demo"),
    why: WhyOption = None,
    force: ForceOption = False,
    every: AllOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run everything on the embedded model and data; no network, about a minute on two cores.

    Example: arisk demo --mode full
    """
    from arisk.cli.demo import demo_config
    from arisk.engine.run import run_stages

    told, chosen = Told(as_json, every), {} if why is None else {"why": why}
    outcome = run_stages(
        catalogue(),
        demo_config(mode).model_copy(update=chosen),
        run_dir=output_dir,
        force=force,
        show=show(quiet),
        command=f"arisk demo --mode {mode} --output-dir {output_dir}",
        decided=told.decided,
    )
    told.end(outcome)
