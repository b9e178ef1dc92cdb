"""Text written by a language model with a tuner beside it: keys and values of both are kept, a token costs a position.

All samples of a batch stand at the same position, so nothing is padded and no sample sees another's length: what is fed
is first the shortest prompt's length of every prompt, then a token at a time, a prompt's own until it ends and what
was written after that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.extract.backbones.live import LiveBackbone
from pipeline.extract.batch import Batch
from pipeline.extract.past import Past
from pipeline.store.errors import UserError
from pipeline.train.fit.finite import refuse_nan
from pipeline.train.model import Model
from pipeline.train.model import state_names as names_of

Ended = Literal["", "end", "length", "stop"]


@dataclass(frozen=True)
class Choice:
    """How a token is chosen: the most likely one at `temperature` 0, else drawn with `seed` from the distribution at
    that temperature, of the `top_k` most likely tokens (all where None) and of these the fewest that together have
    probability `top_p`. Raises UserError for values that make no distribution."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"--temperature: 0 (the most likely token) or above, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top-k: at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p: above 0 and at most 1, not {self.top_p}")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise UserError("--top-k and --top-p are for drawing: give a --temperature above 0 with them")

    def __call__(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """(B, vocabulary) → (B,) token ids."""
        if self.temperature == 0:
            return logits.argmax(-1)
        chance, token = (logits.double() / self.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            chance[:, self.top_k :] = 0
        if self.top_p is not None:
            chance[chance.cumsum(-1) - chance >= self.top_p * chance.sum(-1, keepdim=True)] = 0
        return token.gather(1, torch.multinomial(chance, 1, generator=generator))[:, 0]


@dataclass
class Written:
    """What was written after prompt `number` of `prompt` ids: `ids`, without the end token, and why it `ended`: at an
    end token, at the longest `length` allowed, or where the caller found a `stop`."""

    number: int
    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    ended: Ended = ""


@torch.inference_mode()
def continued(
    model: Model,
    live: LiveBackbone,
    prompts: Sequence[Sequence[int]],
    *,
    most: int,
    ends: Collection[int],
    choose: Choice,
    stop: Callable[[Written], bool] = lambda written: False,
    batch_size: int = 16,
) -> list[Written]:
    """Up to `most` tokens after each of `prompts`, at least one id each. `ends`: tokens that end a text. `stop` is
    called after each token with what was written so far. Prompts of like length share a batch, which changes no greedy
    answer. UserError for a prompt that fills all positions of the backbone; NotFinite for NaN."""
    longest = getattr(live.backbone.config, "max_position_embeddings", None) or 1 << 62
    for number, prompt in enumerate(prompts, 1):
        if not 0 < len(prompt) < longest:
            raise UserError(f"prompt {number} has {len(prompt)} tokens; the model takes 1 to {longest - 1}")
    model.eval()
    out = [Written(i, list(prompt)) for i, prompt in enumerate(prompts)]
    order = sorted(range(len(out)), key=lambda i: len(out[i].prompt))
    generator = torch.Generator(live.device).manual_seed(choose.seed)
    for low in range(0, len(order), batch_size):
        texts = [out[i] for i in order[low : low + batch_size]]
        for logits, at in _steps(model, live, texts):
            tokens = choose(refuse_nan(logits), generator).tolist()
            for text, token in zip(texts, tokens, strict=True):
                if not text.ended and at >= len(text.prompt):
                    _take(text, token, ends, min(most, longest - len(text.prompt)), stop)
    return out


def end_tokens(tokenizer: Any, model: Any) -> set[int]:
    """The tokens that end a text: the tokenizer's, and those of the model's generation settings."""
    more = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])}
    return {token for token in found if token is not None}


def text_after(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` as it stands behind `prompt`: a tokenizer may write the first of several tokens otherwise than
    the same one later."""
    before: str = tokenizer.decode(prompt, skip_special_tokens=True)
    whole: str = tokenizer.decode([*prompt, *ids], skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else str(tokenizer.decode(ids))


def _take(text: Written, token: int, ends: Collection[int], most: int, stop: Callable[[Written], bool]) -> None:
    if token in ends:
        text.ended = "end"
        return
    text.ids.append(token)
    if stop(text):
        text.ended = "stop"
    elif len(text.ids) >= most:
        text.ended = "length"


def _steps(model: Model, live: LiveBackbone, texts: Sequence[Written]) -> Iterator[tuple[Tensor, int]]:
    """(B, vocabulary) logits of the token at a position, and the position, until all of `texts` ended; whoever takes
    them writes on."""
    past = Past()
    states = names_of(model.tuner.name, model.tuner.config, live.backbone)
    fed = [text.prompt[: len(texts[0].prompt)] for text in texts]
    while not all(text.ended for text in texts):
        logits = _run(model, live, states, fed, past)
        past.length += len(fed[0])
        yield logits, past.length
        known = [[*text.prompt, *text.ids] for text in texts]
        # Of a text that has ended nothing is read any more.
        fed = [[ids[past.length] if past.length < len(ids) else ids[-1]] for ids in known]


def _run(model: Model, live: LiveBackbone, states: Sequence[str], fed: Sequence[Sequence[int]], past: Past) -> Tensor:
    (stream,) = live.backbone.streams
    ids = torch.tensor([i for row in fed for i in row], device=live.device)
    batch = Batch({}, {f"{stream}.ids": ids}, {stream: np.full(len(fed), len(fed[0]))}, past=past)
    batch = live.filled(batch, states, torch.float32)
    layout = batch.layout(stream)
    (rows,) = model(batch).values()
    vocabulary: Any = model.tuner.tail
    logits: Tensor = vocabulary.logits(rows[layout.first + layout.lengths - 1])
    return logits.float()
