"""What `arisk check` finds: everything a run would meet, without running it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from arisk.base.task import Task
from arisk.config.plan import Config, planned_steps
from arisk.forecast.segments import rollout_cost
from arisk.models.loading import load_tokenizer
from arisk.models.python_source import task_from_entry
from arisk.models.rendering import Rendered
from arisk.models.selection import select_parameters
from arisk.models.tasks import LoadedData, load_data, load_with_adapter, statistics_of

__all__ = ["check_task"]

#: Rows of each data set shown as rendered.
SHOWN = 2
#: Gradient evaluations of a probe point, as forward passes are a third of one.
FORWARD = 1 / 3
#: What peft puts before the names of modules.
PEFT = "base_model.model."
#: A data set of fewer rows is said to be small.
FEW = 32


def check_task(
    config: Config, *, device: torch.device | None = None, kept: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Validate model, adapter, selection and rows, and estimate the work.

    Args:
        config: the resolved config.
        device: where the model goes; default the CPU.
        kept: the model is put here, for `load_task` to take.

    Returns:
        A mapping for display: `model`, `data` (statistics and two rendered rows each), `warnings` and `work`
        (parameters, samples, disk in GB, gradient evaluations of one row).

    Raises:
        AriskError: the first thing that would stop the run.
    """
    if config.model.source == "python":
        return _check_python(task_from_entry(str(config.model.entry)), config)
    tokenizer = load_tokenizer(config.model)
    data = load_data(config, tokenizer)
    model = load_with_adapter(config, device or torch.device("cpu"), {} if kept is None else kept)
    wrapped = [name.removeprefix(PEFT) for name, module in model.named_modules() if hasattr(module, "lora_A")]
    names = select_parameters(model, config.model.parameters)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    selected = sum(parameters[name].numel() for name in names)
    total = sum(p.numel() for p in model.parameters())
    shown = {}
    for section, loaded in data.items():
        examples = [_marked(row, tokenizer) for row in loaded.rendered[:SHOWN]]
        shown[section] = {**statistics_of(loaded), "rendered rows": examples}
    return {
        "model": {
            "path": str(config.model.path),
            "parameters": f"{total:,}",
            "selected parameters": f"{selected:,} in {len(names)} tensors",
            **({"adapter wraps": f"{len(wrapped)} modules, e.g. {wrapped[0]}"} if wrapped else {}),
        },
        "data": shown,
        "warnings": _warnings(data),
        "work": _work(config, {name: len(d.rendered) for name, d in data.items()}, selected),
    }


def _warnings(data: Mapping[str, LoadedData]) -> list[str]:
    """What in the rows makes a run say less than it seems to."""
    found: list[str] = []
    for section, loaded in data.items():
        facts = statistics_of(loaded)
        if facts["duplicates"]:
            found.append(f"{section}: {facts['duplicates']} repeated rows are dropped")
        if facts["prompts_truncated"] or facts["responses_truncated"]:
            found.append(
                f"{section}: {facts['prompts_truncated']} prompts and {facts['responses_truncated']} "
                f"responses are cut; raise {section}.max_length"
            )
        if facts["rows"] < FEW:
            found.append(f"{section}: {facts['rows']} rows are few, {FEW} or more are advised")
    prompts = {row.row.prompt for row in data["safety"].rendered if row.row.prompt}
    shared = sum(row.row.prompt in prompts for row in data["finetune"].rendered)
    if shared:
        found.append(f"finetune: {shared} rows have a prompt of the safety set")
    return found


def _check_python(task: Task, config: Config) -> dict[str, Any]:
    """The same for a task from local code, whose rows arisk does not know."""
    parameters = dict(task.model.named_parameters(remove_duplicate=False))
    selected = sum(parameters[name].numel() for name in task.parameter_names)
    rows = {"safety": len(task.safety.rows), "finetune": len(task.finetune.rows)}
    return {
        "model": {"entry": config.model.entry, "selected parameters": f"{selected:,}"},
        "data": rows,
        "work": _work(config, rows, selected),
    }


def _marked(rendered: Rendered, tokenizer: Any) -> str:
    """A row as the model sees it, the part that carries loss in double angle quotes."""
    start = rendered.response_start
    prompt = tokenizer.decode(list(rendered.tokens[:start]))
    return f"{prompt}«{tokenizer.decode(list(rendered.tokens[start:]))}»".replace("\n", "\\n")


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
        rolled, passes = rollout_cost(steps, config.rollout)
        rows_per_step = batch * config.training.gradient_accumulation
        measured = min(samples, config.rollout.eval_samples or samples)
        measured += min(rows.get("control", 0), config.rollout.control_samples)
        gradients["rollout"] = rolled * rows_per_step
        gradients["rollout (forward passes, in gradients)"] = round(passes * measured * FORWARD)
        share = f"{rolled} of {steps} planned optimizer steps ({rolled / steps:.0%})"
    planned = sum(gradients.values())
    return {
        "gradients of one row": {**gradients, "sum": planned},
        "rollout": share,
    }
