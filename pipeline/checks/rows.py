"""Rows before a backbone gets them: of the task's shape, of the kind the backbone reads, in words it knows."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.extract.backbones import Backbone, Inputs
from pipeline.extract.tasks.base import TaskSpec
from pipeline.extract.tasks.images import SUFFIXES
from pipeline.store.errors import UserError
from pipeline.terminal import counted

if TYPE_CHECKING:
    from pipeline.commands.prepare import Split

LOOKED_AT = 100  # rows that show whether they name images
UNKNOWN = 0.05  # share of unknown tokens above which the tokenizer is in doubt
DISTINCT = 0.9  # of distinct texts, the share of distinct samples below which it is


def checked_rows(rows: Any, spec: TaskSpec) -> list[tuple[str, ...]]:
    """The rows given to `predict`, each one text for every field of the task; of a task with one field a row may be the
    text itself. Raises UserError naming the row that is of another shape."""
    named = ", ".join(spec.fields)
    if isinstance(rows, str | bytes | Mapping):
        raise UserError(f"predict: a list of rows is needed, not {type(rows).__name__}; each row has {named}")
    out = []
    for number, row in enumerate(rows):
        if isinstance(row, str) and len(spec.fields) > 1:
            raise UserError(f"predict: row {number} is one text; the task has {len(spec.fields)} fields: {named}")
        fields = (row,) if isinstance(row, str) else row
        if not isinstance(fields, Sequence | np.ndarray) or isinstance(fields, bytes):
            raise UserError(f"predict: row {number} is {type(row).__name__}, not the text of {named}")
        if len(fields) != len(spec.fields):
            raise UserError(
                f"predict: row {number} has {counted(len(fields), 'field')}; the task has {len(spec.fields)}: {named}"
            )
        out.append(tuple(_text(value, name, number) for name, value in zip(spec.fields, fields, strict=True)))
    return out


def _text(value: Any, name: str, number: int) -> str:
    if not isinstance(value, str):
        raise UserError(f"predict: row {number}: {name!r} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"predict: row {number}: {name!r} holds half a character (a lone surrogate)") from None
    return str(value)


def refuse_other_kind(backbone: Backbone, texts: Sequence[Sequence[str]], root: str, where: str) -> None:
    """UserError for names of images given to a backbone that reads text, and for texts given to one that reads
    images. `root`: the folder that names are relative to; `where`: what the rows are, for the message."""
    if not len(texts):
        return
    first = texts[0][0]
    shown = repr(first if len(first) <= 60 else first[:60] + "…")
    if backbone.modality == "text":
        if all(t[0].lower().endswith(SUFFIXES) for t in texts if t):
            raise UserError(
                f"{where} are names of images (the first is {shown}), and {backbone.name} backbones read text: "
                "give an image model, see `pipeline models`"
            )
    # A name without a suffix may be an image too; what is wrong with a single file is said when it is read.
    elif not any(t[0].lower().endswith(SUFFIXES) or _is_file(root, t[0]) for t in texts[:LOOKED_AT]):
        raise UserError(
            f"{where} name no images (the first is {shown}), and {backbone.name} backbones read images: give a "
            "text model, see `pipeline models`, or the folder that the names are relative to: --data FOLDER"
        )


def _is_file(root: str, name: str) -> bool:
    # A folder may hold the frames of a video. False, not an error, for what is no path.
    return os.path.exists(os.path.join(root, name))  # noqa: PTH110, PTH118


def refuse_unknown_ids(backbone: Backbone, inputs: Inputs, where: str) -> None:
    """UserError for token ids that the backbone has no embedding of."""
    rows = getattr(backbone.config, "vocab_size", None)
    ids = inputs.columns.get(f"{backbone.streams[0]}.ids")
    if rows is not None and ids is not None and len(ids) and int(ids.max()) >= rows:
        raise UserError(
            f"{where}: the tokenizer gives token {int(ids.max())} and the model knows {rows:,}: it is another model's "
            "tokenizer; put the one that belongs to the weights beside them"
        )


def _special(tokenizer: Any, splits: Sequence[Split]) -> str:
    """What to say of texts that hold a special token spelled out, "" where none does."""
    pattern = re.compile("|".join(re.escape(token) for token in tokenizer.all_special_tokens) or "(?!)")
    found = [match for s in splits for row in s.rows.texts if (match := pattern.search("\n".join(row)))]
    if not found:
        return ""
    return (
        f"{counted(len(found), 'row')} with a special token of the tokenizer spelled out, such as {found[0][0]!r}: it "
        "is read as that token, not as text"
    )


def token_doubts(tokenizer: Any, backbone: Backbone, splits: Sequence[Split]) -> list[str]:
    """What makes it doubtful that the tokenizer fits the texts, one line each: many unknown tokens, or distinct texts
    that became the same sample."""
    if backbone.modality != "text":
        return []
    said = []
    ids = np.concatenate([s.inputs.columns[f"{backbone.streams[0]}.ids"] for s in splits])
    nothing = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id
    words = ids[~np.isin(ids, [i for i in tokenizer.all_special_ids if i != nothing])]
    unknown = float((words == nothing).mean()) if len(words) else 0.0
    if unknown > UNKNOWN:
        said.append(
            f"{unknown:.0%} of the tokens are unknown to the tokenizer ({tokenizer.unk_token}): what they say is lost; "
            "is it the tokenizer of this model, and the model for these texts?"
        )
    if backbone.continues_text and (odd := _special(tokenizer, splits)):
        said.append(odd)
    texts, samples = sum(len(set(s.rows.texts)) for s in splits), sum(len(set(s.keys)) for s in splits)
    if samples < DISTINCT * texts:
        said.append(
            f"{texts:,} distinct texts became {samples:,} distinct samples: the tokenizer, or --max-length, leaves out "
            "what tells them apart"
        )
    return said
