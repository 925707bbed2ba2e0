"""Takes a committed stage from another run directory instead of computing it again. No torch.

Keys are made of contents: equal keys mean equal inputs, settings and version, wherever the run lives.
The source is only read, and needs no lock: commits are atomic, and every file is checked against the
source's manifest after it was brought over, so a source that is damaged, or changes meanwhile, is not
taken. Files are hard links where the file system has them (nothing in a run directory is ever written
in place), else copies.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arisk.base.artifacts import disk_error
from arisk.base.errors import ArtifactError
from arisk.engine.fingerprints import file_digest
from arisk.engine.freshness import StageState
from arisk.engine.rundir import RunDir, remove_tree

__all__ = ["CONFIG_FILE", "check_run_dir", "take"]

#: The config of a run as it was resolved; what has none is no run directory.
CONFIG_FILE = "config.yaml"


def check_run_dir(path: Path) -> None:
    """Refuse what is no run directory.

    Raises:
        ArtifactError: it does not exist, is a file, a stage's folder, or holds no run.
    """
    fix = "give the folder that `arisk run CONFIG --run-dir FOLDER` wrote, or a YAML config"
    if not path.exists():
        raise ArtifactError("there is no such run directory or config", where=str(path), fix=fix)
    if (path / CONFIG_FILE).exists():
        return
    if (path / "manifest.json").exists():
        what, fix = f"this is the stage {path.name} of a run, not a run", f"give {path.parent}"
    else:
        what = "this is not a run directory: it has no config.yaml"
    raise ArtifactError(what, where=str(path), fix=fix)


def take(rundir: RunDir, state: StageState, sources: Sequence[Path]) -> Path | None:
    """Commit the stage from the first source that has it with the same key, whole and undamaged.

    Args:
        rundir: the run directory that takes, locked by the caller.
        state: the stage, with the key and ingredients it must have.
        sources: run directories to look in, in order.

    Returns:
        The source, or None where none has it; nothing is changed then.

    Raises:
        ArtifactError: this run directory cannot be written, or its disk is full.
    """
    for source in sources:
        if source.resolve() != rundir.path.resolve() and _take(rundir, state, source):
            return source
    return None


def _take(rundir: RunDir, state: StageState, source: Path) -> bool:
    other = RunDir(source)
    try:
        manifest = other.manifest(state.stage)
    except ArtifactError:
        return False
    if manifest is None or manifest.get("key") != state.key:
        return False
    staging = rundir.path / ".partial" / f"taken-{state.stage}"
    if not _bring(manifest.get("outputs", {}), other.stage_dir(state.stage), staging):
        remove_tree(staging)
        return False
    # What a killed run left of this stage is not needed any more.
    for left in staging.parent.glob(f"{state.stage}-*"):
        remove_tree(left)
    rundir.commit(
        state.stage,
        key=state.key,
        ingredients=state.ingredients,
        workspace=staging,
        seconds=float(manifest.get("seconds", 0.0)),
        taken_from=str(manifest.get("taken_from") or source),
    )
    return True


def _bring(outputs: Mapping[str, Mapping[str, Any]], source: Path, staging: Path) -> bool:
    """Link or copy the files of a stage; False where one is missing or not what its manifest says.

    Raises:
        ArtifactError: the target cannot be written.
    """
    try:
        remove_tree(staging)
        staging.mkdir(parents=True)
        for name, expected in outputs.items():
            file, placed = source / name, staging / name
            if not _inside(name) or not file.is_file():
                return False
            placed.parent.mkdir(parents=True, exist_ok=True)
            _place(file, placed)
            if placed.stat().st_size != expected["bytes"] or file_digest(placed) != expected["sha256"]:
                return False
    except FileNotFoundError:
        return False
    except OSError as err:
        raise disk_error(err, staging) from err
    return bool(outputs)


def _inside(name: str) -> bool:
    """A manifest from elsewhere may not name files outside its stage."""
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def _place(file: Path, placed: Path) -> None:
    """A hard link, or a copy where links are not possible."""
    try:
        os.link(file.resolve(), placed)
    except OSError:
        shutil.copyfile(file, placed)
