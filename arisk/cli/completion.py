"""What the shell completes: configs, run directories and config keys. Looks at names, opens no file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

__all__ = ["complete_config", "complete_run", "complete_run_or_config", "complete_setting"]

#: Levels that are opened while a folder is the only match: the shell would put a space after its name.
DEPTH = 4


def complete_config(incomplete: str) -> list[str]:
    """YAML files and the folders on the way to them."""
    return _paths(incomplete, _is_config)


def complete_run(incomplete: str) -> list[str]:
    """Run directories (folders with a `config.yaml`) and the folders on the way to them."""
    return _paths(incomplete, _is_run)


def complete_run_or_config(incomplete: str) -> list[str]:
    """What `arisk compare` takes."""
    return _paths(incomplete, lambda path: _is_config(path) or _is_run(path))


def _is_config(path: Path) -> bool:
    return path.suffix in {".yaml", ".yml"}


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()


def complete_setting(incomplete: str) -> list[str]:
    """Dotted config keys for `--set`, with the `=`; nothing once a value has begun."""
    from arisk.config.yaml import known_keys

    return [f"{key}=" for key in known_keys() if key.startswith(incomplete)] if "=" not in incomplete else []


def _paths(incomplete: str, wanted: Callable[[Path], bool]) -> list[str]:
    """Matches of a started path: what is wanted, and folders, opened while they are the only match."""
    folder, slash, start = incomplete.rpartition("/")
    found: list[str] = []
    for _ in range(DEPTH):
        found = _matches(folder + slash, start, wanted)
        if len(found) != 1 or not found[0].endswith("/"):
            break
        folder, slash, start = found[0].removesuffix("/"), "/", ""
    return found


def _matches(prefix: str, start: str, wanted: Callable[[Path], bool]) -> list[str]:
    place = Path(prefix).expanduser() if prefix else Path()
    found: list[str] = []
    try:
        for path in sorted(place.iterdir()):
            if not path.name.startswith(start) or (path.name.startswith(".") and not start.startswith(".")):
                continue
            if wanted(path):
                found.append(prefix + path.name)
            elif path.is_dir():
                found.append(f"{prefix}{path.name}/")
    except OSError:
        return []
    return found
