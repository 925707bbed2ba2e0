"""axolotl's YAML: one flat file for model, data and training, with names of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from arisk.config.imports import parts
from arisk.config.imports.account import Account, Rule, idle, number, other, taken, text, truth, whole
from arisk.config.imports.trainer import TRAINER
from arisk.config.yaml import shortened

__all__ = ["read_axolotl", "recognise_axolotl"]

_FAST = "speed and memory; numbers differ by rounding at most"
_REPORTS = "reporting, evaluation and saving"


def _each(why: str, *keys: str) -> dict[str, Rule]:
    return dict.fromkeys(keys, idle(why))


#: Keys that stand alone.
TABLE: dict[str, Rule] = {
    "base_model": taken("model.path", text),
    "revision_of_model": taken("model.revision", text),
    "trust_remote_code": taken("model.trust_remote_code", truth),
    "loraplus_lr_ratio": taken("training.loraplus_lr_ratio", number),
    "noisy_embedding_alpha": taken("training.neftune_noise_alpha", number),
    "curriculum_sampling": other("rows come in the order of the files: the order of rows differs", False),
    "lr_quadratic_warmup": other("a warm-up that grows with the square of the step", False),
    "embedding_lr": other("embeddings have a learning rate of their own"),
    "embedding_lr_scale": other("embeddings have a learning rate of their own"),
    "loraplus_lr_embedding": idle("adapters of embeddings alone have it"),
    "lr_groups": other("some modules have a learning rate of their own"),
    "lr_div_factor": other("it belongs to the one-cycle schedule"),
    "unfrozen_parameters": other(
        "only these parameters train: name them as `model.parameters: {include: […]}`, with `*` as wildcard"
    ),
    "relora": other("ReLoRA merges and restarts the adapter on its way", False),
    "relora_steps": other("ReLoRA merges and restarts the adapter on its way"),
    "lisa_step_interval": other("LISA trains other layers at other steps"),
    "jagged_restart_steps": other("the schedule restarts on its way"),
    "early_stopping_patience": other("the run may stop earlier: read the forecast at that step", False),
    "tokens": other("tokens are added to the vocabulary, and their embeddings are new", False),
    "added_tokens_overrides": other("tokens of the vocabulary are renamed: rows hold other tokens"),
    "resize_token_embeddings_to_32x": idle("rows of padding in the embedding"),
    "chat_template_jinja": other("another chat template than the model's writes the rows: tokens differ"),
    "pretraining_dataset": other("streamed text for pretraining: name the data set as `finetune.path`"),
    "test_datasets": idle(_REPORTS),
    "shuffle_merged_datasets": idle("rows are shuffled anew in every epoch"),
    "dataset_exact_deduplication": other("repeated rows are left out: fewer rows, fewer steps", False),
    "skip_prepare_dataset": other("rows may be prepared in another way than from their columns", False),
    "reward_model": other("the training of a reward model is another run", False),
    "process_reward_model": other("the training of a reward model is another run", False),
    "trainer_cls": other("a trainer class of your own may do anything"),
    "qat": other("training for quantised weights rounds them in every forward pass"),
    "fp8": other("8-bit floating point rounds every product", False),
    "gptq": other("weights quantised with GPTQ are loaded", False),
    "llama_adapter": other("another kind of adapter", False),
    "xformers_attention": idle(_FAST),
    "s2_attention": other("shifted sparse attention (LongLoRA) is another model while it trains", False),
    "torchdistx_path": idle(_FAST),
    "arisk": idle("arisk's own plugin; give its safety rows as `--safety`"),
    **_each(
        _FAST,
        *("flash_attention", "flash_attn_cross_entropy", "flash_attn_rms_norm", "flash_attn_fuse_mlp"),
        *(
            "flash_attn_fuse_qkv",
            "sdp_attention",
            "flex_attention",
            "eager_attention",
            "sample_packing_eff_est",
        ),
        *("attention", "attn_implementation", "liger_rope", "liger_rms_norm", "liger_glu_activation"),
        *("liger_fused_linear_cross_entropy", "liger_layer_norm", "liger_cross_entropy", "lora_mlp_kernel"),
        *(
            "lora_qkv_kernel",
            "lora_o_kernel",
            "unsloth_cross_entropy_loss",
            "unsloth_lora_mlp",
            "unsloth_lora_qkv",
        ),
        *("unsloth_lora_o", "unsloth_rms_norm", "unsloth_rope", "low_cpu_mem_usage", "lora_on_cpu"),
        *(
            "activation_offloading",
            "pad_to_sequence_len",
            "cut_cross_entropy",
            "gc_steps",
            "experimental_skip_move",
        ),
        *("qlora_sharded_model_loading", "torch_compile", "memory_limit", "gpu_memory_limit", "max_memory"),
        *(
            "total_supervised_tokens",
            "total_num_tokens",
            "lora_embedding_kernel",
            "peft_autocast_adapter_dtype",
        ),
        *("tiled_mlp", "use_kernels"),
    ),
    **_each(
        _REPORTS,
        *(
            "dataset_prepared_path",
            "output_dir",
            "wandb_project",
            "wandb_entity",
            "wandb_watch",
            "wandb_name",
        ),
        *("wandb_log_model", "wandb_run_id", "wandb_mode", "wandb_offline", "mlflow_tracking_uri"),
        *("mlflow_experiment_name", "mlflow_run_name", "hf_mlflow_log_artifacts", "comet_project_name"),
        *("comet_workspace", "use_tensorboard", "use_wandb", "use_mlflow", "use_comet", "evals_per_epoch"),
        *("saves_per_epoch", "eval_steps", "save_steps", "eval_table_size", "eval_max_new_tokens"),
        *(
            "eval_sample_packing",
            "eval_batch_size",
            "eval_causal_lm_metrics",
            "do_causal_lm_eval",
            "do_bench_eval",
        ),
        *("bench_dataset", "save_first_step", "hub_model_id", "hub_strategy", "push_dataset_to_hub"),
        *(
            "hf_use_auth_token",
            "loss_watchdog_threshold",
            "loss_watchdog_patience",
            "profiler_steps",
            "strict",
        ),
        *("auto_resume_from_checkpoints", "val_set_seed", "merge_lora", "merge_method", "inference"),
        *("dataset_keep_in_memory",),
        *(
            "include_tkps",
            "swanlab_project",
            "use_swanlab",
            "opentelemetry",
            "use_otel_metrics",
            "otel_metrics_host",
        ),
        *("otel_metrics_port", "axolotl_config_path", "profiler_steps_start"),
    ),
    **_each(
        "how the work is spread over the machine; `--devices N` tells how many devices share a step",
        *("ddp", "fsdp_version", "deepspeed", "ray_num_workers", "use_ray", "resources_per_worker"),
        *(
            "ray_run_name",
            "tensor_parallel_size",
            "context_parallel_size",
            "dp_shard_size",
            "dp_replicate_size",
        ),
        *("device", "device_map", "world_size", "sequence_parallel_degree", "heads_k_stride", "cloud_config"),
    ),
    **_each(
        "how files are read",
        *("model_type", "tokenizer_type", "tokenizer_use_fast", "tokenizer_legacy", "processor_type"),
        *(
            "is_falcon_derived_model",
            "is_llama_derived_model",
            "is_mistral_derived_model",
            "is_qwen_derived_model",
        ),
        *(
            "base_model_ignore_patterns",
            "dataset_processes",
            "dataset_num_proc",
            "datasets_shuffle",
            "streaming",
        ),
        *("dataset_shard_num", "dataset_shard_idx", "tokenizer_save_jinja_files", "num_workers"),
    ),
    "base_model_config": idle("the model's own settings"),
    "tokenizer_config": other("another tokenizer than the model's cuts the rows: tokens differ"),
    "overrides_of_model_config": other("settings of the model are changed when it is loaded"),
    "overrides_of_model_kwargs": other("the model is loaded with further arguments"),
    "model_config": other("settings of the model are changed when it is loaded"),
    "resume_from_checkpoint": TRAINER["resume_from_checkpoint"],
}
#: Keys that have the names of transformers' Trainer.
SHARED = {
    key: TRAINER[key]
    for key in (
        *("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "neftune_noise_alpha", "seed"),
        *(
            "group_by_length",
            "auto_find_batch_size",
            "optim_target_modules",
            "tf32",
            "gradient_checkpointing",
        ),
        *("gradient_checkpointing_kwargs", "logging_steps", "local_rank", "fsdp", "fsdp_config", "debug"),
        *(
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_prefetch_factor",
            "dataloader_drop_last",
        ),
        *("save_total_limit", "save_strategy", "save_safetensors", "save_only_model", "eval_strategy"),
        *("evaluation_strategy", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        *("ddp_timeout", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_find_unused_parameters"),
        *(
            "remove_unused_columns",
            "torch_compile_backend",
            "torch_compile_mode",
            "include_tokens_per_second",
        ),
        *("report_to", "use_cache"),
    )
}
LORA: dict[str, tuple[str, Any]] = {
    "lora_r": ("r", whole),
    "lora_alpha": ("alpha", number),
    "lora_dropout": ("dropout", number),
    "lora_target_parameters": (
        "target_parameters",
        lambda value: [value] if isinstance(value, str) else value,
    ),
    "lora_modules_to_save": ("modules_to_save", lambda value: value),
    "peft_use_dora": ("use_dora", truth),
    "peft_use_rslora": ("use_rslora", truth),
    "peft_layers_to_transform": ("layers_to_transform", lambda value: value),
    "peft_init_lora_weights": ("init_lora_weights", lambda value: value),
}
#: Keys of `LoraConfig` that arisk passes on as they are.
FURTHER = {
    "lora_fan_in_fan_out": "fan_in_fan_out",
    "peft_layers_pattern": "layers_pattern",
    "peft_layer_replication": "layer_replication",
    "peft_trainable_token_indices": "trainable_token_indices",
    "peft_ensure_weight_tying": "ensure_weight_tying",
}
#: Plugins that change no number: kernels, and arisk's own.
HARMLESS = ("LigerPlugin", "CutCrossEntropyPlugin", "arisk.in_trainer.AxolotlPlugin")
#: Prompt styles of `datasets[].type` → layouts of rows. Each writes its rows in words of its own.
LAYOUTS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "completion": "text", "chat_template": None}


def recognise_axolotl(mapping: Mapping[str, Any]) -> bool:
    """Whether this is an axolotl config."""
    own = {
        "micro_batch_size",
        "num_epochs",
        "sequence_len",
        "datasets",
        "adapter",
        "gradient_accumulation_steps",
    }
    return "base_model" in mapping and bool((own | {"pretraining_dataset", "lora_r"}) & set(mapping))


def read_axolotl(account: Account) -> str:
    """Read an axolotl config.

    Returns:
        What the file is.

    Raises:
        ConfigError: it plans no supervised fine-tune, or a value is wrong.
    """
    if "rl" in account:
        parts.refuse(account, "rl", f"a preference training ({account.raw('rl')})")
    for key in ("reward_model", "process_reward_model"):
        if account.raw(key) is True:
            parts.refuse(account, key, "the training of a reward model")
    _precision(account)
    _adapter(account)
    _data(account)
    _batches(account)
    parts.steps(account, epochs="num_epochs", most="max_steps", default_epochs=1.0)
    _schedule(account)
    parts.optimizer(account, name="optimizer", arguments="optim_args", default="adamw_torch_fused")
    parts.betas(account, first="adam_beta1", second="adam_beta2")
    account.apply({**SHARED, **TABLE})
    account.assume("training.max_grad_norm", 1.0, "transformers' default")
    _names(account)
    return "axolotl"


def _precision(account: Account) -> None:
    """Weights are loaded in the precision that they are trained in."""
    for key, kind in {"bfloat16": "bf16", "float16": "fp16"}.items():
        if account.raw(key) is True:
            account.take(key, "model.dtype", parts.DTYPES[kind])
    kind = parts.precision(account, bf16="bf16", fp16="fp16")
    if kind != "weights":
        account.assume("model.dtype", parts.DTYPES[kind], f"axolotl loads the weights in it under {kind}")


def _adapter(account: Account) -> None:
    kind = account.raw("adapter")
    keys = [*LORA, *FURTHER, "lora_target_modules", "lora_target_linear"]
    if kind in ("lora", "qlora"):
        account.note("adapter", "taken", "model.adapter")
        existing = account.read("lora_model_dir", text)
        if existing:
            account.take("lora_model_dir", "model.adapter.path", existing)
            account.idle(keys, "the existing adapter has settings of its own")
        else:
            _new_adapter(account)
        options = {f"bnb_config_kwargs.{name}": name for name in account.section("bnb_config_kwargs")}
        parts.quantization(account, four="load_in_4bit", eight="load_in_8bit", options=options)
        account.apply({"peft": other("another way to quantise: give it as `model.quantization`")})
        return
    if kind is not None:
        account.note("adapter", "other", f"arisk has no adapter of kind {kind!r}: every parameter is planned")
    account.idle([*keys, "lora_model_dir", "load_in_4bit", "load_in_8bit"], "there is no LoRA adapter")


def _new_adapter(account: Account) -> None:
    parts.lora(account, LORA)
    _targets(account)
    further = {name: account.raw(key) for key, name in FURTHER.items() if account.raw(key) is not None}
    if further:
        account.put("model.adapter.peft", further, account.source.place("adapter"))
    for key, name in FURTHER.items():
        if name in further:
            account.note(key, "taken", f"model.adapter.peft.{name}")


def _targets(account: Account) -> None:
    """Which modules the adapter wraps: every linear one, or those named."""
    named = account.raw("lora_target_modules")
    everything = (
        account.read("lora_target_linear", truth) if account.raw("lora_target_linear") is not None else None
    )
    if everything:
        account.take("lora_target_linear", "model.adapter.target_modules", "all-linear")
        if named:
            account.note(
                "lora_target_modules", "other", "`lora_target_linear` adds every linear module to these"
            )
        return
    if everything is False:
        account.note("lora_target_linear", "idle", "switched off")
    if named:
        account.take("lora_target_modules", "model.adapter.target_modules", named)
    elif "model.adapter.target_parameters" not in account.into.plan:
        account.assume("model.adapter.target_modules", None, "peft's choice where no module is named")


def _batches(account: Account) -> None:
    total, micro = account.read("batch_size", whole), account.read("micro_batch_size", whole) or 1
    if total is not None and account.raw("gradient_accumulation_steps") is None:
        parts.rows_per_step(account, batch="micro_batch_size", accumulation="", default_batch=1)
        each = max(1, total // (micro * account.into.devices))
        count = each * account.into.devices
        account.take(
            "batch_size",
            "training.gradient_accumulation",
            count,
            note=f"{total} rows in micro-batches of {micro}",
            computed=True,
        )
        return
    if total is not None:
        account.note("batch_size", "idle", "`gradient_accumulation_steps` decides")
    parts.rows_per_step(
        account, batch="micro_batch_size", accumulation="gradient_accumulation_steps", default_batch=1
    )


def _schedule(account: Account) -> None:
    least = account.read("cosine_min_lr_ratio", number)
    if least and account.raw("lr_scheduler") in (None, "cosine"):
        key = "cosine_min_lr_ratio"
        account.put("training.schedule", "cosine_with_min_lr", account.source.place(key))
        account.take(key, "training.schedule_args", {"min_lr_rate": least})
        if account.raw("lr_scheduler"):
            account.note("lr_scheduler", "computed", "training.schedule: cosine_with_min_lr")
    else:
        parts.schedule(account, name="lr_scheduler", arguments="lr_scheduler_kwargs", default="cosine")
        if least:
            account.note("cosine_min_lr_ratio", "idle", "the schedule is no cosine")
    constant = account.read("cosine_constant_lr_ratio", number)
    if constant is not None:
        account.note("cosine_constant_lr_ratio", "other", "the rate stays constant at the end of the run")
    parts.warmup(account, count="warmup_steps", ratio="warmup_ratio")
    plan = account.into.plan
    if not account.raw("warmup_steps") and not account.raw("warmup_ratio"):
        most = plan.get("training.max_steps")
        if most:
            count = min(math.floor(0.03 * most), 100)
            account.assume(
                "training.warmup_steps", 2 if count == 1 else count, "3 % of the steps, 100 at most"
            )
        else:
            account.assume("training.warmup_ratio", 0.03, "3 % of the steps; axolotl stops at 100")


def _names(account: Account) -> None:
    """Keys whose value says whether they matter."""
    plugins = account.several("plugins")
    if plugins:
        fast = all(str(name).endswith(HARMLESS) for name in plugins)
        account.note("plugins", "idle" if fast else "other", _FAST if fast else "a plugin may change the run")
    special = account.raw("special_tokens")
    if isinstance(special, Mapping) and set(special) <= {"pad_token"}:
        account.note("special_tokens", "idle", "padding carries no loss")
    elif special:
        account.note(
            "special_tokens", "other", "special tokens other than the tokenizer's: rows hold other tokens"
        )


def _data(account: Account) -> None:
    _sets(account)
    everything = account.read("train_on_inputs", truth)
    if everything is not None:
        account.take("train_on_inputs", "finetune.loss_on", "all" if everything else "assistant")
    else:
        account.assume("finetune.loss_on", "assistant", "axolotl trains the answers")
    size = account.read("val_set_size", number)
    if size:
        account.take("val_set_size", "finetune.val_set_size", size)
    account.idle(["val_set_size"], "no rows are set aside")
    account.apply({"sequence_len": taken("finetune.max_length", whole)})
    account.assume("finetune.max_length", 512, "its default")
    longer = account.raw("excess_length_strategy")
    if longer is not None:
        kind = "keep_start" if longer == "truncate" else "drop"
        account.take("excess_length_strategy", "finetune.truncation", kind)
    account.assume("finetune.truncation", "drop", "axolotl leaves out rows that are too long")
    parts.packing(
        account,
        "sample_packing",
        differs="rows are shuffled before they are packed, and first fit: other rows share a sequence, and "
        "their number may differ by a few in a hundred, and so may the steps of an epoch",
    )
    account.idle(
        ("sample_packing_sequentially", "sample_packing_group_size", "sample_packing_bin_size"),
        "how rows are packed",
    )
    parts.template(account, "chat_template", "axolotl")


def _sets(account: Account) -> None:
    told: list[str] = []
    sets = [_set(each, told) for each in account.several("datasets") if isinstance(each, Mapping)]
    if sets:
        parts.add_sets(account, "datasets", sets)
        account.note("datasets", "taken", f"finetune: {', '.join(each.get('path', '?') for each in sets)}")
    for line in dict.fromkeys(told):
        account.note("datasets", "other", line)


#: Keys of a data set that change which rows or tokens train, with the values that do not.
DETAILS = {
    "train_on_eos": ("turn",),
    "roles_to_train": (["assistant"],),
    **dict.fromkeys(("shards", "message_field_training", "message_field_training_detail"), ()),
    "drop_system_message": (),
}


def _set(each: Mapping[str, Any], told: list[str]) -> dict[str, Any]:
    """One data set; what of it arisk does in another way goes into `told`."""
    names = {"path": "path", "name": "subset", "split": "split"}
    found = {ours: str(each[theirs]) for theirs, ours in names.items() if each.get(theirs)}
    files = each.get("data_files")
    if files and found.get("path") in ("json", "csv", "parquet", "text", "arrow"):
        found["path"] = str(files[0] if isinstance(files, list) else files)
    style = str(each.get("type") or "chat_template").partition(":")[0].partition(".")[0]
    if style not in LAYOUTS:
        told.append(
            f"rows of type {shortened(str(each['type']), 40)!r} are recognised by their columns instead"
        )
    elif LAYOUTS[style]:
        found["format"] = str(LAYOUTS[style])
    if style == "alpaca":
        told.append("Alpaca's own wording stands around each row; arisk writes it with the chat template")
    columns = {"field_messages": "messages_column", "field": "text_column"}
    found.update({ours: str(each[theirs]) for theirs, ours in columns.items() if each.get(theirs)})
    changed = [key for key, off in DETAILS.items() if each.get(key) not in (None, False, *off)]
    told += [f"`{key}` changes which rows or tokens train" for key in changed]
    return found
