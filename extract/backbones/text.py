"""Tokenising with a length limit, and the trie of target texts that a text-to-text decoder is scored on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.store.errors import UserError


def tokenize(
    tokenizer: Any, first: Sequence[str], second: Sequence[str] | None, limit: int, side: str
) -> tuple[dict[str, list[list[int]]], np.ndarray]:
    """Token ids of texts (or pairs) cut to `limit` on `side`, and which of them were cut (n,) bool. UserError where
    the tokenizer's own marks fill the limit: every text would be the same, and pairs would not be cut at all."""
    tokenizer.truncation_side = side
    pair = None if second is None else list(second)
    marks = tokenizer.num_special_tokens_to_add(pair is not None)
    if limit <= marks:
        raise UserError(f"--max-length {limit}: the tokenizer's own {marks} marks leave no room for text; give more")
    encoded = tokenizer(list(first), pair, truncation=True, max_length=limit)
    cut = np.zeros(len(first), bool)
    for i, ids in enumerate(encoded["input_ids"]):
        if len(ids) >= limit:
            whole = tokenizer(first[i], None if second is None else second[i], truncation=False, verbose=False)
            cut[i] = len(whole["input_ids"]) > limit
    return dict(encoded), cut


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
