"""Stage records to and from safetensors and JSON, with a format version.

A record is any frozen dataclass. Its tensors, and those of records in its fields, go to
`tensors.safetensors`, everything else to `record.json`, whose first key is the format version; equal
records give equal bytes. NaN and infinities, which JSON lacks, are the strings "NaN", "Infinity" and
"-Infinity". No torch is imported until a tensor is read or written.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import stat
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from arisk.base.errors import ArtifactError, DamagedError, NewerFormatError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CONFIG_FILE",
    "FORMAT_VERSION",
    "RECORD_FILE",
    "TENSORS_FILE",
    "WORKSPACES",
    "aligned",
    "disk_error",
    "existing_parent",
    "finite",
    "loaded_json",
    "read_json",
    "read_record",
    "read_tensors",
    "write_record",
    "write_tensors",
    "write_text",
]

#: The config that a run directory keeps, as it was resolved for the last run.
CONFIG_FILE = "config.yaml"
#: Values and tensors of a record, in a folder of its own.
RECORD_FILE, TENSORS_FILE = "record.json", "tensors.safetensors"
#: Version of everything in a run directory; a reader refuses a newer one.
FORMAT_VERSION = 1

#: Bytes of the largest JSON that is read: a record of a hundred thousand rows takes a tenth.
LARGEST_JSON = 1 << 29

_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
Record = TypeVar("Record")


def write_record(directory: Path, record: Any) -> None:
    """Write a record's tensors and values into a folder, made if needed.

    Raises:
        ArtifactError: the disk is full or the folder is read-only.
    """
    tensors: dict[str, Any] = {}
    values = _parted(record, "", tensors)
    body = {"format_version": FORMAT_VERSION, "type": type(record).__name__, "values": values}
    write_tensors(directory / TENSORS_FILE, tensors)
    write_text(directory / RECORD_FILE, json.dumps(body, indent=1, allow_nan=False) + "\n")


def read_record(directory: Path, cls: type[Record]) -> Record:
    """Read a record of a given class back.

    Raises:
        ArtifactError: a file is missing, damaged, of a newer format, or of another record.
    """
    path = directory / RECORD_FILE
    body = read_json(path)
    if body.get("type") != cls.__name__ or not isinstance(body.get("values"), dict):
        raise _damaged(path, f"it holds {body.get('type')!r}, not {cls.__name__!r}")
    tensors = read_tensors(directory / TENSORS_FILE)
    try:
        found, missing = _joined(cls, body["values"], "", tensors)
    except (AttributeError, KeyError, TypeError, ValueError) as err:
        raise _damaged(path, f"its values are not those of a {cls.__name__} ({err})") from err
    if missing:
        raise _damaged(path, f"the field {missing!r} is missing")
    return found


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors by name as safetensors; the file appears whole or not at all.

    Args:
        path: the file.
        tensors: what it holds.
        metadata: texts for its header.

    Raises:
        ArtifactError: the disk is full or the folder is read-only.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = path.with_name(path.name + ".partial")
    try:
        _begin(partial)
        mode = stat.S_IMODE(partial.stat().st_mode)
        save_file(_separate(tensors), partial, metadata)
        partial.chmod(mode)  # The library makes files for their owner alone; ours follow the umask.
        partial.replace(path)
    except SafetensorError as err:
        partial.unlink(missing_ok=True)
        if "os error 28" in str(err) or "No space" in str(err):
            raise disk_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), path) from err
        raise disk_error(OSError(errno.EIO, str(err)), path) from err
    except OSError as err:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise disk_error(err, path) from err


def _begin(partial: Path) -> None:
    """An empty file in a folder made if needed; a link that lies there is removed and not followed."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.unlink(missing_ok=True)
    partial.touch(exist_ok=False)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as the format demands."""
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        kept = tensor.detach().cpu().contiguous()
        storage = kept.untyped_storage().data_ptr()
        own[name] = kept.clone() if storage in seen else kept
        seen.add(storage)
    return own


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file, in memory aligned as torch aligns its own.

    Raises:
        ArtifactError: the file is missing, truncated or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        _require_regular(path)
        return {name: aligned(tensor) for name, tensor in load_file(path).items()}
    except FileNotFoundError as err:
        raise _damaged(path, "it is missing") from err
    except (SafetensorError, OSError, ValueError, KeyError) as err:
        raise _unread(path, err) from err


#: Bytes at which torch begins memory of its own.
ALIGNMENT = 64


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where a file has it at any byte.

    Sums and products over memory that begins elsewhere round otherwise, so work that goes on from a file
    would not end as work that was never interrupted.
    """
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all.

    Raises:
        ArtifactError: the disk is full or the folder is read-only.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        _begin(partial)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as err:
        raise disk_error(err, path) from err


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object with a format version this arisk understands.

    Raises:
        ArtifactError: missing, damaged, or written by a newer arisk.
    """
    try:
        body = loaded_json(path)
    except FileNotFoundError as err:
        raise _damaged(path, "it is missing") from err
    except (OSError, ValueError, RecursionError) as err:
        raise _unread(path, err) from err
    version = body.get("format_version") if isinstance(body, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise _damaged(path, "it has no format_version")
    if version > FORMAT_VERSION:
        raise NewerFormatError(
            f"the artifact has format version {version}; this arisk reads up to {FORMAT_VERSION}",
            where=str(path),
            fix="upgrade arisk, or use another --run-dir",
        )
    return body


def loaded_json(path: Path) -> Any:
    """Whatever JSON a regular file of bounded size holds.

    Raises:
        OSError: it is missing, cannot be read, is no regular file, or is larger than `LARGEST_JSON`.
        ValueError: it is no JSON.
        RecursionError: it is nested too deeply.
    """
    size = _require_regular(path)
    if size > LARGEST_JSON:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than any that arisk writes")
    return json.loads(path.read_text(encoding="utf-8"))


def _require_regular(path: Path) -> int:
    """Size of a file; a pipe would hang and a device never end.

    Raises:
        OSError: it is missing, or neither a file nor a link to one.
    """
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    return info.st_size


def _cause(err: Exception) -> str:
    """An exception in one line."""
    if isinstance(err, RecursionError):
        return "it is nested too deeply"
    told = (err.strerror or str(err)) if isinstance(err, OSError) else str(err)
    return told.splitlines()[0][:300] if told else type(err).__name__


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())


def disk_error(err: OSError, path: Path) -> ArtifactError:
    """What a failed write means to a person."""
    if err.errno == errno.ENOSPC:
        what, fix = "the disk is full", "free some space (or set --run-dir to another disk) and run again"
    elif err.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        what, fix = "the run directory cannot be written", "make it writable, or choose another --run-dir"
    elif err.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
        what, fix = "something else is in the way of this file", "remove it, or choose another place"
    elif err.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENOENT):
        what, fix = f"no file can be here: {err.strerror or err}", "choose another --run-dir"
    else:
        what, fix = f"writing failed: {err.strerror or err}", "check the disk, then run again"
    return ArtifactError(f"{what}; finished stages are kept", where=str(path), fix=fix)


#: Folder of a run directory in which stages work before they are committed.
WORKSPACES = ".partial"


def _unread(path: Path, err: Exception) -> ArtifactError:
    """What a failed reading means: the file is damaged, unless the system would not read it just now."""
    damaged = _damaged(path, _cause(err))
    lasting = (errno.EINVAL, errno.EFBIG, errno.EISDIR, errno.ENOTDIR)
    if isinstance(err, OSError) and err.errno not in lasting:
        return ArtifactError(str(damaged.what), where=damaged.where, fix="check the disk, then run again")
    return damaged


def _damaged(path: Path, why: str) -> DamagedError:
    folders = path.parts
    fix = f"run `arisk run CONFIG --from {path.parent.name}` to make it again"
    if WORKSPACES in folders:
        last = len(folders) - 1 - folders[::-1].index(WORKSPACES)
        work = Path(*folders[: last + 2])
        fix = f"remove {work}, and run the same command again"
    return DamagedError(f"an artifact cannot be read: {why}", where=str(path), fix=fix)


def _parted(record: Any, prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """JSON form of a record; its tensors, and those of records in its fields, go into `tensors`."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        value, name = getattr(record, field.name), f"{prefix}{field.name}"
        if _is_tensor(value):
            tensors[name] = value
        elif _is_record(value):
            values[field.name] = _parted(value, f"{name}.", tensors)
        else:
            values[field.name] = _encode(value)
    return values


def _joined(
    cls: Any, values: Mapping[str, Any], prefix: str, tensors: Mapping[str, Any]
) -> tuple[Any, str | None]:
    """A record from its two parts, or the name of a field that neither has."""
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        name, inner = f"{prefix}{field.name}", _record_type(hints[field.name])
        if name in tensors:
            arguments[field.name] = tensors[name]
        elif field.name in values:
            value, missing = values[field.name], None
            if inner is not None and isinstance(value, dict):
                arguments[field.name], missing = _joined(inner, value, f"{name}.", tensors)
            else:
                arguments[field.name] = _decode(value, hints[field.name])
            if missing:
                return None, missing
        elif field.default is dataclasses.MISSING:
            return None, name
    return cls(**arguments), None


def _record_type(hint: Any) -> Any | None:
    """The record class of a field, optional or not; None where it holds something else."""
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
    choices = typing.get_args(hint) if optional else (hint,)
    return next((choice for choice in choices if dataclasses.is_dataclass(choice)), None)


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _is_tensor(value: Any) -> bool:
    return type(value).__module__.startswith("torch")


def _encode(value: Any) -> Any:
    """JSON form of a field: records, mappings and sequences by their parts."""
    if _is_record(value):
        return {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def _decode(value: Any, hint: Any) -> Any:
    """Value of a field from JSON, guided by its type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        inner = [argument for argument in arguments if argument is not type(None)]
        return _decode(value, inner[0]) if inner else value
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints = typing.get_type_hints(hint)
        return hint(**{key: _decode(item, hints[key]) for key, item in value.items()})  # type: ignore[operator]
    if hint is float:
        return _SPECIAL[value] if isinstance(value, str) else float(value)
    if origin is not None and isinstance(value, list) and arguments and issubclass(origin, Sequence):
        return [_decode(item, arguments[0]) for item in value]
    if origin is not None and isinstance(value, dict) and len(arguments) == 2:
        return {key: _decode(item, arguments[1]) for key, item in value.items()}
    return _restore(value) if hint is Any else value


def _restore(value: Any) -> Any:
    """Untyped values: only the spelled-out NaN and infinities change."""
    return _SPECIAL[value] if isinstance(value, str) and value in _SPECIAL else value


def finite(value: Any) -> Any:
    """JSON has no NaN: a number that is none is null, which readers must take as not measured."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value
