"""The selected parameters in a fixed order: names, shapes, modules, and their place in a flat vector.

Measuring without leaving traces: modes, flags, gradients and random state are put back.

Batches may have any shape people use: tensors, tuples, lists, mappings and dataclasses of tensors.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from arisk.base.errors import ConfigError, ShapeError
from arisk.base.task import Batch

__all__ = [
    "ParameterLayout",
    "batch_size",
    "evaluating",
    "in_float32",
    "is_narrow",
    "is_sharded",
    "layout_of",
    "map_tensors",
    "measuring",
    "module_of",
    "move_batch",
    "parameters_of",
    "recomputing",
    "slice_batch",
    "widened",
]


def map_tensors(batch: Batch, change: Callable[[Tensor], Any]) -> Batch:
    """The same structure with every tensor changed; other leaves are kept as they are."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        changed = {key: map_tensors(value, change) for key, value in batch.items()}
        if type(batch) is dict:
            return changed
        try:
            return type(batch)(changed)  # pyright: ignore[reportCallIssue] - BatchEncoding and other dict-likes keep their type
        except TypeError:
            return changed
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {f.name: map_tensors(getattr(batch, f.name), change) for f in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **fields)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, change) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map_tensors(value, change) for value in batch)
    return batch


def _tensors(batch: Batch) -> Iterator[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(batch, keep)
    return iter(found)


def batch_size(batch: Batch) -> int:
    """Number of samples: the common size of dimension 0 of all tensors with a dimension.

    Raises:
        ShapeError: there is no tensor, or the tensors disagree.
    """
    sizes = {tensor.shape[0] for tensor in _tensors(batch) if tensor.ndim > 0}
    if len(sizes) != 1:
        what = (
            f"tensors of a batch disagree on dimension 0: {sorted(sizes)}" if sizes else "no tensor in batch"
        )
        raise ShapeError(
            what,
            where=f"batch of type {type(batch).__name__}",
            fix="let dimension 0 of every tensor be the sample, and keep other values out of the batch",
        )
    return sizes.pop()


def slice_batch(batch: Batch, start: int, stop: int) -> Batch:
    """Samples start … stop − 1, keeping dimension 0; scalars and non-tensors are shared."""
    return map_tensors(batch, lambda tensor: tensor[start:stop] if tensor.ndim > 0 else tensor)


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on a device."""
    return map_tensors(batch, lambda tensor: tensor.to(device))


def is_narrow(tensor: Tensor) -> bool:
    """Whether a tensor has fewer bits than float32."""
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4


@contextmanager
def in_float32(model: nn.Module) -> Generator[None]:
    """Inside, parameters and buffers narrower than float32 are float32; afterwards they are back to the bit.

    The narrow tensors wait on the CPU, so that a device holds the wide ones alone. Tied parameters stay
    tied. A model that has none is left alone.
    """
    narrow = [t for t in (*model.parameters(), *model.buffers()) if is_narrow(t)]
    kept = [(tensor, tensor.data.cpu(), tensor.device) for tensor in narrow]
    try:
        for tensor in narrow:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, old, device in kept:
            tensor.data = old.to(device)


def widened(batch: Batch) -> Batch:
    """The batch with its narrow floating-point tensors in float32."""
    return map_tensors(batch, lambda tensor: tensor.to(torch.float32) if is_narrow(tensor) else tensor)


_LORA = re.compile(r"\.lora_[A-Za-z_]+(\.[^.]+)?(\.weight)?$")


@dataclass(frozen=True)
class ParameterLayout:
    """θ ∈ R^P: the selected parameters, flattened one after the other.

    Attributes:
        names: parameter names; a tied parameter stands once, under its first name.
        shapes: their shapes.
        modules: L distinct module names, in order of appearance.
        module_of_parameter: index into `modules` of each parameter.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    modules: tuple[str, ...]
    module_of_parameter: tuple[int, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each parameter in the flat vector, and P as the last entry."""
        ends = [0]
        for shape in self.shapes:
            ends.append(ends[-1] + math.prod(shape))
        return tuple(ends)

    @cached_property
    def _position(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    @property
    def numel(self) -> int:
        """P, the number of selected parameters."""
        return self.offsets[-1]

    def slice_of(self, name: str) -> slice:
        """Where a parameter lies in the flat vector."""
        i = self._position[name]
        return slice(self.offsets[i], self.offsets[i + 1])

    def shape_of(self, name: str) -> tuple[int, ...]:
        """A parameter's shape."""
        return self.shapes[self._position[name]]

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(P,) vector of tensors by name; each must have as many entries as its parameter.

        Raises:
            ShapeError: a tensor is missing or has another size.
        """
        parts: list[Tensor] = []
        for name in self.names:
            if name not in tensors or tensors[name].numel() != math.prod(self.shapes[self._position[name]]):
                raise ShapeError(
                    f"no tensor of the right size for parameter {name!r}",
                    where=name,
                    fix="give one tensor per selected parameter, of its shape",
                )
            parts.append(tensors[name].reshape(-1))
        return torch.cat(parts)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a (P,) vector by name, in the parameters' shapes.

        Raises:
            ShapeError: the vector does not have P entries.
        """
        if flat.shape != (self.numel,):
            raise ShapeError(
                f"expected a vector of {self.numel} entries, got shape {tuple(flat.shape)}",
                where="parameter layout",
                fix="give a vector over the selected parameters",
            )
        return {
            name: flat[self.offsets[i] : self.offsets[i + 1]].view(self.shapes[i])
            for i, name in enumerate(self.names)
        }


def module_of(name: str) -> str:
    """Module a parameter belongs to; for LoRA weights the adapted module.

    >>> module_of("model.layers.0.q_proj.weight")
    'model.layers.0.q_proj'
    >>> module_of("model.layers.0.q_proj.lora_A.default.weight")
    'model.layers.0.q_proj'
    >>> module_of("theta")
    'theta'
    """
    adapted = _LORA.sub("", name)
    if adapted != name:
        return adapted
    return name.rpartition(".")[0] or name


def layout_of(model: nn.Module, names: Sequence[str]) -> ParameterLayout:
    """Layout of the named parameters, in the order given.

    Raises:
        ConfigError: a name is unknown, stands twice, or nothing is selected.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unknown = [name for name in names if name not in parameters]
    if unknown or not names or len(set(names)) != len(names):
        close = difflib.get_close_matches(unknown[0], parameters, n=3) if unknown else []
        what = f"the model has no parameter {unknown[0]!r}" if unknown else "parameter names repeat"
        raise ConfigError(
            what if names else "no parameter is selected",
            where="model.parameters",
            fix=f"did you mean {close}?" if close else "name each trainable parameter once",
        )
    modules: dict[str, int] = {}
    owner = [modules.setdefault(module_of(name), len(modules)) for name in names]
    shapes = tuple(tuple(parameters[name].shape) for name in names)
    return ParameterLayout(tuple(names), shapes, tuple(modules), tuple(owner))


def parameters_of(model: nn.Module, layout: ParameterLayout) -> list[nn.Parameter]:
    """The selected parameters, in layout order."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [parameters[name] for name in layout.names]


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over processes (FSDP2): a pass of the model then takes them all."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Inside, every module is in evaluation mode; afterwards each is as it was.

    LoRA layers that merge A and B into W in evaluation mode, as loralib's do by default, stay unmerged: A and
    B would have no gradient there. A layer that was merged already is merged again afterwards, W to rounding.
    """
    modes = [(module, module.training) for module in model.modules()]
    merging: list[Any] = [m for m, _ in modes if getattr(m, "merge_weights", None) is True]
    merged = [module for module in merging if getattr(module, "merged", False)]
    try:
        for module in merged:
            module.train()
        for module in merging:
            module.merge_weights = False
        model.eval()
        yield
    finally:
        for module in merging:
            module.merge_weights = True
        for module in merged:
            module.eval()
        for module, training in modes:
            module.training = training


@contextmanager
def measuring(model: nn.Module, layout: ParameterLayout) -> Generator[None]:
    """Inside: evaluation mode (no dropout) and gradients for exactly the selected parameters.

    Afterwards, also after an error, the model has its modes, `requires_grad` flags and `.grad` back,
    and the global random state is what it was.

    Args:
        model: the model to measure.
        layout: the parameters that get gradients.
    """
    selected = set(layout.names)
    parameters = list(model.named_parameters(remove_duplicate=False))
    chosen = {id(parameter) for name, parameter in parameters if name in selected}
    flags = [(p, p.requires_grad, p.grad) for _, p in parameters]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), evaluating(model):
        try:
            for _, parameter in parameters:
                parameter.requires_grad_(id(parameter) in chosen)
                parameter.grad = None
            yield
        finally:
            for parameter, flag, grad in flags:
                parameter.requires_grad_(flag)
                parameter.grad = grad


@contextmanager
def recomputing(model: nn.Module) -> Generator[None]:
    """Inside, layers marked for activation checkpointing recompute; their dropout stays off.

    Transformers does so in training mode only, and reads the flag of the layer itself.
    """
    marked = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and not m.training]
    try:
        for module in marked:
            module.training = True
        yield
    finally:
        for module in marked:
            module.training = False
