"""Configs that `arisk init` writes: a short plan, every key, or a plan imported from other tools."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from arisk.base.errors import ConfigError
from arisk.config.imports import Import, Line, nested
from arisk.config.plan import AdapterConfig, Config, Settings, TrainingConfig
from arisk.config.yaml import by_name, config_file, models_in, shortened, validate_mapping

__all__ = ["account_text", "full_config", "imported_config", "not_modelled", "short_config"]

#: Sections of a written config in the order a user decides on them; the others follow.
FIRST = ("model", "safety", "finetune", "control", "probes", "training", "forecast", "run")
#: What begins before a section.
HEADINGS = {
    "model": "What you are about to fine-tune, on what, and how",
    "forecast": "What counts as collapse, and where the run lives",
    "collect": "How it is measured: the defaults are good ones",
    "verify": "Stages that run only by their own command",
}
#: Titles of the account, in the order in which it is told.
OUTCOMES = {
    "other": "not modelled: the run may differ from the forecast one",
    "unknown": "unknown to arisk",
    "assumed": "not in the file: defaults of its tool",
    "computed": "computed",
    "taken": "taken",
    "idle": "no part in what is trained",
}
#: Bytes of a file of rows up to which it is counted.
COUNTED = 1_000_000_000
#: Settings that are written only where they are not arisk's default.
MINOR = {"betas", "eps", "drop_last", "use_rslora", "use_dora", "init_lora_weights", "bias", "momentum"}
#: What begins a comment about a line of an imported file that the plan leaves out.
NOT_MODELLED = "# Not modelled: "
#: Layout of safety rows without responses.
ALONE = "prompts"
#: A plan that people run, to be changed.
SHORT = """\
# arisk check THIS_FILE && arisk run THIS_FILE
# (`arisk init --from FILE` takes the config of your trainer; `arisk init --full` shows every key)
model:
  path: {model}
  adapter:            # leave it out, and every parameter trains
    r: 16
    alpha: 32
    dropout: 0.05
    target_modules: all-linear
safety:               # prompts that the model refuses today, {answers}
  path: {safety}
{layout}finetune:
  path: {finetune}
  max_length: 1024    # tokens per row
# control: {{path: ordinary.jsonl}}   # ordinary rows, to tell harm from any change
training:
  optimizer: adamw
  learning_rate: 2.0e-4
  schedule: cosine
  warmup_ratio: 0.03
  epochs: 3           # or max_steps
  batch_size: 4
  gradient_accumulation: 4   # × the number of devices, if several train
  max_grad_norm: 1.0
  weight_decay: 0.0
"""


def short_config(model: str, safety: str, finetune: str, *, alone: bool = False) -> str:
    """About 25 lines of a plan that people really run: LoRA, epochs, cosine, warm-up, clipping.

    Args:
        model: folder or hub id.
        safety: safety rows.
        finetune: rows to train on.
        alone: the safety rows are prompts without responses.
    """
    return SHORT.format(
        model=_scalar(model),
        safety=_scalar(safety),
        answers="to which its own refusals are the answers" if alone else "with its refusals",
        layout=f"  format: {ALONE}\n" if alone else "",
        finetune=_scalar(finetune),
    )


def full_config(model: str, safety: str, finetune: str, *, alone: bool = False) -> str:
    """A YAML file with every key, its default and its documentation; loads back as it is."""
    given = {"model": {"path": model}, "safety": {"path": safety}, "finetune": {"path": finetune}}
    if alone:
        given["safety"]["format"] = ALONE
    lines = [
        "# yaml-language-server: $schema=arisk.schema.json",
        "# (the editor's hint: `arisk schema > arisk.schema.json` beside this file)",
        "# arisk check THIS_FILE && arisk run THIS_FILE",
        "# Keys that are commented out show their defaults.",
        "",
    ]
    rest = [name for name in Config.model_fields if name not in FIRST]
    for name in (*FIRST, *rest):
        field = Config.model_fields[name]
        section = next(models_in(field.annotation), None)
        if name in HEADINGS:
            lines += [f"# ── {HEADINGS[name]} ──", ""]
        lines.append(f"# {field.description}")
        if section is None:
            lines += [f"# {name}: {_scalar(field.default)}", ""]
            continue
        active = given.get(name, {})
        lines.append(f"{name}:" if active else f"# {name}:")
        inner = list(_section_lines(section, active))
        lines += ["  # NAME:", *(f"  {line}" for line in inner)] if by_name(field.annotation) else inner
        lines.append("")
    return "\n".join(lines)


def _section_lines(section: type[BaseModel], given: Mapping[str, Any]) -> Iterator[str]:
    """Lines of one section: documented keys, those not given commented out."""
    for name, field in section.model_fields.items():
        doc = (field.description or "").replace("\n", " ")
        if name in given:
            yield f"  {name}: {_scalar(given[name])}  # {doc}"
        else:
            default = field.default
            if isinstance(default, Settings):
                default = default.model_dump(mode="json")
            shown = "…" if default is PydanticUndefined else _scalar(default)
            yield f"  # {name}: {shown}  # {doc}"


def _scalar(value: Any) -> str:
    """One YAML scalar or flow value on one line."""
    if isinstance(value, tuple):
        value = list(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True).strip()
    return text.removesuffix("...").strip()


def imported_config(
    found: Import, *, model: str | None, safety: str | None, finetune: str | None, alone: bool = False
) -> str:
    """The plan of imported files as YAML, what is not modelled in its comments.

    Args:
        found: what was read.
        model: given by the user, it wins over the files.
        safety: safety rows, of which no trainer's config knows.
        finetune: given by the user, it wins over the files.
        alone: the safety rows are prompts without responses.

    Raises:
        ConfigError: a value of a file is none that arisk takes; with the line it came from.
    """
    told = {"model.path": model, "safety.path": safety, "finetune.path": finetune}
    for key, value in {**told, "safety.format": ALONE if alone else None}.items():
        if value is not None:
            if key == "finetune.path":
                found.plan.pop("finetune", None)
            found.plan[key], found.origin[key] = value, "command line"
    missing = {"model.path": "path/to/model", "safety.path": "safety.jsonl"}
    if "finetune" not in found.plan:
        missing["finetune.path"] = "finetune.jsonl"
    open_keys = [key for key in missing if key not in found.plan]
    _count_steps(found)
    plan = nested({**{key: missing[key] for key in open_keys}, **found.plan})
    _require_valid(plan, found)
    lines = ["# arisk check THIS_FILE && arisk run THIS_FILE"]
    lines += [f"# Made of {name} ({kind})." for name, kind in _files(found)]
    lines += [f"# To be filled in: {', '.join(open_keys)}."] if open_keys else []
    for line in found.lines:
        if line.outcome in ("other", "unknown"):
            lines.append(f"{NOT_MODELLED}{_shown(line, value=False)}: {shortened(line.note, 300)}")
    _drop_defaults(plan)
    for name in sorted(plan, key=lambda each: (*FIRST, each).index(each)):
        lines.append(f"{name}:")
        lines += _block(_ordered(plan[name], Config.model_fields[name].annotation), "  ")
    return "\n".join(lines) + "\n"


def not_modelled(path: Path) -> list[str]:
    """What a config that was imported says, in its comments, of lines that it could not take."""
    lines = config_file(path).read_text(encoding="utf-8").splitlines()
    return [line.removeprefix(NOT_MODELLED) for line in lines if line.startswith(NOT_MODELLED)]


def _count_steps(found: Import) -> None:
    """Tell the optimizer steps of a plan in epochs, where its rows lie in one JSONL file."""
    plan = found.plan
    sets = plan.get("finetune", {"path": plan.get("finetune.path")})
    path = Path(str(sets.get("path") if isinstance(sets, Mapping) else ""))
    epochs = plan.get("training.epochs")
    if not epochs or path.suffix != ".jsonl" or not path.is_file() or path.stat().st_size > COUNTED:
        return
    if plan.get("training.packing", "off") != "off":
        said = "optimizer steps follow from the packed sequences: `arisk check` counts them"
        found.lines.append(Line(str(path), None, "", "", "computed", said))
        return
    with path.open("rb") as file:
        rows = sum(1 for line in file if line.strip())
    held = plan.get("finetune.val_set_size", 0)
    rows = min(rows - math.ceil(held * rows if held < 1 else held), plan.get("finetune.max_samples", rows))
    each = plan.get("training.batch_size", 8) * plan.get("training.gradient_accumulation", 1)
    if rows < 1 or each < 1:
        return
    steps = math.ceil(epochs * math.ceil(rows / each))
    said = f"{steps} optimizer steps: {epochs:g} epochs of {rows:,} rows, {each} of them a step"
    found.lines.append(Line(str(path), None, "", "", "computed", said))


def _files(found: Import) -> list[tuple[str, str]]:
    names = list(dict.fromkeys(line.source for line in found.lines))
    return [(shortened(name, 200), kind) for name, kind in zip(names, found.kinds, strict=False)]


def _require_valid(plan: Mapping[str, Any], found: Import) -> None:
    """Refuse a plan that arisk's own config refuses, with the place in the imported file.

    Raises:
        ConfigError: a value is none that arisk takes.
    """
    try:
        validate_mapping(Config, plan, "plan")
    except ConfigError as err:
        first, *rest = (_at_home(each, found) for each in (err, *err.also))
        raise ConfigError(first.what, where=first.where, fix=first.fix, also=rest) from err


def _at_home(problem: Any, found: Import) -> ConfigError:
    key = problem.where.removeprefix("plan: ")
    parts = key.split(".")
    origins = [found.origin.get(".".join(parts[: i + 1])) for i in reversed(range(len(parts)))]
    where = next((origin for origin in origins if origin), None)
    return ConfigError(
        problem.what, where=f"{where} (as `{key}`)" if where else f"`{key}` of the plan", fix=problem.fix
    )


def _drop_defaults(plan: dict[str, Any]) -> None:
    """Leave out what is as arisk has it anyway, of the settings that few people look for."""
    adapter = plan.get("model", {}).get("adapter", {})
    for section, owner in ((plan.get("training", {}), TrainingConfig), (adapter, AdapterConfig)):
        for name in MINOR & set(section):
            default = owner.model_fields[name].default
            if section[name] == (list(default) if isinstance(default, tuple) else default):
                del section[name]


def _ordered(value: Any, annotation: Any) -> Any:
    """A section, or each of several, with its keys in the order of the config and whole numbers as such."""
    if isinstance(value, list):
        return [_ordered(each, annotation) for each in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e6:
        return int(value)
    section = next(iter(models_in(annotation)), None)
    if not isinstance(value, Mapping) or section is None:
        return value
    fields = section.model_fields
    keys = [*(key for key in fields if key in value), *(key for key in value if key not in fields)]
    return {key: _ordered(value[key], fields[key].annotation if key in fields else None) for key in keys}


def _block(value: Mapping[str, Any] | list[Mapping[str, Any]], indent: str) -> Iterator[str]:
    """A section as block YAML, its short values on one line each."""
    if isinstance(value, list):
        for each in value:
            first, *rest = _block(each, indent + "  ")
            yield f"{indent}- {first.strip()}"
            yield from rest
        return
    for key, each in value.items():
        flow = _scalar(each)
        if isinstance(each, Mapping) and each and len(flow) > 60:
            yield f"{indent}{_scalar(key)}:"
            yield from _block(each, indent + "  ")
        else:
            yield f"{indent}{_scalar(key)}: {flow}"


def account_text(lines: Sequence[Line]) -> str:
    """Every line of the imported files, and what became of it."""
    told: list[str] = []
    for outcome, title in OUTCOMES.items():
        these = [line for line in lines if line.outcome == outcome]
        if not these:
            continue
        told += ["", f"{title} ({len(these)})"]
        if outcome == "idle":
            ordered = sorted(these, key=lambda line: line.note)
            for note, group in groupby(ordered, key=lambda line: line.note):
                told.append(f"  {note}: {', '.join(_shown(line, value=False) for line in group)}")
        else:
            for line in sorted(these, key=lambda line: (line.source, line.number or 0)):
                where = f"{_shown(line)} → " if line.key and outcome in ("taken", "computed") else ""
                where = f"{_shown(line)}: " if line.key and not where else where
                told.append(f"  {where}{line.note}")
    return "\n".join(told[1:])


def _shown(line: Line, *, value: bool = True) -> str:
    said = shortened(line.key, 80) + (f" = {line.value}" if value and line.value else "")
    return f"{said} (line {line.number})" if line.number else said
