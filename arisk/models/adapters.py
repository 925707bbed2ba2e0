"""LoRA adapters through peft: a new one as the fine-tune would make it, or an existing folder."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import nn

from arisk.base.errors import ConfigError, InputError
from arisk.config.plan import AdapterConfig
from arisk.models.loading import hf_module

__all__ = ["attach_adapter", "target_modules"]


def attach_adapter(model: Any, config: AdapterConfig, *, seed: int) -> Any:
    """The model with its adapter; the global random state is left as found.

    Args:
        model: a transformers model.
        config: a new adapter, or the path of one.
        seed: seed of a new adapter's A matrices.

    Raises:
        ConfigError: the targets match no module.
        InputError: the folder is no peft adapter, or does not fit the model.
        MissingExtraError: peft is not installed.
    """
    peft = hf_module("peft")
    if config.path is not None:
        return _existing(peft, model, config)
    target_modules(model, config)
    lora = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft asks transformers for names that the next release drops: nothing a user can act on.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        return peft.get_peft_model(model, lora)


def _existing(peft: Any, model: Any, config: AdapterConfig) -> Any:
    path = config.path
    assert path is not None
    if path.exists() and not (path / "adapter_config.json").exists():
        raise InputError(
            "this folder is no peft adapter: it has no adapter_config.json",
            where=f"model.adapter: {path}",
            fix="give the folder that save_pretrained of the adapter wrote",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return peft.PeftModel.from_pretrained(model, str(path), is_trainable=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as err:
        raise InputError(
            f"the adapter cannot be loaded: {str(err).strip().splitlines()[0]}",
            where=f"model.adapter: {path}",
            fix="give an adapter that was trained on this base model",
        ) from err


def target_modules(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Linear modules a new adapter would wrap.

    Raises:
        ConfigError: none match; names some that exist.
    """
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    wanted = config.target_modules
    if wanted == "all-linear":
        return [name for name in linear if not name.endswith("lm_head")]
    if isinstance(wanted, str):
        try:
            found = [name for name in linear if re.fullmatch(wanted, name)]
        except re.error as err:
            raise ConfigError(
                f"target_modules is not a valid regular expression: {err}",
                where="model.adapter.target_modules",
                fix="give `all-linear`, a list of names, or a valid expression",
            ) from err
    else:
        found = [name for name in linear if any(name == t or name.endswith(f".{t}") for t in wanted)]
    if not found:
        ends = sorted({name.rpartition(".")[2] for name in linear})
        raise ConfigError(
            f"target_modules {wanted!r} matches no linear module",
            where="model.adapter.target_modules",
            fix=f"use `all-linear` or some of {ends}",
        )
    return found
