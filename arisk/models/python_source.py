"""Tasks from local Python code: `module:function` or `file.py:function` returning a `Task`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from arisk.base.errors import AriskError, InputError
from arisk.base.task import Task

__all__ = ["task_from_entry"]


def task_from_entry(entry: str) -> Task:
    """Call the named function without arguments and check what it returns.

    This runs local code, as `python` would.

    Raises:
        InputError: the module or function is not there, fails, or returns something else.
    """
    source, _, name = entry.rpartition(":")
    where = f"model.entry: {entry}"
    if not source or not name:
        raise InputError("the entry is not module:function", where=where, fix="e.g. tasks.py:make_task")
    function = getattr(_module(source, where), name, None)
    if not callable(function):
        raise InputError(
            f"{source} has no function {name!r}", where=where, fix="name a function that returns arisk.Task"
        )
    try:
        task = function()
    except AriskError:
        raise
    except Exception as err:
        raise InputError(
            f"the function failed: {type(err).__name__}: {err}",
            where=where,
            fix="run it by itself; `--debug` shows the traceback",
        ) from err
    if not isinstance(task, Task):
        raise InputError(
            f"the function returned {type(task).__name__}, not arisk.Task",
            where=where,
            fix="return arisk.Task(model=…, safety=…, finetune=…, parameter_names=…)",
        )
    return task


def _module(source: str, where: str) -> ModuleType:
    """Import a module by name, or a file by path."""
    path = Path(source)
    try:
        if path.suffix == ".py":
            if not path.is_file():
                raise InputError(f"{source} does not exist", where=where, fix="check the path")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[path.stem] = module
            spec.loader.exec_module(module)
            return module
        if "" not in sys.path:
            sys.path.insert(0, "")
        return importlib.import_module(source)
    except (ImportError, SyntaxError) as err:
        raise InputError(
            f"the module cannot be imported: {err}",
            where=where,
            fix="check its name, and that it can be imported from the working directory",
        ) from err
