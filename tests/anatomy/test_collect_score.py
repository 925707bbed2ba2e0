"""The stages on a small adapter: both stores agree, and attribution adds up to what it explains."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from arisk import AlignmentRiskPipeline, PipelineConfig, assess
from arisk.anatomy.collect import GRADIENTS_FOLDER, collect
from arisk.anatomy.score import score
from arisk.anatomy.subspace import recomputed_side, stored_side, subspace
from arisk.anatomy.update import Permuted
from arisk.base.errors import ConfigError, InputError, NumericsError
from arisk.base.task import SampleSet
from arisk.config.plan import CollectConfig, Config, ScoreConfig, SubspaceConfig, TrainingConfig
from arisk.geometry.vectors import Scratch
from arisk.gradients import GradientStore, layout_of
from arisk.models import load_task

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"


@pytest.fixture(scope="module")
def task():
    data = {name: {"path": str(FIXTURES / "data" / f"{name}.jsonl")} for name in ("safety", "control")}
    data["safety"]["max_samples"] = 12
    config = Config.model_validate(
        {
            "model": {
                "path": str(FIXTURES / "tiny-aligned"),
                "dtype": "float64",
                "adapter": {"r": 2, "target_modules": ["q_proj", "down_proj"]},
            },
            "finetune": {"path": str(FIXTURES / "data" / "mixed.jsonl")},
            "collect": {"chunk_size": 5},
            "training": {"batch_size": 4},
            **data,
        }
    )
    return load_task(config, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("collect")


@pytest.fixture(scope="module")
def measured(task, folder):
    collected = collect(task, CollectConfig(chunk_size=5), folder)
    layout = layout_of(task.model, task.parameter_names)
    side = stored_side(GradientStore(folder / GRADIENTS_FOLDER), layout)
    return collected, subspace(collected, SubspaceConfig(), seed=0), side


CONFIG = ScoreConfig(batches=3, hvp_batches=2, krylov_dim=3, nulls=9, examples=10, probe_points=14)


@pytest.fixture(scope="module")
def scored(task, measured):
    collected, space, side = measured
    return score(
        task, collected, space, side, config=CONFIG, training=TrainingConfig(max_grad_norm=None), seed=0
    )


#: Ways gradients can go while collect works, by the settings that lead there.
WAYS = {
    "memory": {"store": "gram"},
    "disk": {"store": "gram", "memory_budget_gb": 1e-4},
    "groups": {"store": "gram", "memory_budget_gb": 1e-4, "disk_budget_gb": 1e-6},
    "no room": {"memory_budget_gb": 1e-4, "disk_budget_gb": 1e-6},
    "vmap": {"store": "gram", "engine": "vmap", "memory_budget_gb": 1e-4, "disk_budget_gb": 1e-6},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_record(task, measured, tmp_path, way):
    collected, _, _ = measured
    other = collect(task, CollectConfig(chunk_size=5, **WAYS[way]), tmp_path)
    assert (len(list(tmp_path.glob("group-*"))) > 3) == (way not in ("memory", "disk"))
    assert len(list(tmp_path.glob("parts/shard-*"))) == (3 if way == "disk" else 0)
    assert other.store == "gram"
    assert (collected.store, collected.store_dtype) == ("gradients", "float32")
    for name in ("gram", "mean_gradient", "fisher_diagonal", "losses", "gradient_norms"):
        torch.testing.assert_close(getattr(other, name), getattr(collected, name), rtol=1e-9, atol=1e-14)


def full_task(task):
    """Every parameter of the same model, its tied embedding among them."""
    names = [name for name, _ in task.model.named_parameters() if "lora" not in name]
    return replace(task, parameter_names=names, lora_pairs=[])


def test_factors_of_a_full_model_give_the_dense_gram(task, tmp_path):
    whole = full_task(task)
    collected = collect(whole, CollectConfig(chunk_size=5, engine="hooks"), tmp_path / "hooks")
    dense = collect(whole, CollectConfig(chunk_size=5, engine="loop"), tmp_path / "loop")
    for name in ("gram", "mean_gradient", "fisher_diagonal", "losses"):
        torch.testing.assert_close(getattr(collected, name), getattr(dense, name), rtol=1e-9, atol=1e-13)
    layout = layout_of(task.model, whole.parameter_names)
    stores = [GradientStore(tmp_path / f / GRADIENTS_FOLDER) for f in ("hooks", "loop")]
    sizes = [sum(f.stat().st_size for f in s.directory.iterdir()) for s in stores]
    assert sizes[0] < 0.7 * sizes[1]
    v = torch.randn(layout.numel, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w = torch.arange(12, dtype=torch.float64)
    ours, theirs = ((s.dots(layout, v), s.weighted_sum(layout, w)) for s in stores)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_rounded_store_says_so(task, tmp_path):
    whole = full_task(task)
    dense = collect(whole, CollectConfig(chunk_size=5), tmp_path / "dense")
    collected = collect(whole, CollectConfig(chunk_size=5, store_dtype="bfloat16"), tmp_path / "half")
    assert (collected.store, collected.store_dtype) == ("gradients", "bfloat16")
    assert dense.store_rounding is None
    error = float((collected.gram.sum(0) - dense.gram.sum(0)).norm() / dense.gram.sum(0).norm())
    assert 1e-9 < error < 1e-2
    assert 1e-9 < collected.store_rounding < 1e-2
    assert any("rounded to bfloat16" in warning for warning in collected.warnings)
    sizes = [sum(f.stat().st_size for f in (tmp_path / k).rglob("shard-*")) for k in ("half", "dense")]
    assert sizes[0] < 0.3 * sizes[1]  # Two bytes for eight.
    layout = layout_of(task.model, whole.parameter_names)
    v = torch.ones(layout.numel, 1, dtype=torch.float64)
    dots = [GradientStore(tmp_path / k / GRADIENTS_FOLDER).dots(layout, v) for k in ("half", "dense")]
    torch.testing.assert_close(dots[0], dots[1], rtol=0.05, atol=0.05 * float(dots[1].norm()))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "vmap"])
def test_rounding_is_the_same_wherever_gradients_lie(task, tmp_path, way):
    half = {"chunk_size": 5, "store_dtype": "bfloat16"}
    stored = collect(task, CollectConfig(**half), tmp_path / "stored")
    other = collect(task, CollectConfig(**half, **WAYS[way]), tmp_path / "other")
    assert (stored.store, other.store) == ("gradients", "gram")
    assert other.store_rounding == stored.store_rounding
    for name in ("gram", "mean_gradient", "fisher_diagonal"):
        # Sums in float32, of numbers that are the same.
        torch.testing.assert_close(getattr(other, name), getattr(stored, name), rtol=1e-5, atol=1e-9)
    layout = layout_of(task.model, task.parameter_names)
    v = torch.randn(layout.numel, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    again = recomputed_side(task, layout, "hooks", 5, dtype=torch.bfloat16)
    kept = stored_side(GradientStore(tmp_path / "stored" / GRADIENTS_FOLDER), layout)
    torch.testing.assert_close(again.dots(v), kept.dots(v), rtol=1e-5, atol=1e-5)


def test_a_killed_pass_goes_on(task, measured, tmp_path):
    collected, _, _ = measured
    config = CollectConfig(store="gram", chunk_size=5, memory_budget_gb=1e-4)
    collect(task, config, tmp_path)
    (tmp_path / "parts" / "shard-00001.safetensors").unlink()
    kept = (tmp_path / "parts" / "shard-00000.safetensors").stat().st_mtime_ns
    again = collect(task, config, tmp_path)
    assert (tmp_path / "parts" / "shard-00000.safetensors").stat().st_mtime_ns == kept
    torch.testing.assert_close(again.gram, collected.gram, rtol=1e-9, atol=1e-14)


def test_no_room_for_the_store_that_was_asked_for(task, tmp_path):
    with pytest.raises(ConfigError, match="gradient store needs") as caught:
        collect(task, CollectConfig(store="gradients", disk_budget_gb=1e-6), tmp_path)
    assert "gram" in caught.value.fix


def test_recomputed_products_equal_stored_ones(task, measured):
    _, _, stored = measured
    layout = layout_of(task.model, task.parameter_names)
    again = recomputed_side(task, layout, "hooks", 5)
    v = torch.randn(layout.numel, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again.dots(v), stored.dots(v), rtol=1e-9, atol=1e-14)
    w = torch.arange(12, dtype=torch.float64)
    torch.testing.assert_close(again.weighted_sum(w), stored.weighted_sum(w), rtol=1e-9, atol=1e-14)
    name = layout.names[1]
    torch.testing.assert_close(again.columns(name), stored.columns(name), rtol=1e-9, atol=1e-14)


def test_module_grams_add_up_and_traces_with_them(measured):
    collected, space, side = measured
    g = torch.cat([side.columns(n) for n in collected.parameter_names], 1)
    torch.testing.assert_close(collected.gram.sum(0), g @ g.T, rtol=1e-9, atol=1e-15)
    assert float(space.module_traces.sum()) == pytest.approx(space.trace)
    assert float(collected.fisher_diagonal.sum()) == pytest.approx(space.trace)
    top = space.top_weights[0]
    parameter = collected.parameter_names.index(top["name"])
    flat = torch.tensor(0)
    for size, index in zip(collected.parameter_shapes[parameter], top["index"], strict=True):
        flat = flat * size + index
    where = sum(torch.tensor(s).prod() for s in collected.parameter_shapes[:parameter]) + flat
    assert (
        float(collected.fisher_diagonal[int(where)]) == top["value"] == float(collected.fisher_diagonal.max())
    )


@pytest.mark.parametrize("method", ["svd", "randomized_svd"])
def test_subspace_methods_agree(measured, method):
    collected, space, side = measured

    def dense():
        return torch.cat([side.columns(n) for n in collected.parameter_names], 1)

    other = subspace(collected, SubspaceConfig(method=method, max_rank=12), seed=0, gradients=dense)
    k = min(space.rank, other.rank)
    torch.testing.assert_close(other.eigenvalues[:k], space.eigenvalues[:k], rtol=1e-9, atol=0)
    overlap = (other.dual_vectors[:, :k].T @ space.dual_vectors[:, :k]).abs()
    torch.testing.assert_close(overlap, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-7)


def test_diag_topk_is_the_largest_coordinates(measured):
    collected, _, _ = measured
    space = subspace(collected, SubspaceConfig(method="diag_topk", rank=5), seed=0)
    torch.testing.assert_close(space.eigenvalues, torch.topk(collected.fisher_diagonal, 5).values)
    assert space.explained == pytest.approx(float(space.eigenvalues.sum()) / space.trace)


def test_svd_needs_gradients_and_ranks_have_limits(measured):
    collected, _, _ = measured
    with pytest.raises(ConfigError, match="svd"):
        subspace(collected, SubspaceConfig(method="svd"), seed=0)
    with pytest.raises(ConfigError, match="13"):
        subspace(collected, SubspaceConfig(rank=13), seed=0)


def test_contributions_add_up(scored):
    record = scored.record
    c = record.c_update
    assert float(record.module_second_order.sum()) == pytest.approx(float(c.square().mean()))
    torch.testing.assert_close(record.c_batches.mean(1), c, rtol=1e-9, atol=1e-12)


def test_krylov_starts_along_the_update(scored):
    record = scored.record
    torch.testing.assert_close(
        -record.krylov_beta * record.c_krylov[:, 0], record.c_update, rtol=1e-8, atol=1e-12
    )
    torch.testing.assert_close(record.krylov_t, record.krylov_t.T)


@pytest.mark.parametrize("way", ["stored", "recomputed"])
def test_vectors_that_do_not_fit_in_memory_give_the_same_record(
    task, folder, measured, scored, tmp_path, way
):
    collected, space, _ = measured
    layout = layout_of(task.model, task.parameter_names)
    if way == "stored":
        side = stored_side(GradientStore(folder / GRADIENTS_FOLDER), layout, memory=1)
    else:
        side = recomputed_side(task, layout, collected.engine["name"], 5, memory=1)
    with Scratch(tmp_path / "vectors", memory=1) as scratch:
        made = score(
            task,
            collected,
            space,
            side,
            config=CONFIG,
            training=TrainingConfig(max_grad_norm=None),
            seed=0,
            scratch=scratch,
        )
        assert len(list(scratch.folder.iterdir())) == 2
    for name, value in scored.directions.items():
        torch.testing.assert_close(made.directions[name], value, rtol=1e-9, atol=1e-12)
    ours, theirs = made.record, scored.record
    for name in ("c_update", "c_batches", "c_krylov", "krylov_t", "probe_safety"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-9, atol=1e-12)
    for name in ("ratio", "permuted_mean", "permuted_max", "p_value", "delta_w", "control"):
        assert getattr(ours.overlap, name) == pytest.approx(getattr(theirs.overlap, name), rel=1e-9)


def test_permuted_copies_are_the_same_however_they_are_read(task):
    layout = layout_of(task.model, task.parameter_names)
    u = torch.randn(layout.numel, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    whole = Permuted(u, layout, 4, seed=5).block(slice(0, layout.numel), slice(0, 4))
    late = Permuted(u, layout, 2, seed=5, first=2)
    everything = slice(0, layout.numel)
    assert torch.equal(late.block(everything, slice(0, 2)), whole[:, 2:])
    for name in layout.names:
        where = layout.slice_of(name)
        assert torch.equal(late.block(where, slice(1, 2)), whole[where, 3:])
        assert torch.equal(whole[where].sort(dim=0).values, u[where].sort().values[:, None].expand(-1, 4))
    chosen = torch.tensor([0, 7, layout.numel - 1, layout.offsets[1]])
    assert torch.equal(Permuted(u, layout, 4, seed=5).at(chosen), whole[chosen])
    assert len({tuple(column[:50].tolist()) for column in whole.T}) == 4
    other = Permuted(u, layout, 1, seed=6).block(everything, slice(0, 1))
    assert not torch.equal(other[:, 0], whole[:, 0])


def test_overlap_against_a_dense_projector(task, measured, scored):
    collected, space, side = measured
    g = torch.cat([side.columns(n) for n in collected.parameter_names], 1)
    basis = g.T @ space.dual_vectors / (len(g) * space.eigenvalues).sqrt()
    u = -scored.directions["gradient"] / (
        scored.directions["gradient"].square() + scored.directions["noise_variance"]
    ).sqrt().clamp(min=1e-30)
    # The A side of the fresh adapter has no gradient, so its preconditioner does not matter.
    ratio = float((basis.T @ u).norm() / u.norm())
    assert scored.record.overlap.ratio == pytest.approx(ratio, rel=1e-3)
    assert 0 < scored.record.overlap.random < scored.record.overlap.ratio <= 1
    assert scored.record.overlap.delta_w is not None
    assert scored.record.overlap.control is not None


def test_probe_starts_at_zero_and_measures_the_first_order_change(task, scored):
    record = scored.record
    assert record.probe_times is not None
    assert record.probe_safety is not None
    assert float(record.probe_safety[:, 0].abs().max()) == 0
    t = float(record.probe_times[1])
    predicted = record.c_update * t
    assert float((record.probe_safety[:, 1] - predicted).norm()) < 0.05 * float(predicted.norm())


def test_examples_are_the_rows_they_name(task, scored):
    for row in scored.record.examples:
        assert task.finetune.rows[row["index"]]["prompt"] == row["prompt"]
    assert len(scored.record.examples) == 10


def test_score_leaves_the_model_as_found(task, measured):
    collected, space, side = measured
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    state = torch.get_rng_state()
    training = task.model.training
    score(
        task,
        collected,
        space,
        side,
        config=CONFIG,
        training=TrainingConfig(optimizer="sgd", max_grad_norm=None),
        seed=0,
    )
    assert all(torch.equal(p, before[n]) for n, p in task.model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert task.model.training == training


def test_a_run_without_store_or_control_says_what_is_missing(task):
    config = PipelineConfig.model_validate(
        {
            "collect": {"store": "gram", "chunk_size": 5},
            "score": CONFIG.model_dump(),
            "training": {"max_steps": 10, "weight_decay": 0.1},
            "forecast": {"bootstrap_samples": 10},
        }
    )
    report = assess(replace(task, control=None), config)
    assert report.collected.store == "gram"
    assert report.scored.overlap.control is None
    assert any("control" in warning for warning in report.scored.warnings)
    assert report.forecast.forecasters["local"].status == "measured"


def linear(n=4, safety=None, finetune=None):
    model = torch.nn.Linear(3, 1).double()
    x = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(m, b):
        return (m(b) - 1).square().sum(1)

    return {
        "model": model,
        "safety_dataloader": [x],
        "safety_loss_fn": safety or loss,
        "fine_tune_dataloader": [x + 1, x - 1],
        "fine_tune_loss_fn": finetune or loss,
    }


def test_any_torch_model_through_the_api():
    report = AlignmentRiskPipeline().run(**linear())
    assert report.warning.split(":")[0] in ("low", "elevated", "high", "inconclusive")
    assert "RiskReport(" in repr(report)
    assert "<!doctype html>" in report.html()[:20]
    assert report.curvature["gamma_hat"] >= 0


@pytest.mark.parametrize(
    ("changes", "error", "what"),
    [
        ({"safety_loss_fn": lambda m, b: m(b).sum(1) * 0}, NumericsError, "exactly zero"),
        ({"fine_tune_loss_fn": lambda m, b: m(b).sum(1) * 0}, NumericsError, "update of the finetune data"),
        ({"safety_loss_fn": lambda m, b: (m(b) / 0).sum(1)}, NumericsError, "sample 0"),
        ({"fine_tune_loss_fn": lambda m, b: (m(b) / 0).sum(1)}, NumericsError, "loss of a batch"),
        ({"safety_dataloader": [torch.ones(1, 3, dtype=torch.float64)]}, InputError, "two safety samples"),
        ({"fine_tune_dataloader": []}, InputError, "gives no batch"),
    ],
)
def test_bad_input_through_the_api(changes, error, what):
    with pytest.raises(error, match=what):
        AlignmentRiskPipeline().run(**{**linear(), **changes})


def test_lora_mode_without_lora_parameters():
    with pytest.raises(ConfigError, match="no LoRA parameters"):
        AlignmentRiskPipeline({"mode": "lora"}).run(**linear())


def test_epochs_need_a_known_size():
    with pytest.raises(ConfigError, match="known size"):
        AlignmentRiskPipeline({"training": {"epochs": 1}}).run(**linear())


def test_shuffled_loaders_do_not_touch_the_global_random_state():
    x = torch.randn(8, 3, dtype=torch.float64)
    loader = torch.utils.data.DataLoader(x, batch_size=4, shuffle=True)
    given = linear()
    state = torch.get_rng_state()
    AlignmentRiskPipeline().run(**{**given, "safety_dataloader": loader, "fine_tune_dataloader": loader})
    assert torch.equal(torch.get_rng_state(), state)


def test_an_empty_task_set_is_named():
    empty = SampleSet("safety", [], lambda m, b: b)
    with pytest.raises(InputError, match="safety loader gives no batch"):
        AlignmentRiskPipeline().run(**{**linear(), "safety_dataloader": empty.batches})
