"""A plain value, from YAML or a caller, as the type of the option it is for."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, get_args

from pipeline.store.errors import UserError


def short(value: Any) -> str:
    """`value` for a message: YAML's references make lists of lists that have no end when written out."""
    return reprlib.repr(value)[:200]


def parse_seeds(text: str) -> list[int]:
    """ "0,1,2" → [0, 1, 2], each once: a run repeated would narrow the spread. UserError for anything else."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if not part.isdecimal():
            raise UserError(f"--seeds: whole numbers from 0 with commas between, not {part!r}")
    if not parts:
        raise UserError("--seeds: name at least one")
    return list(dict.fromkeys(int(part) for part in parts))


def checked_value(name: str, hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint` says: bool, int, float, str, a tuple of one of them (also written with commas), or
    None where the hint allows it. Raises UserError naming `where` and `name`."""
    kinds = get_args(hint) if get_args(hint) and hint.__class__.__name__ == "UnionType" else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = next(k for k in kinds if k is not type(None))
    if args := get_args(kind):
        apart = [part.strip() for part in value.split(",")] if isinstance(value, str) else [value]
        values = value if isinstance(value, list | tuple) else apart
        if not all(isinstance(v, str | int | float) for v in values):
            raise UserError(f"{where}: {name}: expected {args[0].__name__} values, not {short(value)}")
        try:
            return tuple(args[0](str(v)) for v in values if str(v).strip())
        except ValueError:
            raise UserError(f"{where}: {name}: expected {args[0].__name__} values, not {short(value)}") from None
    if (kind is bool and isinstance(value, bool)) or (kind is str and isinstance(value, str)):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    # YAML reads 3e-3 as text; a number is a number.
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    raise UserError(f"{where}: {name}: expected {kind.__name__}, not {short(value)}")


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with lists for tuples, in what is nested too."""
    lists = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return {k: plain(v) if isinstance(v, dict) else v for k, v in lists.items()}
