"""A tiny model with home-made adapters, and the dense float64 oracle of every term."""

import torch
from torch import nn

from arisk.base.task import SampleSet
from arisk.guard import AlignGuardConfig, Site, build_mitigator

SCALING = 1.5
EXACT = {"width": 64, "rank": 3}


class Lora(nn.Module):
    """y = W x + b + s B A x."""

    def __init__(self, inputs, outputs, rank):
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.a = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x):
        return self.base(x) + SCALING * (x @ self.a.T) @ self.b.T


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Lora(5, 4, 2), Lora(4, 3, 2)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


SITES = [Site(f"{name}.base.weight", f"{name}.a", f"{name}.b", SCALING) for name in ("first", "second")]


def net(trained=False):
    """The model in float64; `trained` gives B some size, so that the reference is not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net().double()
        for layer in (model.first, model.second):
            layer.base.requires_grad_(False)
            if trained:
                nn.init.normal_(layer.b, std=0.3)
    return model


def loss(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def samples(seed=1, batches=3, size=4):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(batches):
        x = torch.randn(size, 5, generator=generator, dtype=torch.float64)
        made.append((x, torch.randint(0, 3, (size,), generator=generator)))
    return SampleSet("safety", made, loss)


def mitigator(model, **settings):
    extra = {key: settings.pop(key) for key in ("finetune",) if key in settings}
    return build_mitigator(model, samples(), AlignGuardConfig(**{**EXACT, **settings}), sites=SITES, **extra)


def perturb(model, size=0.2, seed=5):
    """Move A and B as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (model.first, model.second):
            for p in (layer.a, layer.b):
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=size)


def delta_w(model):
    """(P,) s B A of both layers, with gradient."""
    return torch.cat([(SCALING * layer.b @ layer.a).flatten() for layer in (model.first, model.second)])


def fisher(model, data):
    """(P, P) F of ∂ℓ/∂W, sample by sample."""
    weights = [model.first.base.weight, model.second.base.weight]
    for w in weights:
        w.requires_grad_(True)
    rows = []
    for x, y in data.batches:
        for i in range(len(x)):
            grads = torch.autograd.grad(loss(model, (x[i : i + 1], y[i : i + 1])).mean(), weights)
            rows.append(torch.cat([g.flatten() for g in grads]))
    for w in weights:
        w.requires_grad_(False)
    g = torch.stack(rows)
    return g.T @ g / len(g)


def row_mass(fisher_matrix):
    """Per layer the (out, in) Fisher diagonal."""
    diagonal = fisher_matrix.diagonal()
    return [diagonal[:20].view(4, 5), diagonal[20:].view(3, 4)]


def oracle(f, change, *, config, h=None):
    """The four weighted terms from explicit P × P matrices.

    Args:
        f: (P, P) Fisher matrix.
        change: (P,) ΔW with gradient.
        config: an `AlignGuardConfig`.
        h: (P,) diagonal of H; default ones.
    """
    values, vectors = torch.linalg.eigh(f)
    values, vectors = values[-config.rank :], vectors[:, -config.rank :]
    p = vectors @ vectors.T
    retained = vectors @ torch.diag(values) @ vectors.T
    if config.split == "blocks":
        shares = []
        for mass in row_mass(f):
            density = mass.mean(1, keepdim=True)
            shares.append((density / (density + f.diagonal().mean())).expand_as(mass).flatten())
        p = torch.diag(torch.cat(shares))
    safe = p @ change
    task = (torch.eye(len(f), dtype=f.dtype) - p) @ change
    h = torch.ones(len(f), dtype=f.dtype) if h is None else h
    eta = 1 + config.beta * torch.sigmoid(change.abs() - config.tau)
    return {
        "fisher": config.lambda_a * safe @ retained @ safe,
        "task": config.lambda_t * task @ torch.diag(h) @ task,
        "overlap": config.lambda_nc * config.alpha * (eta * (safe * task).abs()).mean(),
        "geodesic": config.lambda_nc
        * (1 - config.alpha)
        * (safe @ task) ** 2
        / ((safe @ safe) * (task @ task)),
    }
