"""Which system of ours a golden case is for, by the official sources that its metadata names; and a table of them all.

python -m tests.golden.systems [FOLDER]     # prints method, cases, worst differences; what has no system by name
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from tests.golden import Case, cases
from tests.golden.compare import Difference, NoSystem, Setup, differences
from tests.golden.maps import sherl_resnet, unipt_maps
from tests.golden.retrieval import gpo, hinge_loss, ranking, sherl_bert
from tests.golden.texts import lst_t5, mtsa, sherl_t5, unipt_bert
from tests.golden.towers import clip4clip

SHERL, UNIPT, LST = "Paranioar/SHERL", "Paranioar/UniPT", "ylsung/Ladder-Side-Tuning"
SYSTEMS: dict[tuple[str, tuple[str, ...]], tuple[str, Callable[[Case], Setup]]] = {
    (SHERL, ("modeling_side_t5.py",)): ("SHERL on T5", sherl_t5),
    (LST, ("modeling_side_t5.py",)): ("LST on T5", lst_t5),
    (SHERL, ("modeling.py",)): ("MTSA alone", mtsa),
    (SHERL, ("adapter_for_cnn.py", "resnet.py")): ("SHERL on ResNet", sherl_resnet),
    (UNIPT, ("adapter_for_cnn.py",)): ("UniPT on maps", unipt_maps),
    (UNIPT, ("adapter_for_transformer.py", "encoders.py", "gpo.py")): ("UniPT on BERT", unipt_bert),
    (SHERL, ("modeling.py", "until_module.py")): ("SHERL on CLIP4Clip", clip4clip),
    (SHERL, ("adapter_for_transformer.py", "encoders.py", "gpo.py")): ("SHERL on BERT, VSE∞ form", sherl_bert),
    (SHERL, ("gpo.py",)): ("GPO", gpo),
    (SHERL, ("loss.py", "utils.py")): ("hinge loss", hinge_loss),
    (SHERL, ("evaluation.py",)): ("ranks of retrieval", ranking),
    (UNIPT, ("modeling.py", "module_adapter.py", "until_module.py")): ("UniPT on CLIP4Clip", clip4clip),
}
PRUNING = (LST, ("fisher.py", "pruning_methods.py"))  # makes weights, not outputs: tests/train/test_golden_pruning.py


def compared() -> list[Case]:
    """The cases that outputs and gradients are compared of, those without a system among them."""
    return [case for case in cases() if (case.repository, case.sources) != PRUNING]


def compare(case: Case) -> list[Difference]:
    """Every tensor of `case` against ours. NoSystem, naming the official sources, where nothing of ours claims them."""
    if (case.repository, case.sources) not in SYSTEMS:
        raise NoSystem(f"{case.repository}: {case.about['file']}")
    return differences(case, SYSTEMS[case.repository, case.sources][1](case))


def table() -> list[str]:
    """A row a system: number of cases, worst difference of an output and of a gradient over its tensor's largest value
    (without gradients below 1e-4 of their file's largest, which are rounding). Then what has no system, by name."""
    found: dict[str, list[list[Difference]]] = {}
    without = []
    for case in compared():
        try:
            done = compare(case)
        except NoSystem as error:
            without.append(f"{case.name}: no system for {error}")
        else:
            found.setdefault(SYSTEMS[case.repository, case.sources][0], []).append(done)
    rows = ["| method | cases | tensors | worst output | worst gradient |", "|---|---|---|---|---|"]
    for name, runs in found.items():
        every = [d for run in runs for d in run]
        outputs = max(d.share for d in every if not d.gradient)
        gradients = max((d.share for d in every if d.gradient and not d.rounding), default=0.0)
        rows.append(f"| {name} | {len(runs)} | {len(every)} | {outputs:.1e} | {gradients:.1e} |")
    return [*rows, "", *without]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        os.environ["GOLDEN"] = sys.argv[1]
    print("\n".join(table()))
