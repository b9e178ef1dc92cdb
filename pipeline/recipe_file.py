"""Recipe files: options as YAML, each once, with a digest of what they say in a comment."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.store.errors import Notice, UserError
from pipeline.store.format.digest import digest_bytes

_SEAL = "xxh3 of the options: "


def recipe_text(values: Mapping[str, Any], header: str = "") -> str:
    """`values` as YAML below a comment, `header` and the digest."""
    body = yaml.safe_dump(dict(values), sort_keys=False)
    lines = [*header.splitlines(), f"{_SEAL}{_digest(yaml.safe_load(body))}"]
    return "".join(f"# {line}\n" for line in lines) + body


def recipe_values(path: str | Path, record: bool = False) -> dict[Any, Any]:
    """What the file says. UserError where it is absent, not YAML, no mapping, or has a name twice. Where it no longer
    says what its digest is of: a Notice; with `record`, which a run's own recipe is, UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.load(text, _Once)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: cannot be read: {error}") from None
    except RecursionError:
        raise UserError(f"recipe {path}: nested too deep to be `option: value` lines") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"recipe {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe {path}: expected `option: value` lines")
    seal = re.search(rf"^# {_SEAL}(.*)$", text, re.MULTILINE)
    if seal and seal[1] != _digest(values):
        if record:
            raise UserError(
                f"{path} differs from its digest, so it is damaged or was changed: restore it; what has moved is said "
                "by options (--store, --model)"
            )
        warnings.warn(f"recipe {path}: changed since the run that wrote it", Notice, stacklevel=3)
    return values


def _digest(values: Mapping[Any, Any]) -> str:
    """xxh3-128 of a mapping as YAML gives it; order, comments and spelling do not count."""
    return digest_bytes(json.dumps({str(k): v for k, v in values.items()}, sort_keys=True, default=str).encode())


class _Once(yaml.SafeLoader):
    """YAML in which no name stands twice: of two values a reader takes the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    where = f"on lines {seen[key.value]} and {line}" if seen[key.value] != line else f"on line {line}"
                    raise yaml.constructor.ConstructorError(
                        problem=f"{key.value} is given twice, {where}: keep one of them"
                    )
                seen[key.value] = line
        return super().construct_mapping(node, deep)
