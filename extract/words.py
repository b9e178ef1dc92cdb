"""Words of a text, and which of them each sub-token belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

_WORD = re.compile("[^ ]+")


def words_of(text: str) -> list[str]:
    """The words of `text`: what blanks part."""
    return _WORD.findall(text)


def word_meta(source: str, text: str, start: int, offsets: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """`word`: the number of the word that each position belongs to, -1 for none (marks, the prompt); `words`: how many
    words there are. `source`: what was tokenised, in which `text` begins at `start`; `offsets`: the characters of
    `source` that each position stands for."""
    number = np.full(len(source) + 1, -1)
    spans = [match.span() for match in _WORD.finditer(text)]
    for i, (a, b) in enumerate(spans):
        number[start + a : start + b] = i
    # The blank before a word may belong to its first sub-token, so that its first character of a word counts.
    held = [[n for n in number[a:b].tolist() if n >= 0] for a, b in offsets]
    return {"word": [h[0] if h else -1 for h in held], "words": len(spans)}
