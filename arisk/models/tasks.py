"""From a config to a `Task`: model, adapter, parameters and data sets put together.

Tasks from local Python code: `module:function` or `file.py:function` returning a `Task`.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from arisk.base.errors import AriskError, ConfigError, InputError
from arisk.base.task import ProbeRows, SampleSet, Task
from arisk.config.plan import Config, DataConfig, ProbeConfig, data_sets, probe_section
from arisk.config.yaml import shortened
from arisk.models.answers import GreedyAnswers, OwnAnswer, OwnAnswers, Shelf, outcomes_said
from arisk.models.batching import FixedBatches, PlannedBatches
from arisk.models.formats import SAFETY_SETS, Row, with_answer
from arisk.models.loading import load_model, load_tokenizer, mark_recomputed
from arisk.models.losses import TOKENS, per_sample_nll
from arisk.models.packing import PackedBatches, packs, wrapped
from arisk.models.rendering import TRAINED, Rendered, keep_start, render_rows, whole_rows
from arisk.models.rows import read_data
from arisk.models.selection import attach_adapter, lora_pairs, select_parameters
from arisk.models.soundness import require_causal, require_room

__all__ = [
    "Answers",
    "LoadedData",
    "assembled",
    "description_of",
    "load_data",
    "load_set",
    "load_task",
    "load_with_adapter",
    "own_answers",
    "probes_of",
    "require_fit",
    "sample_set",
    "shared_rows",
    "statistics_of",
    "task_from_entry",
]

#: ``answers(section, prompts)``: what the aligned model itself says to rendered prompts, and does by it.
Answers = Callable[[str, Sequence[Rendered]], Sequence[OwnAnswer]]


@dataclass(frozen=True)
class LoadedData:
    """A data set as tokens, and what was left out of it.

    Attributes:
        parts: the settings of each part, one unless the config has a list.
        rendered: the rows of all parts, one part after the other.
        duplicates: repeated rows that were dropped.
        dropped: rows too long to keep a token with loss.
        taken: one line per part that says how it was read.
        sequences: rows of each packed sequence; None where a sequence is a row.
        own: answers of the aligned model to prompts without a response; those that refuse are in `rendered`.
        questions: rows with options, each of which is a row of `rendered`; empty for all other data sets.
    """

    parts: tuple[DataConfig, ...]
    rendered: list[Rendered]
    duplicates: int = 0
    dropped: int = 0
    taken: tuple[str, ...] = ()
    sequences: Sequence[Sequence[int]] | None = None
    own: tuple[OwnAnswer, ...] = ()
    questions: tuple[Row, ...] = ()

    @property
    def units(self) -> int:
        """What micro-batches count: packed sequences, or rows."""
        return len(self.rendered if self.sequences is None else self.sequences)


def load_task(
    config: Config, *, device: torch.device, kept: dict[str, Any] | None = None, shelf: Shelf | None = None
) -> Task:
    """Everything a run measures: model with adapter, selected parameters, data in planned order.

    Args:
        config: the resolved config.
        device: where the model goes.
        kept: models loaded before, taken where settings, seed and device are equal; this one is put
            in. Every stage leaves the model as it found it.
        shelf: where the model's own answers to safety prompts are kept.

    Raises:
        AriskError: what is wrong with the model, adapter, data or selection.
    """
    if config.model.source == "python":
        task = task_from_entry(str(config.model.entry))
        task.model.to(device)
        return task
    tokenizer = load_tokenizer(config.model)
    models = {} if kept is None else kept
    data = load_data(config, tokenizer, own_answers(config, tokenizer, device, models, shelf))
    model = load_with_adapter(config, device, models)
    notes = require_fit(model, data, tokenizer, config)
    names = select_parameters(model, config.model.parameters)
    sets = {name: sample_set(name, loaded, config, tokenizer) for name, loaded in data.items()}
    loaded = assembled(model, config, names, sets, getattr(model, "load_notes", ()), notes)
    return replace(loaded, probes=probes_of(config, data, sets))


def probes_of(
    config: Config, data: Mapping[str, LoadedData], sets: Mapping[str, SampleSet]
) -> list[ProbeRows]:
    """The probes of a config, from its loaded rows and their batches."""
    found: list[ProbeRows] = []
    for name, given in config.probes.items():
        section = probe_section(name)
        asked = data[section].questions
        right = [row.options.index(row.response) for row in asked]
        found.append(
            ProbeRows(name, given.measure, sets[section], [len(row.options) for row in asked], right)
        )
    return found


def assembled(
    model: Any,
    config: Config,
    names: Sequence[str],
    sets: Mapping[str, SampleSet],
    warnings: Sequence[str],
    data_warnings: Sequence[str],
) -> Task:
    """The task of a model and its data sets by their names in a config.

    Args:
        model: as it will be trained.
        config: describes it.
        names: of the parameters that train.
        sets: `safety`, `finetune`, and of the others those that there are.
        warnings: sentences about the model.
        data_warnings: sentences about the data.
    """
    told = {name: sets[name] for name in ("safety", "finetune", "control") if name in sets}
    return Task(
        model=model,
        safety=sets["safety"],
        finetune=sets["finetune"],
        control=sets.get("control"),
        parameter_names=names,
        lora_pairs=lora_pairs(model, names),
        description={
            **description_of(config, model, names, told),
            "warnings": list(warnings),
            "data_warnings": list(data_warnings),
        },
        heldout=sets.get("verify.safety"),
        clean=sets.get("guard.task"),
    )


def shared_rows(data: Mapping[str, LoadedData]) -> list[str]:
    """Sentences about rows, or prompts, that two data sets have in common.

    Sets that overlap answer for each other: safety rows that are trained on do not show what is lost, and
    held-out rows that the forecast has seen check nothing.
    """
    whole = {name: {_identity(row.row) for row in loaded.rendered} for name, loaded in data.items()}
    found: list[str] = []
    for first, second in itertools.combinations(data, 2):
        if isinstance(data[second].parts[0], ProbeConfig) and first != TRAINED:
            continue  # Probes may share rows with anything but what is trained on.
        own = data[second].rendered
        same = sum(_identity(row.row) in whole[first] for row in own)
        if same:
            found.append(f"{second}: {same} of {len(own)} rows are rows of {first} too")
            continue
        prompts = {row.row.prompt for row in data[first].rendered if row.row.prompt}
        asked = sum(row.row.prompt in prompts for row in own)
        if asked:
            found.append(f"{second}: {asked} of {len(own)} rows have a prompt of {first}")
    return found


def _identity(row: Row) -> str:
    return json.dumps([row.messages, row.text, row.tools], default=str)


def require_fit(model: Any, data: Mapping[str, LoadedData], tokenizer: Any, config: Config) -> list[str]:
    """Whether model, tokenizer and rows belong together; sentences about what a reader must know of them.

    Raises:
        InputError: the model looks ahead, or has no embedding or position for a row.
    """
    where = f"model.path: {config.model.path}"
    rows = {name: [row.tokens for row in loaded.rendered] for name, loaded in data.items()}
    pad = int(tokenizer.pad_token_id or 0)
    notes = require_room(
        model,
        {name: max(map(len, own)) for name, own in rows.items()},
        {name: max(pad, *map(max, own)) for name, own in rows.items()},
        where,
    )
    require_causal(model, max(rows["finetune"], key=len), where)
    own = (_own_said(name, loaded.own) for name, loaded in data.items() if loaded.own)
    return [*notes, *own, *(f"{said}." for said in shared_rows(data))]


def own_answers(
    config: Config, tokenizer: Any, device: torch.device, kept: dict[str, Any], shelf: Shelf | None
) -> OwnAnswers:
    """What the planned run's model says before its first step; it is loaded when it is asked.

    Args:
        config: the resolved config.
        tokenizer: of the model.
        device: where the model goes.
        kept: as of `load_task`.
        shelf: where answers are kept.
    """
    return OwnAnswers(lambda: load_with_adapter(config, device, kept), tokenizer, config.behaviour, shelf)


def _own_said(section: str, own: Sequence[OwnAnswer]) -> str:
    return (
        f"{section}: the prompts have no responses; of the model's own answers ({outcomes_said(own)}) the "
        "refusals are the safe responses."
    )


def load_with_adapter(config: Config, device: torch.device, kept: dict[str, Any]) -> Any:
    """The model with its adapter, from those kept where it is the same; else loaded, and kept."""
    key = f"{config.model.model_dump_json()} {config.run.seed} {device} {config.run.device_map}"
    if key not in kept:
        model = load_model(config.model, device, device_map=config.run.device_map)
        if config.model.adapter is not None:
            model = attach_adapter(model, config.model.adapter, seed=config.run.seed)
        if config.model.gradient_checkpointing:
            mark_recomputed(model)
        # One at a time: two models may not fit.
        kept.clear()
        kept[key] = model
    return kept[key]


def load_data(config: Config, tokenizer: Any, answers: Answers | None = None) -> dict[str, LoadedData]:
    """Read and tokenise every data set of the config; safety rows are de-duplicated.

    Args:
        config: the resolved config.
        tokenizer: of the model.
        answers: writes the responses of safety prompts that have none.

    Raises:
        InputError: what is wrong with the rows.
    """
    return {
        section: load_set(config, section, parts, tokenizer, answers)
        for section, parts in data_sets(config).items()
    }


def load_set(
    config: Config,
    section: str,
    parts: tuple[DataConfig, ...],
    tokenizer: Any,
    answers: Answers | None = None,
) -> LoadedData:
    """Read and tokenise one data set, as `load_data` does all of them.

    Raises:
        InputError: what is wrong with the rows.
    """
    packed = section == TRAINED and config.training.packing != "off"
    rendered: list[Rendered] = []
    duplicates = dropped = 0
    taken: list[str] = []
    own: list[OwnAnswer] = []
    questions: list[Row] = []
    for data in parts:
        found = read_data(data, section=section, seed=_seed(config, data))
        if isinstance(data, ProbeConfig) and data.measure == "choice":
            # Options of one question are compared: none of them may be left out, or cut.
            pages = _options(found.rows, tokenizer, data, section)
            questions += found.rows
            rendered += pages
            taken.append(found.said())
            continue
        kept = _distinct(found.rows) if section in SAFETY_SETS else found.rows
        render = whole_rows if packed else render_rows
        pages = render(kept, tokenizer, data, section=section)
        duplicates += len(found.rows) - len(kept)
        dropped += len(kept) - len(pages)
        taken.append(found.said())
        if not all(page.row.answered for page in pages):
            pages, said = _answered(pages, tokenizer, data, section, answers)
            own += said
        rendered += pages
    loaded = LoadedData(
        parts, rendered, duplicates, dropped, tuple(taken), own=tuple(own), questions=tuple(questions)
    )
    return _packed(loaded, config.training.packing) if packed else loaded


def _options(rows: Sequence[Row], tokenizer: Any, data: ProbeConfig, section: str) -> list[Rendered]:
    """Every option of every question as a row of its own, in order.

    Raises:
        InputError: an option does not fit into `max_length`.
    """
    each = [
        replace(row, messages=(*row.messages[:-1], {**row.messages[-1], "content": option}))
        for row in rows
        for option in row.options
    ]
    pages = render_rows(each, tokenizer, data, section=section)
    whole = {id(page.row) for page in pages if not page.response_cut}
    row = next((row for row in each if id(row) not in whole), None)
    if row is not None:
        raise InputError(
            "an option of a question does not fit into `max_length`",
            where=f"{row.source}, line {row.line}",
            fix=f"raise `{section}.max_length` (now {data.max_length}), or leave the question out",
        )
    return pages


def _packed(loaded: LoadedData, packing: str) -> LoadedData:
    """The rows as they stand in packed sequences.

    Raises:
        ConfigError: the parts of the data set name sequences of different lengths.
        InputError: no token carries loss.
    """
    limits = {part.max_length for part in loaded.parts}
    if len(limits) > 1:
        raise ConfigError(
            f"packed sequences have one length, and the parts name {sorted(limits)}",
            where=f"{TRAINED}.max_length",
            fix="give every part the same `max_length`",
        )
    (limit,) = limits
    if packing == "wrapped":
        loaded = replace(loaded, rendered=wrapped(loaded.rendered, limit))
    else:
        rendered = [keep_start(row, limit) for row in loaded.rendered]
        sequences = packs([len(row.tokens) for row in rendered], limit)
        loaded = replace(loaded, rendered=rendered, sequences=sequences)
    if not any(row.trained for row in loaded.rendered):
        raise InputError(
            "no token of the packed rows carries loss",
            where=f"{TRAINED}: {loaded.parts[0].path}",
            fix=f"raise `{TRAINED}.max_length` (now {limit})",
        )
    return loaded


def _answered(
    pages: Sequence[Rendered], tokenizer: Any, data: DataConfig, section: str, answers: Answers | None
) -> tuple[list[Rendered], list[OwnAnswer]]:
    """The prompts that the model refuses, with its refusals as their responses; and all its answers."""
    if section not in SAFETY_SETS or answers is None:
        row = next(page.row for page in pages if not page.row.answered)
        raise InputError(
            "the rows are prompts without a response",
            where=f"{row.source}, line {row.line}",
            fix="give each a response, or name its column (`response_column`)",
        )
    own = list(answers(section, pages))
    if not any(answer.outcome == "refused" for answer in own):
        first = own[0]
        raise InputError(
            f"the model refuses none of the {len(own)} prompts ({outcomes_said(own)}): there is no refusal "
            "whose loss could be forecast",
            where=f"{section}.path: {data.path}",
            fix=f"read its answers (to {shortened(first.prompt, 60)!r} it says "
            f"{shortened(first.response, 60)!r}), and give prompts that it refuses; list openings that the "
            "rule does not know as `behaviour.refusal_openings`",
        )
    refused = zip(pages, own, strict=True)
    rows = [with_answer(page.row, said.response) for page, said in refused if said.outcome == "refused"]
    return render_rows(rows, tokenizer, data, section=section), own


def _seed(config: Config, data: DataConfig) -> int:
    return config.run.seed if data.seed is None else data.seed


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """Rows without repeats: a repeated safety sample makes the Gram matrix singular."""
    seen: dict[str, Row] = {}
    for row in rows:
        seen.setdefault(_identity(row), row)
    return list(seen.values())


def sample_set(section: str, loaded: LoadedData, config: Config, tokenizer: Any) -> SampleSet:
    """Batches and per-row metadata; safety rows are batched by length to waste little padding."""
    rendered = loaded.rendered
    pad = int(tokenizer.pad_token_id or 0)
    batches: Any
    if section in SAFETY_SETS:
        rendered = sorted(rendered, key=lambda row: len(row.tokens))
        batches = FixedBatches(rendered, config.collect.chunk_size, pad)
    elif section == "guard.task" or section in map(probe_section, config.probes):
        batches = FixedBatches(rendered, config.training.batch_size, pad)
    else:
        batches = _planned(loaded, config, pad)
    # Plain text has no prompt to answer.
    prompted = section in (*SAFETY_SETS, "control") and all(row.row.prompt for row in rendered)
    generate = GreedyAnswers(tokenizer, rendered) if prompted else None
    statistics = statistics_of(replace(loaded, rendered=rendered))
    rows = [_metadata(row) for row in rendered]
    name = {"verify.safety": "heldout", "guard.task": "clean"}.get(section, section)
    return SampleSet(name, batches, per_sample_nll, rows, statistics, generate, TOKENS)


def _planned(loaded: LoadedData, config: Config, pad: int) -> PlannedBatches | PackedBatches:
    """Micro-batches in planned order."""

    def batches(of: Sequence[Any]) -> PlannedBatches:
        training = config.training
        return PlannedBatches(
            of,
            training.batch_size,
            pad,
            _seed(config, loaded.parts[0]),
            shuffled=training.order == "shuffled",
            drop_last=training.drop_last,
        )

    rows = batches(loaded.rendered)
    if loaded.sequences is None:
        return rows
    return PackedBatches(rows, batches(loaded.sequences), loaded.sequences)


def _metadata(rendered: Rendered) -> dict[str, Any]:
    return {
        "prompt": rendered.row.prompt,
        "response": rendered.row.response,
        "tokens": rendered.trained,
        "line": rendered.row.line,
        "source": rendered.row.source,
    }


def statistics_of(loaded: LoadedData) -> dict[str, Any]:
    """Counts of one data set: rows, duplicates, tokens, what truncation cost, and what carries no loss."""
    lengths = torch.tensor([len(row.tokens) for row in loaded.rendered], dtype=torch.float64)
    responses = torch.tensor([row.trained for row in loaded.rendered], dtype=torch.float64)
    return {
        "rows": len(loaded.rendered),
        "duplicates": loaded.duplicates,
        "dropped": loaded.dropped,
        "read_as": list(loaded.taken),
        "tokens_total": int(lengths.sum()),
        "tokens_mean": float(lengths.mean()),
        "tokens_max": int(lengths.max()),
        "response_tokens_mean": float(responses.mean()),
        "response_tokens_min": int(responses.min()),
        "prompts_truncated": sum(row.prompt_cut > 0 for row in loaded.rendered),
        "responses_truncated": sum(row.response_cut > 0 for row in loaded.rendered),
        "loss_on": _counted(row.mode for row in loaded.rendered),
        "answers_untrained": sum(row.untrained for row in loaded.rendered),
    }


def _counted(words: Iterable[str]) -> str:
    """Different words, with their counts where there are several."""
    counts = Counter(words)
    return ", ".join(counts) if len(counts) == 1 else ", ".join(f"{w} {n}" for w, n in counts.items())


def description_of(
    config: Config, model: Any, names: Sequence[str], sets: Mapping[str, SampleSet]
) -> dict[str, Any]:
    """Provenance for the report."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    adapter = config.model.adapter
    return {
        "model": str(config.model.path),
        "architecture": type(model.get_base_model() if adapter is not None else model).__name__,
        "dtype": config.model.dtype,
        "adapter": None if adapter is None else adapter.model_dump(mode="json", exclude_none=True),
        "parameters_total": sum(p.numel() for p in model.parameters()),
        "parameters_selected": sum(parameters[name].numel() for name in names),
        "data": {name: dict(samples.statistics) for name, samples in sets.items()},
    }


def task_from_entry(entry: str) -> Task:
    """Call the named function without arguments and check what it returns.

    This runs local code, as `python` would.

    Raises:
        InputError: the module or function is not there, fails, or returns something else.
    """
    source, _, name = entry.rpartition(":")
    where = f"model.entry: {entry}"
    if not source or not name:
        raise InputError("the entry is not module:function", where=where, fix="e.g. tasks.py:make_task")
    function = getattr(_module(source, where), name, None)
    if not callable(function):
        raise InputError(
            f"{source} has no function {name!r}", where=where, fix="name a function that returns arisk.Task"
        )
    try:
        task = function()
    except AriskError:
        raise
    except Exception as err:
        raise InputError(
            f"the function failed: {type(err).__name__}: {err}",
            where=where,
            fix="run it by itself; `--debug` shows the traceback",
        ) from err
    if not isinstance(task, Task):
        raise InputError(
            f"the function returned {type(task).__name__}, not arisk.Task",
            where=where,
            fix="return arisk.Task(model=…, safety=…, finetune=…, parameter_names=…)",
        )
    return task


def _module(source: str, where: str) -> ModuleType:
    """Import a module by name, or a file by path."""
    path = Path(source)
    try:
        if path.suffix == ".py":
            if not path.is_file():
                raise InputError(f"{source} does not exist", where=where, fix="check the path")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[path.stem] = module
            spec.loader.exec_module(module)
            return module
        if "" not in sys.path:
            sys.path.insert(0, "")
        return importlib.import_module(source)
    except (ImportError, SyntaxError) as err:
        raise InputError(
            f"the module cannot be imported: {err}",
            where=where,
            fix="check its name, and that it can be imported from the working directory",
        ) from err
