"""Files of transformers and TRL: TrainingArguments, SFTConfig, TRL's command line, the alignment handbook.

All of them are flat: keys of `TrainingArguments` with those of `SFTConfig`, `ModelConfig` and
`ScriptArguments` beside them. Facts from transformers 5.24 and TRL 1.16, with older names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arisk.config.imports import parts
from arisk.config.imports.account import (
    Account,
    Rule,
    idle,
    mapping_of,
    number,
    other,
    taken,
    text,
    truth,
    whole,
)

__all__ = ["HANDBOOK_KEYS", "TRAINER", "UNLIMITED", "read_trainer", "recognise_trainer", "trainer_core"]

_REPORTS = "reporting and logging"
_EVALUATES = "evaluation on the way"
_SAVES = "saving and uploading"
_MACHINE = "how the work is spread over the machine"
_FAST = "speed and memory; numbers differ by rounding at most"
_LOADS = "how data is loaded"


def _each(why: str, *keys: str) -> dict[str, Rule]:
    return dict.fromkeys(keys, idle(why))


#: Keys of `TrainingArguments` that stand alone, in transformers 4 and 5.
TRAINER: dict[str, Rule] = {
    "learning_rate": taken("training.learning_rate", number),
    "weight_decay": taken("training.weight_decay", number),
    "adam_epsilon": taken("training.eps", number),
    "max_grad_norm": taken("training.max_grad_norm", number),
    "neftune_noise_alpha": taken("training.neftune_noise_alpha", number),
    "seed": taken("run.seed", whole),
    "data_seed": taken("finetune.seed", whole),
    "dataloader_drop_last": taken("training.drop_last", truth),
    "label_smoothing_factor": other("smoothed labels are another loss: gradients differ at every step", 0),
    "group_by_length": other("rows of like length share a batch: the order of rows differs", False),
    "auto_find_batch_size": other("the batch may be halved when memory runs out: fewer rows per step", False),
    "optim_target_modules": other("the optimizer treats these modules in its own way"),
    "resume_from_checkpoint": other(
        "the run starts from a checkpoint and not from the model named here", False
    ),
    "load_best_model_at_end": other(
        "an earlier checkpoint may be kept: read the forecast at its step, not at the end", False
    ),
    "ignore_data_skip": idle("it matters to resumed runs"),
    "deepspeed": idle(f"{_MACHINE}; `--devices N` tells how many devices share a step"),
    "fsdp": idle(f"{_MACHINE}; `--devices N` tells how many devices share a step"),
    **_each(
        f"{_MACHINE}; `--devices N` tells how many devices share a step",
        *("fsdp_config", "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap", "parallelism_config"),
        *("local_rank", "_n_gpu", "tpu_num_cores", "ddp_backend", "ddp_timeout", "ddp_bucket_cap_mb"),
        *("ddp_find_unused_parameters", "ddp_broadcast_buffers", "ddp_static_graph", "dispatch_batches"),
        *("average_tokens_across_devices", "no_cuda", "use_cpu", "use_mps_device", "use_ipex", "sharded_ddp"),
        *("tpu_metrics_debug", "xpu_backend", "mp_parameters", "enable_jit_checkpoint"),
    ),
    **_each(
        _FAST,
        *(
            "tf32",
            "torch_compile",
            "torch_compile_backend",
            "torch_compile_mode",
            "use_liger_kernel",
            "use_liger",
        ),
        *("liger_kernel_config", "use_cache", "torch_empty_cache_steps", "jit_mode_eval", "full_determinism"),
        *("fp16_backend", "fp16_opt_level", "half_precision_backend", "bf16_full_eval", "fp16_full_eval"),
        *("gradient_checkpointing_kwargs", "activation_checkpointing", "activation_checkpointing_kwargs"),
        *("torchdynamo", "optim_memory_efficient", "activation_offloading"),
    ),
    "gradient_checkpointing": idle(
        "it saves memory and leaves the numbers; `model.gradient_checkpointing: true` does so here"
    ),
    **_each(
        _REPORTS,
        *("logging_strategy", "logging_steps", "logging_first_step", "logging_dir", "log_on_each_node"),
        *(
            "logging_nan_inf_filter",
            "log_level",
            "log_level_replica",
            "disable_tqdm",
            "report_to",
            "run_name",
        ),
        *("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "debug"),
        *("skip_memory_metrics", "include_num_input_tokens_seen", "include_tokens_per_second"),
    ),
    **_each(
        _EVALUATES,
        *("eval_strategy", "evaluation_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size"),
        *("per_gpu_eval_batch_size", "prediction_loss_only", "eval_on_start", "eval_do_concat_batches"),
        *("eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics"),
        *(
            "metric_for_best_model",
            "greater_is_better",
            "do_eval",
            "do_predict",
            "include_inputs_for_metrics",
        ),
        *("predict_with_generate", "generation_max_length", "generation_num_beams", "generation_config"),
    ),
    "do_train": idle("a plan is a training"),
    **_each(
        _SAVES,
        *("output_dir", "overwrite_output_dir", "save_only_model", "save_strategy", "save_steps"),
        *("save_on_each_node", "save_total_limit", "save_safetensors", "push_to_hub", "hub_token"),
        *("hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
        *("push_to_hub_token", "push_to_hub_model_id", "push_to_hub_organization", "hub_model_revision"),
        *("restore_callback_states_from_checkpoint",),
    ),
    **_each(
        _LOADS,
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
        *("remove_unused_columns", "label_names", "length_column_name", "past_index"),
    ),
}
#: Keys of `SFTConfig`, `ModelConfig` and `ScriptArguments` that stand alone.
SFT: dict[str, Rule] = {
    "truncation_mode": taken("finetune.truncation", text),
    "eos_token": other(
        "a turn may end with another token than the tokenizer's, which is trained as well", "<EOS_TOKEN>"
    ),
    "pad_token": idle("padding carries no loss"),
    "pad_to_multiple_of": idle(_FAST),
    "padding_free": idle(_FAST),
    "eval_packing": idle(_EVALUATES),
    "dataset_num_proc": idle(_LOADS),
    "dataset_batch_size": idle(_LOADS),
    "dataset_kwargs": other("rows may be prepared in another way than from their columns"),
    "num_of_sequences": idle("it was of the old packing"),
    "chars_per_token": idle("it was of the old packing"),
    "shuffle_dataset": idle("it changes the order of rows, which is random as it is"),
    "chat_template_path": other("another chat template than the model's writes the rows: tokens differ"),
    "chat_template": other(
        "another chat template than the model's writes the rows; save it as chat_template.jinja in the "
        "model's folder, and the tokens are the same"
    ),
    "router_aux_loss_coef": other("the balance loss of a mixture of experts is left out", 0),
    "use_flash_attention_2": idle(_FAST),
    "attn_implementation": idle(_FAST),
    "trust_remote_code": taken("model.trust_remote_code", truth),
    "tokenizer_name_or_path": other("another tokenizer than the model's cuts the rows: tokens differ"),
    "auto_insert_empty_system_msg": other("an empty system turn may stand before each row", False),
    "dataset_test_split": idle(_EVALUATES),
    "dataset_streaming": idle(_LOADS),
    "streaming": idle(_LOADS),
    "ignore_bias_buffers": idle(_MACHINE),
    "preprocessing_num_workers": idle(_LOADS),
    "block_size": idle(_LOADS),
    "env": idle("environment variables"),
    "lora_task_type": idle("a causal language model, always"),
    "base_model_revision": idle("the revision of the base model of an adapter"),
    "model_code_revision": idle("the revision of remote code"),
    "benchmarks": idle(_EVALUATES),
    "callbacks": other("callbacks may change the run on its way"),
    "wandb_entity": idle(_REPORTS),
    "wandb_project": idle(_REPORTS),
    "system_prompt": other("a system turn stands before each row: tokens differ"),
}
#: Longest row where no limit is set.
UNLIMITED = 131_072
#: Keys of the handbook's data mixtures.
HANDBOOK_KEYS = ("dataset_mixture", "dataset_mixer")
#: Keys that only a preference or reward run has.
PREFERENCES = {
    **dict.fromkeys(
        ("beta", "max_prompt_length", "precompute_ref_log_probs", "rpo_alpha", "reference_free", "ref_model"),
        "a preference training (DPO or a relative of it)",
    ),
    **dict.fromkeys(("desirable_weight", "undesirable_weight"), "a KTO training"),
    **dict.fromkeys(
        ("num_generations", "reward_model_path", "reward_funcs", "kl_coef", "vf_coef"),
        "a reinforcement learning run",
    ),
    "center_rewards_coefficient": "the training of a reward model",
}
#: Keys of a LoRA adapter on TRL's command line.
LORA: dict[str, tuple[str, Any]] = {
    "lora_r": ("r", whole),
    "lora_alpha": ("alpha", number),
    "lora_dropout": ("dropout", number),
    "lora_target_modules": ("target_modules", lambda value: value),
    "lora_target_parameters": ("target_parameters", lambda value: value),
    "lora_modules_to_save": ("modules_to_save", lambda value: value),
    "use_rslora": ("use_rslora", truth),
    "use_dora": ("use_dora", truth),
}
QUANTIZED = {
    "bnb_4bit_quant_type": "bnb_4bit_quant_type",
    "use_bnb_nested_quant": "bnb_4bit_use_double_quant",
    "bnb_4bit_quant_storage": "bnb_4bit_quant_storage",
}


def recognise_trainer(mapping: Mapping[str, Any]) -> bool:
    """Whether these are arguments of transformers' Trainer, alone or with a model and data beside them."""
    own = {
        "num_train_epochs",
        "per_device_train_batch_size",
        "lr_scheduler_type",
        "gradient_accumulation_steps",
    }
    own |= {
        "learning_rate",
        "model_name_or_path",
        "dataset_name",
        "output_dir",
        "max_seq_length",
        "warmup_ratio",
    }
    own |= {"max_steps", "optim", "num_train_epochs", "use_peft", "bf16", "packing", *HANDBOOK_KEYS}
    return len(own & set(mapping)) >= 2


def trainer_core(account: Account, *, rate: float = 5e-5, default_precision: str = "weights") -> None:
    """The arguments of transformers' Trainer, and its defaults."""
    size = "per_device_train_batch_size"
    batch = (
        "per_gpu_train_batch_size" if size not in account and "per_gpu_train_batch_size" in account else size
    )
    parts.rows_per_step(account, batch=batch, accumulation="gradient_accumulation_steps", default_batch=8)
    parts.steps(account, epochs="num_train_epochs", most="max_steps", default_epochs=3.0)
    parts.schedule(account, name="lr_scheduler_type", arguments="lr_scheduler_kwargs", default="linear")
    parts.warmup(account, count="warmup_steps", ratio="warmup_ratio")
    if account.raw("adafactor") is True:
        account.take("adafactor", "training.optimizer", "adafactor")
    elif "adafactor" in account:
        account.note("adafactor", "idle", "switched off")
    parts.optimizer(account, name="optim", arguments="optim_args", default="adamw_torch")
    parts.betas(account, first="adam_beta1", second="adam_beta2")
    parts.precision(account, bf16="bf16", fp16="fp16", default=default_precision)
    _sampling(account)
    account.apply(TRAINER)
    account.assume("training.learning_rate", rate, "its default")
    account.assume("training.max_grad_norm", 1.0, "its default")


def _sampling(account: Account) -> None:
    key = "train_sampling_strategy"
    given = account.raw(key)
    if given == "sequential":
        account.take(key, "training.order", "sequential")
    elif given == "group_by_length":
        account.note(key, "other", "rows of like length share a batch: the order of rows differs")
    elif given is not None:
        account.note(key, "idle", "random order, as planned")
    accelerator = account.raw("accelerator_config")
    if isinstance(accelerator, Mapping) and accelerator.get("split_batches"):
        account.note(
            "accelerator_config", "other", "`split_batches` divides the batch by the number of devices"
        )
    elif accelerator is not None:
        account.note("accelerator_config", "idle", _MACHINE)


def read_trainer(account: Account) -> str:
    """Read the arguments of a Trainer or SFTTrainer, a file of TRL's command line, or a handbook recipe.

    Returns:
        What the file is.

    Raises:
        ConfigError: it plans no supervised fine-tune, or a value is wrong.
    """
    for key, what in PREFERENCES.items():
        if key in account:
            parts.refuse(account, key, what)
    supervised = any(key in account for key in (*_SFT_ONLY, "model_name_or_path", "dataset_name"))
    handbook = any(key in account for key in HANDBOOK_KEYS)
    _model(account)
    _data(account)
    _loss(account)
    if supervised:
        _adapter(account)
        trainer_core(account, rate=2e-5, default_precision="bf16" if "fp16" not in account else "weights")
        account.assume("finetune.max_length", 1024, "its default")
    else:
        trainer_core(account)
    account.apply(SFT)
    if handbook:
        return "alignment handbook"
    return "TRL's SFTConfig" if supervised else "transformers' TrainingArguments"


_SFT_ONLY = (
    *(
        "max_length",
        "max_seq_length",
        "packing",
        "assistant_only_loss",
        "completion_only_loss",
        "packing_strategy",
    ),
    *("dataset_text_field", "dataset_mixture", "dataset_mixer", "use_peft", "dataset_num_proc"),
)


def _model(account: Account) -> None:
    """Model, revision and dtype, alone or inside `model_init_kwargs`."""
    if "model_name_or_path" in account:
        account.take("model_name_or_path", "model.path", account.read("model_name_or_path", text))
    inside = account.read("model_init_kwargs", mapping_of)
    if inside is not None:
        account.seen.add("model_init_kwargs")
        account.note("model_init_kwargs", "taken", "see the keys in it")
    for key in ("model_revision", "model_init_kwargs.revision"):
        revision = account.raw(key)
        if revision not in (None, "main"):
            account.take(key, "model.revision", account.read(key, text))
        elif revision:
            account.note(key, "idle", "the newest, as by default")
    named = [*("torch_dtype", "dtype"), *("model_init_kwargs.torch_dtype", "model_init_kwargs.dtype")]
    for key in named:
        _dtype(account, key)


def _dtype(account: Account, key: str) -> None:
    given = account.raw(key)
    if given is None:
        return
    if str(given) in parts.DTYPES:
        account.take(key, "model.dtype", parts.DTYPES[str(given)])
    elif str(given) == "auto":
        account.note(
            key,
            "other",
            "the dtype that the weights are saved in; write it as `model.dtype` (float32 is planned now)",
        )
    else:
        account.note(key, "other", f"arisk has no dtype {given!r}: weights are kept in float32")


def _adapter(account: Account) -> None:
    """LoRA and quantised weights of TRL's `ModelConfig`."""
    if account.read("use_peft", truth):
        account.note("use_peft", "taken", "model.adapter")
        parts.lora(account, LORA)
        for name, value in {"r": 16, "alpha": 32, "dropout": 0.05, "target_modules": None}.items():
            account.assume(f"model.adapter.{name}", value, "its default")
        parts.quantization(account, four="load_in_4bit", eight="load_in_8bit", options=QUANTIZED)
        return
    if "use_peft" in account:
        account.note("use_peft", "idle", "every parameter trains")
    for key in (*LORA, "load_in_4bit", "load_in_8bit", *QUANTIZED):
        if account.raw(key) is not None:
            account.note(key, "idle", "`use_peft` is off: every parameter trains")


def _data(account: Account) -> None:
    """Data sets: one by name, a mixture, or the handbook's."""
    name = account.read("dataset_name", text)
    if name is not None:
        found: dict[str, Any] = {"path": name}
        for key, target in {"dataset_config": "subset", "dataset_train_split": "split"}.items():
            value = account.read(key, text)
            if value is not None:
                found[target] = value
                account.note(key, "taken", f"finetune.{target}: {value}")
        _named_sets(account, "dataset_name", [found])
    mixture = account.raw("dataset_mixture")
    for key, given in {"datasets": account.raw("datasets"), "dataset_mixture.datasets": mixture}.items():
        several = given.get("datasets") if isinstance(given, Mapping) else given
        if isinstance(several, list):
            _mixture(account, key, several)
    size = "dataset_mixture.test_split_size"
    account.apply(
        {size: taken("finetune.val_set_size", number), "dataset_mixture.seed": idle("order of rows")}
    )
    if size in account.seen and len(account.several("dataset_mixture.datasets")) > 1:
        said = "rows are set aside of all data sets together there, and of each one here: write it below one"
        account.note(size, "other", said)
    _mixer(account)


def _mixer(account: Account) -> None:
    """The handbook's older mixture: data set → share, for each of the training splits."""
    mixer = account.raw("dataset_mixer")
    if isinstance(mixer, Mapping):
        splits = [
            split for split in account.several("dataset_splits") or ["train"] if "test" not in str(split)
        ]
        pairs = [(path, share, split) for path, share in mixer.items() for split in splits]
        sets = [{"path": str(path), "split": str(split), "weight": share} for path, share, split in pairs]
        _named_sets(account, "dataset_mixer", sets)
        if "dataset_splits" in account:
            account.note("dataset_splits", "taken", f"finetune.split: {', '.join(map(str, splits))}")
    account.apply(
        dict.fromkeys(("dataset_configs", "dataset_dir"), other("name it as `subset` of the data set"))
    )


def _mixture(account: Account, key: str, given: list[Any]) -> None:
    """TRL's and the handbook's list of data sets."""
    sets: list[dict[str, Any]] = []
    for each in given:
        if not isinstance(each, Mapping):
            continue
        names = {"path": "path", "id": "path", "name": "subset", "config": "subset", "split": "split"}
        given_names = {
            ours: str(each[theirs]) for theirs, ours in names.items() if each.get(theirs) is not None
        }
        found: dict[str, Any] = dict(given_names)
        files = each.get("data_files")
        if isinstance(files, str):
            found["path"] = files
        share = each.get("weight", each.get("fraction"))
        if share is not None and float(share) != 1:
            found["weight"] = float(share)
        sets.append({name: value for name, value in found.items() if (name, value) != ("subset", "default")})
    _named_sets(account, key, sets)


def _named_sets(account: Account, key: str, sets: list[dict[str, Any]]) -> None:
    for each in sets:
        if each.get("weight") in (1, 1.0):
            del each["weight"]
    if sets:
        parts.add_sets(account, key, sets)
        account.note(key, "taken", f"finetune: {', '.join(each.get('path', '?') for each in sets)}")


def _loss(account: Account) -> None:
    """Which tokens train, how long a row may be, and packing."""
    for key, kind in {"assistant_only_loss": "assistant", "completion_only_loss": "completion"}.items():
        given = account.read(key, truth)
        if given:
            account.take(key, "finetune.loss_on", kind)
        elif given is False and kind == "completion":
            account.take(key, "finetune.loss_on", "all")
        elif given is False:
            account.note(key, "idle", "switched off")
    _length(account)
    column = account.read("dataset_text_field", text)
    if column not in (None, "text"):
        account.take("dataset_text_field", "finetune.text_column", column)
    account.idle(["dataset_text_field"], "the usual column")
    kind = account.raw("loss_type")
    if kind in (None, "nll", "chunked_nll"):
        if kind:
            account.note("loss_type", "idle", "the loss that is planned")
    else:
        account.note(
            "loss_type", "other", f"{kind!r} weighs tokens in another way: gradients differ at every step"
        )
    _packing(account)


def _length(account: Account) -> None:
    """The longest row; null is no limit."""
    for key in ("max_length", "max_seq_length"):
        if account.raw(key) is not None:
            account.take(key, "finetune.max_length", account.read(key, whole))
        elif key == "max_length" and key in account.source.mapping:
            account.take(key, "finetune.max_length", UNLIMITED, note="no limit", computed=True)


def _packing(account: Account) -> None:
    """TRL's packing: of whole rows by default."""
    given = account.read("packing_strategy", text)
    known = {None: "bfd", "bfd": "bfd", "wrapped": "wrapped", "bfd_split": "bfd", "bfd-requeue": "bfd"}
    if given is not None and not account.raw("packing"):
        account.note("packing_strategy", "idle", "packing is off")
    elif given is not None and known.get(given) != given:
        cut = "the rest of a row that is longer than `max_length` is packed as a row of its own, and cut here"
        unknown = f"arisk does not know {given!r} and packs whole rows, best fit first"
        account.note("packing_strategy", "other", cut if given in known else unknown)
    elif given is not None:
        account.note("packing_strategy", "taken", f"training.packing: {given}")
    parts.packing(account, "packing", kind=known.get(given, "bfd"))
