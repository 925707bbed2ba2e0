"""What `arisk check` finds: everything a run would meet, without running it.

What `arisk check` prints: model, data, rows as the model sees them, and the plan of work.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from arisk.base.errors import InputError
from arisk.base.task import Task
from arisk.base.terminal import clock, columns, table, wrapped
from arisk.config.plan import Config, ProbeConfig, TrainingConfig, planned_steps, probe_section
from arisk.forecast.leap import rollout_cost
from arisk.forecast.record import ENOUGH
from arisk.forecast.rollout import forward_rows
from arisk.models.answers import Shelf, refused_today
from arisk.models.formats import SAFETY_SETS
from arisk.models.judge import OUTCOMES, Exchange, RefusalRule, learnt_openings
from arisk.models.loading import load_tokenizer
from arisk.models.rendering import TRAINED, token_rows
from arisk.models.selection import out_of_reach, select_parameters
from arisk.models.tasks import (
    LoadedData,
    load_data,
    load_with_adapter,
    own_answers,
    require_fit,
    statistics_of,
    task_from_entry,
)
from arisk.training.recipe import parameter_groups, recipe_of, require_recipe

__all__ = ["check_task", "check_text", "plan_text", "shortened"]

#: Rows of each data set shown as rendered, and own answers of each outcome.
SHOWN, READ = 2, 3
#: Gradient evaluations of a probe point, as forward passes are a third of one.
FORWARD = 1 / 3
#: What peft puts before the names of modules.
PEFT = "base_model.model."
#: Safety prompts that the model is asked; a run asks `behaviour.prompts` of them.
ASKED = 16


def check_task(
    config: Config,
    *,
    device: torch.device | None = None,
    kept: dict[str, Any] | None = None,
    shelf: Shelf | None = None,
) -> dict[str, Any]:
    """Validate model, adapter, selection and rows, and estimate the work.

    Args:
        config: the resolved config.
        device: where the model goes; default the CPU.
        kept: the model is put here, for `load_task` to take.
        shelf: where the model's own answers to safety prompts are kept.

    Returns:
        A mapping for display: `model`, `data` (statistics and two rendered rows each), `warnings` and `work`
        (parameters, samples, disk in GB, gradient evaluations of one row). For those who check the plan
        against a trainer's: `training_steps`, `learning_rates` by step, `weight_decay` by parameter, and
        `trained_parameters`.

    Raises:
        AriskError: the first thing that would stop the run.
    """
    approximations = require_recipe(config.training)
    if config.model.source == "python":
        return _check_python(task_from_entry(str(config.model.entry)), config, approximations)
    tokenizer = load_tokenizer(config.model)
    kept, device = {} if kept is None else kept, device or torch.device("cpu")
    data = load_data(config, tokenizer, own_answers(config, tokenizer, device, kept, shelf))
    model = load_with_adapter(config, device, kept)
    notes = require_fit(model, data, tokenizer, config)
    named = model.named_modules()
    wrapped_modules = [name.removeprefix(PEFT) for name, module in named if hasattr(module, "lora_A")]
    names = select_parameters(model, config.model.parameters)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    selected = sum(parameters[name].numel() for name in names)
    total = sum(p.numel() for p in model.parameters())
    shown = {}
    for section, loaded in data.items():
        rows = token_rows(loaded.rendered, tokenizer, SHOWN)
        examples = [row["text"].replace("\n", "\\n") for row in rows]
        shown[section] = {**statistics_of(loaded), "rendered rows": examples, "tokens of rows": rows}
        if isinstance(loaded.parts[0], ProbeConfig):
            shown[section]["measure"] = loaded.parts[0].measure
            shown[section]["questions"] = len(loaded.questions) or None
        if section == "safety" and not loaded.own:
            shown[section]["today"] = _today(model, data, tokenizer, config)
        if loaded.own:
            shown[section]["own answers"] = [asdict(answer) for answer in loaded.own]
            shown[section]["answers in"] = None if shelf is None else str(shelf.path(section))
    return {
        "model": {
            "path": str(config.model.path),
            "parameters": f"{total:,}",
            "selected parameters": f"{selected:,} in {len(names)} tensors",
            **(_reach(model, wrapped_modules) if wrapped_modules else {}),
        },
        "data": shown,
        "warnings": [*approximations, *getattr(model, "load_notes", ()), *notes, *_warnings(data)],
        "work": _work(config, {name: d.units for name, d in data.items()}, selected),
        **_training(model, names, config.training, data[TRAINED].units),
    }


def _today(
    model: nn.Module, data: Mapping[str, LoadedData], tokenizer: Any, config: Config
) -> dict[str, Any] | str:
    """What the model does with some safety prompts now, as a mapping; else why it was not asked."""
    loaded, control = data["safety"], data.get("control")
    if not config.behaviour.prompts:
        return "`behaviour.prompts` is 0"
    if not all(row.row.prompt for row in loaded.rendered):
        return "there are rows without a prompt"
    try:
        found = refused_today(
            model,
            loaded.rendered,
            tokenizer,
            config.behaviour,
            prompts=min(ASKED, config.behaviour.prompts),
            ordinary=[] if control is None else [row.row.response for row in control.rendered],
        )
    except InputError as err:
        return err.what
    return {
        **asdict(found),
        "refusing responses": refusing(loaded, control),
        "responses": len(loaded.rendered),
    }


def _training(model: nn.Module, names: Sequence[str], training: TrainingConfig, units: int) -> dict[str, Any]:
    """The planned training in numbers: steps, learning rate of each, what decays, what trains."""
    steps = planned_steps(training, units)
    of = dict(model.named_parameters(remove_duplicate=False))
    groups = parameter_groups(model, names, [of[name] for name in names], training)
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    return {
        "training_steps": steps,
        "learning_rates": recipe_of(training, steps).rates.tolist(),
        "weight_decay": {name: decay[name] for name in names},
        "trained_parameters": list(names),
    }


def _reach(model: Any, wrapped_modules: Sequence[str]) -> dict[str, str]:
    """What the adapter wraps, and what of the model it cannot change."""
    share, largest = out_of_reach(model)
    names = ", ".join(f"{name} ({part:.0%})" for name, part in largest)
    return {
        "adapter wraps": f"{len(wrapped_modules)} modules, e.g. {wrapped_modules[0]}",
        "no adapter reaches": f"{share:.0%} of its weights" + (f": {names}" if names else ""),
    }


def _warnings(data: Mapping[str, LoadedData]) -> list[str]:
    """What in the rows makes a run say less than it seems to."""
    found: list[str] = []
    for section, loaded in data.items():
        facts = statistics_of(loaded)
        found += _unsaid(section, loaded, facts)
        if facts["duplicates"]:
            found.append(f"{section}: {facts['duplicates']} repeated rows are dropped")
        if facts["prompts_truncated"] or facts["responses_truncated"]:
            found.append(
                f"{section}: {facts['prompts_truncated']} prompts and {facts['responses_truncated']} "
                f"responses are cut; raise {section}.max_length"
            )
        if section in SAFETY_SETS and any(row.row.prompt for row in loaded.rendered):
            found += _other_than_refusals(section, loaded, data.get("control"))
        rows = len(loaded.questions) or facts["rows"]
        if section != TRAINED and rows < ENOUGH:
            what = "questions" if loaded.questions else "rows"
            found.append(f"{section}: {rows} {what} are thin evidence, {ENOUGH} or more are advised")
    return found


def refusing(loaded: LoadedData, control: LoadedData | None = None) -> int:
    """How many responses of a data set begin with a refusal, by the rule and what they share themselves."""
    exchanges = [Exchange(row.row.prompt, row.row.response) for row in loaded.rendered]
    ordinary = [] if control is None else [row.row.response for row in control.rendered]
    rule = RefusalRule(learnt_openings((exchange.answer for exchange in exchanges), ordinary), own=False)
    return rule(exchanges).count("refused")


def _other_than_refusals(section: str, loaded: LoadedData, control: LoadedData | None) -> list[str]:
    """A warning where fewer than half of the safe responses refuse: their loss measures something else."""
    count, rows = refusing(loaded, control), len(loaded.rendered)
    if 2 * count >= rows:
        return []
    return [
        f"{section}: {count} of {rows} responses begin with a refusal; the loss of the others "
        "says nothing of refusals"
    ]


def _unsaid(section: str, loaded: LoadedData, facts: Mapping[str, Any]) -> list[str]:
    """What is read of the rows and not trained, and what is trained that may not be meant."""
    found = [f"{section}: {taken.partition('; ')[2]}" for taken in loaded.taken if "; " in taken]
    if facts["dropped"]:
        found.append(
            f"{section}: {facts['dropped']} rows are left out, as they keep no token with loss within "
            f"{section}.max_length"
        )
    if facts["answers_untrained"]:
        found.append(f"{section}: {facts['answers_untrained']} assistant turns carry no loss")
    asked = sum(row.mode == "all" and bool(row.row.messages) for row in loaded.rendered)
    if asked and section == TRAINED and loaded.parts[0].loss_on == "auto":
        found.append(
            f"{section}: every token of {asked} conversations is trained, questions too, as TRL does unless "
            f"`assistant_only_loss` is set; `{section}.loss_on: assistant` trains the answers alone"
        )
    return found


def _check_python(task: Task, config: Config, approximations: Sequence[str]) -> dict[str, Any]:
    """The same for a task from local code, whose rows arisk does not know."""
    parameters = dict(task.model.named_parameters(remove_duplicate=False))
    selected = sum(parameters[name].numel() for name in task.parameter_names)
    rows = {"safety": len(task.safety.rows), "finetune": len(task.finetune.rows)}
    return {
        "model": {"entry": config.model.entry, "selected parameters": f"{selected:,}"},
        "data": rows,
        "warnings": list(approximations),
        "work": _work(config, rows, selected),
        **_training(task.model, task.parameter_names, config.training, rows["finetune"]),
    }


def _work(config: Config, rows: Mapping[str, int], selected: int) -> dict[str, Any]:
    """Planned work in gradients of single rows, and the share of the run that a rollout takes."""
    samples, score = rows.get("safety", 0), config.score
    krylov = score.krylov_steps(selected)
    batch = config.training.batch_size
    probes = (score.probe_points + 1) * (samples + 2 * score.hvp_batches * batch) * FORWARD
    gradients = {
        "safety samples": samples,
        "update direction": score.batches * batch * (2 if config.control else 1),
        "curvature": 2 * krylov * score.hvp_batches * batch,
        "examples": min(score.examples, rows.get("finetune", score.examples)),
        "virtual move (forward passes, in gradients)": round(probes),
    }
    steps = planned_steps(config.training, rows.get("finetune", 0))
    share = "off"
    if config.rollout.enabled:
        rolled, _ = rollout_cost(steps, config.rollout)
        rows_per_step = batch * config.training.gradient_accumulation
        sets = {"safety": samples, "control": rows.get("control", 0), "followed": 0, "ordinary": 0}
        sets["probes"] = sum(rows[probe_section(name)] for name in config.probes)
        gradients["rollout"] = rolled * rows_per_step
        measured = forward_rows(steps, config.rollout, sets)
        gradients["rollout (forward passes, in gradients)"] = round(measured * FORWARD)
        share = f"{rolled} of {steps} planned optimizer steps ({rolled / steps:.0%})"
    planned = sum(gradients.values())
    return {
        "gradients of one row": {**gradients, "sum": planned},
        "rollout": share,
    }


#: Data sets whose rows are printed; the JSON has all.
PRINTED = ("safety", "finetune")
#: Characters of a row in a pipe, and the least in a narrow terminal.
IN_A_PIPE, LEAST = 400, 40
HEADER = ("data", "rows", "repeated", "tokens (longest)", "response (shortest)", "cut")


def check_text(report: Mapping[str, Any]) -> str:
    """The report of `arisk check` for people; wrapped to the terminal, unbroken in a pipe.

    Args:
        report: `model`, `data`, `warnings`, `work`, and the `plan` of `arisk.cost.estimate`.
    """
    width = columns(sys.stdout) - 1 if sys.stdout.isatty() else None
    lines = [f"{key}: {value}" for key, value in report["model"].items()]
    lines += ["", *_data_lines(report["data"], width)]
    lines += [_said(f"warning: {warning}") for warning in report.get("warnings", ())]
    return "\n".join([*lines, "", plan_text(report)] if "plan" in report else lines)


def plan_text(report: Mapping[str, Any]) -> str:
    """The plan of work, which ends with what to do: forecast, or really do it."""
    width = columns(sys.stdout) - 1 if sys.stdout.isatty() else None
    return "\n".join(_plan_lines(report, width))


def _told(plan: Mapping[str, Any]) -> list[str]:
    """Forecast or fine-tune: what either takes, and which of the two answers sooner."""
    verdict, real = plan.get("verdict_seconds"), plan.get("real_seconds")
    if verdict is None or real is None:
        return []
    both = f"forecast: about {_about(verdict)} · really doing it: about {_about(real)}"
    if plan.get("carried_out"):
        return [
            f"{both} → run it: `arisk run` carries so short a plan out, and `arisk verify` takes that over"
        ]
    if verdict <= real:
        return [f"{both} → run it"]
    return [f"{both} → `arisk verify` answers this sooner"]


def _about(seconds: float) -> str:
    """A duration to two digits, in the unit one would say it in.

    >>> _about(42.3), _about(131.0), _about(9000.0)
    ('42 s', '2.2 min', '2.5 h')
    """
    for size, unit in ((1.0, "s"), (60.0, "min"), (3600.0, "h")):
        if seconds < 100 * size or unit == "h":
            return f"{seconds / size:.2g} {unit}"
    raise AssertionError


def shortened(text: str, width: int) -> str:
    """At most `width` characters: the head and the tail, where a chat's response stands.

    >>> shortened("one two three four five", 13)
    'one t … five'
    """
    if len(text) <= width:
        return text
    tail = (width - 3) // 2
    head = max(0, width - 3 - tail)
    return f"{text[:head].rstrip()} … {text[len(text) - tail :].lstrip()}"


def _said(text: str) -> str:
    return wrapped(text, sys.stdout, indent=" " * 9)


def _data_lines(data: Mapping[str, Any], width: int | None) -> list[str]:
    """Counts of every data set, then the first rows; a Python task tells only how many rows there are."""
    counted = {name: facts for name, facts in data.items() if isinstance(facts, Mapping)}
    if not counted:
        return [f"{name}: {rows} rows" for name, rows in data.items()]
    rows = [[name, *_cells(facts)] for name, facts in counted.items()]
    lines = [table(rows, HEADER, width=width)]
    lines += [f"{name}: {taken}" for name, facts in counted.items() for taken in _taken(facts)]
    lines += [f"{name}: {_asked(facts['today'])}" for name, facts in counted.items() if "today" in facts]
    lines += [f"{name}: {_measured(facts)}" for name, facts in counted.items() if "measure" in facts]
    lines += ["(tokens of a row and of its response in the mean; rows cut to max_length)", ""]
    lines.append("rows as the model sees them, the part that carries loss in « »:")
    room = IN_A_PIPE if width is None else max(LEAST, 2 * width - 2)
    for name in PRINTED:
        for row in counted.get(name, {}).get("rendered rows", ()):
            lines.append(f"- {name}: {shortened(row, room - len(name) - 4)}")
    for name, facts in counted.items():
        lines += _answer_lines(name, facts, room)
    return lines


def _asked(today: Mapping[str, Any] | str) -> str:
    """Whether the safety set is one: what its responses do, and what the model does with its prompts now."""
    if isinstance(today, str):
        return f"what the model does with the prompts today was not looked at ({today})"
    return (
        f"{today['refusing responses']} of {today['responses']} responses refuse; the model refuses "
        f"{today['refused']} of {today['asked']} of the prompts today. Loss of the first tokens: "
        f"{today['safe_loss']:.2g} nats in the responses, {today['own_loss']:.2g} in what it says itself"
    )


def _answer_lines(name: str, facts: Mapping[str, Any], room: int) -> list[str]:
    """The model's own answers for reading: a few of each outcome, and where all of them are."""
    answers, told = facts.get("own answers", ()), Counter[str]()
    lines: list[str] = []
    for answer in sorted(answers, key=lambda each: OUTCOMES.index(each["outcome"])):
        told[answer["outcome"]] += 1
        if told[answer["outcome"]] <= READ:
            said = f"{answer['prompt']} → {answer['response']}".replace("\n", "\\n")
            lines.append(f"- {answer['outcome']}: {shortened(said, room - len(answer['outcome']) - 4)}")
    if not lines:
        return []
    place = f"; all of them: {facts['answers in']}" if facts.get("answers in") else ""
    return ["", f"{name}: the model's own answers (refused ones are the safe responses){place}", *lines]


def _taken(facts: Mapping[str, Any]) -> list[str]:
    """How each part of a data set was read; a line for all parts that were read alike."""
    return list(dict.fromkeys(said.partition("; ")[0] for said in facts.get("read_as", ())))


def _measured(facts: Mapping[str, Any]) -> str:
    """What is measured on a probe."""
    if facts["questions"]:
        return f"measured by choice, {facts['questions']} questions with {facts['rows']} options"
    what = {"nll": "the loss of the responses", "opening": "the loss of their first tokens"}
    return f"measured by {facts['measure']}, {what[facts['measure']]}"


def _cells(facts: Mapping[str, Any]) -> list[str]:
    """One data set's row of the table."""
    return [
        str(facts["rows"]),
        str(facts["duplicates"]),
        f"{facts['tokens_mean']:.1f} ({facts['tokens_max']})",
        f"{facts['response_tokens_mean']:.1f} ({facts['response_tokens_min']})",
        str(max(facts["prompts_truncated"], facts["responses_truncated"])),
    ]


def _plan_lines(report: Mapping[str, Any], width: int | None) -> list[str]:
    """The stages to come with their estimated time, memory and disk."""
    plan, work = report["plan"], report.get("work", {})
    device = any(cost.get("device_gb") for cost in plan["stages"].values())
    header = ["stage", "time", "peak memory", *(["on the device"] if device else [])]
    header += ["disk", "operations", "passes of the model"]
    rows = [
        [
            stage,
            clock(cost["seconds"]),
            f"{cost['memory_gb']:.2f} GB",
            *([f"{cost['device_gb']:.2f} GB" if cost["device_gb"] else "–"] if device else []),
            f"{cost['disk_gb']:.2f} GB" if cost["disk_gb"] else "–",
            f"{cost['flop'] / 1e12:.2g} TFLOP" if cost.get("flop") else "–",
            cost["work"],
        ]
        for stage, cost in plan["stages"].items()
    ]
    facts = [f"rollout: {work['rollout']}"] if "rollout" in work else []
    facts += [f"store: {plan['store']}"] if "store" in plan else []
    return [
        "plan of work (estimated here):",
        table(rows, header, width=width),
        *facts,
        "verify, screen and guard have their own commands; screen takes that at most",
        f"arisk run: about {clock(plan['seconds'])}, peak memory about {plan['memory_gb']:.2f} GB",
        *[_said(f"warning: {warning}") for warning in plan["warnings"]],
        *map(_said, _told(plan)),
    ]
