"""Written texts beside reference texts: exact match, ROUGE and BLEU by the libraries that papers report them from.

ROUGE by rouge-score (F1 of ROUGE-1, ROUGE-2 and ROUGE-L, no stemming), BLEU by sacrebleu (of the whole corpus, 0 to
100, its usual tokens); both are imported when they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from pipeline.store.errors import UserError

ROUGE = ("rouge1", "rouge2", "rougeL")


def libraries() -> tuple[Any, Any]:
    """rouge-score and sacrebleu. UserError saying how to install them where they are not there."""
    try:
        return import_module("rouge_score.rouge_scorer"), import_module("sacrebleu")
    except ImportError as error:
        raise UserError(
            f"scores of written text need {error.name}: pip install 'activation-pipeline[text-scores]'"
        ) from None


def text_scores(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Of n texts, one at least: `exact_match` (but for blanks at both ends) and ROUGE from 0 to 1, `bleu` from 0 to
    100."""
    rouge, sacrebleu = libraries()
    same = [text.strip() == wanted.strip() for text, wanted in zip(written, references, strict=True)]
    scorer = rouge.RougeScorer(list(ROUGE))
    found = [scorer.score(wanted, text) for text, wanted in zip(written, references, strict=True)]
    overlap = {name: float(np.mean([score[name].fmeasure for score in found])) for name in ROUGE}
    bleu = float(sacrebleu.corpus_bleu(list(written), [list(references)]).score)
    return {"exact_match": float(np.mean(same)), **overlap, "bleu": bleu}
