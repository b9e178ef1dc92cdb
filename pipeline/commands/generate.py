"""`pipeline generate`: texts that a run of a language model writes after prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.extract.completion import chat_ids, prompt_ids
from pipeline.extract.tasks.completion import conversation, form_of
from pipeline.extract.tasks.sheet import read_sheet
from pipeline.runs import Run
from pipeline.store.errors import UserError
from pipeline.train.continuation import Choice, Written, continued, end_tokens, text_after

Prompt = str | list[dict[str, Any]]  # a text, or a conversation


@dataclass(frozen=True)
class Writing:
    """How texts are written: at most `most` tokens, up to the first of `stops`, chosen by `choice`, `batch_size` texts
    at a time. UserError for what cannot be."""

    most: int = 128
    stops: tuple[str, ...] = ()
    choice: Choice = field(default_factory=Choice)
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name, value in (("max-new-tokens", self.most), ("batch-size", self.batch_size)):
            if value < 1:
                raise UserError(f"--{name}: at least 1, not {value}")
        if "" in self.stops:
            raise UserError("--stop: an empty text stands everywhere")


def read_prompts(path: Path, run: Run) -> list[Prompt]:
    """The prompts of a file: a line each of a .txt, else its column `prompt`, or `messages` of a run on conversations,
    or the run's own first column. UserError for a missing column or text."""
    if path.suffix.lower() == ".txt":
        try:
            # At newlines only: str.splitlines would also cut at U+0085 and U+2028 inside a prompt.
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--input {path}: cannot be read: {error}") from None
        return [line for line in lines if line]
    sheet = read_sheet(path)
    name = next((n for n in ("prompt", "messages") if n in sheet.columns), run.spec.fields[0])
    found: list[Prompt] = []
    for row, value in enumerate(sheet.column(name)):
        if name == "messages":
            found.append(conversation(sheet, row, value, name, answered=False))
        elif isinstance(value, str):
            found.append(value)
        else:
            raise UserError(f"{sheet.where(row)}: {name!r} is {type(value).__name__}, not text")
    return found


def write(
    run: Run, prompts: Sequence[Prompt], how: Writing, heard: Callable[[int, str], None] | None = None
) -> list[dict[str, Any]]:
    """What `run` writes after each of `prompts`: the `prompt`, the `text` and its `token_ids`, and what it `ended` at
    ("end": an end token, "stop": one of the stops, "length"). `heard(i, text)` gets the text of prompt i piece by
    piece. Raises UserError for runs that do not go on with texts."""
    objective = run.single().objective
    if not objective.continues_text:
        raise UserError(f"generate: runs of objective completion write text; this one's is {objective.name}")
    if not prompts:
        raise UserError("generate: there are no prompts; give --prompt TEXT or --input FILE")
    live, checkpoint = run.live()
    tokenizer, form = checkpoint.tokenizer, form_of(run.spec)
    ids = [prompt_ids(tokenizer, form, p) if isinstance(p, str) else chat_ids(tokenizer, p) for p in prompts]
    told = _Told(tokenizer, how.stops, heard)
    ends = end_tokens(tokenizer, live.model)
    made = continued(
        run.model, live, ids, most=how.most, ends=ends, choose=how.choice, stop=told, batch_size=how.batch_size
    )
    entries = []
    for prompt, written in zip(prompts, made, strict=True):
        text = told.finish(written)
        entries.append({"prompt": prompt, "text": text, "token_ids": written.ids, "ended": written.ended})
    return entries


class _Told:
    """Text of what was written so far; says whether a stop stands in it, and tells it on piece by piece."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], heard: Callable[[int, str], None] | None) -> None:
        self.tokenizer, self.stops, self.heard = tokenizer, stops, heard
        self.hold = max((len(stop) for stop in stops), default=1) - 1  # characters that may begin a stop
        self.said: dict[int, str] = {}

    def __call__(self, written: Written) -> bool:
        if not self.stops and self.heard is None:
            return False
        text, stopped = self._text(written)
        if not stopped and not text.endswith("\ufffd"):  # else part of a character
            self._tell(written, text[: len(text) - self.hold])
        return stopped

    def finish(self, written: Written) -> str:
        """The whole text, cut at the first stop."""
        text, _ = self._text(written)
        self._tell(written, text)
        return text

    def _text(self, written: Written) -> tuple[str, bool]:
        text = text_after(self.tokenizer, written.prompt, written.ids)
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        return (text[: min(places)], True) if places else (text, False)

    def _tell(self, written: Written, text: str) -> None:
        said = self.said.get(written.number, "")
        if self.heard is not None and len(text) > len(said):
            self.said[written.number] = text
            self.heard(written.number, text[len(said) :])
