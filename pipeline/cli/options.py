"""Command-line options: those of all runs made from the recipe's fields, those of the chosen tuner and objective from
their configs; and how a recipe file and the command line are merged."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import click
from click.shell_completion import CompletionItem

from pipeline.cli.command import tell
from pipeline.extract.options import about
from pipeline.extract.short_names import SHORT_NAMES
from pipeline.jobs.slots import names_in, tuners_in
from pipeline.option_names import option_name
from pipeline.owners import Owned, names_of, owned, recipe_of, refusal
from pipeline.recipe import Recipe, read_recipe
from pipeline.store.errors import Notice, UserError

_HINTS = get_type_hints(Recipe)
_OWNED = "pipeline.owned"  # where a context keeps the options of the chosen owners


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


def _kind(hint: Any) -> Any:
    kinds = [k for k in get_args(hint) if k is not type(None)] if type(None) in get_args(hint) else [hint]
    args = get_args(kinds[0])
    return _Many(args[0]) if args else kinds[0]


def _option(
    flag: str, name: str, hint: Any, help: str, choices: Sequence[str], metavar: str, switch: bool
) -> click.Option:
    """`switch`: a bool that can only be turned on."""
    kind = _kind(hint)
    settings: dict[str, Any] = {"help": help, "default": None}
    if kind is bool:
        settings |= {"is_flag": True} if switch else {}
        flag += "" if switch else f"/--no-{flag.removeprefix('--')}"
    elif choices:
        settings["type"] = click.Choice(choices)
    else:
        settings["type"] = kind
        if metavar:
            settings["metavar"] = metavar
    if name in _NAMES:
        settings["shell_complete"] = _NAMES[name]
    return click.Option([flag, name], **settings)


def _completes(names: Callable[[], Sequence[str]], files: bool = False) -> Callable[..., list[CompletionItem]]:
    """What a shell offers for an option that takes one of `names`, or several with commas between; or a file."""

    def offer(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",")
        found = [CompletionItem(before + comma + name) for name in names() if name.startswith(last)]
        return [*found, CompletionItem(incomplete, type="file")] if files else found

    return offer


def _task_names() -> list[str]:
    from pipeline.extract.tasks import task_names

    return [name for name, _ in task_names()]


_NAMES: dict[str, Callable[..., list[CompletionItem]]] = {
    "model": _completes(lambda: list(SHORT_NAMES), files=True),
    "task": _completes(_task_names, files=True),
    "tuner": _completes(lambda: names_of("tuner")),
    "tuners": _completes(lambda: names_of("tuner")),
    "objective": _completes(lambda: names_of("objective")),
}


def _common(command: str, without: Sequence[str]) -> list[click.Parameter]:
    found: list[click.Parameter] = [
        click.Option(
            ["--recipe", "recipe_file"], metavar="FILE", help="Take options from a YAML file; the command line wins."
        )
    ]
    for f in fields(Recipe):
        if command in f.metadata["on"] and f.name not in without:
            hint, m = _HINTS[f.name], f.metadata
            flag = option_name(f.name)
            found.append(_option(flag, f.name, hint, m["help"], m["choices"], m["metavar"], hint is bool))
    return found


class OwnerCommand(click.Command):
    """A command with the recipe's options that `takes` ("extract" or "train") has, save those in `without`, and those
    of the tuners and the objective that its line or its recipe file chooses. `methods`: the name of the parameter that
    names the tuners, where that is not --tuner or --for."""

    takes = "train"
    without: tuple[str, ...] = ()
    methods = ""
    looks_at: tuple[str, ...] = ()  # further parameters that `tuners` reads

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.params = [*_common(self.takes, self.without), *self.params]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # of a line that is being typed
            with suppress(UserError, click.ClickException):
                ctx.meta[_OWNED] = _owned(*self._chosen(args), self.takes == "extract")
            return super().parse_args(ctx, args)
        try:
            tuners, objective = self._chosen(args)
            ctx.meta[_OWNED] = _owned(tuners, objective, self.takes == "extract")
        except UserError as error:
            ctx.exit(tell(error))
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption:
            flags = {flag for p in self.get_params(ctx) for flag in (*p.opts, *p.secondary_opts)}
            unknown = [w.partition("=")[0] for w in words if w.startswith("--")]
            names = [w.removeprefix("--").replace("-", "_") for w in unknown if w not in flags]
            if said := refusal(names, [*tuners, *([objective] if objective else [])]):
                ctx.exit(tell(UserError(said)))
            if "grid" in names:
                said = "--grid: it is of `pipeline sweep`; the step of STS-B's targets is --target-step"
                ctx.exit(tell(UserError(said)))
            raise

    def _chosen(self, args: Sequence[str]) -> tuple[list[str], str | None]:
        """The tuners and the objective that the line or its recipe file names; modules to import are imported."""
        own = self.methods or ("tuners" if self.takes == "extract" else "tuner")
        names = {own, "objective", "imports", "model"}
        looked_at = [p for p in self.params if p.name in {*names, "recipe_file", *self.looks_at}]
        ways: dict[str, Any] = {"ignore_unknown_options": True, "allow_extra_args": True}
        first = click.Command("first", params=looked_at, add_help_option=False, context_settings=ways)
        given = {k: v for k, v in first.make_context("first", list(args)).params.items() if v is not None}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Notice)  # said when the recipe is made
            values = read_recipe(given["recipe_file"]) if given.get("recipe_file") else {}
        values = {k: v for k, v in values.items() if k in names}
        recipe = recipe_of("train", (f"recipe {given.get('recipe_file')}", values), ("command line", {
            k: v for k, v in given.items() if k in names and k != self.methods
        }))  # fmt: skip
        return self.tuners(given, recipe), recipe.objective

    def tuners(self, given: Mapping[str, Any], recipe: Recipe) -> list[str]:
        """The tuners chosen by what is `given` on the line, and by the `recipe` of line and file."""
        if self.methods:
            return tuners_among(given[self.methods])
        return tuners_in(recipe, self.takes == "extract")

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own = [option for options in ctx.meta.get(_OWNED, {}).values() for option in options]
        *params, last = super().get_params(ctx)  # --help stands last
        return [*params, *own, last]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups = ctx.meta.get(_OWNED, {})
        own = [option for options in groups.values() for option in options]
        common = [p for p in self.get_params(ctx) if p not in own]
        for title, params in {"Options": common, **groups}.items():
            if rows := [row for p in params if (row := p.get_help_record(ctx))]:
                with formatter.section(title):
                    formatter.write_dl(rows)


def _owned(tuners: Sequence[str], objective: str | None, extraction: bool) -> dict[str, list[click.Option]]:
    """Title → options of those chosen."""
    groups: dict[str, list[click.Option]] = {}
    for option in owned(tuners, objective, extraction):
        title = f"{option.kind.capitalize()} {', '.join(option.owners)}"
        groups.setdefault(title, []).append(_click_option(option))
    return groups


def _click_option(of: Owned) -> click.Option:
    known, default = about(of.field), of.field.default
    help = known.help
    if default not in (None, ()) and default is not False:
        shown = f"{default:g}" if isinstance(default, float) else "on" if default is True else default
        help = f"{help} Default: {shown}."
    return _option(of.flag, f"{of.kind}__{of.name}", of.hint, help, of.choices, known.metavar, False)


def tuners_among(methods: str) -> list[str]:
    """The tuners among the methods of `compare`, written with commas; others are looked at there."""
    known = names_of("tuner")
    return [name for method in split_names(methods) for name in names_in(method) if name in known]


def split_names(text: str) -> list[str]:
    """Names with commas between, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def takes(command: str, *left_out: str, names_tuners: str = "") -> type[OwnerCommand]:
    """The class of a command that takes the recipe's options of `command`, see `OwnerCommand`."""
    return type("RecipeCommand", (OwnerCommand,), {"takes": command, "without": left_out, "methods": names_tuners})


def build_recipe(
    command: str,
    given: dict[str, Any],
    recipe_file: str | None,
    tuners: Sequence[str] | None = None,
    *between: tuple[str, Mapping[Any, Any]],
) -> Recipe:
    """The recipe file's options overlaid with those of `between`, and then with those given on the command line."""
    line: dict[str, Any] = {}
    for name, value in given.items():
        kind, mark, option = name.partition("__")
        if value is not None and mark:
            line.setdefault(f"{kind}_options", {})[option] = value
        elif value is not None:
            line[name] = value
    file = [(f"recipe {recipe_file}", read_recipe(recipe_file))] if recipe_file else []
    return recipe_of(command, *file, *between, ("command line", line), tuners=tuners)
