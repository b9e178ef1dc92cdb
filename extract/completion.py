"""Texts that a language model learns to write: their token ids, and which of the tokens are targets.

Three forms of rows. `text`: every token but the first. `completion`: a prompt and what follows it, whose tokens are the
targets. `messages`: a conversation (JSON), of which the assistant's tokens are. A text begins with the tokenizer's
begin token, where it has one, and a text and a completion end with its end token; a conversation is rendered by the
tokenizer's chat template, which says both. Targets are kept as spans of positions, [first, after the last].

A longer text than the model is to see is cut, or becomes several samples, windows that each begin a stride after the
one before. A token is learned once, in the first window that has it: what a window shares with the one before is there
to be seen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from pipeline.store.errors import UserError

Form = Literal["plain", "text", "completion", "messages"]
Span = tuple[int, int]


class RowError(UserError):
    """A row is nothing to learn from; the message begins with its number."""


_LEAKLESS: set[tuple[str, tuple[str, ...]]] = set()  # templates and roles whose marks were looked at
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass
class Encoded:
    """Samples of rows: the `ids` of each; its meta, which says how many `tokens` it has, which spans of them are to
    `learn`, and of a text in several windows which `window` it is, [number from 1, of how many]; whether it was cut
    (`truncated`); and the row that it is `of`, from 0."""

    ids: list[list[int]] = field(default_factory=list)
    metas: list[dict[str, Any]] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    of: list[int] = field(default_factory=list)


def encode_rows(
    tokenizer: Any, rows: Sequence[Sequence[str]], form: str, limit: int, side: str, stride: int | None = None
) -> Encoded:
    """The samples of `rows` of `form`, of at most `limit` tokens: longer texts are cut on `side`, or with a `stride`
    split into windows that begin so many tokens apart; windows without a target are left out. RowError where no target
    is left of a row; UserError for a stride that leaves tokens out."""
    if stride is not None and stride >= limit:
        raise UserError(f"--stride {stride}: below the {limit} tokens of a window, or a token has none before it")
    encode = {"text": _text, "completion": _completion, "messages": _messages}[form]
    out = Encoded()
    for i, fields in enumerate(rows):
        try:
            ids, spans = encode(tokenizer, fields)
        except UserError as error:
            raise RowError(f"row {i + 1}: {error}") from None
        if stride is None:
            first = max(0, len(ids) - limit) if side == "left" else 0
            parts = [(first, first, min(first + limit, len(ids)))]
        else:
            parts = windows(len(ids), limit, stride)
        found = 0
        for number, (first, new, end) in enumerate(parts, 1):
            # A first token has none before it that could predict it.
            inside = [(max(a - first, new - first, 1), min(b, end) - first) for a, b in spans]
            if learn := [[a, b] for a, b in inside if a < b]:
                found += 1
                out.ids.append(ids[first:end])
                more = {"window": [number, len(parts)]} if len(parts) > 1 else {}
                out.metas.append({"tokens": end - first, "learn": learn, **more})
                out.truncated.append(len(parts) == 1 and end - first < len(ids))
                out.of.append(i)
        if not found:
            cut = f": what is to be learned lies beyond --max-length {limit}; --stride N splits a text instead"
            gone = parts[-1][2] - parts[0][0] < len(ids)
            raise RowError(f"row {i + 1} has no token to learn{cut if gone else ''}")
    return out


def windows(count: int, limit: int, stride: int) -> list[tuple[int, int, int]]:
    """Of a text of `count` tokens the windows of `limit` tokens at most, `stride` apart: the first token of each, the
    first that no window before it has, and the end. `stride` < `limit`."""
    out = [(0, 0, min(limit, count))]
    while out[-1][2] < count:
        first = out[-1][0] + stride
        out.append((first, out[-1][2], min(first + limit, count)))
    return out


def prompt_ids(tokenizer: Any, form: str, text: str) -> list[int]:
    """The ids that a text to be continued begins with: a prompt, or with `messages` what the user says."""
    return _begun(tokenizer, text) if form != "messages" else chat_ids(tokenizer, [{"role": "user", "content": text}])


def chat_ids(tokenizer: Any, said: list[dict[str, Any]]) -> list[int]:
    """The ids of a conversation up to where the assistant's next turn begins."""
    return _plain(tokenizer, _rendered(tokenizer, said, add_generation_prompt=True))


def answer_ids(tokenizer: Any, answers: Sequence[str]) -> list[list[int]]:
    """The ids of each of `answers` as it goes on with a text, a blank before it and the end token after it. UserError
    unless behind what all of them begin with each has a first token of its own, by which it can be told."""
    before = _plain(tokenizer, "x")
    found = []
    for answer in answers:
        ids = _plain(tokenizer, f"x {answer}")
        own = ids[len(before) :] if ids[: len(before)] == before else _plain(tokenizer, f" {answer}")
        found.append([*own, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])])
    deciding: dict[int, str] = {}
    place = shared(found)
    for answer, ids in zip(answers, found, strict=True):
        other = deciding.setdefault(ids[place], answer) if place < len(ids) else answers[0]
        if place >= len(ids) or other != answer:
            raise UserError(
                f"the labels {other!r} and {answer!r} begin with the same token, and are told apart by their first: "
                "give labels that begin otherwise, or learn classes with a head (--objective classification)"
            )
    return found


def shared(answers: Sequence[Sequence[int]]) -> int:
    """How many ids all of `answers` begin with."""
    first, last = (list(end(answers, key=tuple)) if answers else [] for end in (min, max))
    return next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def encode_answers(
    tokenizer: Any, sources: Sequence[str], candidates: Sequence[Sequence[int]], gold: Sequence[int] | None, limit: int,
    side: str,
) -> Encoded:  # fmt: skip
    """Samples of `sources`, texts to be answered, each with its own answer, of `candidates` number `gold`; for scoring
    (None) with what all candidates begin with. Sources are cut on `side` so that the longest answer finds room: an
    answer never is. Of a sample its meta also tells which position is to `decide` between the answers. UserError where
    there is no room."""
    room = limit - max(len(ids) for ids in candidates)
    if room < 1:
        raise UserError(f"--max-length {limit} leaves no token of a text beside its answer of {limit - room} tokens")
    out, common = Encoded(), shared(candidates)
    for i, source in enumerate(sources):
        ids = _begun(tokenizer, source)
        if not ids:
            raise RowError(f"row {i + 1}: the text is empty, which is no token here")
        kept = ids[-room:] if side == "left" else ids[:room]
        answer = candidates[0][:common] if gold is None else candidates[gold[i]]
        out.ids.append([*kept, *answer])
        count = len(out.ids[-1])
        learn = [] if gold is None else [[len(kept), count]]
        out.metas.append({"tokens": count, "learn": learn, "decide": len(kept) + common - 1})
        out.truncated.append(len(kept) < len(ids))
        out.of.append(i)
    return out


def learned(meta: Mapping[str, Any]) -> np.ndarray:
    """(tokens,) bool: which positions of a row are targets."""
    mask = np.zeros(int(meta["tokens"]), bool)
    for first, end in meta["learn"]:
        mask[first:end] = True
    return mask


def _plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _begun(tokenizer: Any, text: str) -> list[int]:
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return begin + _plain(tokenizer, text)


def _ended(tokenizer: Any, text: str) -> list[int]:
    return _begun(tokenizer, text) + ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])


def _text(tokenizer: Any, fields: Sequence[str]) -> tuple[list[int], list[Span]]:
    ids = _ended(tokenizer, fields[0])
    return ids, [(0, len(ids))]


def _completion(tokenizer: Any, fields: Sequence[str]) -> tuple[list[int], list[Span]]:
    """The two are tokenised as one text; a token that the prompt alone does not end in is the completion's."""
    prompt, completion = fields
    ids = _ended(tokenizer, prompt + completion)
    before = _begun(tokenizer, prompt)
    same = next((k for k, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids)))
    return ids, [(same, len(ids))] if completion else []


def _messages(tokenizer: Any, fields: Sequence[str]) -> tuple[list[int], list[Span]]:
    said = json.loads(fields[0])
    if not tokenizer.is_fast:
        raise UserError("the tokenizer does not say which characters a token stands for: save a tokenizer.json")
    if tokenizer.chat_template and _MARKS.search(str(tokenizer.chat_template)):
        _refuse_leaks(tokenizer, [message["role"] for message in said])
        return _marked(tokenizer, said)
    return _by_prefixes(tokenizer, said)


def _marked(tokenizer: Any, said: list[dict[str, Any]]) -> tuple[list[int], list[Span]]:
    """By the generation marks of the template."""
    made = _applied(tokenizer, said, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    mask = np.asarray(made["assistant_masks"], bool)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
    return list(made["input_ids"]), [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _refuse_leaks(tokenizer: Any, roles: Sequence[str]) -> None:
    """UserError where the template's generation marks stand around what others than the assistant say: looked for in
    a conversation of these `roles` whose messages are numbers that occur nowhere else."""
    known = (str(tokenizer.chat_template), tuple(roles))
    if known in _LEAKLESS:
        return
    said = [{"role": role, "content": f"{7310 + 13 * i}"} for i, role in enumerate(roles)]
    ids, spans = _marked(tokenizer, said)
    taught = "".join(tokenizer.decode(ids[a:b]) for a, b in spans)
    if leaked := [message for message in said if message["role"] != "assistant" and message["content"] in taught]:
        raise UserError(
            f"the generation marks of the chat template also stand around what the {leaked[0]['role']} says: what is "
            "learned would not be the assistant's"
        )
    _LEAKLESS.add(known)


def _by_prefixes(tokenizer: Any, said: list[dict[str, Any]]) -> tuple[list[int], list[Span]]:
    """The assistant's turns of a template without generation marks: what the conversation up to a turn lacks of that
    with it. Each rendering must begin as the one before; a template that rewrites earlier turns is refused."""
    characters: list[Span] = []
    renderings = [""]
    for i, message in enumerate(said):
        if message["role"] == "assistant":
            renderings += [
                _rendered(tokenizer, said[:i], add_generation_prompt=True),
                _rendered(tokenizer, said[: i + 1]),
            ]
            characters.append((len(renderings[-2]), len(renderings[-1])))
    whole = _rendered(tokenizer, said)
    for shorter, longer in pairwise([*renderings, whole]):
        if not longer.startswith(shorter):
            raise UserError(
                "the chat template renders earlier turns otherwise once there are later ones, so the assistant's "
                "tokens cannot be told apart: give one with {% generation %} marks"
            )
    made = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = np.asarray([end for _, end in made["offset_mapping"]], np.int64)
    # A token ends within one turn: ends ascend, so that the tokens of a turn are neighbours.
    spans = [(int(np.searchsorted(ends, a, "right")), int(np.searchsorted(ends, b, "right"))) for a, b in characters]
    return list(made["input_ids"]), spans


def _rendered(tokenizer: Any, said: list[dict[str, Any]], **options: Any) -> str:
    text: str = _applied(tokenizer, said, tokenize=False, **options)
    return text


def _applied(tokenizer: Any, said: list[dict[str, Any]], **options: Any) -> Any:
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template: put the model's chat_template.jinja beside its weights, or give rows "
            "of prompt and completion"
        )
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(said, **options)
    except TemplateError as error:
        raise UserError(f"the chat template refuses the conversation: {error}") from None
