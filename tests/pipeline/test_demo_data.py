"""The demo's generated pairs: the same every time, no repeats, balanced, and no answer in the words alone."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from pipeline.commands import demo_data
from pipeline.commands.demo_data import GRAMMAR, demo_task
from pipeline.extract.tasks import SPLITS


def test_same_seed_same_rows() -> None:
    assert demo_task(50, 20, 20) == demo_task(50, 20, 20)
    assert demo_task(50, 20, 20, seed=1).splits != demo_task(50, 20, 20).splits
    random.seed(7)
    first = demo_task(50, 20, 20, seed=3).splits
    random.seed(8)
    assert demo_task(50, 20, 20, seed=3).splits == first
    revisions = {demo_task(50, 20, 20, seed=seed).provenance["revision"] for seed in (0, 1, 3)}
    assert len(revisions) == 3


def test_sizes_balance_and_no_repeats() -> None:
    task = demo_task()
    assert [len(task.rows(split)) for split in SPLITS] == [2000, 500, 500]
    for split in SPLITS:
        assert Counter(task.rows(split).labels) == {0: len(task.rows(split)) // 2, 1: len(task.rows(split)) // 2}
    pairs = [pair for split in SPLITS for pair in task.rows(split).texts]
    assert len(set(pairs)) == len(pairs)
    labels = task.rows("train").labels[:100]
    assert 30 < sum(label == 1 for label in labels) < 70  # any prefix is a mix, for --limit
    assert max(len(" ".join(pair).split()) for pair in pairs) <= 20
    assert all(pair[0] != pair[1] for pair in pairs)


def test_odd_sizes() -> None:
    task = demo_task(7, 1, 3)
    assert [len(task.rows(split)) for split in SPLITS] == [7, 1, 3]
    assert Counter(task.rows("train").labels) == {0: 4, 1: 3}


@pytest.mark.parametrize("kind", GRAMMAR, ids=lambda kind: kind.__name__)
def test_both_labels_use_the_same_words(kind: object) -> None:
    r = random.Random(0)
    words: dict[bool, set[str]] = {}
    for true in (True, False):
        words[true] = {w for _ in range(3000) for w in " ".join(kind(r, true)).split()}  # type: ignore[operator]
    assert words[True] == words[False]


def test_word_counts_do_not_give_the_answer_away() -> None:
    task = demo_task()
    texts = {split: [" | ".join(pair) for pair in task.rows(split).texts] for split in SPLITS}
    counts = CountVectorizer(ngram_range=(1, 2)).fit(texts["train"])
    probe = LogisticRegression(C=0.1, max_iter=500).fit(counts.transform(texts["train"]), task.rows("train").labels)
    assert probe.score(counts.transform(texts["test"]), task.rows("test").labels) < 0.65


def test_grammar_that_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_data, "GRAMMAR", (lambda r, true: ("a", str(r.random() < 0.5)),))
    with pytest.raises(ValueError, match="no new pairs of kind <lambda> left"):
        demo_task(5, 0, 0)
