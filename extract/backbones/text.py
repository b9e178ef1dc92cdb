"""Tokenising with a length limit, and the trie of target texts that a text-to-text decoder is scored on."""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.extract.inputs import Inputs, ragged
from pipeline.extract.words import word_meta
from pipeline.store.errors import UserError

if TYPE_CHECKING:
    from pipeline.extract.backbones.base import TextOptions


def tokenize(
    tokenizer: Any, first: Sequence[str], second: Sequence[str] | None, limit: int, side: str, words: bool = False
) -> tuple[dict[str, list[list[Any]]], np.ndarray]:
    """Token ids of texts (or pairs) cut to `limit` on `side`, and which of them were cut (n,) bool; with `words` also
    `offset_mapping`, the characters each token stands for. UserError where the tokenizer's own marks fill the limit
    (every text would be the same, and pairs would not be cut at all), or where it cannot tell characters."""
    tokenizer.truncation_side = side
    pair = None if second is None else list(second)
    marks = tokenizer.num_special_tokens_to_add(pair is not None)
    if limit <= marks:
        raise UserError(f"--max-length {limit}: the tokenizer's own {marks} marks leave no room for text; give more")
    if words and not tokenizer.is_fast:
        raise UserError(
            "tags are of words, and this tokenizer does not say which characters a token stands for: save a "
            "tokenizer.json beside the model"
        )
    encoded = tokenizer(list(first), pair, truncation=True, max_length=limit, return_offsets_mapping=words)
    cut = np.zeros(len(first), bool)
    for i, ids in enumerate(encoded["input_ids"]):
        if len(ids) >= limit:
            whole = tokenizer(first[i], None if second is None else second[i], truncation=False, verbose=False)
            cut[i] = len(whole["input_ids"]) > limit
    return dict(encoded), cut


def encoder_inputs(
    tokenizer: Any, texts: Sequence[Sequence[str]], options: TextOptions, longest: int, types: bool = False
) -> Inputs:
    """Single texts, or pairs joined the tokenizer's own way, as the one stream `encoder` of at most `longest` tokens.
    `types`: with the column that says to which text of a pair a token belongs."""
    limit = min(options.max_length, longest)
    first = [t[0] for t in texts]
    second = [t[1] for t in texts] if texts and len(texts[0]) > 1 else None
    encoded, cut = tokenize(tokenizer, first, second, limit, options.truncation_side, options.words)
    ids, lengths = ragged(encoded["input_ids"])
    columns = {"encoder.ids": ids}
    if types:
        told = encoded.get("token_type_ids")
        columns["encoder.types"] = ragged(told)[0] if told is not None else np.zeros_like(ids)
    return Inputs({"encoder": lengths}, columns, cut, metas=word_metas(texts, first, 0, encoded))


def word_metas(
    texts: Sequence[Sequence[str]], sources: Sequence[str], start: int, encoded: dict[str, list[list[Any]]]
) -> list[dict[str, Any]]:
    """For each row, which word of its text each position belongs to (see `word_meta`); [] where `tokenize` was not
    asked for `words`. The text begins at character `start` of what was tokenised, `sources`."""
    offsets = encoded.get("offset_mapping", [])
    return [word_meta(s, t[0], start, o) for s, t, o in zip(sources, texts, offsets, strict=False)]


def field_start(prompt: str) -> int:
    """The character of a source made from `prompt` at which the first field's text begins."""
    at = 0
    for literal, field, *_ in Formatter().parse(prompt):
        at += len(literal)
        if field == "0":
            return at
        if field is not None:
            break
    raise UserError(f"--prompt {prompt!r}: tags are of the words of {{0}}, which must come first in it")


def decision_trie(candidates: Sequence[Sequence[int]], start: int) -> tuple[list[int], list[int]]:
    """The decoder positions that scoring needs: prefixes of target texts where at least two targets part, and what
    leads to them. Returns (ids, parents): the input id at each position and the position before it, -1 at the root.

    Greedy decoding restricted to the targets visits no other position, so its choice is exact (methods: for class
    labels with distinct first tokens this is the root alone).
    """
    following: dict[tuple[int, ...], set[int]] = {}
    for target in candidates:
        for k in range(len(target)):
            following.setdefault(tuple(target[:k]), set()).add(target[k])
    branching = [p for p, tokens in following.items() if len(tokens) > 1]
    needed = sorted({p[:k] for p in branching for k in range(len(p) + 1)} or {()}, key=lambda p: (len(p), p))
    place = {p: i for i, p in enumerate(needed)}
    return [p[-1] if p else start for p in needed], [place[p[:-1]] if p else -1 for p in needed]


def gold_chain(target: Sequence[int], start: int) -> tuple[list[int], list[int]]:
    """Teacher forcing: the target shifted right behind the start id, each position following the one before."""
    ids = [start, *target[:-1]]
    return ids, list(range(-1, len(ids) - 1))
