"""Command-line options made from the recipe's fields, and how a recipe file and the command line are merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import click

from pipeline.recipe import Recipe, checked_names, option_name, read_recipe

_HINTS = get_type_hints(Recipe)


class _Many(click.ParamType):
    """A list written with commas."""

    name = "a,b,…"

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple | list):
            return tuple(value)
        try:
            return tuple(self.kind(v.strip()) for v in str(value).split(",") if v.strip())
        except ValueError:
            self.fail(f"{value!r} is not a list of {self.kind.__name__} values with commas between", param, ctx)


def _kind(name: str) -> Any:
    hint = _HINTS[name]
    kinds = [k for k in get_args(hint) if k is not type(None)] if type(None) in get_args(hint) else [hint]
    args = get_args(kinds[0])
    return _Many(args[0]) if args else kinds[0]


def recipe_options(command: str, *without: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: every option of the recipe that `command` takes, save those in `without`, plus --recipe."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for f in reversed(fields(Recipe)):
            if command not in f.metadata["on"] or f.name in without:
                continue
            kind = _kind(f.name)
            settings: dict[str, Any] = {"help": f.metadata["help"], "default": None}
            if kind is bool:
                settings |= {"is_flag": True, "default": None}
            elif f.metadata["choices"]:
                settings["type"] = click.Choice(f.metadata["choices"])
            else:
                settings["type"] = kind
                if f.metadata["metavar"]:
                    settings["metavar"] = f.metadata["metavar"]
            flag = option_name(f.name)
            if kind is bool and _HINTS[f.name] is not bool:  # three-valued: yes, no, or the default of the backbone
                flag += f"/--no-{flag.removeprefix('--')}"
                settings.pop("is_flag")
            function = click.option(flag, f.name, **settings)(function)
        return click.option(
            "--recipe", "recipe_file", metavar="FILE", help="Take options from a YAML file; the command line wins."
        )(function)

    return decorate


def build_recipe(given: dict[str, Any], recipe_file: str | None) -> Recipe:
    """The recipe file's options overlaid with those given on the command line."""
    values = read_recipe(recipe_file) if recipe_file else {}
    values |= {k: v for k, v in given.items() if v is not None}
    return Recipe.from_mapping(checked_names(values, "command line"), "command line")
