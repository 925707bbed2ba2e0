import pytest
import torch
from torch import nn

from arisk.base.errors import ArtifactError
from arisk.gradients import GradientStore, layout_of

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


def test_reading_damage_is_an_error(tmp_path):
    store, _ = filled(tmp_path)
    shard = tmp_path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match="shard") as caught:
        store.sweep(LAYOUT)
    assert "collect" in caught.value.fix
    with pytest.raises(ArtifactError, match="no gradient shards"):
        GradientStore(tmp_path / "none").sweep(LAYOUT)
