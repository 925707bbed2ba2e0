"""Gram matrices and moments from factors, by both ways, against the dense float64 oracle."""

import pytest
import torch

from arisk.gradients import layout_of, measuring, slice_batch
from arisk.gradients.factors import Outer, Rows, block_of, ghost_gram, is_ghost, parameter_products
from arisk.gradients.hooks import hook_parts
from tests.gradients import cases


def held(name):
    """Parts of every parameter over two batches, its shape and its columns of the oracle."""
    model, batch, loss_fn, names, oracle = cases.case(name)
    layout, found = layout_of(model, names), {n: [] for n in names}
    with measuring(model, layout):
        for part in (slice_batch(batch, 0, 3), slice_batch(batch, 3, len(oracle))):
            hook_parts(model, part, loss_fn, layout, lambda n, parts: found[n].append(list(parts)))
    for i, n in enumerate(names):
        yield found[n], layout.shapes[i], oracle[:, layout.slice_of(n)]


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("ghost", [True, False, None])
@pytest.mark.parametrize("entries", [1, 1 << 22])
def test_products_equal_the_oracle(name, ghost, entries, monkeypatch):
    monkeypatch.setattr("arisk.gradients.factors.GRAM_ENTRIES", entries)
    for batches, shape, g in held(name):
        factored = not any(isinstance(part, torch.Tensor) for parts in batches for part in parts)
        made = parameter_products(batches, shape, ghost=ghost and factored)
        torch.testing.assert_close(made.gram, g @ g.T, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(made.mean, g.mean(0), rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(made.diagonal, g.square().mean(0), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("ghost", [True, False])
def test_blocks_and_factors_of_one_parameter_go_together(ghost):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    outer = Outer(draw(3, 5, 7), draw(3, 5, 4))
    tied = Rows(torch.randint(0, 7, (2, 6), generator=generator), draw(2, 6, 4), 7)
    again = Outer(draw(2, 5, 7), draw(2, 5, 4))
    batches = [[outer], [tied, again]]
    if not ghost:
        batches.append([draw(2, 7, 4), draw(2, 7, 4)])
    g = torch.cat([sum(block_of(part) for part in parts).flatten(1) for parts in batches])
    made = parameter_products(batches, (7, 4), ghost=ghost)
    torch.testing.assert_close(made.gram, g @ g.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made.diagonal, g.square().mean(0), rtol=1e-12, atol=1e-12)
    if ghost:
        torch.testing.assert_close(ghost_gram(batches), g @ g.T, rtol=1e-12, atol=1e-12)


def test_ghosts_win_for_short_sequences_only():
    def batches(length):
        return [[Outer(torch.zeros(1, length, 512), torch.zeros(1, length, 512))] for _ in range(4)]

    assert is_ghost(batches(8), (512, 512))
    assert not is_ghost(batches(128), (512, 512))
    assert not is_ghost([[torch.zeros(4, 512, 512)]], (512, 512))
