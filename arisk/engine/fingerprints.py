"""What a stage was computed from: digests of models, data files and code. No torch.

Digests are sha256 of contents. A cache keyed by path, size, modification time and inode spares
re-reading an unchanged 500 MB file; it only ever skips reading, it is never the truth itself.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arisk.base.artifacts import loaded_json, write_text
from arisk.base.errors import ArtifactError, InputError

if TYPE_CHECKING:
    from arisk.config.plan import Config, DataConfig

__all__ = ["DigestCache", "file_digest", "input_fingerprints", "stage_key"]

_CHUNK = 1 << 20


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def stage_key(ingredients: Mapping[str, Any]) -> str:
    """sha256 of the ingredients as canonical JSON."""
    text = json.dumps(ingredients, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class DigestCache:
    """Digests of files that have not changed since they were last read.

    Args:
        path: JSON file of the cache; a damaged one is started anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            held = loaded_json(path)
        except (OSError, ValueError, RecursionError):
            held = None
        self.known: dict[str, list[Any]] = held if isinstance(held, dict) else {}

    def digest(self, path: Path) -> str:
        """sha256 of the file, from the cache while size, time and inode are the same.

        Raises:
            InputError: it cannot be read.
        """
        try:
            return self._digest(path)
        except OSError as err:
            raise InputError(
                f"the file cannot be read: {err.strerror or err}", where=str(path), fix="make it readable"
            ) from err

    def _digest(self, path: Path) -> str:
        stat = path.stat()
        mark = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        held = self.known.get(str(path))
        if not isinstance(held, list) or len(held) != 4 or held[:3] != mark:
            held = [*mark, file_digest(path)]
            self.known[str(path)] = held
        return str(held[3])

    def save(self) -> None:
        """Write the cache where the folder exists and can be written; losing it costs only time."""
        if self.path.parent.is_dir():
            with suppress(ArtifactError):
                write_text(self.path, json.dumps(self.known))


def input_fingerprints(config: Config, cache: DigestCache) -> dict[str, Any]:
    """Fingerprints of everything a run reads, by config section.

    Raises:
        InputError: a file named in the config does not exist.
    """
    from arisk.config.plan import data_sets
    from arisk.models.files import require_data

    found: dict[str, Any] = {}
    if config.model.source == "python":
        found["model"] = _entry(str(config.model.entry), cache)
    else:
        found["model"] = _path_or_hub(str(config.model.path), "model.path", cache, config.model.revision)
    if config.model.adapter is not None and config.model.adapter.path is not None:
        adapter = str(config.model.adapter.path)
        found["adapter"] = _path_or_hub(adapter, "model.adapter", cache, None)
    for name, parts in data_sets(config).items():
        for data in parts:
            require_data(data, name)
    if config.probes:
        found["probes"] = {
            name: _path_or_hub(probe.path, f"probes.{name}.path", cache, None)
            for name, probe in config.probes.items()
        }
    for name, parts in data_sets(config).items():
        if name.startswith("probes."):
            continue
        each = [
            {**_path_or_hub(data.path, f"{name}.path", cache, None), **_own_answers(config, name, data)}
            for data in parts
        ]
        found[name] = each[0] if len(each) == 1 else {str(number): one for number, one in enumerate(each)}
    return found


def _own_answers(config: Config, name: str, data: DataConfig) -> dict[str, Any]:
    """What decides, beside the model, which responses prompts without any are given."""
    from arisk.models.formats import SAFETY_SETS
    from arisk.models.rows import OWN_ANSWERS, prompts_alone

    if name not in SAFETY_SETS or not prompts_alone(data, name):
        return {}
    judged = config.behaviour.model_dump(mode="json", include={"judge", "refusal_openings"})
    return {"own answers": {"version": OWN_ANSWERS, **judged}}


def _path_or_hub(value: str, where: str, cache: DigestCache, revision: str | None) -> dict[str, Any]:
    """Digests by relative name of a file or folder; a hub id stands for itself."""
    path = Path(value).expanduser()
    if path.is_file():
        return {"sha256": cache.digest(path)}
    if path.is_dir():
        return {str(file.relative_to(path)): cache.digest(file) for file in sorted(_files(path, where))}
    if path.exists():
        raise InputError(
            f"{value} is neither a file nor a folder (a device, a pipe or a socket)",
            where=where,
            fix="save what it gives to a file, and name that",
        )
    if _looks_like_path(value):
        raise InputError(
            f"{value} does not exist",
            where=where,
            fix="check the path; relative paths are looked up beside the config file, then in the "
            "working directory",
        )
    return {"hub": value, "revision": revision}


#: Files of one model or data set at most: a home folder has more.
MOST_FILES = 10_000


def _files(folder: Path, where: str) -> list[Path]:
    """All files under a folder, hidden ones and those behind links to folders apart.

    Raises:
        InputError: there are too many to be one model or data set.
    """
    found: list[Path] = []
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(at) / name for name in names if not name.startswith("."))
        found += [file for file in files if file.is_file()]
        if len(found) > MOST_FILES:
            raise InputError(
                f"this folder holds more than {MOST_FILES:,} files, and all of them would be read",
                where=f"{where}: {folder}",
                fix="give the folder that holds nothing else",
            )
    return found


def _looks_like_path(value: str) -> bool:
    """A hub id is `name` or `owner/name`; anything with a suffix, a dot or more slashes is a path."""
    return (
        value.startswith((".", "/", "~"))
        or value.count("/") > 1
        or Path(value).suffix in {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow"}
    )


def _entry(entry: str, cache: DigestCache) -> dict[str, Any]:
    """Digest of the source file behind `module:function` or `file.py:function`, where it is found."""
    source, _, function = entry.rpartition(":")
    path = Path(source)
    if path.suffix != ".py":
        try:
            spec = importlib.util.find_spec(source)
        except (ImportError, ValueError):
            spec = None
        path = Path(spec.origin) if spec and spec.origin else path
    digest = cache.digest(path) if path.is_file() else None
    return {"entry": source if digest is None else path.name, "function": function, "sha256": digest}
