"""A saved report loads as what was saved, or not at all."""

import json
import random
import shutil

import pytest

from arisk import RiskReport
from arisk.base.errors import ArtifactError
from arisk.config.plan import ForecastConfig, TrainingConfig
from arisk.forecast.run import skipped_records


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    made = skipped_records("no LoRA weights", TrainingConfig(), ForecastConfig())
    RiskReport(*made, status="skipped", reason="no LoRA weights").save(folder)
    return folder


def test_a_report_comes_back(saved):
    assert RiskReport.load(saved).reason == "no LoRA weights"


def test_no_flipped_byte_loads(saved, tmp_path):
    draw = random.Random(0)
    files = [file for file in sorted(saved.rglob("*")) if file.is_file()]
    assert len(files) == 12
    for number, file in enumerate(files * 4):
        folder = shutil.copytree(saved, tmp_path / str(number))
        target = folder / file.relative_to(saved)
        body = bytearray(target.read_bytes())
        body[draw.randrange(len(body))] ^= 1 << draw.randrange(8)
        target.write_bytes(bytes(body))
        if target.name == "report.json" and json_equal(target, file):
            continue
        with pytest.raises(ArtifactError):
            RiskReport.load(folder)


def json_equal(one, other):
    """Whether two files hold the same JSON: white space may differ."""
    try:
        return json.loads(one.read_text()) == json.loads(other.read_text())
    except ValueError:
        return False


@pytest.mark.parametrize("harm", ["missing", "without digest", "edited"])
def test_a_report_that_was_changed_is_refused(saved, tmp_path, harm):
    folder = shutil.copytree(saved, tmp_path / "report")
    head = json.loads((folder / "report.json").read_text())
    if harm == "missing":
        (folder / "basis.safetensors").unlink()
    elif harm == "without digest":
        del head["digest"]
    else:
        head["status"] = "measured"
    (folder / "report.json").write_text(json.dumps(head))
    with pytest.raises(ArtifactError, match="missing, or not what"):
        RiskReport.load(folder)
