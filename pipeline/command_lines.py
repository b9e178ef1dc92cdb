"""Command lines that the software prints, made in one place: each is complete, and pasting it does what was meant."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from pipeline.jobs.slots import SlotRecipe, tuners_in
from pipeline.option_names import option_name
from pipeline.owners import owned
from pipeline.recipe import Recipe
from pipeline.store.errors import MissingStates, SpaceMismatch

# Options that mean something else to `extract` than to `train`: its batches are of tokens, its seed orders the visits.
TRAINING_SENSE = ("batch_size", "seed")


def command_line(command: str, recipe: Recipe) -> str:
    """`pipeline COMMAND` with every option of `recipe` that the command takes and that is not left at its default,
    shell-quoted: parsed back it is the same recipe."""
    words = ["pipeline", command]
    taker = command if command in ("extract", "train") else "train"  # plan, bench and compare take train's options
    for f in fields(recipe):
        value = getattr(recipe, f.name)
        if taker in f.metadata["on"] and value != f.default:
            words += option(option_name(f.name), value)
    names = tuners_in(recipe, taker == "extract")
    for own in owned(names, recipe.objective, taker == "extract"):
        values = recipe.tuner_options if own.kind == "tuner" else recipe.objective_options
        if own.name in values:
            words += option(own.flag, values[own.name])
    return " ".join(words)


def option(flag: str, value: Any) -> list[str]:
    """One option as words of a command line."""
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag.removeprefix('--')}"]
    return [flag, quoted(",".join(map(str, value)) if isinstance(value, tuple) else str(value))]


def quoted(text: str) -> str:
    """`text` as one shell word. Where blanks would not survive being shown as one line of prose they are escaped, as
    bash and zsh read it ($'…')."""
    if text == " ".join(text.split()) and text.isprintable():
        return shlex.quote(text)
    escaped = []
    for at, c in enumerate(text):
        edge = c == " " and (at in (0, len(text) - 1) or text[at - 1].isspace())
        code = f"\\x{ord(c):02x}" if ord(c) < 128 else f"\\u{ord(c):04x}" if ord(c) < 65536 else f"\\U{ord(c):08x}"
        escaped.append(code if edge or not c.isprintable() else f"\\{c}" if c in "\\'" else c)
    return f"$'{''.join(escaped)}'"


def extraction(recipe: Recipe, tuner: str = "") -> Recipe:
    """The recipe of the extraction that stores what training by `recipe` reads. `tuner`: another than its own."""
    if isinstance(recipe, SlotRecipe):
        recipe = recipe.joint()
    left: dict[str, Any] = {f.name: f.default for f in fields(recipe) if f.name in TRAINING_SENSE}
    return replace(recipe, tuners=tuple((tuner or recipe.tuner).split(",")), **left)


def extract_command(recipe: Recipe, **changed: Any) -> str:
    """The command that would put into the store what `recipe` needs."""
    return command_line("extract", replace(extraction(recipe), **changed))


class NotExtracted(MissingStates):
    """Something is not stored: `what` it is, for the message, and the extraction that puts it there, of which `changed`
    are options that are not those of the `recipe` to train by."""

    def __init__(self, what: str, recipe: Recipe, samples: int = 0, states: tuple[str, ...] = (), **changed: Any):
        self.what, self.recipe, self._told = what, recipe, f"; run: {extract_command(recipe, **changed)}"
        super().__init__(what + self._told, samples, states)

    def for_states(self) -> MissingStates | SpaceMismatch:
        """The same where states were asked for by name: whose extraction stores them is not known."""
        said = str(self).removesuffix(self._told)  # with what `within` has put before it
        if isinstance(self, SpaceMismatch):
            return SpaceMismatch(said)
        how = "`pipeline extract --for TUNER` with a tuner that reads these states"
        return MissingStates(f"{said}; extract first: {how}", self.samples, self.states)

    def for_all(self, tuners: Sequence[str], options: Mapping[str, Any]) -> NotExtracted:
        """The same where training by several `tuners` with `options` between them was asked for."""
        recipe = replace(self.recipe, tuner_options=dict(options))
        return type(self)(self.what, recipe, self.samples, self.states, tuners=tuple(tuners))


class NoneFits(NotExtracted, SpaceMismatch):
    """There are feature spaces of the task, and none is the one that was asked for."""


def store_command(command: str, store: str, *words: str) -> str:
    """`pipeline store COMMAND` with `words`, on the store at `store`; "" for the default place."""
    return " ".join(["pipeline", "store", command, *map(quoted, words), *(option("--store", store) if store else [])])
