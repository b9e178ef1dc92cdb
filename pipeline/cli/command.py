"""What all commands share: `--json`, one line for an error, results on stdout and talk on stderr."""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click

from pipeline.importing import uncollected
from pipeline.installation import full_install
from pipeline.store import progress
from pipeline.store.errors import Notice, UserError


@dataclass
class Manner:
    """How much the running command says. `begun`: when it began, by the monotonic clock."""

    quiet: bool = False
    verbose: bool = False
    begun: float = 0.0


_manner = Manner()


def say(text: str) -> None:
    """A line for a person; stdout is kept for results."""
    when = f"[{time.monotonic() - _manner.begun:7.1f} s] " if _manner.verbose else ""
    click.echo(when + printable(text), err=True)


def voice(as_json: bool) -> Callable[[str], None]:
    """What a command says its lines with: nothing where one JSON object is all that is to be seen, and of a quiet one
    the warnings alone."""
    if _manner.quiet and not as_json:
        return lambda text: say(text) if text.startswith("warning") else None
    return (lambda text: None) if as_json else say


def _behave(quiet: bool, verbose: bool) -> None:
    """Takes the manner of one command; a process may run several."""
    if quiet and verbose:
        _manner.verbose = False
        raise UserError("--quiet and --verbose: give one of them")
    _manner.quiet, _manner.verbose, _manner.begun = quiet, verbose, time.monotonic()
    progress.shown = not quiet
    if verbose:
        os.environ["TRANSFORMERS_VERBOSITY"] = "info"
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")


def printable(text: str) -> str:
    """`text` with every character that would act on a terminal rather than be seen on it as its `\\uXXXX`: names and
    provenance in a store were written by others. Within JSON it says the same."""
    return text if text.isascii() and text.isprintable() else _ACTING.sub(_escaped, text)


# Control characters but for the newline and the tab, line and paragraph separators, marks that turn the direction of
# what follows, and halves of surrogate pairs.
_ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def _escaped(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


def tell(error: UserError) -> int:
    """The one line of an error that a user can mend; returns the exit status."""
    if not error.everywhere or os.environ.get("RANK", "0") == "0":
        say(f"error: {' '.join(str(error).split())}")
    return error.exit_code


@contextmanager
def notices() -> Iterator[None]:
    """Within it every `Notice` is a line for a person; other warnings are shown as ever."""
    with warnings.catch_warnings():
        usual = warnings.showwarning
        warnings.simplefilter("always", Notice)

        def show(message: Warning | str, category: type[Warning], *more: Any, **named: Any) -> None:
            if issubclass(category, Notice):
                say(f"note: {' '.join(str(message).split())}")
            else:
                usual(message, category, *more, **named)

        warnings.showwarning = show
        yield


@contextmanager
def imports() -> Iterator[None]:
    """Within it nothing is collected, and what it leaves is not gone through later either: the process is ours."""
    fresh = "torch" not in sys.modules
    with uncollected():
        try:
            yield
        finally:
            if fresh:
                gc.freeze()


class Commands(click.Group):
    """Commands of which one that needs what a small install lacks says so in one line, and with which install it has
    it; a missing module of anybody else's is that module's error."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            lacking = full_install(error)
            if lacking is None:
                raise
            if _manner.verbose:
                click.echo(traceback.format_exc().rstrip(), err=True)
            sys.exit(tell(lacking))


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --json, --quiet and --verbose, prints what the command returns, and turns an error a user can mend into one
    line."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else.")
    @click.option("-q", "--quiet", is_flag=True, help="No progress, no lines but warnings, errors and the result.")
    @click.option(
        "-v", "--verbose", is_flag=True, help="Also the time, what libraries log, and where errors come from."
    )
    @functools.wraps(function)
    def wrapper(as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
        try:
            _behave(quiet, verbose)
            with notices():
                result, text = function(as_json=as_json, **options)
        except UserError as error:
            if _manner.verbose:
                click.echo(traceback.format_exc().rstrip(), err=True)
            sys.exit(tell(error))
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            sys.exit(130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        shown = json.dumps(result, ensure_ascii=False, default=str) if as_json else text
        try:
            if shown:
                click.echo(printable(shown))
        except BrokenPipeError:
            raise  # click's own: whoever read it has seen enough
        except OSError as error:
            click.echo(f"error: the result could not be written: {error.strerror}", err=True)
            sys.exit(2)

    return wrapper
