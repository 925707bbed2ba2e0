"""What the documents show is so: stored results number for number, links, commands and config keys."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from arisk.catalogue import catalogue
from arisk.config.plan import Config
from arisk.config.yaml import load_config
from arisk.forecast.worth import REAL, counted, validity, worth
from tests.bench.__main__ import BENCHES
from tests.bench.validity.readme import BEGIN, END, README, STORED, block, number

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / ".github" / "CONTRIBUTING.md",
    ROOT / ".github" / "GUIDE.md",
    ROOT / ".github" / "SUMMARY.md",
    ROOT / ".github" / "alignment-risk.md",
    ROOT / "tests" / "bench" / "README.md",
]
#: Verbs that no stage makes.
VERBS = {"run", "check", "status", "what-if", "compare", "card", "demo", "init", "schema"}
documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def test_the_benchmarks_show_the_stored_result():
    text = README.read_text(encoding="utf-8")
    shown = text[text.index(BEGIN) + len(BEGIN) : text.index(END)]
    assert shown == block(json.loads(STORED.read_text(encoding="utf-8")))


def test_the_report_shows_the_stored_result():
    tables = json.loads(STORED.read_text(encoding="utf-8"))
    page = worth()
    for row in tables["Fresh mixtures"]:
        assert f"<td>{number(row['ρ final'])}</td><td>{number(row['AUC'])}</td>" in page.replace(
            ' class="num"', ""
        ), row["name"]


@pytest.mark.parametrize(
    ("line", "title"),
    [
        ("mixtures of data that nobody had looked at", "Fresh mixtures"),
        ("data that no constant was chosen on", "Data sets not tuned on"),
        ("2 or 8 harmful rows in 400", "Low contamination"),
        ("1000 and 2000 steps", "Long runs"),
    ],
)
def test_the_readme_counts_as_the_stored_result_does(line, title):
    text = DOCUMENTS[0].read_text(encoding="utf-8").partition("## How right it is")[2]
    (row,) = [found for found in text.splitlines() if found.startswith("| ") and line in found]
    shown = [tuple(map(int, pair)) for pair in re.findall(r"(\d+) of (\d+)", row)]
    verdicts = json.loads(STORED.read_text(encoding="utf-8"))[f"{title}: verdicts"]
    levels = {found["name"]: (found["collapsed"], found["did not"]) for found in verdicts}
    collapsed, spared = (sum(counts) for counts in zip(*levels.values(), strict=True))
    doubted = levels["elevated"][1] + levels["inconclusive"][1]
    assert shown == [(levels["high"][0], collapsed), (levels["high"][1], spared), (doubted, spared)]


def anchors(path):
    heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@documents
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name) if name else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@documents
def test_files_that_are_named_are_there(path):
    named = r"`((?:arisk|tests|fixtures|configs)/[\w./-]+\w/?)"
    for name in re.findall(named, path.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


@documents
def test_commands_are_there(path):
    text = path.read_text(encoding="utf-8")
    verbs = set(re.findall(r"(?:^|`|\| |-m )arisk ([a-z][a-z-]+)", text, flags=re.MULTILINE))
    assert verbs <= VERBS | set(catalogue().names)
    recipes = set(
        re.findall(
            r"^([a-z][a-z0-9-]*)(?: [^:\n]*)?:(?!=)", (ROOT / "Justfile").read_text(), flags=re.MULTILINE
        )
    )
    told = set(re.findall(r"(?:^|&& |`)just ([a-z][a-z0-9-]*)", text, flags=re.MULTILINE))
    assert told <= recipes


def keys_of(annotation):
    """Names of the settings of a section, whatever stands beside it in its type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return set(annotation.model_fields)
    return {name for part in get_args(annotation) for name in keys_of(part)}


@documents
def test_config_keys_are_there(path):
    """Keys in backticks such as `training.loss`, with or without a value."""
    sections = {name: keys_of(field.annotation) for name, field in Config.model_fields.items()}
    assert {"loss", "packing"} <= sections["training"]
    # Two tables name keys of `summary.json` and of another package in their first cells.
    told = r"^\| `rollout\..*|^\| [^|]*\|"
    text = re.sub(told, "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for section, key in re.findall(r"`([a-z]+)\.([a-z_]+)(?:: [^`]+)?`", text):
        if section in sections and key not in ("html", "py"):
            assert key in sections[section], f"{section}.{key}"


def test_the_benchmarks_that_are_named_are_there():
    text = README.read_text(encoding="utf-8")
    told = re.findall(r"`(?:just bench|python -m tests\.bench) ([a-z][a-z0-9 -]*?)(?: --[^`]*)?`", text)
    assert {name for names in told for name in names.split()} <= set(BENCHES)
    assert len(told) > 8


def test_the_config_of_the_readme_is_one(tmp_path):
    text = DOCUMENTS[0].read_text(encoding="utf-8").partition("## The config")[2]
    path = tmp_path / "my.yaml"
    path.write_text(text.partition("```yaml\n")[2].partition("```")[0])
    config = load_config(path)
    assert config.training.epochs == 3


def test_the_readme_is_short():
    text = DOCUMENTS[0].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    assert len(text.encode()) <= 16_000


def test_the_citation_and_the_licence_are_those_of_the_package():
    package = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    cited = yaml.safe_load((ROOT / ".github" / "CITATION.cff").read_text(encoding="utf-8"))
    assert f'version = "{cited["version"]}"' in package
    assert f'license = "{cited["license"]}"' in package
    assert 'license-files = ["arisk/LICENSE"]' in package
    assert "Apache License" in (ROOT / "arisk" / "LICENSE").read_text(encoding="utf-8")


def test_refusals_on_real_models_are_those_of_the_stored_record():
    text = DOCUMENTS[0].read_text(encoding="utf-8")
    rows = {row["name"]: row for row in validity()[REAL]}
    for called, row in (("LoRA", rows["lora adamw"]), ("all weights", rows["full adamw"])):
        (cells,) = re.findall(rf"^\| {called} \| (.*) \|$", text, re.MULTILINE)
        missed, spared, close = cells.split(" | ")
        assert missed == counted(row["lost a quarter: low"], row["lost a quarter"], least=False)
        high, between = row["lost under a tenth: high"], row["lost under a tenth: elevated"]
        assert spared == f"{high} and {between} of {row['lost under a tenth']}"
        assert close == f"{row['within 10 points']} of {row['jobs']}"
