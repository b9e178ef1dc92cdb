"""Choosing a feature space by the fields of its identity, and saying how others differ.

Silent reuse of a wrong cache is the worst a store can do, so nothing but an exact match is ever returned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.store.errors import SeveralSpaces, SpaceMismatch, StoreError
from pipeline.store.format.digest import canonical_json

if TYPE_CHECKING:
    from pipeline.store.space import Space

_ABSENT = object()


def choose_space(spaces: Sequence[Space], wanted: Mapping[str, Any]) -> Space:
    """The one of `spaces` whose identity has every value of `wanted` (dotted field → value).

    Raises SpaceMismatch if none has (naming each field in which the nearest differs, with both values), SeveralSpaces
    if several have (naming the fields that tell them apart), StoreError if there is no feature space at all.
    """
    if not spaces:
        raise StoreError("the store holds no feature space yet: extract first")
    differing = {space.id: differences(space.identity, wanted) for space in spaces}
    exact = [space for space in spaces if not differing[space.id]]
    if len(exact) == 1:
        return exact[0]
    if exact:
        raise SeveralSpaces(f"{len(exact)} feature spaces fit, say which one, --space ID: {_apart(exact)}")
    nearest = min(spaces, key=lambda space: (len(differing[space.id]), space.id))
    said = "; ".join(f"{name} is {_show(has)}, asked for {_show(want)}" for name, has, want in differing[nearest.id])
    others = f" ({len(spaces) - 1} more differ as much or more)" if len(spaces) > 1 else ""
    raise SpaceMismatch(
        f"no feature space fits; the nearest, {nearest.id[:8]}, differs: {said}{others}: "
        "ask for what is there, or extract with what you ask for"
    )


def differences(identity: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted field, the identity's value, the wanted one) wherever they differ."""
    found = []
    for name, want in wanted.items():
        has = _get(identity, name)
        if has is _ABSENT or canonical_json(has) != canonical_json(want):
            found.append((name, has, want))
    return found


def flatten(identity: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested identity as dotted field → value."""
    out: dict[str, Any] = {}
    for name, value in identity.items():
        if isinstance(value, Mapping) and value:
            out |= flatten(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out


def _get(identity: Any, name: str) -> Any:
    for part in name.split("."):
        if not isinstance(identity, Mapping) or part not in identity:
            return _ABSENT
        identity = identity[part]
    return identity


def _apart(spaces: Sequence[Space]) -> str:
    flat = {space.id: flatten(space.identity) for space in spaces}
    fields = sorted(set().union(*flat.values()))
    said = []
    for name in fields:
        values = {space: fields_of.get(name, _ABSENT) for space, fields_of in flat.items()}
        if len({_show(value) for value in values.values()}) > 1:
            said.append(f"{name} = " + ", ".join(f"{_show(v)} ({space[:8]})" for space, v in values.items()))
    return "; ".join(said)


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False, sort_keys=True)
