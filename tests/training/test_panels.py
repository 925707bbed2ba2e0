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
from arisk.training.panels import filled, panel_of, split_panel, spread

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


def test_rows_of_like_length_are_measured_together_and_told_in_their_order(monkeypatch):
    monkeypatch.setattr("arisk.training.panels.TOKENS_AT_ONCE", 90)
    rows = by_length(40)
    shuffled = [rows[i] for i in torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()]
    samples = SampleSet(
        "control", FixedBatches(shuffled, 8, 0), lambda _m, batch: batch["attention_mask"].sum(1)
    )
    panel = panel_of(samples, 25, CPU)
    own = [len(shuffled[row].tokens) for row in panel.rows]
    assert panel.losses(nn.Linear(1, 1)).tolist() == own
    assert sorted(lengths(panel)) == sorted(own)
    shapes = [batch["input_ids"].shape for batch in panel.batches]
    assert all(count * longest <= 90 for count, longest in shapes)
    # Sorted, all rows but those at a group's end have the group's length, or nearly so.
    assert sum(count * longest for count, longest in shapes) < 1.15 * sum(own)
    assert len(panel.batches) <= sum(own) / 90 * 1.4


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


def drifting(rows, steps, generator):
    """(N, M) losses that rise as a common curve and a line of each row's own, with a little of a wave."""
    own = torch.rand(rows, generator=generator, dtype=torch.float64)
    at = torch.tensor(steps, dtype=torch.float64)
    return (at / 10).square() + own[:, None] * at, own


def test_leading_rows_carry_what_all_rows_do_together():
    """A common curve beside straight lines of each row's own is found without an error."""
    steps, whole = [0, 4, 9, 20, 50, 100], [True, False, False, True, False, True]
    truth, _ = drifting(40, steps, torch.Generator().manual_seed(0))
    lead = spread(40, 8)
    others = [i for i in range(40) if i not in lead]
    measured = truth.clone()
    for i, every in enumerate(whole):
        if not every:
            measured[others, i] = float("nan")
    found, error = filled(measured, whole, lead, steps)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    assert float(error.abs().max()) < 1e-12
    assert torch.equal(measured.isnan(), torch.tensor(whole).logical_not()[None] & ~_is_in(lead, 40)[:, None])


def _is_in(places, count):
    inside = torch.zeros(count, dtype=torch.bool)
    inside[torch.tensor(places)] = True
    return inside


def test_the_error_told_is_the_error_made():
    """Over many draws of rows' own bends, the squared error of the mean is the one that is told."""
    generator, made, told = torch.Generator().manual_seed(3), [], []
    lead = spread(60, 12)
    for _ in range(300):
        truth = torch.randn(60, 3, generator=generator, dtype=torch.float64).cumsum(1)
        measured = truth.clone()
        measured[~_is_in(lead, 60), 1] = float("nan")
        found, error = filled(measured, [True, False, True], lead, [0, 5, 10])
        made.append(float(found[:, 1].mean() - truth[:, 1].mean()) ** 2)
        told.append(float(error[1]) ** 2)
        assert error[0] == error[2] == 0
    assert 0.8 < sum(made) / sum(told) < 1.25


def test_lines_are_level_after_the_last_whole_point():
    measured = torch.tensor([[0.0, 1.0, 3.0], [0.0, 1.0, float("nan")], [0.0, 4.0, float("nan")]])
    found, error = filled(measured.double(), [True, True, False], [0], [0, 1, 2])
    assert found.tolist() == [[0, 1, 3], [0, 1, 3], [0, 4, 6]]
    assert error.tolist() == [0, 0, 0]  # One leading row says nothing of a spread.


@pytest.mark.parametrize(("rows", "lead"), [(40, 8), (40, 20), (11, 3)])
def test_a_split_panel_measures_every_row_once(rows, lead):
    samples = SampleSet(
        "safety", FixedBatches(by_length(rows), 8, 0), lambda _m, batch: batch["attention_mask"].sum(1)
    )
    model, split = nn.Linear(1, 1), split_panel(samples, None, lead, CPU)
    whole = panel_of(samples, None, CPU).losses(model)
    leading, others = split.leading(model, 1)[0], split.others(model, 1)[0]
    assert len(split) == rows
    assert bool((leading.isnan() != others.isnan()).all()) or split.rest is None
    torch.testing.assert_close(torch.where(leading.isnan(), others, leading), whole)
    assert (~leading.isnan()).nonzero()[:, 0].tolist() == split.places
    assert len(split.places) == (lead if 2 * lead < rows else rows)
