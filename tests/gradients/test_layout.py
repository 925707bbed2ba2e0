from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from arisk.base.errors import ConfigError, ShapeError
from arisk.gradients import batch_size, layout_of, move_batch, slice_batch

MODEL = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def test_flatten_and_split_are_inverse():
    layout = layout_of(MODEL, [n for n, _ in MODEL.named_parameters()])
    flat = torch.arange(float(layout.numel))
    assert torch.equal(layout.flatten(layout.split(flat)), flat)
    assert layout.modules == ("0", "1")
    assert layout.module_of_parameter == (0, 0, 1, 1)
    assert layout.slice_of("1.weight") == slice(9, 12)


def test_bad_names_and_vectors_are_refused():
    with pytest.raises(ConfigError, match="wieght") as caught:
        layout_of(MODEL, ["0.wieght"])
    assert "0.weight" in caught.value.fix
    with pytest.raises(ConfigError, match="no parameter"):
        layout_of(MODEL, [])
    with pytest.raises(ShapeError):
        layout_of(MODEL, ["0.weight"]).split(torch.zeros(5))
    with pytest.raises(ShapeError, match=r"0\.bias"):
        layout_of(MODEL, ["0.bias"]).flatten({})


@dataclass(frozen=True)
class Pair:
    x: torch.Tensor
    name: str


Named = namedtuple("Named", "x y")
X = torch.arange(12.0).view(4, 3)


@pytest.mark.parametrize(
    "batch",
    [
        X,
        (X, X),
        [X, "text"],
        {"x": X, "n": 3},
        Pair(X, "a"),
        Named(X, X),
        {"a": {"b": X}, "c": torch.tensor(2.0)},
    ],
)
def test_batches_of_every_kind(batch):
    assert batch_size(batch) == 4
    part = slice_batch(batch, 1, 3)
    assert type(part) is type(batch)
    assert batch_size(part) == 2
    assert batch_size(move_batch(batch, torch.device("cpu"))) == 4


def test_batch_encoding_stays_one():
    from transformers import BatchEncoding

    part = slice_batch(BatchEncoding({"input_ids": X, "attention_mask": X}), 0, 2)
    assert isinstance(part, BatchEncoding)
    assert part["input_ids"].shape == (2, 3)


@pytest.mark.parametrize("batch", [(X, X[:2]), "text", {"a": 1}])
def test_batches_that_are_none(batch):
    with pytest.raises(ShapeError):
        batch_size(batch)
