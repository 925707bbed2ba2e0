"""The run directory: manifests, atomic commits, one writer at a time. Bytes and JSON only, no torch.

Layout: `<stage>/manifest.json` beside the stage's files; `.partial/<stage>-<key>/` while it works,
kept after a crash so that the stage can resume; `.lock` and `.holder.json` for the one writer. A
stage is committed by writing its manifest last and renaming its folder, so a crash leaves the old
stage or none.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from arisk.base.artifacts import FORMAT_VERSION, disk_error, read_json, write_text
from arisk.base.errors import ArtifactError
from arisk.engine.fingerprints import file_digest

__all__ = ["MANIFEST", "RunDir"]

MANIFEST = "manifest.json"
#: Files up to this size are re-read to check that a stage is fresh; larger ones by size, and by
#: digest when they are used.
QUICK_BYTES = 16 << 20


class RunDir:
    """One run's folder.

    Args:
        path: the folder; made when something is first written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def stage_dir(self, stage: str) -> Path:
        """Folder of a committed stage."""
        return self.path / stage

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """Manifest of a committed stage; None when there is none.

        Raises:
            ArtifactError: it is damaged, or of a newer format.
        """
        path = self.stage_dir(stage) / MANIFEST
        return read_json(path) if path.exists() else None

    @contextmanager
    def lock(self, command: str) -> Generator[None]:
        """Be the one writer; a second one is told at once who holds the folder.

        Raises:
            ArtifactError: another process is writing, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK):
                raise PermissionError(13, "Permission denied")
            lock = FileLock(self.path / ".lock", timeout=0)
            lock.acquire()
        except Timeout as err:
            raise ArtifactError(
                f"another run is writing here: {self._holder()}",
                where=str(self.path),
                fix="wait for it, stop it, or choose another --run-dir",
            ) from err
        except OSError as err:
            raise disk_error(err, self.path) from err
        try:
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": _now()}
            write_text(self.path / ".holder.json", json.dumps(holder))
            self._clean()
            yield
        finally:
            with suppress(OSError):
                (self.path / ".holder.json").unlink(missing_ok=True)
            lock.release()

    def _holder(self) -> str:
        try:
            held = json.loads((self.path / ".holder.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return "(unknown process)"
        return f"process {held['pid']} on {held['host']} since {held['since']} ({held['command']})"

    def _clean(self) -> None:
        """Finish or undo what a crash left between two renames."""
        for trash in self.path.glob(".trash-*"):
            stage = trash.name.removeprefix(".trash-")
            if not self.stage_dir(stage).exists():
                trash.rename(self.stage_dir(stage))
            else:
                shutil.rmtree(trash, ignore_errors=True)

    def workspace(self, stage: str, key: str) -> Path:
        """Folder in which a stage works; the same key finds what a killed run left.

        Raises:
            ArtifactError: the folder cannot be written.
        """
        parent = self.path / ".partial"
        wanted = parent / f"{stage}-{key[:16]}"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            for old in parent.glob(f"{stage}-*"):
                if old != wanted:
                    shutil.rmtree(old, ignore_errors=True)
            wanted.mkdir(exist_ok=True)
        except OSError as err:
            raise disk_error(err, wanted) from err
        return wanted

    def commit(
        self,
        stage: str,
        *,
        key: str,
        ingredients: Mapping[str, Any],
        workspace: Path,
        seconds: float,
        leave_out: Sequence[str] = (),
        taken_from: str | None = None,
    ) -> None:
        """Turn a workspace into the stage: digests, manifest last, then two renames.

        Args:
            stage: its name.
            key: sha256 of the ingredients.
            ingredients: what it was computed from.
            workspace: the folder it worked in.
            seconds: wall time it took.
            leave_out: glob patterns of files that served resuming only; deleted.
            taken_from: the run directory that computed it, where that is another one.

        Raises:
            ArtifactError: the disk is full or the folder is read-only; the old stage is kept.
        """
        try:
            for pattern in leave_out:
                for file in workspace.glob(pattern):
                    file.unlink()
                    if file.parent != workspace:
                        with suppress(OSError):
                            file.parent.rmdir()
            files = sorted(file for file in workspace.rglob("*") if file.is_file())
            outputs = {
                str(file.relative_to(workspace)): {"bytes": file.stat().st_size, "sha256": file_digest(file)}
                for file in files
                if file.name != MANIFEST
            }
            body = {
                "format_version": FORMAT_VERSION,
                "stage": stage,
                "key": key,
                "finished": _now(),
                "seconds": round(seconds, 3),
                "ingredients": ingredients,
                "outputs": outputs,
                **({"taken_from": taken_from} if taken_from else {}),
            }
            write_text(workspace / MANIFEST, json.dumps(body, indent=1) + "\n")
            for file in (*files, workspace / MANIFEST, workspace):
                _sync(file)
            self._swap(stage, workspace)
        except OSError as err:
            raise disk_error(err, workspace) from err

    def _swap(self, stage: str, workspace: Path) -> None:
        trash = self.path / f".trash-{stage}"
        if self.stage_dir(stage).exists():
            shutil.rmtree(trash, ignore_errors=True)
            self.stage_dir(stage).rename(trash)
        workspace.rename(self.stage_dir(stage))
        _sync(self.path)
        shutil.rmtree(trash, ignore_errors=True)
        with suppress(OSError):
            (self.path / ".partial").rmdir()

    def verify(self, stage: str, *, deep: bool) -> None:
        """Check a committed stage's files against its manifest.

        Args:
            stage: its name.
            deep: re-read every file; otherwise those above 16 MB by size only.

        Raises:
            ArtifactError: a file is missing or differs; names it.
        """
        manifest = self.manifest(stage)
        outputs = manifest.get("outputs", {}) if manifest else {}
        for name, expected in outputs.items():
            file = self.stage_dir(stage) / name
            size = file.stat().st_size if file.is_file() else None
            same = size == expected["bytes"]
            if same and (deep or expected["bytes"] <= QUICK_BYTES):
                same = file_digest(file) == expected["sha256"]
            if not same:
                raise ArtifactError(
                    "the file is missing" if size is None else "the file is not what the stage wrote",
                    where=str(file),
                    fix=f"run `arisk run CONFIG --from {stage}` to make it again",
                )

    def write(self, name: str, text: str) -> None:
        """Write a file beside the stages, such as the resolved config."""
        path = self.path / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk; systems that cannot do so for folders are let be."""
    with suppress(PermissionError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
