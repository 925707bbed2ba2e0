import json
import math
import resource
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arisk.anatomy.record import OverlapNulls
from arisk.base.artifacts import (
    FORMAT_VERSION,
    read_record,
    read_tensors,
    write_record,
    write_tensors,
    write_text,
)
from arisk.base.errors import ArtifactError
from arisk.forecast.record import Curve


@dataclass(frozen=True)
class Inner:
    value: float | None
    names: list[str]


@dataclass(frozen=True)
class Example:
    tensor: torch.Tensor
    empty: torch.Tensor | None
    number: float
    count: int
    label: str
    inner: Inner
    many: dict[str, Inner]
    free: dict[str, Any]
    pairs: list[int | None]


def example(number=1.5, **changes):
    values = {
        "tensor": torch.arange(6, dtype=torch.float64).view(2, 3),
        "empty": None,
        "number": number,
        "count": 3,
        "label": "NaN is text here",
        "inner": Inner(None, ["ü", "\u2028</script>"]),
        "many": {"a": Inner(2.0, [])},
        "free": {"x": [1, {"y": None}]},
        "pairs": [1, None],
    }
    return Example(**{**values, **changes})


@dataclass(frozen=True)
class Deeper:
    tensor: torch.Tensor
    label: str


@dataclass(frozen=True)
class Nested:
    deeper: Deeper
    maybe: Deeper | None
    tensor: torch.Tensor | None


def test_tensors_of_records_in_fields(tmp_path):
    record = Nested(Deeper(torch.ones(2), "a"), None, torch.zeros(1))
    write_record(tmp_path, record)
    found = read_record(tmp_path, Nested)
    assert torch.equal(found.deeper.tensor, torch.ones(2))
    assert (found.deeper.label, found.maybe, found.tensor.tolist()) == ("a", None, [0.0])
    write_record(tmp_path, Nested(record.deeper, Deeper(torch.zeros(3), "b"), None))
    found = read_record(tmp_path, Nested)
    assert (found.maybe.tensor.tolist(), found.maybe.label, found.tensor) == ([0.0] * 3, "b", None)
    write_tensors(tmp_path / "tensors.safetensors", {"maybe.tensor": torch.zeros(3)})
    with pytest.raises(ArtifactError, match=r"the field 'deeper.tensor' is missing"):
        read_record(tmp_path, Nested)


def test_round_trip(tmp_path):
    record = example()
    write_record(tmp_path, record)
    back = read_record(tmp_path, Example)
    assert torch.equal(back.tensor, record.tensor)
    assert back.tensor.dtype == torch.float64
    for field in fields(Example)[1:]:
        assert getattr(back, field.name) == getattr(record, field.name)


@given(
    st.floats(),
    st.lists(st.one_of(st.none(), st.integers(-(2**53), 2**53)), max_size=5),
    st.text(max_size=20),
)
def test_any_value_survives(tmp_path_factory, number, pairs, text):
    folder = tmp_path_factory.mktemp("record")
    write_record(folder, example(number, pairs=pairs, label=text))
    back = read_record(folder, Example)
    assert back.pairs == pairs
    assert back.label == text
    assert back.number == number or (math.isnan(back.number) and math.isnan(number))


def test_equal_records_give_equal_bytes(tmp_path):
    write_record(tmp_path / "a", example())
    write_record(tmp_path / "b", example())
    for name in ("record.json", "tensors.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_json_is_strict_and_versioned_first(tmp_path):
    write_record(tmp_path, example(math.inf))
    text = (tmp_path / "record.json").read_text()
    assert next(iter(json.loads(text))) == "format_version"
    assert "Infinity" in text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"bare {name}"))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda f: (f / "record.json").unlink(), "missing"),
        (lambda f: (f / "record.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "record.json").write_text("[]"), "format_version"),
        (lambda f: (f / "record.json").write_bytes(b"\xff"), "cannot be read"),
        (lambda f: (f / "tensors.safetensors").unlink(), "missing"),
        (lambda f: (f / "tensors.safetensors").write_bytes(b"12"), "cannot be read"),
        (lambda f: edit(f, lambda b: b.update(format_version=FORMAT_VERSION + 1)), "format version"),
        (lambda f: edit(f, lambda b: b.update(type="Other")), "Other"),
        (lambda f: edit(f, lambda b: b["values"].pop("count")), "count"),
    ],
)
def test_damage_is_one_clear_error(tmp_path, damage, what):
    write_record(tmp_path, example())
    damage(tmp_path)
    with pytest.raises(ArtifactError, match=what) as caught:
        read_record(tmp_path, Example)
    assert str(tmp_path) in caught.value.where
    assert caught.value.fix
    assert caught.value.exit_code == 4


def edit(folder, change):
    path = folder / "record.json"
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


def test_truncated_tensors(tmp_path):
    write_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(100)})
    path = tmp_path / "t.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError):
        read_tensors(path)


def test_tensors_that_share_memory_are_written(tmp_path):
    base = torch.arange(10.0)
    write_tensors(tmp_path / "t.safetensors", {"a": base, "b": base[2:5], "c": base.view(2, 5).T})
    back = read_tensors(tmp_path / "t.safetensors")
    assert back["b"].tolist() == [2, 3, 4]
    assert torch.equal(back["c"], base.view(2, 5).T)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([torch.float32, torch.float64]))
def test_tensors_are_read_into_memory_that_begins_as_torchs_own(tmp_path_factory, sizes, dtype):
    """Kernels round by where memory begins, so what is read back must lie as what was computed."""
    path = tmp_path_factory.mktemp("aligned") / "t.safetensors"
    write_tensors(path, {f"{i}": torch.arange(float(size), dtype=dtype) for i, size in enumerate(sizes)})
    for name, tensor in read_tensors(path).items():
        assert tensor.tolist() == list(range(sizes[int(name)]))
        assert tensor.data_ptr() % 64 == torch.zeros(sizes[int(name)]).data_ptr() % 64 == 0


def test_full_disk_keeps_the_old_text(tmp_path):
    """A limit on file size refuses bytes in the middle of a write, as a full disk does."""
    write_text(tmp_path / "a.json", "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ArtifactError) as caught:
            write_text(tmp_path / "a.json", "new" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 4
    assert (tmp_path / "a.json").read_text() == "old"


def test_a_partial_file_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "a.json.partial").symlink_to(tmp_path / "elsewhere")
    write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "elsewhere").read_text() == "mine"
    assert (tmp_path / "a.json").read_text() == "new"


def test_tensors_that_do_not_fit_keep_the_old_file(tmp_path):
    """A limit on file size refuses bytes in the middle of a write, as a full disk does."""
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.zeros(3)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ArtifactError, match="finished stages are kept"):
            write_tensors(path, {"a": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_tensors(path)["a"].tolist() == [0, 0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["t.safetensors"]


def test_real_records_keep_their_nested_types(tmp_path):
    nulls = OverlapNulls(0.1, 0.01, 10.0, None, 9, 0.02, 0.03, 0.1, None, None, math.nan)
    curve = Curve(
        "x", "measured", None, "forecast", [0], [math.inf], [0.0], [1.0], None, [None, 3], 0.5, 9, None, []
    )

    write_record(tmp_path / "n", nulls)
    write_record(tmp_path / "c", curve)
    assert read_record(tmp_path / "n", OverlapNulls).control is None
    assert math.isnan(read_record(tmp_path / "n", OverlapNulls).conflict_cosine or 0)
    assert read_record(tmp_path / "c", Curve) == curve
