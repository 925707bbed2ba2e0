"""LLaMA-Factory's YAML: transformers' TrainingArguments, and arguments for method, model and data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arisk.config.imports import parts
from arisk.config.imports.account import Account, Rule, idle, number, other, taken, text, truth, whole
from arisk.config.imports.trainer import trainer_core

__all__ = ["read_llama_factory", "recognise_llama_factory"]

_FAST = "speed and memory; numbers differ by rounding at most"
STAGES = {
    "rm": "the training of a reward model",
    "ppo": "a reinforcement learning run",
    "dpo": "a preference training (DPO)",
    "kto": "a KTO training",
}


def _each(why: str, *keys: str) -> dict[str, Rule]:
    return dict.fromkeys(keys, idle(why))


TABLE: dict[str, Rule] = {
    "model_name_or_path": taken("model.path", text),
    "trust_remote_code": taken("model.trust_remote_code", truth),
    "val_size": taken("finetune.val_set_size", number),
    "max_samples": taken("finetune.max_samples", whole),
    "loraplus_lr_ratio": taken("training.loraplus_lr_ratio", number),
    "loraplus_lr_embedding": idle("adapters of embeddings alone have it"),
    "stage": idle("supervised fine-tuning"),
    "create_new_adapter": other("a second adapter is trained on top of the first", False),
    "pissa_init": other(
        "the adapter starts from the largest singular vectors of the weights, not from zero", False
    ),
    "pissa_iter": idle("it belongs to `pissa_init`"),
    "pissa_convert": idle("it belongs to `pissa_init`"),
    "use_galore": other(
        "GaLore projects the gradients: plan `optimizer: galore_adamw`, of which arisk says more", False
    ),
    "use_apollo": other("APOLLO scales the gradients in another way than adamw", False),
    "use_badam": other("BAdam trains one block of layers at a time", False),
    "use_muon": other("Muon is another optimizer: plan `optimizer: muon`", False),
    "use_adam_mini": other("Adam-mini shares second moments within blocks", False),
    "use_dft_loss": other("DFT weighs tokens by their probability: gradients differ at every step", False),
    "use_asft_loss": other("another loss: gradients differ at every step", False),
    "use_eaft_loss": other("another loss: gradients differ at every step", False),
    "use_llama_pro": other("only added layers train", False),
    "mixture_of_depths": other("layers are skipped for some tokens: another model"),
    "shift_attn": other("shifted sparse attention (LongLoRA) is another model while it trains", False),
    "rope_scaling": other("positions are scaled: another model"),
    "resize_vocab": other("the vocabulary grows, and the new embeddings are untrained", False),
    "add_tokens": other("tokens are added to the vocabulary, and their embeddings are new"),
    "add_special_tokens": other("tokens are added to the vocabulary, and their embeddings are new"),
    "moe_aux_loss_coef": other("the balance loss of a mixture of experts is left out", 0),
    "train_from_scratch": other("the weights are random: there is no aligned model", False),
    "fp8": other("8-bit floating point rounds every product", False),
    "mix_strategy": other("data sets are mixed row by row, and the number of rows differs", "concat"),
    "interleave_probs": other("data sets are mixed row by row, and the number of rows differs"),
    "streaming": other("rows are read as a stream, and shuffled within a buffer only", False),
    "enable_thinking": idle(
        "whether the template leaves room for a thought; see the rendered rows in `check`"
    ),
    "tool_format": other("tool calls are written in a format of its own"),
    "freeze_vision_tower": idle("images are not modelled"),
    "freeze_multi_modal_projector": idle("images are not modelled"),
    "freeze_language_model": other("the language model itself is frozen", False),
    "early_stopping_steps": other("the run may stop earlier: read the forecast at that step"),
    "default_system": other("a system turn stands before each row: tokens differ"),
    **_each(
        _FAST,
        *(
            "flash_attn",
            "use_unsloth",
            "use_unsloth_gc",
            "enable_liger_kernel",
            "disable_gradient_checkpointing",
        ),
        *("use_reentrant_gc", "low_cpu_mem_usage", "use_kv_cache", "use_v1_kernels", "offload_folder"),
        *("upcast_layernorm", "upcast_lmhead_output", "use_fast_tokenizer", "infer_backend", "infer_dtype"),
        *("quantization_device_map", "use_kt", "cpu_infer", "compute_accuracy"),
    ),
    "disable_shuffling": other("rows come in the order of the files: the order of rows differs", False),
    **_each(
        "reporting, evaluation and saving",
        *("plot_loss", "include_effective_tokens_per_second", "eval_dataset", "eval_num_beams", "export_dir"),
        *("eval_on_each_dataset", "use_swanlab", "swanlab_project", "swanlab_run_name", "swanlab_mode"),
        *("swanlab_workspace", "swanlab_api_key", "swanlab_logdir", "print_param_status", "hf_hub_token"),
        *("ms_hub_token", "om_hub_token", "trackio_space_id", "include_mfu", "export_size", "export_device"),
    ),
    **_each(
        "how data is loaded",
        *(
            "overwrite_cache",
            "preprocessing_num_workers",
            "preprocessing_batch_size",
            "tokenized_path",
            "media_dir",
        ),
        *("buffer_size", "cache_dir", "ignore_pad_token_for_loss", "image_max_pixels", "image_min_pixels"),
        *("video_max_pixels", "video_min_pixels", "video_fps", "video_maxlen", "split_special_tokens"),
    ),
    **_each(
        "how the work is spread over the machine", "ray_run_name", "ray_num_workers", "resources_per_worker"
    ),
    **_each("it belongs to another stage", "pref_beta", "pref_loss", "pref_ftx", "dpo_label_smoothing"),
}
#: Keys of GaLore and its relatives follow the switch above them.
BRANCHES = (
    "galore_",
    "apollo_",
    "badam_",
    "freeze_trainable",
    "freeze_extra",
    "oft_",
    "muon_",
    "swanlab_",
    "ppo_",
)
LORA: dict[str, tuple[str, Any]] = {
    "lora_rank": ("r", whole),
    "lora_alpha": ("alpha", number),
    "lora_dropout": ("dropout", number),
    "use_rslora": ("use_rslora", truth),
    "use_dora": ("use_dora", truth),
}


def recognise_llama_factory(mapping: Mapping[str, Any]) -> bool:
    """Whether this is a config of LLaMA-Factory."""
    own = {"finetuning_type", "lora_rank", "lora_target", "cutoff_len", "template", "stage", "dataset"}
    return len((own | {"quantization_bit", "dataset_dir"}) & set(mapping)) >= 2


def read_llama_factory(account: Account) -> str:
    """Read a config of LLaMA-Factory.

    Returns:
        What the file is.

    Raises:
        ConfigError: it plans no supervised fine-tune, or a value is wrong.
    """
    stage = str(account.raw("stage") or "sft")
    if stage in STAGES:
        parts.refuse(account, "stage", STAGES[stage])
    method = str(account.raw("finetuning_type") or "lora")
    if "model_revision" in account and account.raw("model_revision") != "main":
        account.take("model_revision", "model.revision", account.read("model_revision", text))
    _dtype(account, method)
    _adapter(account, method)
    _data(account, stage)
    account.apply(TABLE)
    trainer_core(account)
    for key in list(account.source.mapping):
        if str(key).startswith(BRANCHES) and key not in account.seen:
            account.note(str(key), "idle", "it belongs to a method that has a switch of its own")
    return "LLaMA-Factory"


def _dtype(account: Account, method: str) -> None:
    """Frozen and adapter-trained weights are held in half precision, fully trained ones in float32."""
    pure = account.raw("pure_bf16") is True
    if "pure_bf16" in account:
        if pure:
            account.take("pure_bf16", "model.dtype", "bfloat16")
        else:
            account.note("pure_bf16", "idle", "switched off")
    for key, kind in {"bf16": "bfloat16", "fp16": "float16"}.items():
        if account.raw(key) is True and not pure and method != "full":
            account.assume("model.dtype", kind, f"the frozen weights are held in it under {key}")


def _adapter(account: Account, method: str) -> None:
    keys = (*LORA, "lora_target", "additional_target")
    existing = account.read("adapter_name_or_path", text) if method == "lora" else None
    if method == "lora":
        account.apply({"finetuning_type": idle("LoRA, see `model.adapter`")})
        if existing:
            account.take("adapter_name_or_path", "model.adapter.path", existing)
            account.idle(keys, "the existing adapter has settings of its own")
        else:
            _new_adapter(account)
    elif method == "full":
        account.note("finetuning_type", "taken", "every parameter trains")
    else:
        account.note(
            "finetuning_type",
            "other",
            f"arisk has no method {method!r}: every parameter is planned; name those that train as "
            "`model.parameters: {include: […]}`",
        )
    account.idle(keys, "there is no adapter")
    _quantization(account)


def _quantization(account: Account) -> None:
    bits = account.read("quantization_bit", whole)
    options = ("quantization_type", "double_quantization")
    if str(account.raw("quantization_method") or "bnb") not in ("bnb", "bitsandbytes"):
        account.note("quantization_method", "other", "another method than bitsandbytes rounds the weights")
    if bits in (4, 8):
        kind = str(account.raw("quantization_type") or "nf4")
        four = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": account.raw("double_quantization") is not False,
            "bnb_4bit_compute_dtype": account.into.plan.get("model.dtype", "float32"),
        }
        account.take("quantization_bit", "model.quantization", four if bits == 4 else {"load_in_8bit": True})
        for key in options:
            if account.raw(key) is not None:
                account.note(key, "taken", "model.quantization")
    elif bits is not None:
        account.note(
            "quantization_bit", "other", f"weights of {bits} bits cannot be loaded: full ones are planned"
        )
    account.idle(("quantization_method", *options), "bitsandbytes, or not quantised")


def _new_adapter(account: Account) -> None:
    parts.lora(account, LORA)
    account.assume("model.adapter.r", 8, "its default")
    account.assume(
        "model.adapter.alpha", 2 * account.into.plan["model.adapter.r"], "twice the rank, its default"
    )
    target = account.raw("lora_target")
    if target in (None, "all"):
        if target:
            account.take("lora_target", "model.adapter.target_modules", "all-linear")
        account.assume("model.adapter.target_modules", "all-linear", "its default")
    else:
        account.take("lora_target", "model.adapter.target_modules", _names(target))
    if "additional_target" in account:
        account.take(
            "additional_target", "model.adapter.modules_to_save", _names(account.raw("additional_target"))
        )


def _names(value: Any) -> list[str]:
    given = value if isinstance(value, list) else str(value).split(",")
    return [str(each).strip() for each in given if str(each).strip()]


def _data(account: Account, stage: str) -> None:
    names = _names(account.raw("dataset") or "")
    if names:
        _sets(account, names, stage)
    account.apply({"cutoff_len": taken("finetune.max_length", whole)})
    account.assume("finetune.max_length", 2048, "its default")
    if stage == "pt":
        account.put("finetune.loss_on", "all", account.source.place("stage"))
    for key, kind in {"train_on_prompt": "all", "mask_history": "last"}.items():
        if account.read(key, truth):
            account.take(key, "finetune.loss_on", kind)
    account.idle(("train_on_prompt", "mask_history"), "switched off")
    account.assume("finetune.loss_on", "assistant", "LLaMA-Factory trains every answer")
    parts.template(account, "template", "LLaMA-Factory")
    _packing(account, stage)


def _packing(account: Account, stage: str) -> None:
    """Rows share sequences: cut anywhere in pretraining, where it is the default; whole ones else."""
    if stage == "pt":
        if account.raw("packing") is None:
            account.assume("training.packing", "wrapped", "the default of pretraining")
        parts.packing(account, "packing", kind="wrapped")
        account.idle(["neat_packing"], "it belongs to fine-tuning")
        return
    apart = account.raw("neat_packing") is True
    fits = "rows are packed by a knapsack: other rows share a sequence, and their number may differ a little"
    sees = (
        f"tokens attend to the rows that stand before their own in a sequence; here they do not. And {fits}"
    )
    parts.packing(account, "packing", differs=fits if apart else sees)
    parts.packing(account, "neat_packing", differs="" if account.raw("packing") else fits)


def _sets(account: Account, names: list[str], stage: str) -> None:
    known, place = _registry(account)
    sets = [_set(name, known.get(name), place, stage) for name in names]
    parts.add_sets(account, "dataset", sets)
    account.note("dataset", "taken", f"finetune: {', '.join(each['path'] for each in sets)}")
    account.idle(["dataset_dir"], "where dataset_info.json lies")
    missing = ", ".join(name for name in names if name not in known)
    if missing:
        account.note(
            "dataset",
            "other",
            f"{missing}: no dataset_info.json tells what file this is; write its path as `finetune.path`",
        )


def _registry(account: Account) -> tuple[Mapping[str, Any], Path]:
    """`dataset_info.json` of `dataset_dir`, looked up beside the file and where arisk is called."""
    folder = Path(str(account.raw("dataset_dir") or "data"))
    for place in (folder, Path(account.source.name).parent / folder):
        try:
            found = json.loads((place / "dataset_info.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found, place
    return {}, folder


def _set(name: str, entry: Any, place: Path, stage: str) -> dict[str, Any]:
    """One data set by its entry in the registry."""
    if not isinstance(entry, Mapping):
        return {"path": name}
    found: dict[str, Any] = {}
    if entry.get("hf_hub_url"):
        found["path"] = str(entry["hf_hub_url"])
    else:
        found["path"] = str(place / str(entry.get("file_name", name)))
    names = {"subset": "subset", "split": "split"}
    found.update({ours: str(entry[theirs]) for theirs, ours in names.items() if entry.get(theirs)})
    columns = entry.get("columns")
    columns = columns if isinstance(columns, Mapping) else {}
    if entry.get("formatting") == "sharegpt":
        column = str(columns.get("messages", "conversations"))
        if column not in ("conversations", "messages"):
            found["messages_column"] = column
    elif stage == "pt":
        found.update({"format": "text", "text_column": str(columns.get("prompt", "text"))})
    if entry.get("num_samples"):
        found["max_samples"] = entry["num_samples"]
    return found
