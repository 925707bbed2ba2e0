"""Hand-written LoRA layers: guarded as peft's are, to 1e-9; what cannot be guarded is told."""

import warnings

import pytest
import torch
from torch import nn

from arisk import AlignGuardConfig, AlignmentRiskPipeline
from arisk.base.task import SampleSet
from arisk.gradients import layout_of, measuring
from arisk.guard import adapter_sites, build_mitigator

peft = pytest.importorskip("peft")
RANK, ALPHA = 2, 6
SHAPES = {"first": (5, 4), "second": (4, 3)}


class Linear(nn.Module):
    """y = W x + b + s B A x, its own parameters beside a frozen weight, as in loralib."""

    def __init__(self, inputs, outputs, *, turned=False):
        super().__init__()
        shape = (inputs, outputs) if turned else (outputs, inputs)
        self.weight = nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(outputs), requires_grad=False)
        self.lora_A = nn.Parameter(torch.zeros(RANK, inputs))
        self.lora_B = nn.Parameter(torch.zeros(outputs, RANK))
        self.scaling = ALPHA / RANK
        self.fan_in_fan_out = turned

    def forward(self, x):
        weight = self.weight.T if self.fan_in_fan_out else self.weight
        return nn.functional.linear(x, weight, self.bias) + self.scaling * x @ self.lora_A.T @ self.lora_B.T


class Beside(nn.Module):
    """The same around a layer of its own."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A = nn.Parameter(torch.zeros(RANK, inputs))
        self.lora_B = nn.Parameter(torch.zeros(outputs, RANK))
        self.lora_alpha = ALPHA

    def forward(self, x):
        return self.linear(x) + ALPHA / RANK * x @ self.lora_A.T @ self.lora_B.T


class Net(nn.Module):
    def __init__(self, layer=nn.Linear):
        super().__init__()
        self.first, self.second = (layer(*shape) for shape in SHAPES.values())

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def safety():
    generator = torch.Generator().manual_seed(1)
    points = [torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(3)]
    return SampleSet("safety", [(x, torch.randint(0, 3, (4,), generator=generator)) for x in points], loss)


def weights():
    """Of both layers: W, b, A, B; B is not zero, as after some training."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return {
        name: (draw(o, i), draw(o), draw(RANK, i), 0.3 * draw(o, RANK)) for name, (i, o) in SHAPES.items()
    }


def with_peft():
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(SHAPES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Net(), config).double()
    for name, (w, b, a, other) in weights().items():
        layer = getattr(model.base_model.model, name)
        parts = (layer.base_layer.weight, layer.base_layer.bias, layer.lora_A.default.weight)
        for parameter, value in zip((*parts, layer.lora_B.default.weight), (w, b, a, other), strict=True):
            parameter.data.copy_(value)
    return model


def by_hand(layer):
    model = Net(layer).double()
    for name, (w, b, a, other) in weights().items():
        module = getattr(model, name)
        base = getattr(module, "linear", module)
        turned = getattr(module, "fan_in_fan_out", False)
        for parameter, value in zip(
            (base.weight, base.bias, module.lora_A, module.lora_B),
            (w.T if turned else w, b, a, other),
            strict=True,
        ):
            parameter.data.copy_(value)
    return model


def penalised(model):
    """Terms and gradients of the penalty once the adapters have moved."""
    guard = build_mitigator(model, safety(), AlignGuardConfig(width=64, rank=3, split="blocks"))
    generator = torch.Generator().manual_seed(7)
    moved = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in moved:
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.2)
    terms = guard.penalty()
    gradients = torch.autograd.grad(terms.total, moved)
    return [float(value.detach()) for value in terms.named().values()], gradients


@pytest.mark.parametrize("layer", [Linear, lambda *shape: Linear(*shape, turned=True), Beside])
def test_a_hand_written_layer_is_guarded_as_pefts(layer):
    want, slopes = penalised(with_peft())
    found, own = penalised(by_hand(layer))
    assert found == pytest.approx(want, rel=1e-9)
    assert min(want) > 0
    for one, other in zip(own, slopes, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_the_pipeline_takes_it():
    model = by_hand(Linear)
    guard = AlignmentRiskPipeline({"mode": "lora"}).build_lora_mitigator(
        model, safety=safety(), config=AlignGuardConfig(rank=2)
    )
    assert guard.status == "ready"
    assert [site.weight for site in guard.sites] == ["first.weight", "second.weight"]


class Merging(Linear):
    """The same, and merged into W in evaluation mode, as loralib's are by default."""

    merge_weights, merged = True, False

    def train(self, mode=True):
        super().train(mode)
        if self.merge_weights and self.merged == mode:
            sign = -1 if mode else 1
            self.weight.data += sign * self.scaling * self.lora_B.detach() @ self.lora_A.detach()
            self.merged = not mode
        return self

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias) if self.merged else super().forward(x)


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_layer_that_merges_itself_is_guarded_and_trains_on(evaluated):
    model = by_hand(Merging)
    want, _ = penalised(with_peft())
    if evaluated:
        model.eval()
    kept = model.first.weight.detach().clone()
    guard = build_mitigator(model, safety(), AlignGuardConfig(width=64, rank=3, split="blocks"))
    assert torch.allclose(model.first.weight, kept, rtol=0, atol=1e-14)
    assert (model.first.merged, model.first.merge_weights) == (evaluated, True)
    plain = build_mitigator(by_hand(Linear), safety(), AlignGuardConfig(width=64, rank=3, split="blocks"))
    assert torch.allclose(guard.directions.eigenvalues, plain.directions.eigenvalues, rtol=1e-9)
    model.train()
    assert penalised(model)[0] == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("evaluated", [False, True])
def test_the_adapter_of_a_layer_that_merges_itself_has_its_gradient_while_measured(evaluated):
    model, batch = by_hand(Merging).train(not evaluated), safety().batches[0]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    layout = layout_of(model, names)
    with measuring(model, layout):
        slopes = torch.autograd.grad(
            loss(model, batch).mean(), [p for p in model.parameters() if p.requires_grad]
        )
    assert all(slope.any() for slope in slopes)
    assert model.first.merged == evaluated


def test_a_pair_whose_weight_does_not_fit_belongs_to_no_site():
    model = by_hand(Linear)
    model.first.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64), requires_grad=False)
    sites, left = adapter_sites(model)
    assert [site.weight for site in sites] == ["second.weight"]
    assert left == ["first.lora_A", "first.lora_B"]
