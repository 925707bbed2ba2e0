"""Vectors in a file give the numbers of vectors in memory, by whatever blocks they are read."""

import math
from types import SimpleNamespace

import pytest
import torch

from arisk.base.errors import ArtifactError
from arisk.geometry import vectors
from arisk.geometry.vectors import Dense, Scaled, Scratch, VectorStack, column_groups, columns_of

P, M = 23, 5


@pytest.fixture(params=[torch.float32, torch.float64])
def dense(request):
    return torch.randn(P, M, dtype=request.param, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["memory", "file"])
def stack(request, dense, tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "CHUNK", 7)
    path = tmp_path / "deep" / "v.bin" if request.param == "file" else None
    made = VectorStack(P, dense.dtype, path)
    for column in dense.T:
        made.append(column)
    return made


def test_a_stack_is_its_columns(stack, dense):
    assert stack.shape == (P, M)
    assert torch.equal(stack.tensor(), dense)
    assert torch.equal(stack.block(slice(3, 11), slice(1, 4)), dense[3:11, 1:4])
    assert torch.equal(columns_of(dense).block(slice(3, 11), slice(1, 4)), dense[3:11, 1:4])
    scaled = Scaled(stack, torch.arange(P, dtype=dense.dtype))
    assert scaled.shape == (P, M)
    assert torch.equal(
        scaled.block(slice(3, 11), slice(0, 2)), dense[3:11, :2] * torch.arange(3, 11)[:, None]
    )


def test_products_with_a_stack(stack, dense):
    v = torch.randn(P, dtype=dense.dtype, generator=torch.Generator().manual_seed(1))
    w = torch.randn(M, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    close = {"rtol": 1e-5, "atol": 1e-6} if dense.dtype == torch.float32 else {"rtol": 1e-13, "atol": 1e-13}
    torch.testing.assert_close(stack.dots(v), (dense.T @ v).double(), **close)
    torch.testing.assert_close(stack.combine(w), (dense.double() @ w).to(dense.dtype), **close)


def test_an_appended_vector_stays_as_it_was(dense):
    stack = VectorStack(P, dense.dtype)
    moving = dense[:, 0].clone()
    stack.append(moving)
    moving.zero_()
    assert torch.equal(stack.tensor()[:, 0], dense[:, 0])


def test_scratch_spills_what_the_budget_does_not_hold(tmp_path):
    folder = tmp_path / "scratch"
    folder.mkdir()
    (folder / "left-by-a-killed-run.bin").write_bytes(b"1")
    with Scratch(folder, memory=8 * P * 3) as scratch:
        assert not folder.exists()
        first = scratch.stack(P, 2, torch.float64)
        assert first.path is None
        second = scratch.stack(P, 2, torch.float64)
        assert second.path.parent == folder
        second.append(torch.ones(P, dtype=torch.float64))
        assert second.path.stat().st_size == 8 * P
    assert not folder.exists()
    # Without a folder nothing can spill.
    assert Scratch(None, memory=1).stack(P, 100, torch.float64).path is None


def test_files_go_where_the_work_fails(tmp_path):
    scratch = Scratch(tmp_path / "scratch", memory=0)

    def work():
        with scratch:
            scratch.stack(P, 1, torch.float32).append(torch.ones(P))
            assert scratch.folder.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert not scratch.folder.exists()


def test_a_full_disk_is_told(tmp_path):
    stack = VectorStack(1 << 14, torch.float32, tmp_path / "v.bin")
    stack.path.unlink()
    stack.path.symlink_to("/dev/full")
    with pytest.raises(ArtifactError, match="space"):
        stack.append(torch.ones(1 << 14))
    with pytest.raises(ArtifactError):
        VectorStack(P, torch.float32, tmp_path / "v.bin" / "below-a-file")


def test_a_disk_too_small_is_told_before_it_is_filled(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors.shutil, "disk_usage", lambda _: SimpleNamespace(free=8 * P - 1))
    with pytest.raises(ArtifactError, match=r"score\.krylov_dim"):
        Scratch(tmp_path / "scratch", memory=0).stack(P, 1, torch.float64)
    assert list(tmp_path.iterdir()) == []


def test_column_groups_cover_every_column_once():
    assert [(g.start, g.stop) for g in column_groups(10, 7, memory=8 * 10 * 3)] == [(0, 3), (3, 6), (6, 7)]
    assert [(g.start, g.stop) for g in column_groups(10, 2, memory=1)] == [(0, 1), (1, 2)]
    assert [(g.start, g.stop) for g in column_groups(10, 7, memory=math.inf)] == [(0, 7)]
    assert list(column_groups(10, 0, memory=math.inf)) == []


def test_dense_columns_know_their_shape(dense):
    assert Dense(dense).shape == (P, M)
