"""Which parameters train: all, those of an adapter, or those matching name patterns; and the adapters.

A LoRA adapter through peft is a new one as the fine-tune would make it, or an existing folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from arisk.base.errors import ConfigError, InputError, MissingExtraError
from arisk.base.task import LoraPair
from arisk.config.plan import AdapterConfig, ParameterGlobs
from arisk.models.loading import cause_of, first_line, hf_module, require_files
from arisk.models.soundness import require_finite, require_whole_adapter

__all__ = [
    "LORA_MARKERS",
    "allowed_parameters",
    "attach_adapter",
    "lora_names",
    "lora_pairs",
    "out_of_reach",
    "select_parameters",
    "target_modules",
]

#: A parameter whose name contains one of these (case ignored) belongs to a LoRA adapter.
LORA_MARKERS = ("lora_", "lora_A", "lora_B")


def select_parameters(model: nn.Module, choice: str | ParameterGlobs) -> list[str]:
    """Names of the selected parameters in the model's order; tied parameters stand once.

    Args:
        model: the model, adapter attached.
        choice: "full" (every floating-point parameter; of a model with frozen ones, those that
            require a gradient), "lora" (its LoRA matrices alone), "auto" (what requires a gradient where
            there is an adapter: with its biases and `modules_to_save`; else full), or include / exclude
            patterns.

    Raises:
        ConfigError: nothing matches, or a pattern matches nothing.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]
    lora = lora_names(model)
    if isinstance(choice, ParameterGlobs):
        return _matching([name for name, _ in named], choice)
    if choice == "lora":
        return _require(lora, "mode is lora, and the model has no LoRA parameters", named)
    trainable = [name for name, p in named if p.requires_grad]
    if choice == "auto" and lora:
        return trainable or lora
    trainable = trainable or [name for name, _ in named]
    return _require(trainable, "the model has no floating-point parameters", named)


def lora_names(model: nn.Module, markers: Sequence[str] = LORA_MARKERS) -> list[str]:
    """Names of floating-point parameters that contain a marker, case ignored.

    Where some of them require a gradient, only those: a frozen adapter may lie beside one that trains.
    """
    wanted = [marker.lower() for marker in markers]
    found = {
        name: p.requires_grad
        for name, p in model.named_parameters()
        if p.is_floating_point() and any(marker in name.lower() for marker in wanted)
    }
    return [name for name, trained in found.items() if trained] or list(found)


def allowed_parameters(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Exactly these parameters, in the model's order.

    Args:
        model: the model.
        names: as `named_parameters` gives them; all of them must require a gradient.

    Raises:
        ConfigError: names are missing, frozen or given twice; every one is named.
    """
    parameters = dict(model.named_parameters())
    wrong = {
        "not in the model": [name for name in dict.fromkeys(names) if name not in parameters],
        "frozen": [n for n in dict.fromkeys(names) if n in parameters and not parameters[n].requires_grad],
        "given twice": [name for name in dict.fromkeys(names) if list(names).count(name) > 1],
    }
    said = [f"{why}: {', '.join(map(repr, which))}" for why, which in wrong.items() if which]
    if said or not names:
        close = [difflib.get_close_matches(n, parameters, n=1) for n in wrong["not in the model"]]
        near = [f"{n!r} → {c[0]!r}" for n, c in zip(wrong["not in the model"], close, strict=True) if c]
        raise ConfigError(
            "parameter names that cannot be selected: " + "; ".join(said)
            if said
            else "no parameter is named",
            where="fisher.parameter_names",
            fix=f"did you mean {', '.join(near)}?"
            if near
            else "take names from `model.named_parameters()` that require a gradient, each once",
        )
    return [name for name in parameters if name in set(names)]


def _require(names: list[str], what: str, named: Sequence[tuple[str, nn.Parameter]]) -> list[str]:
    if names:
        return names
    example = named[0][0] if named else "none"
    raise ConfigError(
        f"{what} (first parameter: {example})",
        where="model.parameters",
        fix="add an `adapter` section (or attach adapters in Python), or use `full`",
    )


def _matching(names: list[str], globs: ParameterGlobs) -> list[str]:
    """Names matched by an include pattern and by no exclude pattern."""
    for kind, patterns in (("include", globs.include), ("exclude", globs.exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"the {kind} pattern {pattern!r} matches no parameter",
                    where=f"model.parameters.{kind}",
                    fix=f"use patterns such as '*mlp*'; names look like {names[0]!r}",
                )
    kept = [
        name
        for name in names
        if any(fnmatchcase(name, pattern) for pattern in globs.include)
        and not any(fnmatchcase(name, pattern) for pattern in globs.exclude)
    ]
    if not kept:
        raise ConfigError(
            "the exclude patterns leave no parameter",
            where="model.parameters",
            fix="exclude fewer, or include more",
        )
    return kept


def lora_pairs(model: nn.Module, names: Sequence[str]) -> list[LoraPair]:
    """Adapters ΔW = scaling · B A among the selected parameters, for peft's linear LoRA layers.

    Variants whose ΔW is another function of A and B (DoRA) and those of fused experts, whose A and B hold
    one block per expert, are none.
    """
    selected = set(names)
    pairs: list[LoraPair] = []
    for prefix, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if not isinstance(scaling, dict) or not hasattr(module, "lora_A"):
            continue
        if getattr(module, "num_experts", 1) != 1:
            continue
        for adapter, factor in scaling.items():
            if adapter in getattr(module, "lora_variant", {}):
                continue
            a, b = f"{prefix}.lora_A.{adapter}.weight", f"{prefix}.lora_B.{adapter}.weight"
            if a in selected and b in selected:
                pairs.append(LoraPair(a, b, float(factor)))
    return pairs


#: Values of `init_lora_weights` whose start needs data or the caller's help.
FROM_DATA = ("eva", "corda", "lora_ga", "loftq")


def attach_adapter(model: Any, config: AdapterConfig, *, seed: int) -> Any:
    """The model with its adapter; the global random state is left as found.

    Args:
        model: a transformers model.
        config: a new adapter, or the path of one.
        seed: seed of a new adapter's A matrices.

    Raises:
        ConfigError: the targets match no module, or peft refuses the settings.
        InputError: the folder is no peft adapter, or does not fit the model.
        MissingExtraError: peft, or a package that this kind of adapter needs, is not installed.
    """
    peft = hf_module("peft")
    if config.path is not None:
        return _existing(peft, model, config)
    target_modules(model, config)
    arguments = _known_to(peft, config.lora_arguments())
    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft asks transformers for names that the next release drops, and warns of merging and saving,
        # which arisk does not do: nothing a user can act on here.
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **arguments))
        except ImportError as err:
            raise MissingExtraError(
                f"this adapter needs a further package: {first_line(err)}",
                where="model.adapter",
                fix="install it, or leave out the key that asks for it",
            ) from err
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError) as err:
            raise ConfigError(
                f"peft refuses this adapter: {first_line(err)}",
                where="model.adapter",
                fix=_other_targets(model, str(err))
                or "change the key it names; the keys are those of peft's LoraConfig",
            ) from err


def _other_targets(model: nn.Module, message: str) -> str | None:
    """The linear modules that peft does not refuse; None where its message refuses none (Mamba has some)."""
    refused = re.search(r"Incompatible modules: \{(.*?)\}", message)
    if refused is None:
        return None
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    ends = {name.removesuffix(".base_layer").rpartition(".")[2] for name in linear if "lora_" not in name}
    left = sorted(ends - set(re.findall(r"'(\w+)'", refused[1])) - {"lm_head"})
    return f"name the modules in `target_modules`: {left}"


def _known_to(peft: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, if this peft has them all and starts from random adapters.

    Raises:
        ConfigError: a key is not one of its `LoraConfig`, or asks for a start computed from data.
    """
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    for key, value in arguments.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(
                f"peft {peft.__version__} has no LoRA setting {key!r}",
                where="model.adapter",
                fix=f"did you mean `{close[0]}`?" if close else "install a newer peft, or leave the key out",
            )
        if key == "init_lora_weights" and value in FROM_DATA:
            raise ConfigError(
                f"{value!r} computes the adapter's start from data, which only its own script does",
                where="model.adapter.init_lora_weights",
                fix="save the initialised adapter (save_pretrained) and give its folder as `model.adapter`",
            )
    return arguments


def _existing(peft: Any, model: Any, config: AdapterConfig) -> Any:
    path = config.path
    assert path is not None
    if path.exists() and not (path / "adapter_config.json").exists():
        raise InputError(
            "this folder is no peft adapter: it has no adapter_config.json",
            where=f"model.adapter: {path}",
            fix="give the folder that save_pretrained of the adapter wrote",
        )
    if path.is_dir():
        require_files(path, "model.adapter")
    if path.is_dir() and not any(path.glob("*.safetensors")):
        raise InputError(
            "this adapter has no .safetensors file, and pickle files can run code when they are read",
            where=f"model.adapter: {path}",
            fix="save it again with a present peft, which writes adapter_model.safetensors",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = peft.PeftModel.from_pretrained(model, str(path), is_trainable=True)
            expected = peft.get_peft_model_state_dict(made, save_embedding_layers=False)
            found = peft.load_peft_weights(str(path), device="cpu")
    except Exception as err:
        raise InputError(
            f"the adapter cannot be loaded: {cause_of(err)}",
            where=f"model.adapter: {path}",
            fix="give an adapter that was trained on this base model",
        ) from err
    require_whole_adapter(expected, found, made.state_dict(), f"model.adapter: {path}")
    require_finite(made, f"model.adapter: {path}")
    return made


def out_of_reach(model: nn.Module) -> tuple[float, list[tuple[str, float]]]:
    """Weights of the base model that training cannot change, because no adapter lies on them.

    Embeddings, routers, and experts held as one tensor of three dimensions are no linear modules: targets by
    name pass them by.

    Args:
        model: with its adapter attached.

    Returns:
        Their share of the base model's weights, in [0, 1], and the largest of them with their shares, `*` for
        numbers in their names (`model.layers.*.mlp.experts.down_proj`); none below one per cent.
    """
    reached: set[int] = set()
    for module in model.modules():
        base: Any = getattr(module, "get_base_layer", None)
        if hasattr(module, "lora_A") and base is not None:
            reached.add(id(getattr(base(), getattr(module, "parameter_name", "weight"), None)))
    total, left = 0, dict[str, int]()
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            continue
        size: int = parameter.numel()
        total += size
        replaced = ".original_module." in name  # by a copy that trains, of `modules_to_save`
        if id(parameter) not in reached and not parameter.requires_grad and not replaced:
            plain = re.sub(r"\.\d+\.", ".*.", name.removeprefix("base_model.model."))
            plain = plain.replace(".base_layer", "").removesuffix(".weight")
            left[plain] = left.get(plain, 0) + size
    shares = {name: count / max(total, 1) for name, count in left.items()}
    largest = sorted(shares.items(), key=lambda item: -item[1])
    return sum(shares.values()), [(name, share) for name, share in largest if share >= 0.01]


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
    wanted = config.lora_arguments()["target_modules"]
    if wanted is None or config.target_parameters:
        return linear  # peft chooses, or has targets that are no modules
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
