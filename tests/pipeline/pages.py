"""Pages of the documentation: their blocks, and how a block is run as it stands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from tests.pipeline.test_errors import run

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A command is `pipeline` and what follows on its line, before a comment; in what a terminal showed, after a prompt.
COMMAND = re.compile(r"^\s*(?:\$ )?(pipeline .*?)(?:\s#.*)?$")
REFUSED = re.compile(r"^\$ .*\nerror: ", re.MULTILINE)


def pages() -> list[Path]:
    """README and every page that a person wrote."""
    return [README, *sorted(p for p in DOCS.rglob("*.md") if "_parts" not in p.parts)]


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page, in order; of all languages where none is named."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [(language, text) for language, text in found if not languages or language in languages]


def commands(page: Path) -> Iterator[str]:
    """Every `pipeline …` line in the bash, sh, text and plain blocks of a page, one that goes on in the next line
    whole; none that is shown to be refused."""
    for _, text in blocks(page, "bash", "sh", "text", ""):
        for line in REFUSED.sub("", text).replace("\\\n", " ").splitlines():
            if found := COMMAND.match(line):
                yield found[1]


def parsed(line: str, main: click.Command) -> None:
    """Raises where the command of `line` is not there, or does not have its options or takes other values."""
    command, words = main, shlex.split(line)[1:]
    while isinstance(command, click.Group) and words:
        command, *words = command.commands[words[0]], *words[1:]
    command.make_context(line, words)


def execute(line: str) -> str:
    """What the command says. `pipeline` itself runs in this process: importing it anew costs seconds each time."""
    if line.startswith("pipeline "):
        result = run(*shlex.split(line, comments=True)[1:])
        code, output = result.exit_code, result.output
    else:
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=240)
        code, output = done.returncode, done.stdout + done.stderr
    assert code == 0, f"{line}\n{output[-3000:]}"
    return output


def replaced(text: str, instead: Mapping[str, str]) -> str:
    for old, new in instead.items():
        text = text.replace(old, new)
    return text


def follow(page: Path, instead: Mapping[str, str], without: tuple[str, ...] = ()) -> dict[str, str]:
    """Run the bash and Python blocks of a page in order, in the working directory; line → what it said. A Python block
    that begins with `# NAME.py` is that file. `without`: beginnings of lines that are not run."""
    said: dict[str, str] = {}
    names: dict[str, Any] = {}
    for language, text in blocks(page, "bash", "python"):
        text = replaced(text, instead)
        file = re.match(r"# (\w+\.py)\n", text)
        if file:
            Path(file[1]).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, str(page), "exec"), names)
        elif "<<" in text:
            execute(text)
        else:
            for line in text.splitlines():
                if line.strip() and not line.startswith(without or ("\0",)):
                    said[line] = execute(line)
    assert said or not blocks(page, "bash"), page
    return said


def tools() -> str:
    """A PATH with this environment's programs first."""
    import sys

    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
