"""First weights of LST and SHERL on T5 against the released code's, drawn at T5-base size: every group of tensors has
the released standard deviation within sampling error, and what the released code sets is set to the same.

`initial_weights.json` in the folder `GOLDEN` (default: tests/golden) holds the figures. Those named "from_pretrained"
are what a released run starts from: its library initialises each missing module alone.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config

from pipeline.extract.backbones import backbone_for
from pipeline.lookup.objective import class_objective
from pipeline.train.model import Model
from pipeline.train.tuners import tuner_class, tuner_config
from tests.train.test_tuners import CHAINS, T5

FILE = Path(os.environ.get("GOLDEN") or Path(__file__).parents[1] / "golden") / "initial_weights.json"
REDUCTION = 8
# Released names → ours, where a stream comes first in both.
LST = {
    r"side_block\.layer\.layer_norm": r"side\.blocks\.\d+\.layer\.\d\.layer_norm",
    r"side_block\.layer\.": r"side\.blocks\.\d+\.layer\.\d\.",
    r"side_first_downsample": "first",
    r"side_downsamples": r"down\.\d+",
    r"side_gate_params": "gates",
    r"final_side_layer_norm": r"side\.norm",
}
SHERL = {
    r"side_mtsa_block\.gate_params": r"gate",
    r"side_mtsa_block\.guide_block\.fc_attn": "score",
    r"side_mtsa_block\.hor_block\.fc1": r"down\.\d+",
    r"side_mtsa_block\.hor_block\.fc[23]\.weight": "mix_weight",  # both maps of all sets are one tensor here
    r"side_mtsa_block\.hor_block\.fc[23]\.bias": "mix_bias",
    r"side_mtsa_block\.fc_out": "up",
}


def patterns(tuner: str, name: str) -> str:
    """What our names of the released group `name` look like."""
    if name.startswith("side_final_upsample"):
        return name.replace("side_final_upsample", "up").replace(".", r"\.")
    stream, _, rest = name.partition(".")
    if tuner == "sherl" and rest == "final_side_layer_norm.weight":
        return rf"norm\.{stream}\.weight"
    for released, own in (LST if tuner == "lst" else SHERL).items():
        if match := re.match(released, rest):
            end = rest[match.end() :].replace(".", r"\.")
            return rf"{'ladders' if tuner == 'lst' else 'mtsa'}\.{stream}\.{own}{end}"
    raise AssertionError(f"no name for {name}")


def groups(tuner: str) -> list[dict[str, Any]]:
    cases = json.loads(FILE.read_text())["cases"] if FILE.is_file() else {}
    return next((g for c, g in cases.items() if c.startswith(f"{tuner} T5") and "from_pretrained" in c), [])


@pytest.mark.parametrize("tuner", ["lst", "sherl"])
def test_first_weights_are_drawn_as_released(tuner):
    released = groups(tuner)
    if not released:
        pytest.skip(f"no first weights of {tuner} in {FILE.parent.name}")
    backbone = backbone_for(T5Config(vocab_size=64, **T5["t5-base"]))
    config = tuner_config(tuner, {"reduction": REDUCTION, "layers": [1, 10, 11]})
    objective = class_objective(backbone, tuner_class(tuner), CHAINS)
    made = Model.build(tuner, config, backbone, backbone.tail(None, "sdpa"), objective, seed=0)
    own = dict(made.tuner.named_parameters())
    seen: set[str] = set()
    for group in released:
        pattern = patterns(tuner, group["name"])
        names = {n for n in own if re.fullmatch(pattern, n)}
        assert names, f"{group['name']}: nothing is called {pattern}"
        seen |= names
        values = torch.cat([own[n].detach().flatten() for n in names])
        std, mean = (float(values.std(correction=0)), float(values.mean())) if len(values) > 1 else (0.0, float(values))
        # Five standard errors of both samples, and the figures' rounding.
        drawn = math.prod(group["shape"]) * group["tensors"]
        error = math.sqrt(1 / (2 * drawn) + 1 / (2 * len(values)))
        assert abs(std - group["std"]) <= 5 * group["std"] * error + 1e-5, f"{group['name']}: {std} for {group['std']}"
        assert abs(mean - group["mean"]) <= 8 * group["std"] * error + 1e-5, f"{group['name']}: {mean}"
    assert seen == own.keys()
