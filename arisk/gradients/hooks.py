"""Per-sample gradients from one batched forward and backward, by hooks on the modules that train.

A module y = f(x; w) has ∂ℓ_i/∂w = (∂y_i/∂w)ᵀ ∂ℓ_i/∂y_i: inputs are caught in the forward pass,
output gradients in the backward pass, and no ordinary weight gradient is computed. Linear, Conv1D
and Embedding have closed forms; any other leaf module (norms, for one) is asked for its own
vector-Jacobian product, sample by sample, through torch.func. Each parameter is handed on as soon as
its last contribution is in, as blocks or as the factors of their outer products, so memory holds about
one module's block.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from arisk.base.errors import ShapeError
from arisk.base.task import Batch, LossFn
from arisk.gradients.factors import Outer, Part, PartSink, Rows, Sink, block_of
from arisk.gradients.layout import ParameterLayout, batch_size, map_tensors, parameters_of

__all__ = ["hook_gradients", "hook_parts"]

#: What a module call leaves for the backward pass: output gradient → local name → factors or block.
Backward = Callable[[Tensor], Mapping[str, Part]]


class _Contributions:
    """Gathers what every call of every module adds to a parameter, and hands it on when complete.

    A tied parameter, or a module called twice, has several contributions; it is complete when as many
    have come back as went forward.
    """

    def __init__(self, names: dict[int, str], size: int, sink: PartSink, *, multiplied: bool) -> None:
        self.names = names
        self.size = size
        self.sink = sink
        self.multiplied = multiplied
        self.waiting: dict[str, int] = dict.fromkeys(names.values(), 0)
        self.parts: dict[str, list[Part]] = {}
        self.sent: set[str] = set()
        self.muted = False

    def expect(self, parameter: nn.Parameter) -> None:
        self.waiting[self.names[id(parameter)]] += 1

    def add(self, parameter: nn.Parameter, part: Part) -> None:
        name = self.names[id(parameter)]
        parts = self.parts.setdefault(name, [])
        if self.multiplied:
            block = block_of(part)
            parts[:] = [parts[0].add_(block)] if parts else [block]  # type: ignore[union-attr]
        else:
            parts.append(part)
        self.waiting[name] -= 1
        if not self.waiting[name]:
            self.sent.add(name)
            self.sink(name, self.parts.pop(name))

    def flush(self, parameters: dict[str, nn.Parameter]) -> None:
        """Hand on what is left: calls whose output the loss does not use contribute zero."""
        for name in self.waiting:
            if name not in self.sent:
                parameter = parameters[name]
                zeros = torch.zeros(
                    self.size, *parameter.shape, dtype=parameter.dtype, device=parameter.device
                )
                self.sink(name, self.parts.pop(name, [zeros]))


def hook_gradients(
    model: nn.Module, batch: Batch, loss_fn: LossFn, layout: ParameterLayout, sink: Sink
) -> Tensor:
    """G_i = ∇ℓ_i of all samples from one backward pass; see `per_sample_gradients`.

    Raises:
        ShapeError: a module's dimension 0 is not the batch, so its samples cannot be told apart.
    """

    def send(name: str, parts: Sequence[Part]) -> None:
        sink(name, block_of(parts[0]))

    return _run(model, batch, loss_fn, layout, send, multiplied=True)


def hook_parts(
    model: nn.Module, batch: Batch, loss_fn: LossFn, layout: ParameterLayout, sink: PartSink
) -> Tensor:
    """The same gradients as factors: ``sink(name, parts)`` once per parameter, G_i being their sum.

    Args:
        model: the model, inside `measuring`.
        batch: B samples along dimension 0.
        loss_fn: per-sample losses (B,), or a scalar that is their mean.
        layout: the selected parameters.
        sink: called once per parameter.

    Returns:
        (B,) losses, detached. Neither they nor the factors are checked to be finite.

    Raises:
        ShapeError: a module's dimension 0 is not the batch, so its samples cannot be told apart.
    """
    return _run(model, batch, loss_fn, layout, sink, multiplied=False)


def _run(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFn,
    layout: ParameterLayout,
    sink: PartSink,
    *,
    multiplied: bool,
) -> Tensor:
    """One forward and backward pass with hooks on the modules that hold selected parameters."""
    size = batch_size(batch)
    parameters = dict(zip(layout.names, parameters_of(model, layout), strict=True))
    owners = {id(p): name for name, p in parameters.items()}
    sums = _Contributions(owners, size, sink, multiplied=multiplied)
    roots: list[Tensor] = []
    with _frozen(model), _hooked(model, sums, roots, size):
        losses = loss_fn(model, batch)
        # A scalar is taken as the mean over samples; the parity self-test catches any other.
        total = losses * size if losses.ndim == 0 else losses.sum()
        if roots and total.requires_grad:
            torch.autograd.grad(total, roots, allow_unused=True)
    sums.flush(parameters)
    return (losses if losses.ndim else losses.expand(size)).detach()


@contextmanager
def _frozen(model: nn.Module) -> Generator[None]:
    """No parameter asks for a gradient: the backward pass goes through activations only.

    All of them, not only the layout's: one that stayed live would start the graph in its place.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _hooked(model: nn.Module, sums: _Contributions, roots: list[Tensor], size: int) -> Generator[None]:
    """Forward hooks on every module that directly holds a selected parameter."""
    handles = []
    try:
        for module in model.modules():
            own = {n: p for n, p in module.named_parameters(recurse=False) if id(p) in sums.names}
            if own:
                hook = _forward_hook(own, sums, roots, size)
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forward_hook(
    own: dict[str, nn.Parameter], sums: _Contributions, roots: list[Tensor], size: int
) -> Callable[..., Any]:
    """Hook that remembers a call's input and waits for its output gradient."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if sums.muted:
            return output
        if not isinstance(output, Tensor) or output.ndim == 0 or output.shape[0] != size:
            raise ShapeError(
                f"the output of {type(module).__name__} does not have the samples in dimension 0",
                where=f"module {type(module).__name__} holding {sorted(own)}",
                fix="use `collect.engine: vmap` or `loop`",
            )
        backward = _backward_of(module, own, args, kwargs, size)
        for parameter in own.values():
            sums.expect(parameter)
        if not output.requires_grad:
            # Nothing before this call needs a gradient: the graph starts here. The clone keeps
            # later in-place operations off the leaf.
            leaf = output.detach().requires_grad_()
            roots.append(leaf)
            output = leaf.clone()

        def receive(gradient: Tensor) -> None:
            # A module asked for its own vector-Jacobian product runs its forward again.
            sums.muted = True
            blocks = backward(gradient.detach())
            sums.muted = False
            for local, block in blocks.items():
                sums.add(own[local], block)

        output.register_hook(receive)
        return output

    return hook


def _backward_of(
    module: nn.Module, own: dict[str, nn.Parameter], args: tuple[Any, ...], kwargs: dict[str, Any], size: int
) -> Backward:
    """The closed form for the module's type, or its own vector-Jacobian product."""
    if len(args) == 1 and not kwargs:
        given = args[0].detach()
        if type(module) is nn.Linear:
            return lambda gradient: _linear(given, gradient, own)
        if type(module).__name__ == "Conv1D" and {"weight"} <= set(own):
            return lambda gradient: _conv1d(given, gradient, own)
        if type(module) is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq:
            return lambda gradient: _embedding(given, gradient, own, module.padding_idx)
    return lambda gradient: _own_vjp(module, own, args, kwargs, gradient, size)


def _rows(x: Tensor) -> Tensor:
    """(B, S, d) view of (B, …, d)."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _linear(given: Tensor, gradient: Tensor, own: dict[str, nn.Parameter]) -> dict[str, Part]:
    """∂ℓ_i/∂W = Σ_s y'_is x_isᵀ (out, in), ∂ℓ_i/∂b = Σ_s y'_is."""
    x, y = _rows(given), _rows(gradient)
    parts: dict[str, Part] = {}
    if "weight" in own:
        parts["weight"] = Outer(y, x)
    if "bias" in own:
        parts["bias"] = y.sum(1)
    return parts


def _conv1d(given: Tensor, gradient: Tensor, own: dict[str, nn.Parameter]) -> dict[str, Part]:
    """The transposed linear layer of GPT-2: weight (in, out)."""
    x, y = _rows(given), _rows(gradient)
    parts: dict[str, Part] = {"weight": Outer(x, y)}
    if "bias" in own:
        parts["bias"] = y.sum(1)
    return parts


def _embedding(
    given: Tensor, gradient: Tensor, own: dict[str, nn.Parameter], padding: int | None
) -> Mapping[str, Part]:
    """∂ℓ_i/∂E[v] = Σ_{s: token v} y'_is (vocabulary, d)."""
    if padding is not None:
        gradient = gradient.masked_fill((given == padding).unsqueeze(-1), 0)
    tokens = given.reshape(given.shape[0], -1)
    return {"weight": Rows(tokens, _rows(gradient), own["weight"].shape[0])}


def _own_vjp(
    module: nn.Module,
    own: dict[str, nn.Parameter],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    gradient: Tensor,
    size: int,
) -> Mapping[str, Part]:
    """(∂f(x_i; w)/∂w)ᵀ y'_i for each sample, through the module's own forward."""
    inputs: list[Tensor] = []

    def is_batched(tensor: Tensor) -> bool:
        return tensor.ndim > 0 and tensor.shape[0] == size

    def collect(tensor: Tensor) -> Tensor:
        if is_batched(tensor):
            inputs.append(tensor.detach())
        return tensor

    map_tensors((args, kwargs), collect)
    # Not the parameters of before: sharded ones are whole only while their module works.
    values = {name: getattr(module, name).detach() for name in own}

    def one(sample: list[Tensor], output_gradient: Tensor) -> dict[str, Tensor]:
        waiting = iter(sample)

        def put(tensor: Tensor) -> Tensor:
            return next(waiting).unsqueeze(0) if is_batched(tensor) else tensor

        own_args, own_kwargs = map_tensors((args, kwargs), put)
        pull: Any = vjp(lambda w: functional_call(module, w, own_args, own_kwargs), values)[1]
        return pull(output_gradient.unsqueeze(0))[0]

    with torch.enable_grad():
        return vmap(one)(inputs, gradient)
