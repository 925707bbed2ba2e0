"""Reading data sets: JSONL, JSON, CSV, TSV, text, Parquet, a folder of these or a hub id; every row checked.

The layout of the rows is `arisk.models.formats`' business. This module finds the files, names the place
of every fault, keeps the rows that `where` asks for, and draws the subset.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arisk.base.errors import ConfigError, InputError
from arisk.config.plan import DataConfig, ProbeConfig
from arisk.config.yaml import shortened
from arisk.models.formats import CHOICE, FORMATS, SAFETY_SETS, Fields, Format, Row, RowFault, named

if TYPE_CHECKING:
    from torch import Generator

__all__ = [
    "OWN_ANSWERS",
    "ReadRows",
    "Row",
    "prompts_alone",
    "raw_rows",
    "read_data",
    "read_rows",
    "require_data",
]

#: Version of the way in which the model's own answers become responses.
OWN_ANSWERS = 1

#: Bad rows named in one error.
LISTED = 10
#: Rows whose columns decide about the layout.
LOOKED_AT = 100
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
#: Characters of a foreign value that a message repeats.
REPEATED = 60


@dataclass(frozen=True)
class ReadRows:
    """The rows of a data set, and what was taken of it.

    Attributes:
        rows: the rows, in the order of the file.
        format: the layout that was recognised or named.
        unread: rows with text in a column that was not read, by column.
        filtered: rows that `where` left out.
        left_out: rows that the layout leaves out, such as answers labelled as bad.
        held_out: rows that `val_set_size` keeps from the training.
        empty: columns without text in any row, where the rows are therefore taken for prompts alone.
    """

    rows: list[Row]
    format: Format
    unread: Mapping[str, int] = field(default_factory=dict[str, int])
    filtered: int = 0
    left_out: int = 0
    held_out: int = 0
    empty: tuple[str, ...] = ()

    def said(self) -> str:
        """What was taken, in one line for people."""
        parts = [f"read as {self.format.name}: {self.format.summary}"]
        if self.empty:
            parts.append(f"empty in every row: {', '.join(f'`{name}`' for name in self.empty)}")
        if self.unread:
            names = ", ".join(f"`{name}` ({count} rows)" for name, count in self.unread.items())
            parts.append(f"text in columns that are not used: {names}")
        counts = {
            "left out by `where`": self.filtered,
            "left out by their label": self.left_out,
            "held out by `val_set_size`": self.held_out,
        }
        parts += [f"{count} rows {what}" for what, count in counts.items() if count]
        return "; ".join(parts)


def read_rows(config: DataConfig, *, section: str, seed: int) -> list[Row]:
    """The rows of `read_data`.

    Args:
        config: path, layout and columns.
        section: name of the config section, for messages.
        seed: seed of the draw.
    """
    return read_data(config, section=section, seed=seed).rows


def read_data(config: DataConfig, *, section: str, seed: int) -> ReadRows:
    """Rows of a data set, checked, and cut to `max_samples` by a seeded draw that keeps their order.

    `val_set_size` takes its rows away as `datasets.Dataset.train_test_split` does with the same seed, whose
    order the others then have.

    Args:
        config: path, layout and columns.
        section: name of the config section, for messages.
        seed: seed of the draw.

    Raises:
        ConfigError: there is no such layout.
        InputError: the file is missing, empty or unreadable, rows are wrong (each named), of no known
            layout, or none of them is what `where` asks for.
    """
    raws = raw_rows(config, section)
    first = list(itertools.islice(raws, LOOKED_AT))
    columns = _columns([raw for _, raw in first])
    asked = isinstance(config, ProbeConfig) and config.measure == "choice"
    layout = CHOICE if asked else _layout(config, columns, section)
    found = _read(itertools.chain(first, raws), layout, config, section)
    if layout.name == "prompts" and config.format == "auto":
        found = replace(found, empty=_empty(columns, found, config, section))
    rows = found.rows
    import torch

    generator = torch.Generator().manual_seed(seed)
    held_out = 0
    if config.val_set_size:
        rows, held_out = _training_rows(rows, config.val_set_size, section, seed)
    if config.max_samples is not None and config.max_samples < len(rows):
        kept = torch.randperm(len(rows), generator=generator)[: config.max_samples]
        rows = [rows[i] for i in sorted(kept.tolist())]
    if config.weight != 1:
        rows = _repeated(rows, config.weight, generator)
    return replace(found, rows=rows, held_out=held_out)


def prompts_alone(config: DataConfig, section: str) -> bool:
    """Whether a data set is prompts without responses, told from its first rows and without torch.

    Files that another library reads, and hub ids, say so by `format: prompts`.

    Args:
        config: path and layout.
        section: name of the config section.
    """
    if config.format != "auto" or Path(config.path).suffix not in PLAIN or not Path(config.path).is_file():
        return config.format == "prompts"
    try:
        first = [raw for _, raw in itertools.islice(raw_rows(config, section), LOOKED_AT)]
        return _layout(config, _columns(first), section).name == "prompts"
    except InputError:
        # Whoever reads the rows says what is wrong with them.
        return False


def _columns(raws: Sequence[Any]) -> dict[str, Any]:
    """The columns of these rows, each with its first value that says something."""
    columns: dict[str, Any] = {}
    for raw in raws:
        for key, value in raw.items() if isinstance(raw, Mapping) else ():
            if _blank(columns.get(key)):
                columns[key] = value
    return columns


def _blank(value: Any) -> bool:
    """Nothing, no text, or an empty list."""
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _empty(columns: Mapping[str, Any], found: ReadRows, config: DataConfig, section: str) -> tuple[str, ...]:
    """The columns without text in any row that would make the rows more than prompts.

    Raises:
        InputError: one is empty in the rows that decided about the layout, and has text in others.
    """
    written = _written(columns)
    empty = tuple(
        name
        for name in sorted(columns.keys() - written.keys())
        if _fitting({**written, name: "text"}, config) is not found.format
    )
    late = next((name for name in empty if name in found.unread), None)
    if late is not None:
        raise InputError(
            f"the column {late!r} is empty in the first {LOOKED_AT} rows and has text in "
            f"{found.unread[late]} others",
            where=f"{section}.path: {config.path}",
            fix="fill it in every row; or set `format: prompts`, and it is not read",
        )
    return empty


def _written(columns: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in columns.items() if not _blank(value)}


def _fitting(columns: Mapping[str, Any], config: DataConfig) -> Format | None:
    return next((layout for layout in FORMATS.values() if layout.fits(columns, config)), None)


def _layout(config: DataConfig, columns: Mapping[str, Any], section: str) -> Format:
    """The layout that is named, or the first that fits the columns of the rows looked at."""
    place = f"{section}.format: {config.path}"
    known = ", ".join(FORMATS)
    if config.format != "auto":
        if config.format not in FORMATS:
            raise ConfigError(
                f"there is no layout {config.format[:REPEATED]!r}",
                where=f"{section}.format",
                fix=f"one of auto, {known}",
            )
        return FORMATS[config.format]
    implied = config.named_format()
    if implied is not None:
        return FORMATS[implied]
    # A column without any text is as good as not there, unless then nothing is left.
    fitting = _fitting(_written(columns), config) or _fitting(columns, config)
    if fitting is None:
        # Rows that are broken name themselves.
        if not columns:
            return FORMATS["prompt_response"]
        raise InputError(
            f"the layout of the rows is not known; their columns are {named(columns)}",
            where=place,
            fix=f"name the columns (`prompt_column`, `response_column`, `messages_column`, `text_column`), "
            f"or a format: {known}",
        )
    if fitting.refused is not None:
        raise InputError(
            fitting.refused,
            where=place,
            fix=f"set `{section}.format: {fitting.name}` to train on the good answers ({fitting.summary})",
        )
    return fitting


def _read(raws: Iterable[tuple[int, Any]], layout: Format, config: DataConfig, section: str) -> ReadRows:
    """Every row read; bad ones together in one error."""
    rows: list[Row] = []
    bad: list[InputError] = []
    unread: Counter[str] = Counter()
    filtered = left_out = 0
    wanted = _Wanted(config.where)
    for line, raw in raws:
        try:
            fields = Fields(_mapping(raw), config)
            if not wanted(fields):
                filtered += 1
                continue
            row = layout.read(fields)
            if row is None:
                left_out += 1
                continue
            _require_text(row)
        except RowFault as fault:
            bad.append(InputError(fault.what, where=f"{config.path}, line {line}", fix=fault.fix))
            if len(bad) == LISTED:
                break
            continue
        unread.update(fields.unread())
        rows.append(replace(row, format=layout.name, source=config.path, line=line))
    if bad:
        raise InputError(bad[0].what, where=bad[0].where, fix=bad[0].fix, also=bad[1:])
    if not rows:
        raise _nothing(config, section, filtered, left_out, wanted)
    return ReadRows(rows, layout, dict(unread), filtered, left_out)


def _nothing(config: DataConfig, section: str, filtered: int, left_out: int, wanted: _Wanted) -> InputError:
    """Why a data set has no rows."""
    where = f"{section}.path: {config.path}"
    if filtered:
        seen = "; ".join(f"{key} has {named(sorted(values))}" for key, values in wanted.seen.items())
        return InputError(
            f"none of {filtered} rows is what `where` asks for", where=where, fix=f"in the data, {seen}"
        )
    if left_out:
        return InputError(
            f"none of {left_out} rows has a good answer", where=where, fix="give rows whose label is true"
        )
    return InputError("the data set is empty", where=where, fix="give at least two rows")


class _Wanted:
    """Whether a row has the values that `where` names; remembers a few values of the others."""

    def __init__(self, where: Mapping[str, Any] | None) -> None:
        self.where = {
            column: {_plain(value) for value in (values if isinstance(values, list) else [values])}
            for column, values in (where or {}).items()
        }
        self.seen: dict[str, set[str]] = {column: set() for column in self.where}

    def __call__(self, fields: Fields) -> bool:
        fine = True
        for column, values in self.where.items():
            if column not in fields.raw:
                raise RowFault(
                    f"the row has no column {column!r}, which `where` names",
                    f"its columns are {named(fields.raw)}",
                )
            value = _plain(fields.get(column))
            if value not in values:
                fine = False
                if len(self.seen[column]) <= LISTED:
                    self.seen[column].add(value[:REPEATED])
        return fine


def _plain(value: Any) -> str:
    """A value as text, so that `1` in YAML meets `1` in a CSV file, and true meets True."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "null" if value is None else str(value)
    return text.lower() if text in ("True", "False") else text


def _mapping(raw: Any) -> Mapping[str, Any]:
    if isinstance(raw, RowFault):
        raise raw
    if not isinstance(raw, Mapping):
        raise RowFault("the row is not an object", "give one JSON object per line")
    return raw


def _require_text(row: Row) -> None:
    """Refuse text that no encoding holds: a tokenizer would stop at it."""
    try:
        json.dumps([row.messages, row.text, row.tools], ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as err:
        raise RowFault(
            f"the text has half of a character (U+{ord(err.object[err.start]):04X}, a lone surrogate)",
            "write the character itself, or remove it",
        ) from err
    except RecursionError as err:
        raise RowFault("the row is nested too deeply", "flatten it") from err


def _training_rows(rows: list[Row], size: float, section: str, seed: int) -> tuple[list[Row], int]:
    """What is left for training, and how many rows are not."""
    import numpy as np

    held_out = int(np.ceil(size * len(rows))) if size < 1 else int(size)
    if held_out >= len(rows):
        raise InputError(
            f"`val_set_size` holds out {held_out} of {len(rows)} rows",
            where=f"{section}.val_set_size",
            fix="give a smaller number or share",
        )
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[i] for i in order[held_out:]], held_out


def _repeated(rows: list[Row], weight: float, generator: Generator) -> list[Row]:
    """Every row as often as the weight says, its fraction drawn; the order stays."""
    import torch

    whole, part = divmod(weight, 1)
    more = set(torch.randperm(len(rows), generator=generator)[: round(part * len(rows))].tolist())
    chosen = [row for i, row in enumerate(rows) for _ in range(int(whole) + (i in more))]
    return chosen or rows[:1]


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
            f"{config.split[:REPEATED]!r} names no part of a split",
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
                itertools.islice(path.glob("*"), LISTED**3), itertools.islice(path.glob("*/*"), LISTED**3)
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
