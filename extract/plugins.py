"""Tuners, objectives, backbones and tasks of others: modules that register them when they are imported.

A module is named by `--import`, or installed with an entry point of the group `pipeline.plugins`, which is imported
when a name is asked for that is not known.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from pipeline.store.errors import Notice, UserError
from pipeline.store.format.digest import digest_bytes

GROUP = "pipeline.plugins"
_imported: list[str] = []  # what was asked for, whether it could be imported or not


def import_modules(names: Iterable[str]) -> None:
    """Import each of `names`, once: a module, a .py file, or the folder of a package. UserError where one cannot be."""
    for name in names:
        path = Path(name).expanduser()
        _imported.append(name)
        try:
            if path.suffix == ".py" or (path / "__init__.py").is_file():
                _import_file(path.resolve())
            else:
                _import_name(name)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"--import {name}: {_said(error)}") from error


def imported() -> bool:
    """Whether code of others was run in this process."""
    return bool(_imported)


def lasting(names: Iterable[str]) -> tuple[str, ...]:
    """`names` with files and folders by their whole paths."""
    return tuple(str(Path(n).expanduser().resolve()) if Path(n).expanduser().exists() else n for n in names)


def _import_name(name: str) -> None:
    here = str(Path.cwd())
    sys.path.insert(0, here)  # of a console script the working folder is not on the path
    try:
        importlib.import_module(name)
    finally:
        sys.path.remove(here)


def _import_file(path: Path) -> None:
    """A file is a module by its own name, unless another one has it."""
    if not path.exists():
        raise UserError(f"--import {path}: no such file")
    file = path / "__init__.py" if path.is_dir() else path
    if any(getattr(m, "__file__", None) == str(file) for m in list(sys.modules.values())):
        return
    name = path.stem if _free(path.stem) else f"{path.stem}_{digest_bytes(str(path).encode())[:8]}"
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=_within(path))
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _within(path: Path) -> list[str] | None:
    return [str(path)] if path.is_dir() else None


def _free(name: str) -> bool:
    return name.isidentifier() and name not in sys.modules and importlib.util.find_spec(name) is None


@cache
def load_installed() -> None:
    """Import the modules of all installed plug-ins, once in a process. One that cannot be imported is a Notice: those
    who do not need it are not stopped."""
    for point in entry_points(group=GROUP):
        _imported.append(point.name)
        try:
            point.load()
        except Exception as error:
            warnings.warn(f"plug-in {point.name} ({point.value}) cannot be imported: {_said(error)}", Notice)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
