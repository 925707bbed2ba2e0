"""The names of transformers, TRL and peft for settings of the plan: `num_train_epochs` is `epochs`.

A setting given under both names must have one value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

__all__ = ["ALIASES", "Alias", "canonical", "same_setting"]


class Alias(NamedTuple):
    """A foreign name of a setting.

    Attributes:
        key: arisk's name.
        read: value under the foreign name → value of the setting; `UNSAID` where it says nothing.
    """

    key: str
    read: Callable[[Any], Any] = lambda value: value


#: What a foreign name reads as when it leaves the setting open, as `bf16: false` does.
UNSAID = object()


def _switch(kind: str) -> Callable[[Any], Any]:
    """`bf16: true` as `precision: bf16`."""
    return lambda value: kind if value is True or str(value).lower() in ("true", "auto") else UNSAID


def _dtype(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, str) else value


def _revision(value: Any) -> Any:
    return UNSAID if value == "main" else value


#: Sections of the config → foreign names in it.
ALIASES: Mapping[str, Mapping[str, Alias]] = {
    "training": {
        "num_train_epochs": Alias("epochs"),
        "per_device_train_batch_size": Alias("batch_size"),
        "gradient_accumulation_steps": Alias("gradient_accumulation"),
        "lr_scheduler_type": Alias("schedule"),
        "lr_scheduler_kwargs": Alias("schedule_args"),
        "optim": Alias("optimizer"),
        "optim_args": Alias("optimizer_args"),
        "adam_epsilon": Alias("eps"),
        "dataloader_drop_last": Alias("drop_last"),
        "bf16": Alias("precision", _switch("bf16")),
        "fp16": Alias("precision", _switch("fp16")),
    },
    "model": {
        "model_name_or_path": Alias("path"),
        "model_revision": Alias("revision", _revision),
        "torch_dtype": Alias("dtype", _dtype),
        "load_in_4bit": Alias("quantization", lambda value: "4bit" if value else UNSAID),
        "load_in_8bit": Alias("quantization", lambda value: "8bit" if value else UNSAID),
    },
    "adapter": {
        "lora_r": Alias("r"),
        "lora_alpha": Alias("alpha"),
        "lora_dropout": Alias("dropout"),
        "lora_target_modules": Alias("target_modules"),
        "lora_modules_to_save": Alias("modules_to_save"),
        "lora_target_parameters": Alias("target_parameters"),
    },
    "data": {
        "dataset_name": Alias("path"),
        "dataset_config": Alias("subset"),
        "max_seq_length": Alias("max_length"),
        "dataset_text_field": Alias("text_column"),
    },
}


def canonical(section: str, value: Any) -> Any:
    """A section under arisk's own names.

    Args:
        section: a key of `ALIASES`.
        value: the section as given; what is no mapping stays as it is.

    Raises:
        ValueError: one setting has two values.
    """
    if not isinstance(value, Mapping):
        return value
    found = {key: each for key, each in value.items() if key not in ALIASES[section]}
    said = {key: key for key in found}
    given = {name: value[name] for name in ALIASES[section] if name in value}
    if section == "training":
        _trainer_values(found)
        _betas(value, found, said)
    for name, each in given.items():
        key, read = ALIASES[section][name]
        translated = read(each)
        if translated is UNSAID:
            continue
        if key in found and found[key] != translated:
            raise ValueError(f"`{said[key]}: {value[said[key]]}` and `{name}: {each}` contradict each other")
        found[key], said[key] = translated, name
    return found


def _trainer_values(found: dict[str, Any]) -> None:
    """Values by which transformers' Trainer means another setting: -1 steps, a share of warm-up steps."""
    if found.get("max_steps") in (-1, "-1"):
        del found["max_steps"]
    warmup = found.get("warmup_steps")
    if isinstance(warmup, float) and 0 < warmup < 1:
        found.setdefault("warmup_ratio", found.pop("warmup_steps"))


def _betas(value: Mapping[str, Any], found: dict[str, Any], said: dict[str, str]) -> None:
    """`adam_beta1` and `adam_beta2` as `betas`."""
    for name in ("adam_beta1", "adam_beta2"):
        found.pop(name, None)
        said.pop(name, None)
    pair = [value.get("adam_beta1"), value.get("adam_beta2")]
    if pair == [None, None]:
        return
    both = [0.9 if pair[0] is None else pair[0], 0.999 if pair[1] is None else pair[1]]
    if "betas" in found and list(found["betas"]) != both:
        raise ValueError(
            f"`betas: {found['betas']}` and `adam_beta1`, `adam_beta2`: {both} contradict each other"
        )
    found["betas"] = both


def same_setting(section: str, key: str) -> set[str]:
    """All names of the setting that a key names, itself among them."""
    table = ALIASES.get(section, {})
    own = table[key].key if key in table else key
    return {own, *(name for name, alias in table.items() if alias.key == own)}
