"""The script for a GPU runs where there is none, with a small model."""

import pytest
import torch

pytest.importorskip("transformers")

from tests.bench import gpu


def test_every_stage_is_measured_against_plain_passes(capsys):
    gpu._speed("small", torch.device("cpu"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[0] for row in cells] == ["training", "rollout", "collect", "screen"]
    assert all(float(row[3]) > 0 for row in cells)
    # Memory of a device is told where there is one.
    assert all(row[4:] == ["–", "–"] for row in cells)


def test_without_a_gpu_it_says_how_to_run_it(monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cpu --small"):
        gpu.main()
