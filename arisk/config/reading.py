"""Text files and YAML read strictly: every fault has a line, and the work is bounded.

What is foreign comes in through here: the config, `--set`, and the files of other tools. Python's and
PyYAML's own exceptions (numbers of thousands of digits, dates that are none, deep nesting, keys that are
lists) become one `ConfigError`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from arisk.base.errors import ConfigError
from arisk.config.sections import path_fault

__all__ = ["read_text", "read_yaml", "shortened"]

#: Levels of nesting, values and bytes that no file of settings needs.
DEEPEST, MOST_VALUES, LARGEST_FILE = 50, 100_000, 4_000_000


def shortened(text: str, limit: int = 80) -> str:
    """A text on one line, control characters written out, cut where it is longer than `limit` characters."""
    text = "".join(each if each.isprintable() else repr(each)[1:-1] for each in " ".join(text.split()))
    if len(text) <= limit:
        return text
    return f"{text[: limit * 2 // 3]} … {text[-limit // 4 :]} ({len(text)} characters)"


class _Loader(yaml.SafeLoader):
    """SafeLoader whose every fault has a place, and whose work is bounded.

    It refuses a key given twice (YAML would drop the first silently), keys that are no scalars, deep
    nesting and documents that grow by their aliases.
    """

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One node, at most `DEEPEST` levels down."""
        self.depth += 1
        try:
            if self.depth > DEEPEST:
                raise yaml.MarkedYAMLError(
                    problem=f"values are nested more than {DEEPEST} deep",
                    problem_mark=self.peek_event().start_mark,
                )
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; a text that is not what its tag says is an error with its line."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, OverflowError, KeyError, AttributeError) as err:
            text = shortened(str(node.value)) if isinstance(node, yaml.ScalarNode) else "this value"
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(
                problem=f"{text!r} is no {kind} that can be read", problem_mark=node.start_mark
            ) from err


def _unique_mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(
                problem="a key must be one word, not a list or a mapping", problem_mark=key_node.start_mark
            )
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue  # `<<: *defaults`, which may say again what stands here
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.MarkedYAMLError(
                problem=f"the key {shortened(str(key))!r} is given twice", problem_mark=key_node.start_mark
            )
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _refuse_growth(root: yaml.Node) -> None:
    """Refuse a document that its aliases make endless, too deep, or larger than `MOST_VALUES` values."""
    seen: dict[int, tuple[int, int]] = {}
    above: set[int] = set()

    def measure(node: yaml.Node) -> tuple[int, int]:
        """Values in a node and levels below it, aliases written out."""
        if isinstance(node, yaml.ScalarNode):
            return 1, 0
        if id(node) in above:
            raise yaml.MarkedYAMLError(problem="a value holds itself", problem_mark=node.start_mark)
        if id(node) not in seen:
            above.add(id(node))
            pairs = isinstance(node, yaml.MappingNode)
            children = [part for pair in node.value for part in pair] if pairs else node.value
            inner = [measure(child) for child in children]
            seen[id(node)] = 1 + sum(n for n, _ in inner), 1 + max((deep for _, deep in inner), default=0)
            above.remove(id(node))
        values, levels = seen[id(node)]
        if values > MOST_VALUES or levels > DEEPEST:
            problem = f"its aliases make more than {MOST_VALUES} values of it, or more than {DEEPEST} levels"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return values, levels

    measure(root)


def read_yaml(text: str, where: str, *, fix: str, numbered: bool = True) -> tuple[Any, yaml.Node | None]:
    """The value of a YAML text, and the nodes it was made of (they know their lines).

    Args:
        text: what was read.
        where: the file, or the option, for messages.
        fix: remedy of a fault.
        numbered: name the line as well.

    Raises:
        ConfigError: it is no YAML, or not YAML of a sane size and depth; with the line.
    """
    loader: Any = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        _refuse_growth(node)
        return loader.construct_document(node), node
    except yaml.YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark and numbered else ""
        problem = getattr(err, "problem", None) or getattr(err, "reason", None) or str(err)
        raise ConfigError(
            f"this is not valid YAML: {shortened(problem, 200)}", where=f"{where}{line}", fix=fix
        ) from err
    finally:
        if loader is not None:
            loader.dispose()


def read_text(path: Path, what: str) -> str:
    """The text of a regular file of at most `LARGEST_FILE` bytes.

    Args:
        path: the file.
        what: what it is to be, for messages, such as `config file`.

    Raises:
        ConfigError: it is missing, a folder, a device, too large, or no UTF-8.
    """
    shown = shortened(str(path), 200)
    if fault := path_fault(str(path)):
        where = shown or "(empty)"
        raise ConfigError(f"the {what} cannot be read: {fault}", where=where, fix="check the path")
    try:
        if path.is_dir():
            raise ConfigError(
                f"this is a folder, not a {what}",
                where=shown,
                fix=f"give the YAML file; for a run directory its own: {path / 'config.yaml'}",
            )
        if path.exists() and not path.is_file():
            raise ConfigError(
                f"the {what} is no regular file (a device, a pipe or a socket)",
                where=shown,
                fix="save its text to a file and give that",
            )
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError(
                f"the {what} has {path.stat().st_size} bytes, too many for settings",
                where=shown,
                fix=f"give a file of settings; they take less than {LARGEST_FILE} bytes",
            )
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as err:
        raise ConfigError(
            f"the {what} does not exist", where=shown, fix="check the path, or write one with `arisk init`"
        ) from err
    except (OSError, UnicodeDecodeError) as err:
        why = shortened(str(err), 200)
        fix = "give a UTF-8 text file"
        raise ConfigError(f"the {what} cannot be read: {why}", where=shown, fix=fix) from err
