"""What a store says, checked before anything is made from it: whoever wrote it, a bad value is one line.

The store checks its own format (names, sizes, digests, shapes). Here are the parts whose meaning is the pipeline's: the
identity of a feature space, the configuration and the names of its checkpoint, headers and labels of task tables, and
what states and columns must be for the backbone.
"""

from __future__ import annotations

import math
import string
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.extract.geometry import META, MOST_PIXELS, Geometry
from pipeline.extract.tasks.base import DENSE, TaskError, TaskSpec
from pipeline.extract.tasks.masks import png_size
from pipeline.extract.tasks.objects import wrong_object
from pipeline.recipe import PRECISIONS
from pipeline.store import FORMATS, Samples, Space, Store, TaskTable, digest_json
from pipeline.store.errors import StoreError, UserError
from pipeline.store.format.names import is_key
from pipeline.store.tables.texts import Texts

if TYPE_CHECKING:
    from pipeline.extract.backbones import Backbone

# The deepest published networks have some hundred layers; the largest numbers of a configuration are vocabularies and
# longest positions.
MAX_LAYERS, MAX_NUMBER = 512, 1 << 24
MAX_NAME, MAX_CLASSES, MAX_TARGET = 200, 1 << 20, 1 << 10
_MADE_WITH = ("config", "tokenizer", "precision")
_COUNTS = ("layer", "depth", "block", "stage")
# Of a head that is never built; the library makes a name for each of as many classes as the first says.
_HEADS = ("num_labels", "id2label", "label2id")


def refuse(where: str, what: str) -> StoreError:
    """The one line for content that no writer of ours makes."""
    return StoreError(f"{where} is malformed: {what}; restore it from another copy, or extract again")


def backbone_from(store: Store, space: Space) -> Backbone:
    """The backbone of a space, from the configuration kept beside its tail weights. Raises StoreError for one that no
    backbone has: of a wrong type, or so large that only its making would fill the memory."""
    from transformers import AutoConfig

    from pipeline.extract.backbones import backbone_for
    from pipeline.extract.projection import load_projection

    identity = check_identity(space)
    name = kept_name("config.json", kept_of(store, identity))
    where = store.files.where(f"weights/{identity['weights']}/{name}")
    raw = {k: v for k, v in store.load_json(identity["weights"], name).items() if k not in _HEADS}
    bound_numbers(raw, where)
    kind = raw.pop("model_type", None)
    if not isinstance(kind, str):
        raise refuse(where, "model_type is missing")
    try:
        backbone = backbone_for(AutoConfig.for_model(kind, **raw))
        layers = [backbone.depth(stream) for stream in backbone.streams]
        sound = all(isinstance(n, int) and 1 <= n <= MAX_LAYERS for n in layers)
    except UserError:
        raise
    except Exception as error:  # whatever the library makes of foreign values
        raise refuse(where, " ".join(str(error).split())[:200] or type(error).__name__) from error
    if not sound:
        raise refuse(where, f"a backbone has 1 to {MAX_LAYERS} layers")
    return backbone.projected(load_projection(store, identity))


def made_with(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What the files kept of a checkpoint depend on beside its weights: the configuration says how they compute, a
    tokenizer how many rows the softmax has, and the precision how they were rounded when they were loaded."""
    return {name: identity.get(name) for name in _MADE_WITH}


def own_kept(identity: Mapping[str, Any]) -> str:
    """The mark of kept files that are of one configuration, tokenizer and precision alone."""
    return "-" + digest_json(made_with(identity))[:16]


def kept_name(name: str, kept: str) -> str:
    """`name` as kept under the mark `kept`: tail.safetensors, tail-0123456789abcdef.safetensors."""
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}{kept}{dot}{suffix}"


def kept_of(store: Store, identity: Mapping[str, Any]) -> str:
    """The mark of the files kept for the space of `identity`: its own, or "" where those without a mark are of it, or
    do not say of what. Raises StoreError where only another space's are there, as after a merge."""
    digest = identity["weights"]
    if store.has_weights(digest, kept_name("source.json", own_kept(identity))):
        return own_kept(identity)
    there = store.load_json(digest, "source.json").get("made_with")
    if isinstance(there, dict) and there != made_with(identity):
        names = ", ".join(name for name, value in made_with(identity).items() if there.get(name) != value)
        raise StoreError(
            f"weights/{digest} in {store.where} are kept for a feature space of another {names} only: extract again "
            "with the checkpoint of this one, which computes nothing that is stored and keeps what is missing"
        )
    return ""


def bound_numbers(value: Any, where: str, name: str = "") -> None:
    """Raises StoreError for a number in a configuration that is beyond any backbone's. `name`: of the field."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            bound_numbers(inner, where, str(key))
    elif isinstance(value, list):
        for inner in value:
            bound_numbers(inner, where, name)
    elif isinstance(value, int):
        most = MAX_LAYERS if any(word in name for word in _COUNTS) else MAX_NUMBER
        if abs(value) > most:
            raise refuse(where, f"{name} is {value}, at most {most} is allowed")


def check_identity(space: Space) -> dict[str, Any]:
    """The identity of `space`, its fields of the types that are worked with. Raises StoreError naming the first that is
    not; fields of other versions are left alone."""
    identity, where = space.identity, space.files.where(f"spaces/{space.id}/space.json")

    def need(name: str, sound: bool) -> None:
        if not sound:
            raise refuse(where, f"identity.{name} is {str(identity.get(name, 'missing'))[:80]!r}")

    need("weights", is_key(identity.get("weights")))
    need("format", identity.get("format") in FORMATS)
    need("precision", identity.get("precision") in PRECISIONS)
    need("attention", identity.get("attention") in ("sdpa", "eager"))
    need("max_length", type(identity.get("max_length")) is int and 1 <= identity["max_length"] <= MAX_NUMBER)
    need("truncation_side", identity.get("truncation_side") in ("left", "right"))
    if "stride" in identity:
        need("stride", type(identity["stride"]) is int and 0 < identity["stride"] < identity["max_length"])
    need("prompt", isinstance(identity.get("prompt"), str) and plain_prompt(identity["prompt"]))
    for name in ("views", "projection", "projection_fit", "image_size"):
        need(name, isinstance(identity.get(name, ""), str))
    need("projection_fit", identity.get("projection", "none") == "none" or is_key(identity.get("projection_fit")))
    return identity


def plain_prompt(prompt: str) -> bool:
    """Whether a prompt only puts in the fields {0} and {1}: {0:999999999} would fill the memory."""
    try:
        found = [parts[1:] for parts in string.Formatter().parse(prompt)]
    except ValueError:
        return False
    return all(field in (None, "0", "1") and not spec and not how for field, spec, how in found)


def source_of(store: Store, space: Space) -> dict[str, Any]:
    """What a space's checkpoint is called: `names`, one at least, and `revision`."""
    digest = str(space.identity.get("weights"))
    if not is_key(digest):
        raise refuse(store.files.where(f"spaces/{space.id}/space.json"), "identity.weights is no digest")
    own = kept_name("source.json", own_kept(space.identity))
    name = own if store.has_weights(digest, own) else "source.json"
    where = store.files.where(f"weights/{digest}/{name}")
    source = store.load_json(digest, name)
    names = source.get("names")
    if not isinstance(names, list) or not names or not all(is_name(name) for name in names):
        raise refuse(where, "names must list what the checkpoint is called")
    if not isinstance(source.get("revision", ""), str):
        raise refuse(where, "revision must be text")
    return source


def is_name(value: object) -> bool:
    """Whether `value` can name a checkpoint or a class: some printable text."""
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and value.isprintable()


def check_header(header: Mapping[str, Any], where: str) -> TaskSpec:
    """The task that a table's header describes. Raises StoreError naming `where` and the field that is not what it must
    be."""
    for name, kinds in (
        ("provenance", dict), ("candidates", list), ("beside", dict), ("total", int), ("created", str),
        ("decoder", str), ("model", str), ("slot", str), ("slots", dict),
    ):  # fmt: skip
        if name in header and (not isinstance(header[name], kinds) or isinstance(header[name], bool)):
            raise refuse(where, f"{name} in its header is not of the right type")
    if "version" in header and not is_key(header["version"]):
        raise refuse(where, "version in its header is no digest")
    spec = _spec(header.get("spec"), where)
    _check_candidates(header.get("candidates", []), spec, where)
    return spec


def check_table(table: TaskTable, where: str) -> TaskTable:
    """`table`, its header, labels and texts being what a task's are. Raises StoreError naming `where` and what is
    not."""
    spec = check_header(table.header, where)
    slots = {*table.joined, table.header["slot"]} if "slot" in table.header else set(table.joined)
    if slots != set(table.header.get("slots", {})):
        raise refuse(where, "the slots in its header are not those of its columns")
    if _sound(table, spec):
        return table
    metas = table.metas or [{}] * len(table)
    for row, (label, texts, meta) in enumerate(zip(table.labels, table.texts, metas, strict=True)):
        if wrong := _wrong_target(label, spec, meta):
            raise refuse(where, f"{wrong} (row {row + 1})")
        # A later window of the text before has none of its own.
        later = not texts and row > 0 and "window" in meta and meta["window"][0] > 1
        if not later and not len(spec.fields) <= len(texts) <= 2:
            raise refuse(where, f"row {row + 1} has {len(texts)} texts, the task has {len(spec.fields)}")
    return table


def _sound(table: TaskTable, spec: TaskSpec) -> bool:
    """Whether every row of a task of classes or numbers is as it must be, by whole columns; False says nothing yet."""
    texts = table.texts
    counts = texts.counts() if isinstance(texts, Texts) else np.fromiter(map(len, texts), np.int64, len(texts))
    if spec.target not in ("class", "number") or len(counts) != len(table) or len(table.labels) != len(table):
        return False
    known = [label for label in table.labels if label is not None]
    kinds = {int} if spec.target == "class" else {int, float}
    if not set(map(type, known)) <= kinds or np.any((counts < len(spec.fields)) | (counts > 2)):
        return False
    most = len(spec.labels) - 1 if spec.target == "class" else sys.float_info.max
    least = 0 if spec.target == "class" else -most
    return not known or (least <= min(known) and max(known) <= most and not any(map(math.isnan, known)))


def _wrong_target(label: Any, spec: TaskSpec, meta: Mapping[str, Any]) -> str:
    """What keeps `label` from being a target of the task, "" where nothing does."""
    if spec.target == "tags":
        count, word = meta.get("words"), meta.get("word")
        if type(count) is not int or not isinstance(word, list) or not word or len(word) > MAX_NUMBER:
            return "it does not say which words positions are"
        if not all(type(w) is int and -1 <= w < count for w in word):
            return "positions are of words that are not there"
        if isinstance(label, list) and len(label) != count:
            return f"there are {len(label)} tags for {count} words"
    if spec.target == "tokens" and (wrong := _wrong_spans(meta)):
        return wrong
    if spec.target == "class" and "decide" in meta and (wrong := _wrong_answer(meta)):
        return wrong
    if spec.target in DENSE and (wrong := _wrong_geometry(meta)):
        return wrong
    if label is None:
        return ""
    if spec.target == "mask":
        size = png_size(label) if isinstance(label, bytes) else None
        return "" if size == tuple(meta[META]["size"]) else "its mask is no PNG image of its image's size"
    if spec.target in ("boxes", "instances"):
        size, outlined = tuple(meta[META]["size"]), spec.target == "instances"
        found = label if isinstance(label, list) else [None]
        return next((w for one in found if (w := wrong_object(one, len(spec.labels), size, outlined))), "")
    if spec.target in ("classes", "tags"):
        sound = isinstance(label, list) and all(type(i) is int and 0 <= i < len(spec.labels) for i in label)
    elif spec.target == "class":
        sound = type(label) is int and 0 <= label < len(spec.labels)
    else:
        sound = spec.target == "number" and _is_number(label)
    return "" if sound else f"the label {str(label)[:80]} is none of the {len(spec.labels)} classes"


def _wrong_spans(meta: Mapping[str, Any]) -> str:
    """What keeps `meta` from saying which tokens are targets, "" where nothing does."""
    count, learn, window = meta.get("tokens"), meta.get("learn"), meta.get("window", [1, 1])
    if not isinstance(window, list) or len(window) != 2 or not all(type(n) is int for n in window):
        return "it does not say which window of a text it is"
    if not 1 <= window[0] <= window[1] <= MAX_NUMBER:
        return "it is no window of a text"
    if type(count) is not int or not 1 <= count <= MAX_NUMBER or not isinstance(learn, list) or not learn:
        return "it does not say which tokens are to be learned"
    end = 1  # the first token has none before it
    for span in learn:
        sound = isinstance(span, list) and len(span) == 2 and all(type(place) is int for place in span)
        if not sound or not end <= span[0] < span[1] <= count:
            return f"the tokens to be learned are not spans of {count} tokens"
        end = span[1]
    return ""


def _wrong_answer(meta: Mapping[str, Any]) -> str:
    """What keeps `meta` from saying where a text's answer stands, "" where nothing does. A row to score has none."""
    place, count = meta["decide"], meta.get("tokens")
    if type(place) is not int or type(count) is not int or not 0 <= place < count:
        return "it does not say where its answer is told"
    return _wrong_spans(meta) if meta.get("learn") != [] else ""


def _wrong_geometry(meta: Mapping[str, Any]) -> str:
    """What keeps the meta of an image from saying where it shows what, "" where nothing does."""
    try:
        found = Geometry.of(meta)
        pairs = (found.size, found.extent, found.seen)
        whole = all(type(n) is int and 1 <= n <= MAX_NUMBER for pair in pairs for n in pair)
        real = all(_is_number(n) for n in (*found.scale, *found.offset)) and min(found.scale) > 0
        inside = all(a <= b for a, b in zip(found.seen, found.extent, strict=True))
        two = all(len(pair) == 2 for pair in (*pairs, found.scale, found.offset))
    except (KeyError, TypeError, ValueError):
        return "it does not say where its image shows what"
    within = whole and max(h * w for h, w in pairs) <= MOST_PIXELS if two and whole else False
    return "" if within and real and inside else "where its image shows what makes no sense"


def _spec(raw: Any, where: str) -> TaskSpec:
    if not isinstance(raw, dict):
        raise refuse(where, "its header describes no task")
    for name in ("labels", "metrics", "fields", "texts"):
        values = raw.get(name)
        if not isinstance(values, list) or len(values) > MAX_CLASSES or not all(isinstance(v, str) for v in values):
            raise refuse(where, f"spec.{name} in its header is no list of texts")
    values = raw.get("values")
    if not isinstance(values, list) or len(values) > MAX_CLASSES or not all(_is_number(v) for v in values):
        raise refuse(where, "spec.values in its header is no list of numbers")
    if any(b <= a for a, b in pairwise(values)):
        raise refuse(where, "spec.values in its header do not ascend")
    scored = raw["metrics"] or raw.get("target") in ("classes", "tags", "tokens", "pair", *DENSE, "none")
    if not isinstance(raw.get("name"), str) or not isinstance(raw.get("prompt"), str) or not scored:
        raise refuse(where, "spec.name, spec.prompt or spec.metrics is missing in its header")
    try:
        return TaskSpec.from_dict(raw)
    except (TaskError, TypeError) as error:
        raise refuse(where, str(error)) from None


def _check_candidates(candidates: Sequence[Any], spec: TaskSpec, where: str) -> None:
    sound = not candidates or len(candidates) == len(spec.texts)
    for ids in candidates:
        sound = sound and isinstance(ids, list) and 1 <= len(ids) <= MAX_TARGET
        sound = sound and all(type(i) is int and 0 <= i <= MAX_NUMBER for i in ids)
    if not sound:
        raise refuse(where, "candidates in its header are not the token ids of each target")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def check_states(space: Space, backbone: Backbone, states: Sequence[str]) -> None:
    """Raises StoreError for a stored state that has not the width the backbone gives it."""
    for segment in space.segments():
        for name in states:
            info = segment.states.get(name)
            if info is not None and info.width != backbone.state_width(name):
                raise refuse(
                    f"segment {segment.id}",
                    f"{name} is {info.width} wide, the backbone's is {backbone.state_width(name)}",
                )


def check_columns(backbone: Backbone, samples: Samples) -> None:
    """Raises StoreError where the columns of `samples`, a block as read, cannot be inputs of the backbone."""
    if wrong := backbone.refuse_columns(samples.lengths, samples.columns):
        raise StoreError(f"the samples from {samples.keys[0]} on are malformed: {wrong}; extract again in a new store")
