"""The run directory: manifests, atomic commits, one writer at a time. Bytes and JSON only, no torch.

Layout: `<stage>/manifest.json` beside the stage's files; `.partial/<stage>-<key>/` while it works,
kept after a crash so that the stage can resume; `.lock` and `.holder.json` for the one writer. A
stage is committed by writing its manifest last and renaming its folder, so a crash leaves the old
stage or none.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from arisk.base.artifacts import FORMAT_VERSION, WORKSPACES, disk_error, loaded_json, read_json, write_text
from arisk.base.errors import ArtifactError
from arisk.engine.fingerprints import file_digest, stage_key

__all__ = ["MANIFEST", "RunDir", "remove_tree"]

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
        self._claimed: tuple[tuple[int, int] | None, str] | None = None

    def stage_dir(self, stage: str) -> Path:
        """Folder of a committed stage."""
        return self.path / stage

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """Manifest of a committed stage; None when there is none.

        What it says of its own origin is checked: the key must be that of the ingredients.

        Raises:
            ArtifactError: it is damaged, edited, or of a newer format.
        """
        path = self.stage_dir(stage) / MANIFEST
        if not os.path.lexists(path):
            return None
        body = read_json(path)
        fault = _fault(body, stage)
        if fault:
            raise ArtifactError(
                f"the manifest is damaged: {fault}",
                where=str(path),
                fix=f"run `arisk run CONFIG --from {stage}` to make the stage again",
            )
        return body

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
            self._refuse_links()
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
            self._claim(command)
            self._clean()
            yield
        finally:
            with suppress(OSError, ArtifactError):
                self._require_lock()
                (self.path / ".holder.json").unlink(missing_ok=True)
            self._claimed = None
            lock.release()

    def _claim(self, command: str) -> None:
        """Write who holds the folder, and remember by what to know that it is still this process."""
        token = secrets.token_hex(8)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": _now()}
        write_text(self.path / ".holder.json", json.dumps({**holder, "token": token}))
        self._claimed = (self._lock_file(), token)

    def _lock_file(self) -> tuple[int, int] | None:
        """Device and inode of the lock file; None where there is none."""
        try:
            info = (self.path / ".lock").stat()
        except OSError:
            return None
        return info.st_dev, info.st_ino

    def _require_lock(self) -> None:
        """Check that no other process can have become the writer since this one locked the folder.

        Raises:
            ArtifactError: the lock file is gone or another one, or someone else has signed as the holder.
        """
        if self._claimed is None:
            return
        file, token = self._claimed
        held = self._held()
        if file is None or self._lock_file() != file or held.get("token") != token:
            raise ArtifactError(
                "the lock of this run directory was removed or taken while the run went on",
                where=str(self.path / ".lock"),
                fix="see whether another run writes here (`ps`), then run the same command again: what was "
                "finished before is kept",
            )

    def _refuse_links(self) -> None:
        """Nothing outside the folder is followed, replaced or deleted.

        Raises:
            ArtifactError: a stage's folder, or one that arisk works in, is a link.
        """
        for entry in self.path.iterdir():
            if entry.is_symlink():
                raise ArtifactError(
                    f"{entry.name} is a link in the run directory",
                    where=str(entry),
                    fix="put the file or folder itself here; to use another disk, give a --run-dir there "
                    "(the run directory as a whole may be a link)",
                )

    def _held(self) -> dict[str, Any]:
        try:
            held = loaded_json(self.path / ".holder.json")
        except (OSError, ValueError, RecursionError):
            return {}
        return held if isinstance(held, dict) else {}

    def _holder(self) -> str:
        held = self._held()
        if not {"pid", "host", "since", "command"} <= held.keys():
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
        # Empty where the crash came just after the last rename.
        with suppress(OSError):
            (self.path / WORKSPACES).rmdir()

    def workspace(self, stage: str, key: str) -> Path:
        """Folder in which a stage works; the same key finds what a killed run left.

        Raises:
            ArtifactError: the folder cannot be written.
        """
        parent = self.path / WORKSPACES
        wanted = parent / f"{stage}-{key[:16]}"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            for old in parent.glob(f"{stage}-*"):
                if old != wanted or _has_links(old):
                    remove_tree(old)
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
        self._require_lock()
        try:
            if _has_links(workspace):
                raise OSError(errno.ELOOP, "a link lies in the workspace")
            for pattern in leave_out:
                # JSON first: it says that the tensors beside it are whole, to a run that goes on from here.
                for file in sorted(workspace.glob(pattern), key=lambda file: file.suffix != ".json"):
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
            self._require_lock()  # Digests of gigabytes take their time.
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
            (self.path / WORKSPACES).rmdir()

    def verify(self, stage: str, *, deep: bool) -> None:
        """Check a committed stage's files against its manifest.

        Args:
            stage: its name.
            deep: re-read every file; otherwise those above 16 MB by size only.

        Raises:
            ArtifactError: a file is missing or differs; names it.
        """
        manifest = self.manifest(stage)
        outputs = manifest["outputs"] if manifest else {}
        folder = self.stage_dir(stage)
        for name in _written(folder) if manifest else ():
            if name not in outputs:
                raise ArtifactError(
                    "the file is not one that the stage wrote",
                    where=str(folder / name),
                    fix=f"remove it, or run `arisk run CONFIG --from {stage}` to make the stage again",
                )
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
        if path.is_symlink() or not path.is_file() or path.read_bytes() != text.encode():
            write_text(path, text)


def _fault(body: Mapping[str, Any], stage: str) -> str | None:
    """What keeps a manifest from being one of this stage; None where nothing does."""
    ingredients, outputs = body.get("ingredients"), body.get("outputs")
    if not isinstance(ingredients, dict) or not isinstance(outputs, dict):
        return "it lacks ingredients or outputs"
    if body.get("stage") != stage:
        return f"it is of the stage {str(body.get('stage'))[:40]!r}"
    if body.get("key") != stage_key(ingredients):
        return "its key does not follow from its ingredients"
    if not isinstance(body.get("seconds"), (int, float)):
        return "it lacks the time the stage took"
    for name, output in outputs.items():
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        if not inside or not isinstance(output, dict):
            return f"its entry of the file {name[:80]!r} is none"
        if not isinstance(output.get("bytes"), int) or not isinstance(output.get("sha256"), str):
            return f"its entry of the file {name[:80]!r} lacks size or digest"
    return None if outputs else "it lists no file"


def _written(folder: Path) -> list[str]:
    """Files of a stage's folder by relative name; hidden ones are the system's."""
    return sorted(
        str(file.relative_to(folder))
        for file in folder.rglob("*")
        if not file.is_dir() and file.name != MANIFEST and not file.name.startswith(".")
    )


def _has_links(path: Path) -> bool:
    """Whether a path, or anything under it, is a link."""
    if path.is_symlink():
        return True
    return any(
        (Path(at) / name).is_symlink() for at, folders, files in os.walk(path) for name in (*folders, *files)
    )


def remove_tree(path: Path) -> None:
    """Remove a folder with all in it, as far as that is possible; of a link, the link alone."""
    if path.is_symlink():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


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
