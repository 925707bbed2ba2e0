"""Sentences on rows, layers and overlap by rules; maps of any number of layers."""

import math
from dataclasses import replace

import pytest
import torch

from arisk.anatomy.page import section
from arisk.anatomy.text import layer_and_type, layer_sentence, row_sentence
from tests.report import records as made


def rows(*harms):
    return [{"line": 10 + i, "second_order": harm} for i, harm in enumerate(harms)]


@pytest.mark.parametrize(
    ("harms", "says"),
    [
        ((1, 30, 1, 1, 1, 1, 1, 1), "row 11 carries 81 %"),
        ((40, 30, 10, 1, 1, 1, 1, 1), "rows 10, 11 carry 82 %"),
        ((5, 4, 4, 4, 4, 4, 4, 4), "the 4 worst carry"),
        ((9, -50, math.nan, None, 1, 0, 0, 0), "row 10 carries 90 %"),
    ],
)
def test_few_rows_are_named_and_many_are_called_spread(harms, says):
    told = row_sentence(rows(*harms), 400)
    assert says in told
    assert "f the 8 fine-tuning rows (of 400) that were scored" in told
    assert "(of" not in row_sentence(rows(*harms), 8)


def test_rows_without_harm_say_nothing():
    assert row_sentence(rows(1, 2, 3)) is None
    assert row_sentence(rows(-1, -2, 0, math.nan)) is None


def modules(shares):
    """Four kinds in each layer, `shares` by layer, the second kind with half of it."""
    names = [f"model.layers.{i}.mlp.{k}" for i in range(len(shares)) for k in ("a", "b", "c", "d")]
    parts = [share * part for share in shares for part in (0.1, 0.5, 0.2, 0.2)]
    return names, torch.tensor(parts, dtype=torch.float64)


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ([0.1, 0.1, 0.1, 0.3, 0.4, 0.0], "Layers 3–4 of 6 carry 70 % of the mass, 35 % of all in mlp.b."),
        ([0.7, 0.1, 0.1, 0.1], "Layer 0 of 4 carries 70 % of the mass, 35 % of all in mlp.b."),
        ([0.25, 0.25, 0.25, 0.25], "The mass is spread over the 4 layers"),
        ([0.4, 0.1, 0.1, 0.4], "The mass is spread over the 4 layers"),
    ],
)
def test_the_narrowest_band_of_layers(shares, says):
    assert says in layer_sentence(*modules(shares), "mass")


def test_modules_outside_the_layers_are_named_where_they_carry_much():
    names = ["embed_tokens", *[f"layers.{i}.mlp" for i in range(4)]]
    narrow = torch.tensor([0.45, 0.5, 0.03, 0.01, 0.01], dtype=torch.float64)
    assert layer_sentence(names, narrow, "mass") == (
        "embed_tokens carries 45 % of the mass, 50 % lies in layer 0 of 4."
    )
    flat = torch.tensor([0.4, 0.15, 0.15, 0.15, 0.15], dtype=torch.float64)
    assert layer_sentence(names, flat, "mass") == "embed_tokens carries 40 % of the mass."
    little = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2], dtype=torch.float64)
    assert "no narrow band" in layer_sentence(names, little, "mass")


def test_layers_without_numbers_or_mass():
    values = torch.tensor([0.25, 0.75, math.nan], dtype=torch.float64)
    assert layer_sentence(["a", "b", "c"], values, "mass") == "b carries 75 % of the mass (3 modules)."
    assert layer_sentence(["a", "b"], torch.tensor([-1.0, 0.0]), "mass") is None


@pytest.mark.parametrize(
    ("p", "permutations", "says", "holds"),
    [
        (0.01, 99, ", more than chance", True),
        (0.05, 19, ", more than chance", True),
        (0.3, 99, ", no more than chance", False),
        (0.5, 3, ", no more than chance", False),
        (0.25, 3, "its 3 shuffled copies, which are too few", None),
    ],
)
def test_an_overlap_at_the_floor_of_few_permutations_is_no_finding(p, permutations, says, holds):
    collected, space, scored, _ = made.records()
    overlap = replace(scored.overlap, p_value=p, permutations=permutations)
    assert overlap.beyond_chance is holds
    assert replace(overlap, ratio=math.nan).beyond_chance is None
    moved = replace(scored, overlap=overlap)
    told = section(collected, space, moved, threshold=0.1, show_text=True, max_examples=1).findings
    assert sum(says in finding.sentence for finding in told) == 1


@pytest.mark.parametrize("layers", [1, 80])
def test_any_number_of_layers(layers):
    assert "fig-fisher-map" in made.page(layers=layers)


def test_layer_and_kind_are_read_from_a_name():
    assert layer_and_type("h.0.mlp.c_fc") == (0, "mlp.c_fc")
