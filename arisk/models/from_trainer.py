"""What a transformers or TRL trainer is about to train, as a `Task`: its model, its rows, its arguments.

Rows are what the trainer's own data loader holds, put through its own collator one by one, so that
columns, truncation, packing and trained tokens are the trainer's. Arguments are read as `arisk init --from`
reads them.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler

from arisk.base.errors import ConfigError, InputError
from arisk.base.task import SampleSet, Task
from arisk.config.imports.account import Account, Import, Source
from arisk.config.imports.trainer import read_trainer
from arisk.config.plan import Config, DataConfig, ProbeConfig, TrainingConfig, probe_section
from arisk.config.python import PipelineConfig
from arisk.config.sections import BehaviourConfig
from arisk.config.yaml import validate_mapping
from arisk.models.answers import OwnAnswers
from arisk.models.formats import Row
from arisk.models.rendering import IGNORED, Rendered
from arisk.models.tasks import LoadedData, assembled, load_set, probes_of, require_fit, sample_set

__all__ = [
    "Planned",
    "as_loaded",
    "foreign_optimizer",
    "loss_notes",
    "planned_by",
    "require_length",
    "settings_of",
    "task_of",
    "tokenizer_of",
    "trainer_of",
]

#: Arguments that tell how rows are made and the model is loaded, which a live trainer has done already.
DONE = {
    *("packing", "packing_strategy", "dataset_kwargs", "chat_template", "chat_template_path", "eos_token"),
    *("dtype", "torch_dtype", "model_init_kwargs", "dataset_text_field", "assistant_only_loss"),
    *("completion_only_loss", "max_length", "max_seq_length", "truncation_mode", "loss_type"),
}
#: Samplers whose order is known.
SHUFFLED, SEQUENTIAL = {"RandomSampler", "SeedableRandomSampler"}, {"SequentialSampler"}
#: Forward hooks of transformers that a trainer puts on embeddings: for reentrant checkpoints, and for noise
#: that arisk adds itself.
HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad", "neftune_post_forward_hook")
ROWS = "the trainer's train_dataset"


@dataclass(frozen=True)
class Planned:
    """What a trainer holds.

    Attributes:
        model: as it would be before the first step.
        args: its `TrainingArguments`.
        loader: its data loader of training rows.
        tokenizer: of its `processing_class`.
        optimizer: one that the script has made itself, which the arguments do not describe; else None.
        notes: what of the training the arguments do not tell, one sentence each.
    """

    model: nn.Module
    args: Any
    loader: Any
    tokenizer: Any
    optimizer: Any = None
    notes: tuple[str, ...] = ()


def planned_by(trainer: Any) -> Planned:
    """What a trainer would train; its data loader is made as `train` makes it, and forgotten again.

    Raises:
        ConfigError: this is no trainer, or it has no rows, a training behind it, or no tokenizer.
    """
    where = "preflight(trainer)"
    needed = ("model", "args", "state", "get_train_dataloader")
    if any(not hasattr(trainer, name) for name in needed):
        raise ConfigError(
            f"a {type(trainer).__name__} is no transformers Trainer",
            where=where,
            fix="give the Trainer or SFTTrainer object whose `train()` comes next",
        )
    if getattr(trainer, "train_dataset", None) is None:
        raise ConfigError(
            "the trainer has no train set",
            where=f"{where}: train_dataset",
            fix="make the trainer with `train_dataset=…`",
        )
    require_unstarted(trainer.state.global_step, where)
    require_length(trainer.train_dataset, trainer.args)
    held = getattr(getattr(trainer, "accelerator", None), "_dataloaders", [])
    before = len(held)
    try:
        loader = trainer.get_train_dataloader()
    finally:
        del held[before:]
    return Planned(
        trainer.model,
        trainer.args,
        loader,
        tokenizer_of(getattr(trainer, "processing_class", None)),
        getattr(trainer, "optimizer", None),
        loss_notes(trainer),
    )


def loss_notes(trainer: Any) -> tuple[str, ...]:
    """Sentences about a loss that is not the trainer's usual one."""
    notes: list[str] = []
    planned = "the mean over all trained tokens is planned"
    if getattr(trainer, "compute_loss_func", None) is not None:
        notes.append(f"The trainer has a loss function of its own (`compute_loss_func`); {planned}.")
    kind = type(trainer)
    if hasattr(kind, "compute_loss") and not kind.compute_loss.__module__.startswith(("transformers", "trl")):
        notes.append(f"{kind.__name__} overrides `compute_loss`; {planned}.")
    alike = getattr(trainer, "model_accepts_loss_kwargs", True) is False
    if alike and trainer.args.gradient_accumulation_steps > 1:
        notes.append(f"The model takes no token count, so the trainer weighs micro-batches alike; {planned}.")
    return tuple(notes)


def foreign_optimizer(trainer: Any, optimizer: Any) -> Any:
    """The optimizer of a training that has begun, where it is not of the kind that the arguments name."""
    inner = getattr(optimizer, "optimizer", optimizer)
    choose = getattr(trainer, "get_optimizer_cls_and_kwargs", None)
    if inner is None or choose is None:
        return None
    kind, _ = choose(trainer.args, trainer.model)
    return inner if isinstance(kind, type) and not isinstance(inner, kind) else None


def trainer_of(frame: Any, callback: Any) -> Any:
    """The trainer that is calling a callback, which is handed no reference to it; None where there is none.

    Args:
        frame: of the callback's method.
        callback: one of the trainer's.
    """
    while frame is not None:
        found = frame.f_locals.get("self")
        handler = getattr(found, "callback_handler", None)
        if handler is not None and callback in getattr(handler, "callbacks", ()):
            return found
        frame = frame.f_back
    return None


def require_unstarted(step: int, where: str) -> None:
    """Refuse a model that has been trained.

    Raises:
        ConfigError: steps have been taken.
    """
    if step > 0:
        raise ConfigError(
            f"the model has been training already: {step} optimizer steps are done",
            where=where,
            fix="call preflight before `train()`, on a trainer made anew with the aligned model",
        )


def require_length(dataset: Any, args: Any) -> None:
    """Refuse rows without an end on a plan without one, and rows that can be read but once.

    Raises:
        ConfigError: neither the data nor the arguments tell how long training is, or reading takes rows away.
    """
    if hasattr(dataset, "__len__"):
        return
    if args.max_steps <= 0:
        raise ConfigError(
            "the train set is iterable, without a length, and `max_steps` is not set: the plan has no end",
            where="args.max_steps",
            fix="set `max_steps` in the TrainingArguments, or give a data set of known size",
        )
    if iter(dataset) is dataset:
        raise ConfigError(
            "the train set can be read only once, and reading rows ahead would take them from the training",
            where="train_dataset",
            fix="give a data set that starts anew at every `iter()`, such as `datasets.IterableDataset`",
        )


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer of a trainer, also inside a processor.

    Raises:
        ConfigError: there is none.
    """
    if processing_class is None:
        raise ConfigError(
            "the trainer has no tokenizer, and the safety rows are to be written with it",
            where="trainer.processing_class",
            fix="make the trainer with `processing_class=tokenizer`",
        )
    return getattr(processing_class, "tokenizer", processing_class)


def settings_of(planned: Planned, config: PipelineConfig) -> tuple[PipelineConfig, list[str]]:
    """The trainer's arguments as settings; what `config` sets itself stands.

    Returns:
        The settings, and what of the training they do not model.

    Raises:
        ConfigError: an argument is wrong, the weights are sharded, or an optimizer is unknown.
    """
    args = planned.args
    if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
        raise ConfigError(
            "the weights are spread over processes (FSDP or DeepSpeed), and a preflight needs them whole",
            where="args.fsdp, args.deepspeed",
            fix="save `args.to_json_string()` as a file, and run what `arisk init --from` makes of it",
        )
    own = set(config.training.model_fields_set)
    if planned.optimizer is not None and "optimizer" not in own:
        raise ConfigError(
            f"the trainer was given an optimizer ({type(planned.optimizer).__name__}), which its arguments "
            "do not describe",
            where="trainer.optimizer",
            fix='say what it does: `config={"training": {"optimizer": "adamw", "learning_rate": 1e-4}}`',
        )
    devices = max(int(getattr(args, "world_size", 1)), int(getattr(args, "n_gpu", 1)), 1)
    account = Account(Source("the trainer's arguments", args.to_dict(), {}), Import(devices=devices))
    read_trainer(account)
    account.rest()
    plan = account.into.plan
    # The rows of a live trainer are packed already.
    of_training = [key for key in plan if key.startswith("training.") and key != "training.packing"]
    theirs = {key.partition(".")[2]: plan[key] for key in of_training}
    kind = _sampler(planned.loader)
    counted = hasattr(planned.loader.dataset, "__len__")
    if kind in SEQUENTIAL or not counted:
        theirs["order"] = "sequential"
    for pair in (("max_steps", "epochs"), ("warmup_steps", "warmup_ratio")):
        if own & set(pair):
            theirs = {key: value for key, value in theirs.items() if key not in pair}
    given = config.training.model_dump(include=own)
    training = validate_mapping(TrainingConfig, {**theirs, **given}, "the trainer's arguments")
    found = config.model_copy(deep=True)
    found.training = training
    if "seed" not in config.model_fields_set:
        found.seed = int(args.seed)
    notes = [f"{line.key}: {line.note}." for line in account.into.lines
             if line.outcome in ("other", "unknown") and line.key.partition(".")[0] not in DONE]  # fmt: skip
    if kind not in SHUFFLED | SEQUENTIAL and counted:
        notes.append(f"The rows come in the order of a {kind}; they are planned in random order.")
    return found, [*planned.notes, *notes]


def _sampler(loader: Any) -> str:
    """Kind of the sampler of a data loader.

    Raises:
        ConfigError: something else than torch puts rows together to micro-batches.
    """
    batches: Any = getattr(loader, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    if batches is not None and type(batches) is not BatchSampler:
        raise ConfigError(
            f"a {type(batches).__name__} decides which rows share a micro-batch; no preflight can follow it",
            where="trainer.get_train_dataloader()",
            fix="give the config of the run to `arisk init --from`, which plans packing; or train without it",
        )
    return type(getattr(batches, "sampler", None) or getattr(loader, "sampler", None)).__name__


def task_of(
    planned: Planned,
    settings: PipelineConfig,
    safety: Any,
    control: Any,
    notes: Sequence[str],
    probes: Mapping[str, Any] | None = None,
) -> Task:
    """The task of a trainer's plan.

    Args:
        planned: what the trainer holds.
        settings: with the trainer's training, from `settings_of`.
        safety: prompts with safe responses: a file, rows, a `datasets.Dataset`, or a `DataConfig`.
        control: ordinary rows in the same forms; None without.
        notes: what a reader must know of the plan.
        probes: further rows by name, in the same forms or as the settings of a probe.

    Raises:
        AriskError: what is wrong with the rows or the model.
    """
    model, tokenizer = planned.model, planned.tokenizer
    names = [n for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()]
    if not names:
        raise ConfigError(
            "no parameter of the model requires a gradient, so nothing would be trained",
            where="trainer.model",
            fix="call `requires_grad_(True)` on what the fine-tune trains, or attach an adapter",
        )
    with tempfile.TemporaryDirectory(prefix="arisk-") as folder:
        given: dict[str, DataConfig] = {"safety": _data(safety, "safety", Path(folder))}
        if control is not None:
            given["control"] = _data(control, "control", Path(folder))
        further = {
            name: _data(rows, probe_section(name), Path(folder), ProbeConfig)
            for name, rows in (probes or {}).items()
        }
        config = _config(planned, settings, given, further)
        answers = OwnAnswers(lambda: model, tokenizer, settings.behaviour)
        named = {**given, **{probe_section(name): rows for name, rows in config.probes.items()}}
        loaded = {name: load_set(config, name, (data,), tokenizer, answers) for name, data in named.items()}
    loaded["finetune"] = _trained(planned, settings.training)
    fit = require_fit(model, loaded, tokenizer, config)
    sets = {name: sample_set(name, one, config, tokenizer) for name, one in loaded.items()}
    task = assembled(model, config, names, sets, notes, fit)
    return replace(task, probes=probes_of(config, loaded, sets))


def safety_rows(
    model: nn.Module,
    tokenizer: Any,
    safety: Any,
    *,
    batch_size: int = 8,
    behaviour: BehaviourConfig | None = None,
) -> SampleSet:
    """Safety rows as the protections of `arisk.guard` take them.

    Args:
        model: the model before it trains; it answers prompts that have no response, and what the judge takes
            for refusals are then the safe responses.
        tokenizer: its tokenizer.
        safety: prompts with safe responses, or prompts alone: a file, a list of mappings, a
            `datasets.Dataset`, or the settings of a data set.
        batch_size: rows of a batch.
        behaviour: the judge; default the rule.

    Raises:
        AriskError: what is wrong with the rows; or the model refuses none of the prompts.
    """
    settings = behaviour or BehaviourConfig()
    with tempfile.TemporaryDirectory(prefix="arisk-") as folder:
        data = _data(safety, "safety", Path(folder))
        config = Config.model_validate(
            {
                "model": {"path": "the model in memory"},
                "safety": data.model_dump(),
                "finetune": {"path": ROWS},
                "collect": {"chunk_size": batch_size},
            }
        )
        answers = OwnAnswers(lambda: model, tokenizer, settings)
        loaded = load_set(config, "safety", (data,), tokenizer, answers)
    return sample_set("safety", loaded, config, tokenizer)


def _config(
    planned: Planned,
    settings: PipelineConfig,
    given: Mapping[str, DataConfig],
    probes: Mapping[str, DataConfig],
) -> Config:
    """The plan as the YAML would say it; the fine-tuning rows are in memory."""
    dtype = str(next(planned.model.parameters()).dtype).removeprefix("torch.")
    name = str(getattr(getattr(planned.model, "config", None), "_name_or_path", "") or "the trainer's model")
    return validate_mapping(
        Config,
        {
            "run": {"seed": settings.seed},
            "model": {"path": name, "dtype": dtype},
            "finetune": _finetune(planned),
            "training": settings.training.model_dump(),
            "collect": settings.collect_settings.model_dump(),
            **{name: data.model_dump() for name, data in given.items()},
            "probes": {name: data.model_dump(exclude_unset=True) for name, data in probes.items()},
        },
        "preflight",
    )


def _finetune(planned: Planned) -> dict[str, Any]:
    """The trained rows as a data set, with the seed that the trainer's sampler takes."""
    seed = planned.args.data_seed
    return {"path": ROWS, "seed": int(torch.initial_seed() if seed is None else seed) % 2**63}


def _data(given: Any, name: str, folder: Path, kind: type[DataConfig] = DataConfig) -> DataConfig:
    """A data set in any of its forms; rows in memory are read as those of a file."""
    if isinstance(given, DataConfig):
        return given
    if isinstance(given, (str, Path)):
        return kind(path=str(given))
    if isinstance(given, Mapping):
        return validate_mapping(kind, dict(given), name)
    if not isinstance(given, Iterable):
        raise ConfigError(
            f"a {type(given).__name__} is no data set",
            where=f"preflight({name}=…)",
            fix="give a file, a list of mappings such as {'prompt': …, 'response': …}, or a datasets.Dataset",
        )
    path = folder / f"{name}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in given:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    return kind(path=str(path))


def _trained(planned: Planned, training: TrainingConfig) -> LoadedData:
    """The trainer's rows through its collator.

    Raises:
        InputError: they are no rows of a causal language model, or no token of them carries loss.
    """
    dataset, collate = planned.loader.dataset, planned.loader.collate_fn
    if hasattr(dataset, "__len__"):
        raws: Iterable[Any] = (dataset[i] for i in range(len(dataset)))
    else:
        # As many as the plan takes, and what the scores look at.
        per_step = training.batch_size * training.gradient_accumulation
        raws = itertools.islice(iter(dataset), (training.max_steps or 1) * per_step)
    rendered: list[Rendered] = []
    sequences: list[list[int]] = []
    for number, raw in enumerate(raws):
        parts = list(_rows(collate([raw]), number, planned.tokenizer))
        sequences.append(list(range(len(rendered), len(rendered) + len(parts))))
        rendered += parts
    if not any(row.trained for row in rendered):
        raise InputError(
            "no token of the trainer's rows carries loss",
            where=ROWS,
            fix="look at one batch of `trainer.get_train_dataloader()`: its `labels` are all -100",
        )
    packed = len(rendered) > len(sequences)
    parts_of = (DataConfig.model_validate(_finetune(planned)),)
    return LoadedData(parts_of, rendered, taken=(ROWS,), sequences=sequences if packed else None)


def _rows(batch: Any, number: int, tokenizer: Any) -> Generator[Rendered]:
    """The rows of a collated batch of one: padding taken away, packed rows apart by their positions."""
    where = f"{ROWS}: row {number}"
    ids, labels = (
        batch.get(name) if isinstance(batch, Mapping) else None for name in ("input_ids", "labels")
    )
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or ids.shape != labels.shape:
        raise InputError(
            "the collator's batches have no `input_ids` and `labels` of one shape",
            where=where,
            fix="arisk forecasts causal language models; let the collator copy `input_ids` to `labels`",
        )
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    keep = torch.ones_like(ids[0], dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        keep = mask[0].bool()
    tokens, wanted = ids[0][keep].tolist(), labels[0][keep].tolist()
    starts = [0]
    if isinstance(positions, Tensor) and positions.shape == ids.shape:
        starts = [i for i, place in enumerate(positions[0][keep].tolist()) if place == 0 or i == 0]
    if any(label not in (IGNORED, token) for token, label in zip(tokens, wanted, strict=True)):
        raise InputError(
            "a label is another token than the row's: this is no causal language modelling",
            where=where,
            fix="collate with `mlm=False`; arisk forecasts models that predict the next token",
        )
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        yield _rendered(tokens[start:end], wanted[start:end], number, tokenizer)


def _rendered(tokens: list[int], labels: list[int], number: int, tokenizer: Any) -> Rendered:
    spans: list[tuple[int, int]] = []
    for i, label in enumerate(labels):
        if label == IGNORED:
            continue
        if spans and spans[-1][1] == i:
            spans[-1] = (spans[-1][0], i + 1)
        else:
            spans.append((i, i + 1))
    begin = max(1, spans[-1][0]) if spans else len(tokens)
    head = "" if spans and spans[-1][0] == 0 else tokenizer.decode(tokens[:begin], skip_special_tokens=True)
    tail = tokenizer.decode(tokens[begin if head else 0 :], skip_special_tokens=True)
    row = Row(text=(head.strip(), tail.strip()), format="trainer", source=ROWS, line=number + 1)
    return Rendered(tuple(tokens), tuple(spans), begin, row, "all")


@contextmanager
def as_loaded(model: Any) -> Generator[None]:
    """Inside, a model that a trainer has made ready computes as it was loaded; then it is ready again.

    Autocast that accelerate wraps around `forward`, a trainer's hooks on embeddings, and attention kernels
    without a second derivative are taken away: the plan's precision and noise are arisk's part.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with ExitStack() as stack:
        if "_original_forward" in vars(model) and "forward" in vars(model):
            stack.callback(setattr, model, "forward", model.forward)
            model.forward = vars(model)["_original_forward"]
        for module in base.modules():
            hooks = module._forward_hooks  # pyright: ignore[reportPrivateUsage] - handles of them may be lost
            taken = [key for key, hook in hooks.items() if getattr(hook, "__name__", "") in HOOKS]
            if taken:
                stack.callback(hooks.update, dict(hooks))
                stack.callback(hooks.clear)
                for key in taken:
                    del hooks[key]
        kind = getattr(getattr(base, "config", None), "_attn_implementation", "eager")
        if kind not in ("eager", None) and hasattr(base, "set_attn_implementation"):
            base.set_attn_implementation("eager")
            stack.callback(base.set_attn_implementation, kind)
        yield
