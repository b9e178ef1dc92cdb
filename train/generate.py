"""Free greedy generation with the frozen decoder live: the papers' way of scoring, offered beside the exact one.

Each step runs the backbone over what was written so far and the tuner on top, so it costs about as many passes as the
longest answer has tokens. Class labels take two or three.
"""

from __future__ import annotations

import numpy as np
import torch

from pipeline.extract.backbones.capabilities import WritesText
from pipeline.extract.backbones.live import LiveBackbone
from pipeline.extract.backbones.tail import TextTail
from pipeline.extract.inputs import Inputs
from pipeline.train.fit.finite import refuse_nan
from pipeline.train.model import Model
from pipeline.train.model import state_names as names_of

# Tokens after which an answer is cut, or the longest target's where that is more: what is longer is no target. The
# official code cuts at 20 after each epoch and at 128 at the end, which changes no score.
MAX_LENGTH = 20


@torch.inference_mode()
def generate(model: Model, live: LiveBackbone, inputs: Inputs, batch_size: int = 64) -> list[list[int]]:
    """The token ids written for each sample, without the start id and the end token. Raises NotFinite for NaN."""
    model.eval()
    backbone = live.backbone
    assert isinstance(backbone, WritesText)
    config = live.backbone.config
    end = config.eos_token_id if isinstance(config.eos_token_id, int) else config.eos_token_id[0]
    states = names_of(model.tuner.name, model.tuner.config, live.backbone)
    start = backbone.start_id
    max_length = max([MAX_LENGTH, *(len(c) for c in model.objective.answers.token_ids)])
    out: list[list[int]] = []
    for low in range(0, len(inputs), batch_size):
        part = inputs.take(np.arange(low, min(low + batch_size, len(inputs))))
        chains = [[start] for _ in range(len(part))]
        done = np.zeros(len(part), bool)
        while not done.all() and len(chains[0]) <= max_length:
            batch = live.states(backbone.with_decoder(part, chains), states, torch.float32)
            layout = batch.layout("decoder")
            last = layout.first + layout.lengths - 1
            (rows,) = model(batch).values()
            assert isinstance(model.tuner.tail, TextTail)
            tokens = refuse_nan(model.tuner.tail.logits(rows[last])).argmax(-1).tolist()
            done |= np.asarray(tokens) == end
            for chain, token in zip(chains, tokens, strict=True):
                chain.append(token)
        for chain in chains:
            written = chain[1:]
            out.append(written[: written.index(end)] if end in written else written)
    return out
