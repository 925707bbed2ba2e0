"""Arrows between packages point one way, public names are sorted, and the fast part loads no torch."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import arisk

ROOT = Path(arisk.__file__).parent
MODULES = sorted(
    name for _, name, _ in pkgutil.walk_packages(arisk.__path__, "arisk.") if "embedded" not in name
)

#: The parts in order; an import may only point to an earlier line, or inside the same part.
ORDER = (
    ("base",),
    ("config",),
    ("geometry",),
    ("gradients",),
    ("models",),
    ("training",),
    ("report",),
    ("engine",),
    ("anatomy",),
    ("forecast",),
    ("verification",),
    ("screening", "guard", "compare"),
    ("cost",),
    ("catalogue",),
    ("peer",),
    ("risk_report",),
    ("api",),
    ("in_trainer",),
    ("cli",),
    ("__main__",),
)
RANKS = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
#: Modules that start fast: neither they nor what they import loads torch.
NO_TORCH = (
    "base.errors",
    "base.processes",
    "base.terminal",
    "cli",
    "config.plan",
    "config.python",
    "config.yaml",
    "engine.fingerprints",
    "engine.freshness",
    "engine.rundir",
    "engine.stage",
    "forecast.text",
    "models.judge",
    "report.text",
)


def imports(path):
    """(module imported, whether at module level) of every arisk import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, id(node) in top
        elif isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)


def files():
    return sorted(path for path in ROOT.rglob("*.py") if "embedded" not in path.parts)


def part_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_one_way(path):
    here = part_of(path)
    if here == "__init__":
        return
    for name, _ in imports(path):
        if name.startswith("arisk."):
            there = name.split(".")[1]
            assert there == here or RANKS[there] < RANKS[here], f"{here} imports {there}"


def test_the_fast_part_loads_no_torch():
    heavy = ("torch", "transformers", "plotly", "safetensors")
    code = (
        "import importlib, sys\n"
        f"for name in {NO_TORCH!r}:\n"
        "    importlib.import_module('arisk.' + name)\n"
        f"    loaded = [heavy for heavy in {heavy!r} if heavy in sys.modules]\n"
        "    assert not loaded, (name, loaded)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_hugging_face_has_one_home():
    for path in files():
        for name, _ in imports(path):
            if name.split(".")[0] in ("transformers", "peft", "datasets", "accelerate"):
                assert part_of(path) == "models"


@pytest.mark.parametrize("name", MODULES)
def test_public_names_exist_and_are_sorted(name):
    if name.endswith("__main__"):
        return
    module = importlib.import_module(name)
    public = getattr(module, "__all__", None)
    if public is None:
        assert not [n for n in vars(module) if not n.startswith("_")] or name.count(".") == 1
        return
    assert sorted(public) == sorted(set(public))
    for public_name in public:
        assert hasattr(module, public_name)


def test_top_level_names_load():
    for name in arisk.__all__:
        assert getattr(arisk, name) is not None
    assert list(arisk.__all__) == sorted(arisk.__all__)
    with pytest.raises(AttributeError):
        _ = arisk.nothing


def test_no_two_public_classes_share_a_name():
    found = {}
    for path in files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: places for name, places in found.items() if len(places) > 1} == {}
