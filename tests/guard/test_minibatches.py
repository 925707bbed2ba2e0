"""Safety minibatches by the number of the step."""

import torch

from arisk.guard import SafetyBatches
from tests.guard.cases import samples


def test_safety_minibatches_are_the_same_by_number_and_cover_every_row():
    data = samples(batches=3, size=4)
    stream = SafetyBatches(data, 3, seed=5, device=torch.device("cpu"))
    again = SafetyBatches(data, 3, seed=5, device=torch.device("cpu"))
    assert len(stream.batches) == 6
    epoch = [stream.at(number)[0] for number in range(1, 7)]
    assert all(len(x) <= 3 for x in epoch)
    rows = {tuple(row.tolist()) for x in epoch for row in x}
    assert rows == {tuple(row.tolist()) for x, _ in data.batches for row in x}
    assert all(torch.equal(again.at(n)[0], stream.at(n)[0]) for n in (9, 2, 17))
