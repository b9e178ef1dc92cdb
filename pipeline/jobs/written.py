"""What a run of a language model writes on a stored split, beside what stands there."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from pipeline.extract.completion import chat_ids, prompt_ids, shared
from pipeline.extract.pretrained import Checkpoint
from pipeline.extract.tasks.completion import form_of
from pipeline.jobs.job import Job
from pipeline.jobs.sources import Live, fresh
from pipeline.store.errors import UserError
from pipeline.train.continuation import Choice, continued, end_tokens, text_after
from pipeline.train.metrics import score
from pipeline.train.model import Model
from pipeline.train.objectives.label_text import LabelText
from pipeline.train.text_scores import libraries, text_scores

MOST = 128  # tokens written where nothing is said
SHORT = 8  # tokens that a label may have more than the longest has


def written_scores(job: Job, model: Model, loaded: Live, split: str, most: int | None) -> dict[str, Any]:
    """Greedy texts after the prompts of `split`, the backbone live. Of prompts with completions exact match, ROUGE and
    BLEU against these, the `rows`, and how many were cut at `most` tokens; of conversations the assistant's last turn
    is written. Of labels as text the task's metrics, and the share of answers that are a label. UserError for rows
    without a prompt."""
    (live, checkpoint), objective = loaded, job.objective
    if isinstance(objective, LabelText):
        return _labels(job, model, objective, loaded, split, most)
    libraries()
    form = form_of(job.spec)
    if form == "text":
        raise UserError(
            f"--generate: the rows of {job.spec.name} are texts without a prompt, which nothing is written after"
        )
    asked = [_asked(checkpoint, form, fields) for fields in job.tables[split].texts if fields]
    ends = end_tokens(checkpoint.tokenizer, live.model)
    prompts = [ids for ids, _ in asked]
    made = continued(model, live, prompts, most=most or MOST, ends=ends, choose=Choice())
    texts = [text_after(checkpoint.tokenizer, one.prompt, one.ids) for one in made]
    figures = text_scores(texts, [reference for _, reference in asked])
    return {**figures, "rows": len(made), "cut": sum(one.ended == "length" for one in made)}


def _asked(checkpoint: Checkpoint, form: str, fields: list[str]) -> tuple[list[int], str]:
    """The ids that are gone on with, and what should follow."""
    if form == "completion":
        return prompt_ids(checkpoint.tokenizer, form, fields[0]), fields[1]
    said = json.loads(fields[0])
    last = max(i for i, message in enumerate(said) if message["role"] == "assistant")
    return chat_ids(checkpoint.tokenizer, said[:last]), said[last]["content"]


def _labels(job: Job, model: Model, objective: LabelText, loaded: Live, split: str, most: int | None) -> dict[str, Any]:
    table, answers = job.tables[split], objective.answers
    labels = [label for label in table.labels if label is not None]
    if len(labels) < len(table):
        raise UserError(f"not all {split} rows of {job.spec.name} have labels to score against")
    live, checkpoint = loaded
    part = fresh(job, loaded, [tuple(fields) for fields in table.texts], "", lambda line: None)
    # What all answers begin with is written too.
    common, (stream,) = shared(answers.token_ids), live.backbone.streams
    counts, ids = part.inputs.lengths[stream], part.inputs.columns[f"{stream}.ids"]
    prompts = [list(map(int, chain[: len(chain) - common])) for chain in np.split(ids, counts.cumsum()[:-1])]
    longest = max(len(candidate) for candidate in answers.token_ids)
    made = continued(
        model, live, prompts, most=most or longest + SHORT, ends=end_tokens(checkpoint.tokenizer, live.model),
        choose=Choice(),
    )  # fmt: skip
    texts = [text_after(checkpoint.tokenizer, one.prompt, one.ids).strip() for one in made]
    figures = score(
        objective.metrics, [objective.meaning(text) for text in texts], objective.truth(labels),
        average=not objective.config.metric,
    )  # fmt: skip
    return {**figures, "in_targets": sum(text in answers.texts for text in texts) / len(texts)}
