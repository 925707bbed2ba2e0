"""Loading a Hugging Face causal LM and its tokenizer, with plain errors for what is not one.

What is loaded must be sound (`arisk.models.soundness`). The Hugging Face stack is imported where it is needed
and missed with a remedy.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from arisk.base.errors import ArtifactError, ConfigError, InputError, MissingExtraError
from arisk.base.terminal import natives_silenced
from arisk.config.plan import ModelConfig
from arisk.config.yaml import shortened
from arisk.models.soundness import require_finite, require_whole

__all__ = [
    "cause_of",
    "first_line",
    "hf_module",
    "load_model",
    "load_tokenizer",
    "mark_recomputed",
    "model_config",
    "require_files",
    "require_tensors",
    "save_tuned",
]

#: What libraries raise where they took a value for granted; their words then say little.
CONFUSED = (TypeError, AttributeError, IndexError, ArithmeticError, AssertionError, NameError, RecursionError)
#: Ends of files that torch unpickles.
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def _quiet() -> Any:
    """Transformers without progress bars and advice on stderr."""
    transformers = hf_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return transformers


def _require_model_folder(config: ModelConfig) -> None:
    path = Path(str(config.path))
    if not path.exists():
        return
    if not path.is_dir():
        raise InputError(
            "the model path is a file",
            where=f"model.path: {path}",
            fix="give the folder that holds config.json (for a GGUF file, its folder and `gguf_file`)",
        )
    require_files(path, "model.path")
    wanted = config.gguf_file or "config.json"
    if not (path / wanted).exists() and (path / "adapter_config.json").exists():
        raise InputError(
            "this folder is a peft adapter without its base model",
            where=f"model.path: {path}",
            fix="give the base model as model.path, and this folder as model.adapter",
        )
    if not (path / wanted).exists():
        raise InputError(
            f"this folder is no Hugging Face model: it has no {wanted}",
            where=f"model.path: {path}",
            fix="give a folder made by save_pretrained, with config.json, weights and tokenizer files",
        )


def require_files(folder: Path, where: str) -> None:
    """Refuse a folder with pipes, devices or broken links, on which reading would hang, end never, or fail.

    Raises:
        InputError: names the first.
    """
    try:
        odd = next((f for f in sorted(folder.iterdir()) if not f.is_file() and not f.is_dir()), None)
    except OSError as err:
        raise InputError(
            f"the folder cannot be read: {err.strerror or err}",
            where=f"{where}: {folder}",
            fix="make it readable",
        ) from err
    if odd is not None:
        raise InputError(
            f"{odd.name} is neither a file nor a link to one",
            where=f"{where}: {folder}",
            fix="give a folder of plain files, as save_pretrained writes it",
        )


def _arguments(config: ModelConfig) -> dict[str, Any]:
    given: dict[str, Any] = {
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "gguf_file": config.gguf_file,
        "local_files_only": Path(str(config.path)).exists(),
    }
    return {key: value for key, value in given.items() if value is not None}


def _load(what: str, config: ModelConfig, load: Any, **extra: Any) -> Any:
    """Call a `from_pretrained`, with its many exceptions as one."""
    _require_model_folder(config)
    try:
        return load(str(config.path), **_arguments(config), **extra)
    except ImportError as err:
        if "gguf" in str(err):
            hf_module("gguf")
        raise MissingExtraError(
            f"the {what} needs a further package: {first_line(err)}",
            where=f"model.path: {config.path}",
            fix="install it",
        ) from err
    except Exception as err:
        raise InputError(
            f"the {what} cannot be loaded: {cause_of(err)}",
            where=f"model.path: {config.path}",
            fix="give a folder made by save_pretrained, or a hub id that this machine can reach",
        ) from err


def first_line(err: BaseException) -> str:
    """The first line of an exception's words, shortened; its type where it has none."""
    lines = str(err).strip().splitlines()
    return shortened(lines[0], 300) if lines else type(err).__name__


def cause_of(err: Exception) -> str:
    """The cause in the words of its library, and in ours where those say nothing to a reader."""
    line = first_line(err)
    lines = str(err).strip().splitlines()
    if line.endswith(":") and len(lines) > 1:  # A heading, and what it is about.
        line = shortened(f"{line} {lines[1].strip()}", 300)
    if type(err).__name__ == "SafetensorError":
        return f"its weights are cut off or damaged ({line}); an interrupted download looks like this"
    if isinstance(err, KeyError):
        return f"a file lacks {line}, or has it where nobody knows it"
    if line.startswith("Error(s) in loading"):
        return shortened([*str(err).splitlines(), line][1], 300)
    if isinstance(err, CONFUSED):
        return f"a value in its files cannot be what it is ({type(err).__name__}: {line})"
    if "Unrecognized configuration class" in line or "for this kind of AutoModel" in str(err):
        return "its architecture has no causal language model"
    return line


def require_tensors(folder: Path, where: str, fix: str) -> None:
    """Refuse weights in pickle files, which may run code.

    Args:
        folder: of the model.
        where: the model's path, for messages.
        fix: what to do about pickle files.

    Raises:
        InputError: the folder holds no other weights.
    """
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise InputError(
            f"the weights are pickle files ({pickles[0]}), which can run code when they are read",
            where=where,
            fix=fix,
        )
    raise InputError(
        "this folder holds no weights: no .safetensors file",
        where=where,
        fix="give a folder made by save_pretrained, with config.json, weights and tokenizer files",
    )


#: Counts and sizes in a model's config; each layer has a weight, the others are a dimension of some, or near.
LAYERS = re.compile("num_hidden_layers|num_layers|n_layers?")
SIZES = re.compile("expert|head|vocab|hidden_size|n_embd|d_model|intermediate|n_inner|ffn|state_size")
#: How many times the tensors there may be layers, and how many times the largest dimension a size may be: of
#: less the missing and resized weights are told one by one.
MORE_LAYERS, MORE = 8, 64
#: A dimension that is no burden, whatever the weights hold.
ORDINARY = 1000


def _require_sizes(settings: Any, config: ModelConfig) -> None:
    """Refuse a config.json that asks for far more than the weights hold: building that would take all memory.

    Raises:
        InputError: names the setting.
    """
    tensors, largest = _extent(Path(str(config.path)))
    if tensors == 0:
        return
    for key, value in _numbers(settings.to_dict()):
        most = MORE * max(tensors, largest, ORDINARY) if SIZES.search(key) else None
        most = MORE_LAYERS * max(tensors, MORE_LAYERS) if LAYERS.fullmatch(key) else most
        if most is not None and value > most:
            raise InputError(
                f"config.json says {key} = {shortened(str(value))}, and its weights are {tensors} tensors of "
                f"{largest} rows or columns at most",
                where=f"model.path: {config.path}",
                fix="give the config.json of these very weights",
            )


def _numbers(values: Mapping[Any, Any]) -> Iterator[tuple[str, int]]:
    """Whole numbers of a config and of the configs in it, by key."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(key, str) and isinstance(value, int):
            yield key, value


def _extent(folder: Path) -> tuple[int, int]:
    """Tensors in a folder's safetensors files, and their largest dimension; 0 where none can be read."""
    from safetensors import SafetensorError, safe_open

    tensors = largest = 0
    for file in folder.glob("*.safetensors") if folder.is_dir() else ():
        try:
            with safe_open(file, framework="pt") as held:
                shapes = [held.get_slice(name).get_shape() for name in held.keys()]  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError, ValueError):
            return 0, 0  # said when they are read
        tensors += len(shapes)
        largest = max(largest, *(max(shape, default=1) for shape in shapes)) if shapes else largest
    return tensors, largest


def model_config(config: ModelConfig) -> Any:
    """The transformers config alone, without weights."""
    transformers = _quiet()
    return _load("model config", config, transformers.AutoConfig.from_pretrained)


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer, with a padding token.

    Raises:
        InputError: there is none.
        MissingExtraError: transformers is not installed.
    """
    transformers = _quiet()
    with natives_silenced():  # The tokenizers' own code prints keys that it does not know.
        tokenizer = _load("tokenizer", config, transformers.AutoTokenizer.from_pretrained)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_model(
    config: ModelConfig, device: torch.device, *, device_map: str | dict[str, Any] | None = None
) -> Any:
    """The causal LM in the configured dtype and attention, on the device, without a cache.

    Args:
        config: which model, and how.
        device: where it goes as a whole …
        device_map: … or over which devices it is spread.

    Raises:
        InputError: the folder or hub id gives no causal LM, or not all of its weights.
        NumericsError: weights are NaN or infinite.
        ConfigError: the map leaves weights on no device that computes.
        MissingExtraError: transformers (or gguf, accelerate) is not installed.
    """
    transformers = _quiet()
    _require_model_folder(config)
    folder = Path(str(config.path))
    if folder.is_dir() and not config.pickle_weights and not config.gguf_file:
        require_tensors(
            folder,
            f"model.path: {folder}",
            "convert them to safetensors, or set `model.pickle_weights: true` if you trust their source",
        )
    settings = model_config(config)
    _require_sizes(settings, config)
    if getattr(settings, "is_encoder_decoder", False):
        raise InputError(
            "the model is an encoder–decoder, and forecasts are of causal language models",
            where=f"model.path: {config.path}",
            fix="give a decoder-only model",
        )
    extra: dict[str, Any] = {} if config.gguf_file else {"use_safetensors": not config.pickle_weights or None}
    if config.quantization is not None:
        extra["quantization_config"] = _quantization(transformers, config)
        extra["device_map"] = {"": str(device)}
    if device_map is not None:
        hf_module("accelerate")
        extra["device_map"] = device_map
        _require_devices(device_map)
    model, info = _load(
        "model",
        config,
        transformers.AutoModelForCausalLM.from_pretrained,
        dtype=getattr(torch, config.dtype),
        attn_implementation="eager" if config.attention == "auto" else config.attention,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # told with both shapes by `require_whole`, which refuses them
        **extra,
    )
    model.load_notes = require_whole(info, model, f"model.path: {config.path}")
    require_finite(model, f"model.path: {config.path}")
    model.config.use_cache = False
    if config.quantization is not None and device_map is None:
        return model  # placed as it was read: quantised weights do not move
    if device_map is None:
        return model.to(device)
    _require_devices(getattr(model, "hf_device_map", None) or {})
    return model


def _quantization(transformers: Any, config: ModelConfig) -> Any:
    """`BitsAndBytesConfig` of `model.quantization`.

    Raises:
        ConfigError: it refuses the arguments.
        MissingExtraError: bitsandbytes is not installed.
    """
    hf_module("bitsandbytes")
    hf_module("accelerate")
    given: dict[str, Any]
    if config.quantization == "4bit":
        # What QLoRA recipes mean by it: normal floats, computed in the dtype of the other weights.
        given = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": config.dtype}
    elif config.quantization == "8bit":
        given = {"load_in_8bit": True}
    else:
        given = dict(config.quantization or {})
    try:
        return transformers.BitsAndBytesConfig(**given)
    except (TypeError, ValueError, AttributeError) as err:
        raise ConfigError(
            f"bitsandbytes refuses this: {str(err).strip().splitlines()[0]}",
            where="model.quantization",
            fix="give `4bit`, `8bit`, or arguments of BitsAndBytesConfig",
        ) from err


def mark_recomputed(model: Any) -> None:
    """Mark the layers for `arisk.gradients.recomputing`, inside which alone they recompute.

    Args:
        model: the causal LM, its adapter attached.

    Raises:
        ConfigError: the model has no such layers, or drops units by its own flag of training.
    """
    model = getattr(model, "get_base_model", lambda: model)()
    drops = [key for key, value in model.config.to_dict().items() if "drop" in key and value]
    if drops or not getattr(model, "supports_gradient_checkpointing", False):
        why = f"its layers would drop units ({', '.join(drops)})" if drops else "it has no layers that can"
        raise ConfigError(
            f"the model cannot recompute activations: {why}",
            where="model.gradient_checkpointing",
            fix="leave it off, and lower `training.batch_size` (with `gradient_accumulation`) to save memory",
        )
    # The method was renamed within version 5 of transformers.
    renamed = getattr(model, "activation_checkpointing_enable", None)
    (renamed or model.gradient_checkpointing_enable)({"use_reentrant": False})
    # Its hook on the embedding is for reentrant checkpoints alone, and hides per-sample gradients.
    model.disable_input_require_grads()


def _require_devices(device_map: str | dict[str, Any]) -> None:
    """Refuse offloaded weights: they come back for a module's forward pass only, backward keeps them all."""
    if isinstance(device_map, str):
        return
    places = {str(place) for place in device_map.values()}
    if "disk" in places or (len(places) > 1 and "cpu" in places):
        raise ConfigError(
            "part of the model would be offloaded, which saves no memory in a backward pass",
            where="run.device_map",
            fix="use devices that hold the whole model together, a smaller `model.dtype`, or processes that "
            "share it (FSDP2, from Python)",
        )


def hf_module(name: str) -> ModuleType:
    """Import transformers, peft or datasets.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as err:
        if err.name and not name.startswith(err.name):
            what = f"the package {err.name!r}, which {name} needs, is not installed"
        else:
            what = f"the package {name!r} is not installed"
        extra = {"gguf": "gguf", "bitsandbytes": "quantization"}.get(err.name or "", "hf")
        raise MissingExtraError(what, where=f"import {name}", fix=f'pip install "arisk[{extra}]"') from err


def save_tuned(model: Any, config: ModelConfig, folder: Path) -> None:
    """Write a tuned adapter or model with its tokenizer, as `from_pretrained` reads them.

    Args:
        model: a transformers or peft model.
        config: of the model it was, for its tokenizer.
        folder: does not exist, or is empty.

    Raises:
        ArtifactError: the disk is full or the folder cannot be written.
    """
    try:
        with warnings.catch_warnings():
            # peft asks the hub whether the vocabulary grew; what trains is saved all the same.
            warnings.simplefilter("ignore")
            model.save_pretrained(str(folder))
        load_tokenizer(config).save_pretrained(str(folder))
    except OSError as err:
        raise ArtifactError(
            f"the tuned model cannot be written: {err}",
            where=str(folder),
            fix="make room on the disk, empty the folder, and run the same command again",
        ) from err
