"""Data files, folders of them and hub ids as raw rows, each with its line or number.

JSONL, JSON, CSV, TSV, text, Parquet and Arrow; what the rows hold is not looked at here.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from arisk.base.errors import ConfigError, InputError
from arisk.config.plan import DataConfig
from arisk.config.yaml import shortened
from arisk.models.formats import LONGEST, SAFETY_SETS, RowFault

__all__ = ["PLAIN", "raw_rows", "require_data"]

#: File endings of JSON lines, of tables with the mark between their columns, and of a text per line.
LINES = (".jsonl", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}
TEXTS = ".txt"
#: File endings that are read, and those of them that need no further library.
PLAIN = (*LINES, ".json", *TABLES, TEXTS)
ENDINGS = (*PLAIN, ".parquet", ".arrow")
#: A split, or a part of one.
PART = re.compile(r"(?P<split>[^\[\]+]*)(?:\[(?P<first>-?\d+%?)?:(?P<last>-?\d+%?)?\])?")
#: Characters of one field of a table.
LONGEST_FIELD = 1 << 27
#: Files of a folder that are looked at, at either depth, for one with data.
LOOKED_AT = 1000


def raw_rows(config: DataConfig, section: str) -> Iterator[tuple[int, Any]]:
    """(line or row number from 1, mapping) of every row as it stands in the file; blank lines left out.

    Args:
        config: path and layout.
        section: name of the config section, for messages.

    Yields:
        A line that cannot be read comes as a `RowFault`.

    Raises:
        InputError: the file is missing or cannot be read.
    """
    path, mode = Path(config.path), require_data(config, section)
    whole, first, last = _part(config, section)
    rows = _source(config.model_copy(update={"split": whole}), path, mode, section)
    try:
        yield from rows if (first, last) == (None, None) else _between(list(rows), first, last)
    except OSError as err:
        raise _unreadable(err, path, section) from err


def _part(config: DataConfig, section: str) -> tuple[str, str | None, str | None]:
    """`train[10%:20%]` as the split, and the two ends of the part that is wanted of it.

    Sums of parts are left to the `datasets` library, which knows the splits.

    Raises:
        ConfigError: this names no part of a file.
    """
    found = PART.fullmatch(config.split)
    if found is None and Path(config.path).suffix not in PLAIN:
        return config.split, None, None
    if found is None:
        raise ConfigError(
            f"{config.split[:LONGEST]!r} names no part of a split",
            where=f"{section}.split",
            fix="write `train`, `train[:20%]` or `train[100:200]`; several parts are several data sets",
        )
    return found["split"], found["first"], found["last"]


def _between(
    rows: Sequence[tuple[int, Any]], first: str | None, last: str | None
) -> Sequence[tuple[int, Any]]:
    """A part of the rows as `datasets` cuts it: shares are rounded to the nearest row."""

    def place(given: str | None) -> int | None:
        if given is None or not given.endswith("%"):
            return None if given is None else int(given)
        return round(int(given[:-1]) * len(rows) / 100)

    return rows[place(first) : place(last)]


def _source(config: DataConfig, path: Path, mode: int | None, section: str) -> Iterator[tuple[int, Any]]:
    """The rows, by what the path is; paths that are nothing here are hub ids."""
    if mode is None and path.suffix in ENDINGS:
        raise InputError(
            "the data file does not exist", where=f"{section}.path: {path}", fix="check the path"
        )
    if mode is None or stat.S_ISDIR(mode):
        return enumerate(_with_datasets(config, section), start=1)
    if path.suffix in LINES:
        return _json_lines(path)
    if path.suffix == ".json":
        return _json(path, section)
    if path.suffix in TABLES:
        return _table(path, section)
    if path.suffix == TEXTS:
        asked = config.format == "prompts" or (config.format == "auto" and section in SAFETY_SETS)
        return _texts(path, config.prompt_column if asked else config.text_column)
    return enumerate(_with_datasets(config, section), start=1)


def _unreadable(err: Exception, path: Path, section: str) -> InputError:
    why = getattr(err, "strerror", None) or str(err) or type(err).__name__
    return InputError(
        f"the data file cannot be read: {why}",
        where=f"{section}.path: {str(path)[:300]}",
        fix="check the path and its permissions",
    )


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Objects by line; bytes are decoded one line at a time, so that a bad one has a number."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(b"\xef\xbb\xbf").strip()
            if content:
                yield number, _object(content)


def _object(line: bytes) -> Any:
    """A JSON value, or the `RowFault` that says why it is none."""
    try:
        return json.loads(line.decode())
    except json.JSONDecodeError as err:
        return RowFault(
            f"this is not valid JSON: {err.msg} at column {err.colno}", "give one JSON object per line"
        )
    except UnicodeDecodeError as err:
        return RowFault(
            f"this is not UTF-8: byte 0x{line[err.start]:02x} at {err.start + 1}",
            "save the file as UTF-8",
        )
    except RecursionError:
        return RowFault("the JSON is nested too deeply", "flatten it, or leave the column out")
    except ValueError as err:
        # Numbers with thousands of digits.
        return RowFault(f"this JSON cannot be read: {str(err).partition(';')[0]}", "shorten the number")


def _json(path: Path, section: str) -> Iterator[tuple[int, Any]]:
    """A list of objects, an object that holds one list of them, or JSON lines under another name."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").strip()
    whole = _object(content) if content else []
    if isinstance(whole, Mapping):
        lists = [value for value in whole.values() if isinstance(value, list)]
        whole = lists[0] if len(lists) == 1 else whole
    if isinstance(whole, list):
        yield from enumerate(whole, start=1)
    elif isinstance(whole, RowFault) and content.startswith(b"[") and b"\n[" not in content:
        raise InputError(whole.what, where=f"{section}.path: {path}", fix="give a list of JSON objects")
    else:
        yield from _json_lines(path)


def _table(path: Path, section: str) -> Iterator[tuple[int, Any]]:
    """Rows of a table with a header; every value is text."""
    csv.field_size_limit(LONGEST_FIELD)
    mark, read, last = TABLES[path.suffix], list[str](), list[str]()

    def remembered(lines: Iterable[str]) -> Iterator[str]:
        for line in lines:
            read.append(line)
            yield line

    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(remembered(file), delimiter=mark, restkey="")
            for number, row in enumerate(reader, start=1):
                last = read.copy()
                read.clear()
                if "" in row and isinstance(row[""], list):
                    yield number, RowFault("the row has more fields than the header", "quote the text")
                else:
                    yield number, row
        _require_closed(last or read, mark)
    except (csv.Error, UnicodeDecodeError) as err:
        raise InputError(
            f"the table cannot be read: {err}",
            where=f"{section}.path: {path}",
            fix="give a UTF-8 table whose first line names the columns",
        ) from err


def _require_closed(lines: Sequence[str], mark: str) -> None:
    """Refuse a last row whose quotation never closes: it has swallowed all rows behind it.

    Raises:
        csv.Error: it is open.
    """
    try:
        list(csv.reader(lines, delimiter=mark, strict=True))
    except csv.Error as err:
        if "unexpected end" in str(err):
            what = f"a quotation mark opens in {shortened(repr(lines[0]), 80)} and never closes"
            raise csv.Error(what) from err


def _texts(path: Path, column: str) -> Iterator[tuple[int, Any]]:
    """Every line of a file as a row of one column."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(b"\xef\xbb\xbf").strip()
            if b"\r" in content:
                what = "a line end of another system is inside the line"
                yield number, RowFault(what, "save the file with the line ends of Unix or Windows")
                continue
            try:
                if content:
                    yield number, {column: content.decode()}
            except UnicodeDecodeError as err:
                what = f"this is not UTF-8: byte 0x{content[err.start]:02x} at {err.start + 1}"
                yield number, RowFault(what, "save the file as UTF-8")


def require_data(config: DataConfig, section: str) -> int | None:
    """Refuse devices, pipes, and folders without data files: everything in them would be read for them.

    Args:
        config: path of the data set.
        section: name of the config section, for messages.

    Returns:
        Mode of what is there; None where nothing is, as with a hub id.

    Raises:
        InputError: no data can be read from it.
    """
    path, empty = Path(config.path), False
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            inside = itertools.chain(
                itertools.islice(path.glob("*"), LOOKED_AT), itertools.islice(path.glob("*/*"), LOOKED_AT)
            )
            empty = not any(file.suffix in ENDINGS and file.is_file() for file in inside)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as err:
        raise _unreadable(err, path, section) from err
    if empty:
        raise InputError(
            "this folder has no data files",
            where=f"{section}.path: {path}",
            fix=f"give a file, or a folder with files ending in {', '.join(ENDINGS)}",
        )
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise InputError(
            "this is a device or a pipe, not a file",
            where=f"{section}.path: {path}",
            fix="give a file: it is read several times",
        )
    return mode


def _with_datasets(config: DataConfig, section: str) -> Any:
    """Rows through the `datasets` library: Parquet files, folders, and hub ids."""
    from arisk.models.loading import hf_module

    datasets = hf_module("datasets")
    datasets.disable_progress_bars()
    path = Path(config.path)
    if path.is_file() and path.suffix not in ENDINGS:
        raise InputError(
            f"files ending in {path.suffix!r} are not read",
            where=f"{section}.path: {path}",
            fix=f"give one of {', '.join(ENDINGS)}",
        )
    try:
        if path.suffix == ".parquet" and path.is_file():
            return datasets.load_dataset("parquet", data_files=str(path), split="train")
        if path.suffix == ".arrow" and path.is_file():
            return datasets.Dataset.from_file(str(path))
        if (path / "dataset_info.json").is_file():
            found = datasets.load_from_disk(str(path))
            return found[config.split] if isinstance(found, Mapping) else found
        return datasets.load_dataset(config.path, config.subset, split=config.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as err:
        raise InputError(
            f"the data set cannot be loaded: {str(err).splitlines()[0] if str(err) else type(err).__name__}",
            where=f"{section}.path: {config.path}",
            fix="check the path or hub id (a hub id needs the network or a local cache) and the split",
        ) from err
