"""Rows that are measured: spread, exact in number, none twice, whatever the batches."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from arisk.base.errors import InputError
from arisk.base.task import SampleSet
from arisk.models.batching import FixedBatches, PlannedBatches
from arisk.models.formats import Row
from arisk.models.rendering import Rendered
from arisk.training.panels import panel_of, spread

CPU = torch.device("cpu")


@given(st.integers(0, 300), st.integers(1, 300))
def test_places_are_spread_and_none_twice(count, limit):
    places = spread(count, limit)
    assert len(places) == min(count, limit)
    assert places == sorted(set(places))
    assert all(0 <= place < count for place in places)
    if len(places) > 1 and limit < count:
        gaps = [b - a for a, b in itertools.pairwise(places)]
        assert max(gaps) - min(gaps) <= 1


def by_length(count):
    """Rows as a safety set has them: the shortest first."""
    return [Rendered(tuple(range(1, 4 + i)), ((1, 3 + i),), 1, Row(line=i), "all") for i in range(count)]


def lengths(panel):
    return [int(n) for batch in panel.batches for n in batch["attention_mask"].sum(1)]


def test_the_cut_into_batches_changes_no_row():
    rows = by_length(40)
    found = {
        size: panel_of(SampleSet("safety", FixedBatches(rows, size, 0), sum), 10, CPU) for size in (3, 8)
    }
    assert lengths(found[3]) == lengths(found[8])
    assert found[3].rows == found[8].rows
    assert len(found[3]) == 10
    # Long rows among them, in the measure of the set.
    assert abs(sum(lengths(found[3])) / 10 - sum(len(r.tokens) for r in rows) / 40) < 1


@pytest.mark.parametrize(("rows", "limit", "wanted"), [(20, 64, 20), (20, 7, 7), (20, 20, 20)])
def test_an_endless_order_gives_no_row_twice(rows, limit, wanted):
    batches = PlannedBatches(by_length(rows), 8, 0, seed=0)
    panel = panel_of(SampleSet("control", batches, sum), limit, CPU)
    assert len(panel) == len(set(panel.rows)) == wanted
    assert len(set(lengths(panel))) == wanted


def loss(model, batch):
    return model.weight.sum() * batch.sum(1)


@pytest.mark.parametrize("limit", [1, 5, 11, 12, 99, None])
def test_lists_and_loaders_are_cut_inside_a_batch(limit):
    values = torch.arange(12.0)[:, None]
    batches = [values[i : i + 5] for i in range(0, 12, 5)]
    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight)
    wanted = min(12, limit or 12)
    listed = panel_of(SampleSet("safety", batches, loss), limit, CPU)
    assert listed.losses(model).tolist() == [float(i) for i in spread(12, limit)]
    read = panel_of(SampleSet("safety", _Once(batches), loss), limit, CPU)
    assert read.losses(model).tolist() == [float(i) for i in range(wanted)]


class _Once:
    """A loader that can only be read."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_an_empty_set_is_an_error():
    with pytest.raises(InputError):
        panel_of(SampleSet("safety", [], loss), 4, CPU)
