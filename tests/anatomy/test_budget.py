"""`why: auto`: within its share by count, never more than asked for, the same for the same plan."""

import dataclasses
import itertools

import pytest

from arisk.anatomy.budget import LEAST, SHARE, SINGLE, Counts, affordable, score_passes
from arisk.config.sections import ScoreConfig
from arisk.engine.stage import FORWARDS

COUNTS = Counts(
    forward_tokens=1e9,
    safety=64,
    control=64,
    finetune=400,
    safety_tokens=80.0,
    finetune_tokens=120.0,
    selected=500_000,
    parameters=135_000_000,
)


def chosen(forward_tokens, **settings):
    counts = dataclasses.replace(COUNTS, forward_tokens=forward_tokens)
    return affordable(ScoreConfig(**settings), counts, batch=4, chunk=8)


def spent(score):
    """Passes of the model in forward tokens, counted apart from the module."""
    passes = score_passes(score, safety=64, control=64, finetune=400, selected=500_000, batch=4, chunk=8)
    collect = SINGLE * 3 * 64 * 80
    safety = passes.pop("forward rows") * 80
    return collect + safety + sum(FORWARDS[kind] * count * 120 for kind, count in passes.items())


@pytest.mark.parametrize("verdict", [2e5, 4e5, 1e6, 2e6, 5e6])
def test_it_stays_within_its_share(verdict):
    score = chosen(verdict)
    if score is None:
        return
    assert spent(score) <= SHARE * verdict
    full = ScoreConfig()
    for name in LEAST:
        taken, asked = getattr(score, name), getattr(full, name)
        assert taken == asked or (isinstance(taken, int) and taken < (12 if asked == "auto" else asked))


def test_more_is_measured_where_the_verdict_took_more():
    sizes = [score for score in map(chosen, (1e6, 2e6, 4e6, 8e6)) if score is not None]
    assert len(sizes) == 4
    for less, more in itertools.pairwise(sizes):
        assert spent(less) <= spent(more)
    assert chosen(1e9) == ScoreConfig()
    assert chosen(1e3) is None


def test_small_settings_are_left_as_they_are():
    small = {"batches": 2, "hvp_batches": 1, "krylov_dim": 2, "nulls": 3, "examples": 0, "probe_points": 0}
    assert chosen(1e6, **small) == ScoreConfig(**small)
