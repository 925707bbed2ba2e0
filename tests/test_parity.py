"""The calls of the peer package's README run with this package's name, and do the right thing."""

import copy
import dataclasses
import json
import random
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import arisk
from arisk import AlignGuardConfig, AlignmentRiskPipeline, FisherConfig, PipelineConfig, RiskReport
from arisk.base.errors import ArtifactError, ConfigError, InputError, NumericsError, ShapeError

FAST = {
    "training": {"optimizer": "sgd", "learning_rate": 0.05, "max_steps": 6},
    "score": {"batches": 2, "hvp_batches": 1, "nulls": 0, "examples": 0, "probe_points": 0, "krylov_dim": 2},
    "rollout": {"enabled": False},
    "forecast": {"bootstrap_samples": 10},
}


class Layer(nn.Module):
    """y = W x + s B A x, named as peft names it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.base_layer = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, outputs, bias=False)})
        self.scaling = {"default": 2.0}

    def forward(self, x):
        low = self.lora_B["default"](self.lora_A["default"](x))
        return self.base_layer(x) + self.scaling["default"] * low


def adapted():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(Layer(3, 4), nn.Tanh(), Layer(4, 2))


def plain():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def rows(seed, count=12):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=generator), torch.randint(0, 2, (count,), generator=generator)


def loss_fn(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def loader(seed, **options):
    return DataLoader(TensorDataset(*rows(seed)), batch_size=4, **options)


def data(model, **other):
    return {
        "model": model,
        "safety_dataloader": loader(1),
        "safety_loss_fn": loss_fn,
        "fine_tune_dataloader": loader(2),
        "fine_tune_loss_fn": loss_fn,
        **other,
    }


def configured(**values):
    return PipelineConfig(**FAST, **values)


# The README's snippets.


def test_basic_usage(capsys):
    config = configured(mode="lora")
    pipeline = AlignmentRiskPipeline(config)
    report = pipeline.run(**data(adapted()))
    print(report.warning)  # noqa: T201 - the call of the README
    print(report.forecast.collapse_step)  # noqa: T201 - the call of the README
    assert capsys.readouterr().out.startswith(report.verdict.level)
    assert all("lora_" in part.name for part in report.subspace.parameter_slices)
    # The adapters of the model are found, so the overlap in ΔW space is measured.
    assert 0 <= report.initial_risk.delta_w <= 1


def test_lora_mitigation():
    model = adapted()
    pipeline = AlignmentRiskPipeline(configured(mode="lora"))
    report = pipeline.run(**data(model))
    mitigator = pipeline.build_lora_mitigator(
        model,
        report.subspace,
        config=AlignGuardConfig(lambda_a=0.25, lambda_t=0.5, lambda_nc=0.1, alpha=0.5),
    )
    with torch.no_grad():
        model[0].lora_B["default"].weight.add_(0.1)
    task_loss = loss_fn(model, rows(2))
    breakdown = mitigator.regularized_loss(task_loss)
    breakdown.total_loss.backward()
    assert float(breakdown.total_loss.detach()) > float(task_loss.detach())
    assert model[0].lora_A["default"].weight.grad is not None
    mitigator.reset_reference()
    assert float(mitigator.regularized_loss(task_loss).total_loss.detach()) == pytest.approx(
        float(task_loss.detach())
    )


def test_performance_controls():
    config = PipelineConfig()
    config.fisher.gradient_collection = "vmap"
    config.fisher.subspace_method = "randomized_svd"
    config.fisher.vmap_chunk_size = 16
    for name, value in FAST.items():
        setattr(config, name, value)
    report = AlignmentRiskPipeline(config).run(**data(plain()))
    assert report.collected.engine["name"] == "vmap"
    assert report.subspace.method == "randomized_svd"
    assert config.collect_settings.chunk_size == 16


@pytest.mark.parametrize("engine", ["loop", "auto", "vmap", "hooks"])
def test_every_engine_gives_the_fisher_of_autograd(engine):
    model = plain()
    report = AlignmentRiskPipeline(configured(fisher={"gradient_collection": engine})).run(**data(model))
    x, y = rows(1)
    grads = []
    for i in range(len(x)):
        found = torch.autograd.grad(loss_fn(model, (x[i : i + 1], y[i : i + 1])), list(model.parameters()))
        grads.append(torch.cat([g.flatten() for g in found]))
    g = torch.stack(grads).double()
    assert torch.allclose(report.subspace.fisher_diagonal.double(), g.square().mean(0), rtol=1e-4, atol=1e-8)
    values = torch.linalg.svdvals(g).square() / len(g)
    k = report.subspace.rank
    assert torch.allclose(report.subspace.fisher_eigenvalues, values[:k], rtol=1e-4)
    basis = report.subspace.fisher_eigenvectors.double()
    assert basis.shape == (g.shape[1], k)
    assert torch.allclose(basis.T @ basis, torch.eye(k, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(basis.T @ (g.T @ g / len(g)) @ basis, torch.diag(values[:k]), atol=1e-5)
    # The peer's module score is the mean of the diagonal over the module.
    first = g[:, :16].square().mean()
    assert report.subspace.module_scores["0"] == pytest.approx(float(first), rel=1e-4)


@pytest.mark.parametrize("method", ["svd", "randomized_svd", "diag_topk", "gram"])
def test_every_subspace_method(method):
    config = configured(fisher={"subspace_method": method, "top_rank": 2, "top_weight_count": 3})
    report = AlignmentRiskPipeline(config).run(**data(plain()))
    space = report.subspace
    assert space.rank <= 2
    basis = space.fisher_eigenvectors.double()
    assert torch.allclose(basis.T @ basis, torch.eye(space.rank, dtype=torch.float64), atol=1e-4)
    assert torch.equal(space.top_weight_scores, space.fisher_diagonal.sort(descending=True).values[:3])
    # The overlap is the one of the basis with the gradient of the first batches.
    model = plain()
    x, y = rows(2)
    means = [loss_fn(model, (x[i : i + 4], y[i : i + 4])) for i in (0, 4)]
    found = torch.autograd.grad(sum(means) / 2, list(model.parameters()))
    g = torch.cat([part.flatten() for part in found]).double()
    expected = float((basis.T @ g).norm() / g.norm())
    assert report.initial_risk.projected_ratio == pytest.approx(expected, rel=1e-3)
    assert report.initial_risk.update_norm == pytest.approx(0.05 * float(g.norm()), rel=1e-4)
    assert report.initial_risk.projected_norm == pytest.approx(0.05 * float((basis.T @ g).norm()), rel=1e-3)


def test_curvature_is_the_hessian_times_the_gradient():
    model = plain().double()
    x, y = rows(2)
    batches = [(x[:4].double(), y[:4]), (x[4:8].double(), y[4:8])]
    safety = [(rows(1)[0].double(), rows(1)[1])]
    settings = {**FAST, "score": {**FAST["score"], "hvp_batches": 2}}
    report = AlignmentRiskPipeline(settings).run(
        **data(model, safety_dataloader=safety, fine_tune_dataloader=batches)
    )
    parameters = list(model.parameters())
    mean = sum(loss_fn(model, batch) for batch in batches) / 2
    g = torch.autograd.grad(mean, parameters, create_graph=True)
    product = torch.autograd.grad(sum((a * a.detach()).sum() for a in g), parameters)
    hg = torch.cat([part.flatten() for part in product])
    basis = report.subspace.fisher_eigenvectors
    assert report.curvature.acceleration_norm == pytest.approx(float(hg.norm()), rel=1e-5)
    assert report.curvature.projected_acceleration_norm == pytest.approx(
        float((basis.T @ hg).norm()), rel=1e-5
    )
    weighted = report.subspace.fisher_eigenvalues.sqrt() * (basis.T @ hg)
    assert report.curvature.gamma_hat == pytest.approx(float(weighted.norm()), rel=1e-5)
    assert report.curvature["epsilon_hat"] == report.curvature.epsilon_hat


def test_forecast_arrays_belong_together():
    settings = {**FAST, "rollout": {"enabled": True}}
    forecast = AlignmentRiskPipeline(settings).run(**data(plain())).forecast
    assert forecast.steps[0] == 0
    assert forecast.steps[-1] == 6
    for values in (forecast.times, forecast.estimated_loss, forecast.quartic_lower_bound):
        assert values.shape == forecast.steps.shape
    assert np.allclose(forecast.quartic_lower_bound, forecast.projected_drift**2 / 2)
    assert forecast.estimated_loss[0] == pytest.approx(0, abs=1e-6)
    assert (forecast.collapse_time is None) == (forecast.collapse_step is None)


# A gradient inside the safety subspace.


class Point(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, dtype=torch.float64))


def safety_rows(model, batch):
    """Per-sample ½⟨a, θ⟩² + ⟨a, θ⟩ s, with signs s that cancel: F is the Hessian, the mean gradient 0."""
    a, s = batch[:, :4], batch[:, 4]
    c = a @ model.weight
    return c * s + 0.5 * c**2


def test_a_gradient_inside_the_safety_subspace_is_risky():
    a = torch.zeros(4, 5, dtype=torch.float64)
    a[:, 0] = 2.0
    a[:, 4] = torch.tensor([1.0, -1.0, 1.0, -1.0])

    def pull(model, batch):
        return (0.5 * (model.weight[None] - batch).square()).sum(1)

    target = torch.zeros(2, 4, dtype=torch.float64)
    target[:, 0] = 3.0
    config = {**FAST, "training": {"optimizer": "sgd", "learning_rate": 0.05, "max_steps": 30}}
    config["training"]["max_grad_norm"] = None
    config["rollout"] = {"enabled": True}
    report = AlignmentRiskPipeline(config).run(
        model=Point(),
        safety_dataloader=[a],
        safety_loss_fn=safety_rows,
        fine_tune_dataloader=[target, target],
        fine_tune_loss_fn=pull,
    )
    assert report.initial_risk.projected_ratio == pytest.approx(1)
    assert report.verdict.level == "high"
    # θ_k = 3 (1 − .95^k): the rise 2 θ² passes 0.1 at the second step.
    truth = next(k for k in range(31) if 2 * (3 * (1 - 0.95**k)) ** 2 >= 0.1)
    assert report.forecast.collapse_step == pytest.approx(truth, abs=1)
    assert report.forecast.estimated_loss[-1] == pytest.approx(2 * (3 * (1 - 0.95**30)) ** 2, rel=0.05)


# Batches of every kind.


@dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


def batch_encoding(x, y):
    return pytest.importorskip("transformers").BatchEncoding({"x": x, "y": y})


KINDS = {
    "tuple": (lambda x, y: (x, y), lambda b: b),
    "list": (lambda x, y: [x, y], lambda b: b),
    "dict": (lambda x, y: {"x": x, "y": y}, lambda b: (b["x"], b["y"])),
    "dataclass": (Pair, lambda b: (b.x, b.y)),
    "tensor": (lambda x, y: torch.cat([x, y[:, None]], 1), lambda b: (b[:, :3], b[:, 3].long())),
    "BatchEncoding": (batch_encoding, lambda b: (b["x"], b["y"])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_every_kind_give_the_same_report(kind):
    pack, unpack = KINDS[kind]

    def packed(seed):
        x, y = rows(seed)
        return [pack(x[i : i + 4], y[i : i + 4]) for i in range(0, 12, 4)]

    def loss(model, batch):
        return loss_fn(model, unpack(batch))

    other = {"safety_dataloader": packed(1), "fine_tune_dataloader": packed(2)}
    found = AlignmentRiskPipeline(FAST).run(
        **data(plain(), safety_loss_fn=loss, fine_tune_loss_fn=loss, **other)
    )
    expected = AlignmentRiskPipeline(FAST).run(**data(plain()))
    assert torch.allclose(found.collected.gram, expected.collected.gram, rtol=1e-6)
    assert found.initial_risk.ratio == pytest.approx(expected.initial_risk.ratio, rel=1e-6)


# What trains.


def test_no_lora_weights_is_an_error_or_a_skip_but_never_low():
    with pytest.raises(ConfigError, match="no LoRA parameters"):
        AlignmentRiskPipeline(configured(mode="lora")).run(**data(plain()))
    pipeline = AlignmentRiskPipeline(configured(mode="lora", require_lora_match=False))
    report = pipeline.run(**data(plain()))
    assert report.status == "skipped"
    assert report.warning.startswith("skipped")
    assert report.verdict.level == "inconclusive"
    assert report.forecast.collapse_step is None
    assert report.verdict.probability is None
    assert np.isnan(report.initial_risk.projected_ratio)
    assert len(report.forecast.estimated_loss) == 0
    assert "level" in report.to_dict()["verdict"]


def test_markers_name_the_adapter():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    config = configured(mode="lora", lora_name_markers=["1."])
    report = AlignmentRiskPipeline(config).run(**data(model))
    assert report.collected.parameter_names == ["1.weight", "1.bias"]


def test_an_allow_list_names_every_mistake_at_once():
    model = plain()
    model[0].bias.requires_grad_(False)
    config = configured(fisher={"parameter_names": ["2.wieght", "0.bias", "2.bias", "2.bias"]})
    with pytest.raises(ConfigError) as caught:
        AlignmentRiskPipeline(config).run(**data(model))
    for said in ("2.wieght", "0.bias", "2.bias", "2.weight", "not in the model", "frozen", "given twice"):
        assert said in str(caught.value)
    config.fisher.parameter_names = ["2.bias", "0.weight"]
    report = AlignmentRiskPipeline(config).run(**data(model))
    assert report.collected.parameter_names == ["0.weight", "2.bias"]


def test_max_samples_and_explained_variance():
    config = configured(fisher=FisherConfig(max_samples=6, target_explained_variance=0.5))
    report = AlignmentRiskPipeline(config).run(**data(plain()))
    assert len(report.collected.losses) == 6
    share = torch.cumsum(report.subspace.spectrum, 0) / report.subspace.trace
    assert report.subspace.rank == int((share < 0.5).sum()) + 1


def test_without_a_share_the_rank_is_the_limit():
    config = configured(fisher={"target_explained_variance": None, "top_rank": 4})
    assert AlignmentRiskPipeline(config).run(**data(plain())).subspace.rank == 4


# Left as found.


class Hostile(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh())
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x))


def test_a_hostile_model_is_left_as_found():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Hostile().train()
    model.body[1].eval()
    model.body[0].bias.requires_grad_(False)
    model.head.weight.grad = torch.full_like(model.head.weight, 7.0)
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    grad = model.head.weight.grad
    randoms = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002

    settings = {**FAST, "rollout": {"enabled": True}}
    shuffled = {"safety_dataloader": loader(1, shuffle=True), "fine_tune_dataloader": loader(2, shuffle=True)}
    pipeline = AlignmentRiskPipeline(settings)
    report = pipeline.run(**data(model, **shuffled))
    arisk.verify(pipeline.task(**data(model, **shuffled)), pipeline.config)

    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.head.weight.grad is grad
    assert bool((grad == 7).all())
    assert model.head.bias.grad is None
    assert torch.equal(torch.get_rng_state(), randoms[0])
    assert (np.random.get_state()[1] == randoms[1]).all()  # noqa: NPY002
    assert random.getstate() == randoms[2]
    assert "0.bias" not in report.collected.parameter_names


def test_a_shuffling_loader_gives_the_same_report_whatever_the_global_seed():
    found = []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            pipeline = AlignmentRiskPipeline(FAST)
            report = pipeline.run(**data(plain(), fine_tune_dataloader=loader(2, shuffle=True)))
            found.append(report.initial_risk.ratio)
    assert found[0] == found[1]


def test_a_loader_with_its_own_generator_is_left_as_found():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    AlignmentRiskPipeline(FAST).run(
        **data(plain(), fine_tune_dataloader=loader(2, shuffle=True, generator=generator))
    )
    assert torch.equal(generator.get_state(), before)


def test_the_model_is_left_as_found_after_an_error():
    model = plain().train()

    def broken(model, batch):
        return loss_fn(model, batch) * float("nan")

    with pytest.raises(NumericsError):
        AlignmentRiskPipeline(FAST).run(**data(model, safety_loss_fn=broken))
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# Saved and read back.


@pytest.mark.parametrize("skipped", [False, True])
def test_a_report_is_saved_and_read_back(tmp_path, skipped):
    config = configured(mode="lora" if skipped else "full", require_lora_match=False)
    report = AlignmentRiskPipeline(config).run(**data(plain()))
    report.save(tmp_path / "report")
    files = {path.suffix for path in (tmp_path / "report").rglob("*") if path.is_file()}
    assert files == {".json", ".safetensors"}
    back = RiskReport.load(tmp_path / "report")
    assert back.warning == report.warning
    assert back.status == report.status
    for field in dataclasses.fields(report.scored):
        old, new = getattr(report.scored, field.name), getattr(back.scored, field.name)
        if isinstance(old, torch.Tensor):
            assert torch.equal(old.nan_to_num(), new.nan_to_num())
    assert json.loads(json.dumps(back.to_dict(), allow_nan=False)) == json.loads(json.dumps(report.to_dict()))
    if not skipped:
        assert torch.equal(back.subspace.fisher_eigenvectors, report.subspace.fisher_eigenvectors)
    for shown in (back, back.subspace, back.forecast):
        assert len(repr(shown)) < 400
    (tmp_path / "report" / "report.json").write_text("{}")
    with pytest.raises(ArtifactError):
        RiskReport.load(tmp_path / "report")


# Misuse.


def one_shot():
    return iter(())


MISUSE = {
    "empty safety": ({"safety_dataloader": []}, InputError, "no batch"),
    "empty fine-tune": ({"fine_tune_dataloader": []}, InputError, "no batch"),
    "exhausted": ({"fine_tune_dataloader": one_shot()}, InputError, "no batch"),
    "no loader": ({"safety_dataloader": None}, InputError, "cannot be iterated"),
    "nan loss": (
        {"fine_tune_loss_fn": lambda m, b: loss_fn(m, b) * float("nan")},
        NumericsError,
        "is nan",
    ),
    "wrong shape": ({"safety_loss_fn": lambda m, b: m(b[0])}, ShapeError, "shape|loss"),
    "fine-tune of wrong shape": ({"fine_tune_loss_fn": lambda m, b: m(b[0])}, ShapeError, "shape|loss"),
    "no number": ({"safety_loss_fn": lambda m, b: 1.0}, InputError, "float"),
    "batch of words": ({"safety_dataloader": ["a", "b"]}, ShapeError, "no tensor"),
    "no loss": ({"safety_loss_fn": None}, InputError, "cannot be called"),
    "no parameters": ({"model": nn.Tanh()}, ConfigError, "parameters"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_one_error(case):
    other, kind, said = MISUSE[case]
    with pytest.raises(kind, match=said):
        AlignmentRiskPipeline(FAST).run(**{**data(plain()), **other})


def test_a_model_whose_parameters_are_all_frozen_is_refused():
    model = plain().requires_grad_(False)
    with pytest.raises(ConfigError, match="require"):
        AlignmentRiskPipeline(FAST).run(**data(model))


def test_assignment_is_validated():
    config = PipelineConfig()
    with pytest.raises(ConfigError, match="did you mean `gradient_collection`"):
        config.fisher.gradient_colection = "vmap"
    with pytest.raises(ConfigError, match="'vmap'"):
        config.fisher.gradient_collection = "fast"
    assert config.fisher.gradient_collection == "auto"
    with pytest.raises(ConfigError, match="vmap_chunk_size"):
        config.fisher.vmap_chunk_size = 0
    with pytest.raises(ConfigError, match="did you mean"):
        PipelineConfig(fisher={"subspace_methd": "svd"})
    with pytest.raises(ConfigError, match=r"training\.learning_rate"):
        PipelineConfig(learning_rate=1e-4)
    # One config's settings are not another's.
    PipelineConfig().fisher.top_rank = 3
    assert PipelineConfig().fisher.top_rank == 32


def test_the_demo_of_the_readme_exists():
    runner = pytest.importorskip("typer.testing").CliRunner()
    from arisk.cli import app

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shown = runner.invoke(app, ["demo", "--mode", "lora", "--output-dir", "x", "--help"])
    assert shown.exit_code == 0
    assert "--output-dir" in shown.output
    assert "--mode" in shown.output
