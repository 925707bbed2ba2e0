"""Gradients that are kept: whole beside the oracle, as sketches by expectation."""

import pytest
import torch
from torch import nn

from arisk.base.errors import ArtifactError, NumericsError
from arisk.gradients import GradientStore, layout_of, measuring
from arisk.gradients.factors import Outer, Rows, block_of, dots_of, entries_of, tensors_of, weighted_sum_of
from arisk.gradients.hooks import hook_parts
from arisk.gradients.store import Sides, Sketch, balanced, per_sample_sketches, sketch_of, sketch_products
from tests.gradients import cases

MODEL = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 3))
LAYOUT = layout_of(MODEL, [n for n, _ in MODEL.named_parameters()])


def filled(folder, dtype=torch.float64, sizes=(4, 4, 3)):
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(sum(sizes), LAYOUT.numel, dtype=dtype, generator=generator)
    store, start = GradientStore(folder), 0
    for index, size in enumerate(sizes):
        rows = g[start : start + size]
        store.write_shard(index, {n: rows[:, LAYOUT.slice_of(n)] for n in LAYOUT.names})
        start += size
    return store, g


def test_sweep_against_the_dense_matrix(tmp_path):
    store, g = filled(tmp_path)
    gram, mean, diagonal = store.sweep(LAYOUT)
    torch.testing.assert_close(gram.sum(0), g @ g.T, rtol=1e-9, atol=1e-9)
    first = g[:, :1240]
    torch.testing.assert_close(gram[0], first @ first.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mean, g.mean(0))
    torch.testing.assert_close(diagonal, g.square().mean(0))


def test_products(tmp_path):
    store, g = filled(tmp_path)
    v = torch.randn(LAYOUT.numel, 3, dtype=torch.float64)
    torch.testing.assert_close(store.dots(LAYOUT, v), g @ v)
    w = torch.randn(11, dtype=torch.float64)
    torch.testing.assert_close(store.weighted_sum(LAYOUT, w), g.T @ w)
    torch.testing.assert_close(store.rows("1.weight", 5, 9), g[:, LAYOUT.slice_of("1.weight")][:, 5:9])


def test_float32_keeps_five_digits(tmp_path):
    store, g = filled(tmp_path, torch.float32)
    gram, _, _ = store.sweep(LAYOUT)
    dense = g.double() @ g.double().T
    assert float((gram.sum(0) - dense).norm() / dense.norm()) < 1e-5


def test_blocks_are_small_and_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr("arisk.gradients.factors.GRAM_ENTRIES", 1)
    monkeypatch.setattr("arisk.gradients.factors.COLUMNS", 100)
    store, g = filled(tmp_path)
    torch.testing.assert_close(store.sweep(LAYOUT)[0].sum(0), g @ g.T)
    v = torch.ones(LAYOUT.numel, 1, dtype=torch.float64)
    torch.testing.assert_close(store.dots(LAYOUT, v), g @ v)


def test_damaged_shards_are_measured_again(tmp_path):
    store, _ = filled(tmp_path)
    shard = tmp_path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:200])
    assert store.finished() == [0, 2]
    assert not shard.exists()


def test_gradients_from_disk_lie_in_memory_as_those_that_were_kept_there(tmp_path):
    """A kernel rounds by where memory begins; a resumed pass reads what a whole one kept."""
    store, _ = filled(tmp_path)
    for name in LAYOUT.names:
        for part in (part for parts in store.parts(name) for part in parts):
            assert {tensor.data_ptr() % 64 for tensor in tensors_of(part)} == {0}


def test_behind_a_batch_on_disk_none_stays_in_memory(tmp_path):
    """A pass that goes on keeps every batch where the pass that was killed would have kept it."""
    whole = GradientStore(tmp_path, memory=100)
    small, large = torch.ones(2, 3, dtype=torch.float64), torch.ones(9, 3, dtype=torch.float64)
    for index, gradients in enumerate((small, large, small)):
        whole.write_shard(index, {"w": gradients})
    on_disk = sorted(tmp_path.iterdir())
    assert [path.name for path in on_disk] == ["shard-00001.safetensors", "shard-00002.safetensors"]
    on_disk[1].unlink()
    again = GradientStore(tmp_path, memory=100)
    for index in {0, 2}.difference(again.finished()):
        again.write_shard(index, {"w": small})
    assert sorted(tmp_path.iterdir()) == on_disk


def test_reading_damage_is_an_error(tmp_path):
    store, _ = filled(tmp_path)
    shard = tmp_path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match="shard") as caught:
        store.sweep(LAYOUT)
    assert "collect" in caught.value.fix
    with pytest.raises(ArtifactError, match="no gradient shards"):
        GradientStore(tmp_path / "none").sweep(LAYOUT)


CPU = torch.device("cpu")


def sketches(name, side, engine="hooks", rename=None):
    model, batch, loss_fn, names, oracle = cases.case(name)
    layout = layout_of(model, names)
    with measuring(model, layout):
        sketch = Sketch(layout, side=side, dtype=torch.float64, device=CPU)
        losses, rows = per_sample_sketches(model, batch, loss_fn, layout, sketch, engine=engine)
    return losses, rows, oracle


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("entries", [1, 1 << 24])
def test_factors_multiply_out_to_the_oracle(name, entries, monkeypatch):
    monkeypatch.setattr("arisk.gradients.factors.BLOCK_ENTRIES", entries)
    model, batch, loss_fn, names, oracle = cases.case(name)
    layout = layout_of(model, names)
    blocks, sums, dots = {}, {}, torch.zeros(len(oracle), 3, dtype=torch.float64)
    w = torch.arange(len(oracle), dtype=torch.float64)
    v = torch.randn(layout.numel, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def sink(parameter, parts):
        blocks[parameter] = sum(block_of(part) for part in parts).flatten(1)
        own = v[layout.slice_of(parameter)].reshape(*layout.shape_of(parameter), 3)
        sums[parameter] = weighted_sum_of(parts, w).flatten()
        dots[:, :2] += dots_of(parts, own[..., :2])
        dots[:, 2:] += dots_of(parts, own[..., 2:])

    with measuring(model, layout):
        hook_parts(model, batch, loss_fn, layout, sink)
    found = torch.cat([blocks[n] for n in layout.names], 1)
    torch.testing.assert_close(found, oracle, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(dots, oracle @ v, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(layout.flatten(sums), w @ oracle, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("engine", ["hooks", "loop"])
def test_a_side_that_is_long_enough_projects_nothing(name, engine):
    _, rows, oracle = sketches(name, 64, engine)
    torch.testing.assert_close(sketch_products(rows, rows), oracle @ oracle.T, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["tiny", "llama", "gpt2", "lora"])
def test_every_engine_gives_the_same_sketch(name):
    ours, theirs = sketches(name, 5), sketches(name, 5, "loop")
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-12)


def wide(side, trial=0):
    """Relative error of the Gram matrix of twelve random rank-4 gradients of a 384 × 256 weight."""
    generator = torch.Generator().manual_seed(7)
    common = torch.randn(1, 4, 384, generator=generator), torch.randn(1, 4, 256, generator=generator)
    left = torch.randn(12, 4, 384, generator=generator) + common[0]
    right = torch.randn(12, 4, 256, generator=generator) + common[1]
    layout = layout_of(nn.ModuleDict({f"m{trial}": nn.Linear(256, 384, bias=False)}), [f"m{trial}.weight"])
    sketch = Sketch(layout, side=side, dtype=torch.float32, device=CPU)
    rows = sketch_of([Outer(left, right)], sketch.sides[f"m{trial}.weight"])
    exact = torch.einsum("iso,isd->iod", left, right).flatten(1)
    exact = exact @ exact.T
    return (sketch_products(rows, rows) - exact) / exact.diagonal().sqrt().outer(exact.diagonal().sqrt())


@pytest.mark.parametrize(("side", "limit"), [(16, 0.35), (32, 0.2), (64, 0.12)])
def test_the_error_falls_as_johnson_and_lindenstrauss_say(side, limit):
    errors = torch.stack([wide(side, trial) for trial in range(8)])
    size = float(errors.square().mean().sqrt())
    assert limit / 4 < size < limit
    # Unbiased: the mean over draws of the sides is smaller than one draw's error.
    assert float(errors.mean(0).square().mean().sqrt()) < 0.6 * size


def test_one_hot_factors_and_kept_sides():
    index = torch.tensor([[0, 2, 2], [1, 1, 0]])
    right = torch.randn(2, 3, 5)
    part = Rows(index, right, 4)
    block = block_of(part)
    assert block.shape == (2, 4, 5)
    torch.testing.assert_close(block[0, 2], right[0, 1] + right[0, 2])
    assert entries_of(part) == 18
    torch.testing.assert_close(sketch_of([part], Sides(None, None, 4, 5)), block.flatten(1))
    side = torch.randn(2, 4)
    expected = (side @ block).flatten(1)
    torch.testing.assert_close(sketch_of([part], Sides(side, None, 4, 5)), expected)


def test_a_bad_sample_is_named():
    model = nn.Linear(3, 2)
    layout = layout_of(model, ["weight"])
    sketch = Sketch(layout, side=2, dtype=torch.float32, device=CPU)
    batch = torch.ones(3, 3)
    batch[1] = float("nan")
    with pytest.raises(NumericsError, match="sample 11"):
        per_sample_sketches(model, batch, lambda m, b: m(b).sum(1), layout, sketch, offset=10)


@pytest.mark.parametrize("shape", [(24, 30), (24, 3), (1, 30)], ids=["both sides", "left", "a vector"])
def test_balanced_sides_estimate_a_known_direction_without_bias_and_with_less_noise(shape):
    """A direction that is large where gradients are small, as a preconditioned one is."""
    generator = torch.Generator().manual_seed(0)
    drawn = lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator)  # noqa: E731
    size = torch.exp(1.5 * drawn(shape[0], 1)) * torch.exp(1.5 * drawn(1, shape[1]))
    g, v = size * drawn(*shape), drawn(*shape) / size
    exact, found = float((g * v).sum()), {"plain": [], "balanced": []}
    for _ in range(400):
        sides = Sides(
            drawn(4, shape[0]) / 2 if shape[0] > 4 else None,
            drawn(4, shape[1]) / 2 if shape[1] > 4 else None,
            *shape,
        )
        own, scale = balanced(sides, v.abs() / size)
        found["plain"].append(float((sketch_of([g[None]], sides) * sketch_of([v[None]], sides)).sum()))
        found["balanced"].append(
            float((sketch_of([g[None]], own) * sketch_of([(v / scale)[None]], sides)).sum())
        )
    plain, even = (torch.tensor(values, dtype=torch.float64) for values in found.values())
    assert abs(float(even.mean()) - exact) < 4 * float(even.std()) / 20
    assert even.std() < 0.4 * plain.std()
