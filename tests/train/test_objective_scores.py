"""Weighted losses, metrics by name and reports, against torch and scikit-learn."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

from pipeline.extract.inputs import Inputs
from pipeline.store.errors import Notice, UserError
from pipeline.train.configs import ObjectiveConfig, PooledConfig
from pipeline.train.features import Feature
from pipeline.train.objective_configs import ClassificationConfig, MultilabelConfig, named_weights
from pipeline.train.objectives import Answers
from pipeline.train.objectives.classification import Classification
from pipeline.train.objectives.multilabel import Multilabel
from pipeline.train.objectives.regression import Regression
from pipeline.train.objectives.tagging import SpanReport, Tagging, TagScorer

NAMES = ("no", "yes", "odd,=one")
FEATURES = {"vector": Feature(6)}


def batch_of(index: list[int], **targets: torch.Tensor) -> Any:
    """A batch without states, of the samples `index`."""
    lengths = np.ones(len(index), np.int64)
    batch = Inputs({"encoder": lengths}, {"encoder.ids": np.ones(len(index), np.int32)}).batch()
    return dataclasses.replace(batch, index=np.asarray(index), targets=targets)


def classes(names: tuple[str, ...] = NAMES, **options: Any) -> Classification:
    return Classification(ClassificationConfig(**options), Answers(names, ("accuracy",)))


@pytest.mark.parametrize("accumulate", [[2, 5], [1, 1, 5], [7]])
def test_weighted_cross_entropy_adds_up_over_batches(accumulate: list[int]) -> None:
    """One step over several batches, of whatever size, has the gradient of torch's weighted mean over all of them."""
    given = ("no=0.25", "yes=3", "odd,=one=1.5")
    head = classes(class_weights=given).head(FEATURES, None)  # type: ignore[arg-type]
    rows, label = torch.randn(7, 6), torch.tensor([0, 1, 2, 1, 0, 0, 2])
    parts, begin = [], 0
    for size in accumulate:
        at = list(range(begin, begin + size))
        parts.append((rows[at], batch_of(at, label=label[at])))
        begin += size
    total = sum(head.weight(batch) for _, batch in parts)
    for some, batch in parts:
        (head.losses({"vector": some}, batch)["class"] * head.weight(batch) / total).backward()
    found = [p.grad.clone() for p in head.parameters()]
    head.zero_grad()
    F.cross_entropy(head.linear(rows), label, weight=torch.tensor([0.25, 3.0, 1.5])).backward()
    for grad, parameter in zip(found, head.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)
    assert "weights" not in head.state_dict()


def test_balanced_is_scikit_learns_and_is_written_out() -> None:
    targets = [0] * 9 + [1] * 2 + [2] * 5
    settled = ClassificationConfig(class_weights=("balanced",)).settled(NAMES, targets)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=np.array(targets))
    assert named_weights("class_weights", settled.class_weights, NAMES) == expected.tolist()
    assert settled.settled(NAMES, [0, 1]) == settled  # evaluate and resume count nothing anew
    absent = ClassificationConfig(class_weights=("balanced",)).settled(NAMES, [0, 0, 1, None])
    assert named_weights("class_weights", absent.class_weights, NAMES) == [3 / 4, 3 / 2, 1.0]
    assert ClassificationConfig().settled(NAMES, targets) == ClassificationConfig()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("maybe=2",), "no class 'maybe'; there are: no, yes"),
        (("yes=2", "yes=3"), "'yes' is given twice"),
        (("yes=0",), "a weight above 0, not 'yes=0'"),
        (("yes=nan",), "a weight above 0, not 'yes=nan'"),
        (("yes",), "NAME=WEIGHT"),
        (("balanced", "yes=2"), "not 'balanced'"),
    ],
)
def test_weights_that_mean_nothing_are_refused(given: tuple[str, ...], said: str) -> None:
    for config in (ClassificationConfig(class_weights=given), MultilabelConfig(positive_weights=given)):
        with pytest.raises(UserError, match=said):
            config.settled(NAMES, [])


def test_positive_weights_are_torchs() -> None:
    config = MultilabelConfig(positive_weights=("balanced",)).settled(NAMES, [[0], [0, 1], [], [0], [0, 0]])
    weights = named_weights("positive_weights", config.positive_weights, NAMES)
    assert weights == [1 / 4, 4.0, 1.0]
    head = Multilabel(config, Answers(NAMES)).head(FEATURES, None)  # type: ignore[arg-type]
    rows, labels = torch.randn(5, 6), torch.randint(0, 2, (5, 3)).float()
    loss = head.losses({"vector": rows}, batch_of(list(range(5)), labels=labels))["labels"]
    expected = F.binary_cross_entropy_with_logits(head.linear(rows), labels, pos_weight=torch.tensor(weights))
    torch.testing.assert_close(loss, expected)


def told(objective: Any, seed: int, n: int = 60) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What a classification's head might measure of n samples, and the truth."""
    torch.manual_seed(seed)
    chances = torch.randn(n, len(objective.answers.labels)).softmax(-1)
    return {"label": chances.argmax(-1), "chances": chances}, torch.randint(0, chances.shape[1], (n,))


def scored(scorer: Any, out: dict[str, torch.Tensor], **targets: torch.Tensor) -> dict[str, float]:
    """The figures when batches come in another order and two scorers are merged."""
    n = len(next(iter(targets.values())))
    first, second = scorer(), scorer()
    for one, at in ((first, list(range(25, n))), (second, list(range(25)))):
        part = {k: v[at] for k, v in targets.items()}
        one.update({k: v[at] for k, v in out.items()}, batch_of(at, **part))
    first.merge(second)
    found: dict[str, float] = first.compute()
    return found


@pytest.mark.parametrize("names", [NAMES, NAMES[:2]])
def test_metrics_of_classes_are_scikit_learns(names: tuple[str, ...]) -> None:
    asked = classes(names).metric_names
    assert ("f1" in asked) == (len(names) == 2)
    objective = classes(names, metric=asked)
    out, truth = told(objective, len(names))
    found = scored(objective.scorer, out, label=truth)
    guess, chances, t = out["label"].numpy(), out["chances"].numpy(), truth.numpy()
    expected = {
        "accuracy": sk.accuracy_score(t, guess),
        "balanced_accuracy": sk.balanced_accuracy_score(t, guess),
        "matthews": sk.matthews_corrcoef(t, guess),
        "cohen_kappa": sk.cohen_kappa_score(t, guess),
        **{f"f1_{a}": sk.f1_score(t, guess, average=a) for a in ("macro", "micro", "weighted")},
        "precision_macro": sk.precision_score(t, guess, average="macro"),
        "recall_macro": sk.recall_score(t, guess, average="macro"),
    }
    if len(names) == 2:
        expected |= {"f1": sk.f1_score(t, guess), "precision": sk.precision_score(t, guess)}
        expected |= {"recall": sk.recall_score(t, guess), "roc_auc": sk.roc_auc_score(t, chances[:, 1])}
        expected |= {"average_precision": sk.average_precision_score(t, chances[:, 1])}
    else:
        expected |= {"roc_auc": sk.roc_auc_score(t, chances.astype(np.float64), multi_class="ovr")}
        expected |= {"average_precision": sk.average_precision_score(t, chances)}
    assert found == pytest.approx(expected) and list(found) == list(asked)
    first = objective.scorer()
    assert first.first == "accuracy" and first.value(found) == found["accuracy"]


def test_a_ranking_of_one_class_is_undefined_and_never_the_best() -> None:
    objective = classes(NAMES[:2], metric=("roc_auc",))
    out, truth = told(objective, 0)
    with pytest.warns(Notice, match="undefined"):
        found = scored(objective.scorer, out, label=torch.zeros_like(truth))
    assert np.isnan(found["roc_auc"]) and np.isnan(objective.scorer().value({"roc_auc": None}))  # type: ignore[dict-item]


def test_metrics_of_numbers_are_scikit_learns_and_errors_select_the_smallest() -> None:
    objective = Regression(PooledConfig(metric=("mse", "mae", "rmse", "r2", "spearman")), Answers((), ("pearson",)))
    torch.manual_seed(0)
    guess, truth = torch.randn(50), torch.randn(50)
    found = scored(objective.scorer, {"label": guess}, label=truth.double())
    g, t = guess.double().numpy(), truth.double().numpy()
    assert found["mse"] == pytest.approx(sk.mean_squared_error(t, g)) and found["rmse"] ** 2 == pytest.approx(
        found["mse"]
    )
    assert found["mae"] == pytest.approx(np.abs(g - t).mean()) and found["r2"] == pytest.approx(sk.r2_score(t, g))
    assert set(found) == {"mse", "mae", "rmse", "r2", "spearman"}
    scorer = objective.scorer()
    assert scorer.first == "mse" and scorer.value({"mse": 1.0}) > scorer.value({"mse": 2.0})
    usual = Regression(PooledConfig(), Answers((), ("pearson", "spearman"))).scorer()
    assert usual.first == "average" and usual.value({"average": 0.5}) == 0.5


def test_a_metric_of_others_is_refused_with_those_that_fit() -> None:
    with pytest.raises(UserError, match="--metric f1: objective regression is scored by pearson, spearman, r2, mse"):
        Regression(PooledConfig(metric=("mse", "f1")), Answers((), ("pearson",)))
    with pytest.raises(UserError, match=r"--metric f1: objective classification is scored by accuracy.*roc_auc"):
        classes(metric=("f1",))  # of three classes it must be said how they are averaged, as in scikit-learn
    with pytest.raises(UserError, match="--metric map: objective tagging is scored by f1, precision, recall, accuracy"):
        Tagging(ObjectiveConfig(metric=("map",)), Answers(("O", "B-X")))


def several(seed: int = 0, n: int = 60) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    torch.manual_seed(seed)
    return {"chances": torch.rand(n, 3)}, torch.randint(0, 2, (n, 3)).float()


def test_metrics_of_several_labels() -> None:
    usual = Multilabel(MultilabelConfig(), Answers(NAMES))
    objective = Multilabel(MultilabelConfig(metric=usual.metric_names, threshold=0.4), Answers(NAMES))
    out, truth = several()
    found = scored(objective.scorer, out, labels=truth)
    there, guess, chances = truth.numpy() > 0.5, out["chances"].numpy() >= 0.4, out["chances"].numpy()
    expected: dict[str, Any] = {
        f"f1_{a}": sk.f1_score(there, guess, average=a, zero_division=0.0) for a in ("micro", "macro", "samples")
    }
    expected |= {"accuracy": sk.accuracy_score(there, guess), "hamming_loss": sk.hamming_loss(there, guess)}
    expected |= {"roc_auc": sk.roc_auc_score(there, chances), "map": sk.average_precision_score(there, chances)}
    assert {k: found[k] for k in expected} == pytest.approx(expected)
    assert list(scored(usual.scorer, out, labels=truth)) == ["micro_f1", "macro_f1", "map"]
    assert (
        Multilabel(MultilabelConfig(metric=("hamming_loss",)), Answers(NAMES)).scorer().value({"hamming_loss": 1}) == -1
    )


def reported(report: Any, out: dict[str, torch.Tensor], **targets: torch.Tensor) -> dict[str, Any]:
    for at in (list(range(13)), list(range(13, 60))):
        part = {k: v[at] for k, v in targets.items()}
        report.update({k: v[at] for k, v in out.items()}, batch_of(at, **part))
    found: dict[str, Any] = report.compute()
    return found


def rows_of(expected: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """Rows of scikit-learn's report, called as ours."""
    return [{"name": n, "f1": r["f1-score"], **{k: r[k] for k in ("precision", "recall", "support")}}
            for n, r in ((n, expected[n.replace("mean", "avg")]) for n in names)]  # fmt: skip


def test_the_report_of_classes_is_scikit_learns() -> None:
    objective = classes()
    out, truth = told(objective, 3)
    found = reported(objective.report(), out, label=truth)
    known = sk.classification_report(truth, out["label"], labels=range(3), target_names=NAMES, output_dict=True)
    expected = rows_of(known, [*NAMES, "macro mean", "weighted mean"])
    for one, other in zip([*found["rows"][:3], *found["rows"][4:]], expected, strict=True):
        assert one == pytest.approx(other)
    assert found["rows"][3]["f1"] == pytest.approx(known["accuracy"]) and found["rows"][3]["support"] == 60
    assert found["confusion"] == sk.confusion_matrix(truth, out["label"], labels=range(3)).tolist()
    assert found["labels"] == list(NAMES)


def test_the_report_of_several_labels_is_scikit_learns() -> None:
    objective = Multilabel(MultilabelConfig(), Answers(NAMES))
    out, truth = several(1)
    found = reported(objective.report(), out, labels=truth)
    told_ = out["chances"].numpy() >= 0.5
    known = sk.classification_report(truth, told_, target_names=NAMES, output_dict=True, zero_division=0.0)
    for one, other in zip(
        found["rows"], rows_of(known, [*NAMES, "micro mean", "macro mean", "weighted mean"]), strict=True
    ):
        assert one == pytest.approx(other)
    assert list(found["confusion"].values()) == sk.multilabel_confusion_matrix(truth, told_).tolist()


def test_the_report_of_tags_is_by_type_of_span() -> None:
    tags = ("O", "B-A", "I-A", "B-B")
    real, guess = [[1, 2, 0, 3], [3, 3, 0]], [[1, 2, 0, 1], [3, 0, None]]
    flat = torch.tensor([t for sample in real for t in sample])
    batch = batch_of([0, 1], truth=flat, **{"truth.n": torch.tensor([4, 3])})
    report, scorer = SpanReport(tags), TagScorer(tags)
    for one in (report, scorer):
        one.update({"tags": guess}, batch)
    rows = {row["name"]: row for row in report.compute()["rows"]}
    assert rows["A"] == {"name": "A", "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "support": 1}
    assert rows["B"] == {"name": "B", "precision": 1.0, "recall": pytest.approx(1 / 3), "f1": 0.5, "support": 3}
    assert {k: rows["micro mean"][k] for k in ("f1", "precision", "recall")} == pytest.approx(
        {k: v for k, v in scorer.compute().items() if k != "accuracy"}
    )


def test_the_report_of_numbers_sums_up_what_is_left() -> None:
    objective = Regression(PooledConfig(), Answers((), ("pearson",)))
    guess, truth = torch.arange(60.0), torch.full((60,), 10.0, dtype=torch.float64)
    found = {r["residual"]: r["value"] for r in reported(objective.report(), {"label": guess}, label=truth)["rows"]}
    assert found["samples"] == 60 and found["mean"] == 19.5 and found["quantile 0"] == -10 and found["quantile 1"] == 49
    assert found["mean absolute"] == pytest.approx(np.abs(np.arange(60) - 10).mean())
