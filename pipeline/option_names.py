"""How options are spelled: on the command line, and in recipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.store.errors import UserError

_ALIASES = {"for": "tuners", "import": "imports", "target_step": "grid"}


def option_name(name: str) -> str:
    """The spelling on the command line: max_length → --max-length; `tuners` is spelled --for, `imports` --import,
    `grid` --target-step, since --grid is a sweep's."""
    spelled = next((alias for alias, own in _ALIASES.items() if own == name), name)
    return "--" + spelled.replace("_", "-")


def field_name(spelled: str) -> str:
    """The name in a recipe of an option as it is `spelled` on a command line or in a file: dashes as underscores, `for`
    as `tuners`, `import` as `imports`, `target_step` as `grid`."""
    plain = spelled.replace("-", "_")
    return _ALIASES.get(plain, plain)


def named(values: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """`values` by the names of options (`field_name`). UserError for one that is given twice."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = field_name(str(key))
        if name in out:
            raise UserError(f"{where}: {option_name(name)} is given twice, once as {key!r}: keep one of them")
        out[name] = value
    return out
