"""Arrows between modules point one way, public names are sorted, and modules stay small."""

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import arisk

ROOT = Path(arisk.__file__).parent
MODULES = sorted(
    name for _, name, _ in pkgutil.walk_packages(arisk.__path__, "arisk.") if "embedded" not in name
)

#: Rank of each part; an import may only point to a lower rank (or inside the same part).
RANKS = {
    "errors": 0,
    "grid": 0,
    "progress": 0,
    "task": 0,
    "refusals": 0,
    "ranking": 2,
    "reuse": 6,
    "compare": 8.5,
    "problems": 1,
    "ranks": 1,
    "results": 1,
    "verified": 1,
    "screened": 1,
    "protection": 1.5,
    "sections": 1,
    "config": 2,
    "geometry": 2,
    "artifacts": 1.5,
    "comparison": 3,
    "python_config": 3,
    "configfile": 3,
    "fingerprints": 3,
    "demo": 3,
    "rundir": 4,
    "gradients": 4,
    "models": 4,
    "report": 4,
    "graph": 4,
    "plan": 5,
    "checked_loss": 5,
    "loaders": 5,
    "guard": 4.5,
    "guard_text": 7,
    "guarded": 1,
    "stages": 5,
    "job": 6,
    "terminal": 6,
    "check_text": 7,
    "peer_results": 3,
    "display": 5,
    "calibration": 6,
    "optional_work": 5.5,
    "workload": 6,
    "estimate": 7,
    "risk_report": 5,
    "acting": 6.5,
    "runners": 7,
    "assessment": 5.5,
    "api": 6,
    "pipeline": 8,
    "status": 8,
    "what_if": 8,
    "screen_text": 7,
    "asked": 9,
    "cli": 10,
    "__main__": 11,
}
NO_TORCH = (
    "cli",
    "config",
    "python_config",
    "configfile",
    "sections",
    "graph",
    "plan",
    "rundir",
    "reuse",
    "fingerprints",
    "status",
    "terminal",
    "check_text",
    "display",
    "errors",
    "problems",
    "grid",
    "ranks",
    "what_if",
    "asked",
    "screen_text",
    "guard_text",
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


@pytest.mark.parametrize("part", NO_TORCH)
def test_the_fast_part_imports_no_torch(part):
    here = ROOT / part
    paths = sorted(here.glob("*.py")) if here.is_dir() else [ROOT / f"{part}.py"]
    top = [name for path in paths for name, at_top in imports(path) if at_top]
    assert not any(name.split(".")[0] in ("torch", "transformers", "plotly", "safetensors") for name in top)


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


def test_modules_stay_small():
    long = {str(p.relative_to(ROOT)): n for p in files() if (n := len(p.read_text().splitlines())) > 350}
    assert not long
