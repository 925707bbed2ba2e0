"""Packed sequences: what each holds, against TRL's own packing and by what must hold."""

import itertools
import random

import pytest

from arisk.models.batching import PlannedBatches
from arisk.models.formats import Row
from arisk.models.packing import PackedBatches, packs, wrapped
from arisk.models.rendering import IGNORED, Rendered

DRAWN = random.Random(3)
LENGTHS = [DRAWN.randint(1, 40) for _ in range(2300)]


def rows(lengths):
    """Rows of tokens that are all different; the last third of each is trained."""
    tokens = itertools.count(1)
    made = []
    for length in lengths:
        start = max(1, 2 * length // 3)
        ids = tuple(itertools.islice(tokens, length))
        spans = ((start, length),) if length > start else ()
        made.append(Rendered(ids, spans, start, Row(line=len(made) + 1), "completion"))
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("limit", [40, 57, 200])
@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_sequences_are_those_of_trl(strategy, limit):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    made = rows(LENGTHS)
    data = datasets.Dataset.from_dict({"input_ids": [list(row.tokens) for row in made]})
    expected = trl.pack_dataset(data, limit, strategy)
    if strategy == "wrapped":
        assert [list(row.tokens) for row in wrapped(made, limit)] == list(expected["input_ids"])
        return
    found = packs(LENGTHS, limit)
    assert [[LENGTHS[row] for row in sequence] for sequence in found] == list(expected["seq_lengths"])
    joined = [[token for row in sequence for token in made[row].tokens] for sequence in found]
    assert joined == list(expected["input_ids"])


@pytest.mark.parametrize("limit", [40, 41, 1000])
def test_every_row_is_in_one_sequence_and_none_is_too_long(limit):
    found = packs(LENGTHS[:1000], limit)
    assert sorted(itertools.chain.from_iterable(found)) == list(range(1000))
    loads = sorted(sum(LENGTHS[row] for row in sequence) for sequence in found)
    assert loads[-1] <= limit
    # Two sequences whose rows fit into one would have been one.
    assert loads[0] + loads[1] > limit


@pytest.mark.parametrize("limit", [8, 33, 10_000])
def test_stretches_are_the_rows_in_one_line(limit):
    made = rows(LENGTHS[:300])
    found = wrapped(made, limit)
    assert [len(row.tokens) for row in found[:-1]] == [limit] * (len(found) - 1)
    for read in (lambda row: row.tokens, lambda row: row.labels()):
        line, cut = ([token for row in some for token in read(row)] for some in (made, found))
        assert cut == line
    lines = [row.row.line for row in found]
    assert lines == sorted(lines)
    assert lines[0] == 1
    assert all(row.response_start >= 1 for row in found)
    labels = [label for row in found for label in row.labels()[1:] if label != IGNORED]
    assert len(labels) == sum(row.trained for row in found)


def test_batches_hold_the_rows_of_their_sequences():
    made = rows(LENGTHS[:50])
    sequences = packs(LENGTHS[:50], 60)
    order = PlannedBatches(sequences, 2, 0, 5)
    planned = PackedBatches(PlannedBatches(made, 2, 0, 5), PlannedBatches(sequences, 2, 0, 5), sequences)
    for number in (0, 1, 7):
        held = [row for sequence in order.indices(number) for row in sequences[sequence]]
        assert planned.indices(number) == held
        assert planned[number]["input_ids"].shape[0] == len(held)
    assert planned.row_count == 50
    assert planned.size == round(2 * 50 / len(sequences))
    assert sorted(planned.sample(50)) == list(range(50))
    first = next(iter(planned))
    assert first["labels"].tolist() == planned[0]["labels"].tolist()
