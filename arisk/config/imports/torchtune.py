"""torchtune's YAML: sections whose `_component_` names the function that they are arguments of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from arisk.config.imports import parts
from arisk.config.imports.account import Account, Rule, idle, number, other, taken, truth, whole
from arisk.config.imports.trainer import UNLIMITED
from arisk.config.yaml import shortened

__all__ = ["read_torchtune", "recognise_torchtune"]

_FAST = "speed and memory; numbers differ by rounding at most"
_REPORTS = "reporting, evaluation and saving"
#: Modules of torchtune's attention and their names in transformers.
MODULES = {"output_proj": "o_proj"}
#: Rows that one data-set builder of torchtune reads: layout, hub id, and which tokens train by default.
BUILDERS: dict[str, tuple[str | None, str | None, str]] = {
    "alpaca_dataset": ("alpaca", "tatsu-lab/alpaca", "all"),
    "alpaca_cleaned_dataset": ("alpaca", "yahma/alpaca-cleaned", "all"),
    "chat_dataset": (None, None, "assistant"),
    "instruct_dataset": ("prompt_response", None, "assistant"),
    "text_completion_dataset": ("text", None, "all"),
    "slimorca_dataset": ("sharegpt", "Open-Orca/SlimOrca-Dedup", "assistant"),
    "samsum_dataset": ("prompt_response", "Samsung/samsum", "assistant"),
    "grammar_dataset": ("prompt_response", "liweili/c4_200m", "assistant"),
    "cnn_dailymail_articles_dataset": ("text", "ccdv/cnn_dailymail", "all"),
    "wikitext_dataset": ("text", "EleutherAI/wikitext_document_level", "all"),
}
TABLE: dict[str, Rule] = {
    "seed": taken("run.seed", whole),
    "clip_grad_norm": taken("training.max_grad_norm", number),
    "compile": idle(_FAST),
    "enable_activation_checkpointing": idle(
        "it saves memory and leaves the numbers; `model.gradient_checkpointing: true` does so here"
    ),
    "enable_activation_offloading": idle(_FAST),
    "custom_sharded_layers": idle(_FAST),
    "fsdp_cpu_offload": idle(_FAST),
    "fsdp_reshard_after_forward": idle(_FAST),
    "ac_mode": idle(_FAST),
    "ac_option": idle(_FAST),
    "use_clipped_logits": idle(_FAST),
    "chunked_output": idle(_FAST),
    "optimizer_in_bwd": other(
        "each parameter steps within the backward pass, so that nothing is clipped", False
    ),
    "device": idle("where it runs"),
    "tensor_parallel_dim": idle("how the work is spread over the machine"),
    "tensor_parallel_plan": idle("how the work is spread over the machine"),
    "data_parallel_shard_dim": idle("how the work is spread over the machine"),
    "data_parallel_replicate_dim": idle("how the work is spread over the machine"),
    "resume_from_checkpoint": other(
        "the run starts from a checkpoint and not from the model named here", False
    ),
    "save_adapter_weights_only": idle(_REPORTS),
    "save_every_n_steps": idle(_REPORTS),
    "keep_last_n_checkpoints": idle(_REPORTS),
    "metric_logger": idle(_REPORTS),
    "output_dir": idle(_REPORTS),
    "log_every_n_steps": idle(_REPORTS),
    "log_level": idle(_REPORTS),
    "log_peak_memory_stats": idle(_REPORTS),
    "profiler": idle(_REPORTS),
    "dataset_val": idle(_REPORTS),
    "run_val_every_n_steps": idle(_REPORTS),
    "batch_size_val": idle(_REPORTS),
    "collate_fn": other("rows are put together by a function of your own"),
    "quantizer": other("training for quantised weights rounds them in every forward pass"),
}
OPTIMIZERS = {
    **dict.fromkeys(("AdamW", "Adam"), "adamw"),
    "SGD": "sgd",
    "AdamW8bit": "adamw_8bit",
    "PagedAdamW8bit": "paged_adamw_8bit",
    "PagedAdamW": "paged_adamw_32bit",
}


def recognise_torchtune(mapping: Mapping[str, Any]) -> bool:
    """Whether this is a torchtune config: sections with a `_component_`."""
    return any(isinstance(value, Mapping) and "_component_" in value for value in mapping.values())


def read_torchtune(account: Account) -> str:
    """Read a torchtune config.

    Returns:
        What the file is.

    Raises:
        ConfigError: it plans no supervised fine-tune, or a value is wrong.
    """
    loss = str(account.raw("loss._component_") or "")
    if any(name in loss for name in ("DPO", "RSO", "SimPO", "IPO", "PPO", "GRPO")) or "rl" in loss.split("."):
        parts.refuse(account, "loss", f"a preference training ({loss.rpartition('.')[2]})")
    if loss:
        account.note("loss", "idle", "the mean over the trained tokens of a step, as planned")
    _model(account)
    _adapter(account)
    _data(account)
    _steps(account)
    _optimizer(account)
    account.apply(TABLE)
    account.assume("training.max_grad_norm", None, "torchtune clips nothing unless asked")
    return "torchtune"


def _model(account: Account) -> None:
    folder = account.raw("checkpointer.checkpoint_dir")
    if folder:
        account.take("checkpointer.checkpoint_dir", "model.path", str(folder))
    files = ("_component_", "checkpoint_files", "model_type", "output_dir", "recipe_checkpoint")
    account.idle(
        [f"checkpointer.{key}" for key in (*files, "safe_serialization")], "how weights are read and saved"
    )
    adapter = account.raw("checkpointer.adapter_checkpoint")
    if adapter:
        account.note(
            "checkpointer.adapter_checkpoint",
            "other",
            "the run goes on from an adapter: give `model.adapter`",
        )
    kind = account.raw("dtype")
    if kind is not None:
        if str(kind) in parts.DTYPES:
            account.take("dtype", "model.dtype", parts.DTYPES[str(kind)], note="weights and all computation")
        else:
            account.note("dtype", "other", f"arisk has no dtype {kind!r}")


def _adapter(account: Account) -> None:
    name = str(account.raw("model._component_") or "")
    builder = name.rpartition(".")[2]
    if name:
        account.note("model._component_", "taken", f"{builder}: the model is read from its folder")
    if account.raw("model.lora_attn_modules") is None:
        return
    modules = [MODULES.get(str(each), str(each)) for each in account.several("model.lora_attn_modules")]
    if account.raw("model.apply_lora_to_mlp"):
        modules += ["gate_proj", "up_proj", "down_proj"]
    if account.raw("model.apply_lora_to_output"):
        modules.append("lm_head")
    account.take(
        "model.lora_attn_modules",
        "model.adapter.target_modules",
        list(dict.fromkeys(modules)),
        note="names as in transformers",
        computed=True,
    )
    for key in ("apply_lora_to_mlp", "apply_lora_to_output"):
        if account.raw(f"model.{key}") is not None:
            account.note(f"model.{key}", "computed", "model.adapter.target_modules")
    keys = {"lora_rank": ("r", whole), "lora_alpha": ("alpha", number), "lora_dropout": ("dropout", number)}
    keys = {**keys, "use_dora": ("use_dora", truth)}
    parts.lora(account, {f"model.{key}": value for key, value in keys.items()})
    account.assume("model.adapter.r", 8, "its default")
    account.assume("model.adapter.alpha", 16, "its default")
    if "qlora" in builder or account.raw("model.quantize_base"):
        account.put("model.quantization", "4bit", account.source.place("model._component_"))
        account.note("model._component_", "computed", "model.quantization: 4bit (NF4 by bitsandbytes)")
    if account.raw("model.quantize_base") is not None:
        account.note("model.quantize_base", "computed", "model.quantization")


def _data(account: Account) -> None:
    _sets(account)
    if account.raw("shuffle") is False:
        account.take("shuffle", "training.order", "sequential")
    account.idle(["shuffle"], "random order, as planned")
    key = "tokenizer.max_seq_len"
    if account.raw(key) is not None:
        account.take(key, "finetune.max_length", account.read(key, whole))
    account.assume("finetune.max_length", UNLIMITED, "torchtune sets no limit here")
    account.idle([key], "no limit")
    account.idle(
        ("tokenizer._component_", "tokenizer.path", "tokenizer.merges_file"),
        "the tokenizer in the model's folder",
    )
    further = [f"tokenizer.{each}" for each in account.section("tokenizer")]
    account.apply({key: other("another template may write the rows: tokens differ") for key in further})


def _sets(account: Account) -> None:
    several = [each for each in account.several("dataset") if isinstance(each, Mapping)]
    if not several:
        return
    told: list[str] = []
    sets = [_set(each, told) for each in several]
    parts.add_sets(account, "dataset", sets)
    account.note("dataset", "taken", f"finetune: {', '.join(found['path'] for found in sets)}")
    _packing(account, several, told)
    for line in dict.fromkeys(told):
        account.note("dataset", "other", line)


def _packing(account: Account, several: Sequence[Mapping[str, Any]], told: list[str]) -> None:
    """Packed sets: in whole rows, but for plain text, whose rows are cut where a sequence ends."""
    packed = [each for each in several if each.get("packed")]
    if not packed:
        return
    cut = [
        each.get("split_across_pack", "text_completion" in str(each.get("_component_"))) for each in packed
    ]
    kind = "wrapped" if all(cut) else "bfd"
    account.put("training.packing", kind, account.source.place("dataset"))
    told.append(
        f"rows are packed in the order of the file, and here as `training.packing: {kind}`: other rows share "
        "a sequence, and the number of sequences, and of steps, may differ by a few in a hundred"
    )
    if kind == "wrapped":
        told.append("each row attends to itself alone; here tokens attend to the rows before them as well")
    if len(packed) < len(several) or len(set(map(bool, cut))) > 1:
        told.append("some data sets are packed in another way, or not at all; here all are packed alike")


def _set(each: Mapping[str, Any], told: list[str]) -> dict[str, Any]:
    """One data set; what of it arisk does in another way goes into `told`."""
    builder = str(each.get("_component_", "")).rpartition(".")[2]
    layout, hub, loss = BUILDERS.get(builder, (None, None, "assistant"))
    if builder not in BUILDERS:
        told.append(f"rows of {shortened(builder, 40)!r} are recognised by their columns instead")
    if layout == "alpaca":
        told.append("Alpaca's own wording stands around each row; arisk writes it with the chat template")
    if each.get("new_system_prompt"):
        told.append("`new_system_prompt` puts a system turn before each row: tokens differ")
    found = {"path": _path(each, hub), **_columns(each, layout, told)}
    if layout:
        found["format"] = layout
    names = {"split": "split", "name": "subset"}
    found.update({ours: str(each[theirs]) for theirs, ours in names.items() if each.get(theirs)})
    trained = each.get("train_on_input")
    found["loss_on"] = loss if trained is None else "all" if trained else "assistant"
    return found


def _path(each: Mapping[str, Any], hub: str | None) -> str:
    """File or hub id: `source: json` names a reader, and `data_files` the file."""
    source, files = str(each.get("source") or hub or "?"), each.get("data_files")
    if files and source in ("json", "csv", "parquet", "text"):
        return str(files[0] if isinstance(files, list) else files)
    return source


def _columns(each: Mapping[str, Any], layout: str | None, told: list[str]) -> dict[str, str]:
    """Columns by arisk's names."""
    names = {
        "conversation_column": "messages_column",
        **({"column": "text_column"} if layout == "text" else {}),
    }
    found = {ours: str(each[theirs]) for theirs, ours in names.items() if each.get(theirs)}
    columns = each.get("column_map")
    if isinstance(columns, Mapping) and layout == "prompt_response":
        pairs = {"input": "prompt_column", "output": "response_column"}
        found.update({ours: str(columns[theirs]) for theirs, ours in pairs.items() if theirs in columns})
    elif columns:
        told.append("`column_map` renames columns: name them in `finetune`")
    return found


def _steps(account: Account) -> None:
    parts.rows_per_step(
        account, batch="batch_size", accumulation="gradient_accumulation_steps", default_batch=1
    )
    per_epoch = account.read("max_steps_per_epoch", whole)
    passes = account.read("epochs", number)
    if per_epoch:
        count = int(per_epoch * (passes or 1))
        account.take(
            "max_steps_per_epoch",
            "training.max_steps",
            count,
            note=f"× {passes or 1:g} epochs",
            computed=True,
        )
        if passes is not None:
            account.note("epochs", "computed", f"training.max_steps: {count}")
        return
    if "max_steps_per_epoch" in account.source.mapping:
        account.note("max_steps_per_epoch", "idle", "not set: epochs decide")
    if passes is not None:
        account.take("epochs", "training.epochs", passes)
    else:
        account.assume("training.epochs", 1, "one pass")


def _optimizer(account: Account) -> None:
    name = str(account.raw("optimizer._component_") or "torch.optim.AdamW").rpartition(".")[2]
    if name in OPTIMIZERS:
        key = "optimizer._component_"
        kind = OPTIMIZERS[name]
        account.take(key, "training.optimizer", kind, note=parts.carried_out(kind))
    else:
        account.put("training.optimizer", "adamw", account.source.place("optimizer._component_"))
        account.note(
            "optimizer._component_", "other", f"arisk cannot carry out {name!r} and plans adamw in its place"
        )
    account.apply(
        {
            "optimizer.lr": taken("training.learning_rate", number),
            "optimizer.weight_decay": taken("training.weight_decay", number),
            "optimizer.eps": taken("training.eps", number),
            "optimizer.momentum": taken("training.momentum", number),
            "optimizer.betas": taken("training.betas", list),
            "optimizer.fused": idle(_FAST),
            "optimizer.foreach": idle(_FAST),
        }
    )
    if "AdamW" in name:
        account.assume("training.weight_decay", 0.01, "its default in torch and bitsandbytes")
    account.assume(
        "training.weight_decay_on", "all", "one group of parameters: norms and biases decay as well"
    )
    schedule = str(account.raw("lr_scheduler._component_") or "").rpartition(".")[2]
    if schedule == "get_cosine_schedule_with_warmup":
        account.take("lr_scheduler._component_", "training.schedule", "cosine")
        account.apply(
            {
                "lr_scheduler.num_warmup_steps": taken("training.warmup_steps", whole),
                "lr_scheduler.num_cycles": other("another number of half waves than one", 0.5),
            }
        )
    elif schedule:
        account.put("training.schedule", "constant", account.source.place("lr_scheduler"))
        account.note("lr_scheduler", "other", f"arisk cannot follow {schedule!r} and plans a constant rate")
    else:
        account.assume("training.schedule", "constant", "no schedule is named")
