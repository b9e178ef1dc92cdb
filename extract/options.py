"""Options of a config, declared where they are read: as fields of its dataclass.

    @dataclass(frozen=True)
    class MyConfig(TunerConfig):
        power: int = option(2, "Power of the states.", least=1)

The command line, recipe files and Python take them from there, of tuners and objectives of others too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any

_KEY = "option"


@dataclass(frozen=True)
class About:
    """What is said of an option beside its name, type and default, see `option`."""

    help: str = ""
    choices: tuple[str, ...] = ()
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    metavar: str = ""
    extraction: bool = False


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    metavar: str = "",
    extraction: bool = False,
) -> Any:
    """A field of a config. Its type is bool, int, float, str, a tuple of one of these, or one of these or None.

    `help`: a sentence for people; the default is added to it. `choices`, or bounds (`least` ≤ value ≤ `most`, `above` <
    value < `below`): what `check_options` takes. `metavar`: how a value is shown in the help. `extraction`: what is
    stored depends on it, so `extract` takes it too.
    """
    about = About(help, tuple(choices), least, above, most, below, metavar, extraction)
    return field(default=default, metadata={_KEY: about})


def about(of: Field[Any]) -> About:
    """What is said of a field; nothing of one that was not made by `option`."""
    found: About = of.metadata.get(_KEY, About())
    return found


def check_options(config: Any) -> None:
    """Raises ValueError naming the first option of the dataclass `config` with a value that it does not take."""
    for f in fields(config):
        value, known = getattr(config, f.name), about(f)
        if value is None:
            continue
        if known.choices and value not in known.choices:
            raise ValueError(f"{f.name}: one of {', '.join(known.choices)}, not {value!r}")
        bounds = (
            ("at least", known.least, lambda v, b: v >= b),
            ("above", known.above, lambda v, b: v > b),
            ("at most", known.most, lambda v, b: v <= b),
            ("below", known.below, lambda v, b: v < b),
        )
        if not all(bound is None or holds(value, bound) for _, bound, holds in bounds):
            said = " and ".join(f"{word} {bound:g}" for word, bound, _ in bounds if bound is not None)
            raise ValueError(f"{f.name}: {said}, not {value}")
