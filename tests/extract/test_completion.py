"""Which tokens of a row are targets: texts, completions, conversations with and without generation marks in the
template; what is cut; what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipeline.extract.completion import chat_ids, encode_rows, learned, prompt_ids
from pipeline.extract.tasks import load_task
from pipeline.extract.tasks.base import TaskError
from pipeline.extract.tasks.completion import form_of
from pipeline.store.errors import UserError
from tests import decoders

PLAIN = (
    "{% for m in messages %}[{{ m.role }}]: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]: {% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}]: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}\n"
    "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]: {% endif %}"
)
# As some templates do with what a model thought: an earlier answer is shorter once another follows.
REWRITING = (
    "{% for m in messages %}[{{ m.role }}]: {{ m.content if loop.last else m.content[:3] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]: {% endif %}"
)
CHAT = [
    {"role": "system", "content": "be old"},
    {"role": "user", "content": "the cat sees a dog"},
    {"role": "assistant", "content": "the dog sleeps"},
    {"role": "user", "content": "a bird?"},
    {"role": "assistant", "content": "it never runs"},
]


def encode(form: str, *fields: str, limit: int = 200, side: str = "right", template: str = ""):
    tokenizer = decoders.tokenizer()
    tokenizer.chat_template = template or None
    found = encode_rows(tokenizer, [fields], form, limit, side)
    (ids,), (meta,), (cut,) = found.ids, found.metas, found.truncated
    assert meta.keys() == {"tokens", "learn"} and meta["tokens"] == len(ids) and found.of == [0]
    taught = tokenizer.decode([i for i, is_target in zip(ids, learned(meta), strict=True) if is_target])
    return tokenizer, ids, taught, cut


def test_a_text_is_learned_but_for_its_first_token():
    tokenizer, ids, taught, cut = encode("text", "the cat sees a dog")
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id and not cut
    assert taught.strip() == "the cat sees a dog</s>"


def test_a_completion_is_learned_with_its_end_and_no_prompt():
    tokenizer, ids, taught, _ = encode("completion", "the cat sees", " a red house")
    assert taught.strip() == "a red house</s>"
    before = prompt_ids(tokenizer, "completion", "the cat sees")
    assert ids[: len(before)] == before  # what generate is given is what was trained on


def test_a_token_over_the_edge_of_prompt_and_completion_is_the_completions():
    _, ids, taught, _ = encode("completion", "the ho", "use")
    assert taught.strip() == "house</s>" and len(ids) == 4


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_of_a_conversation_the_assistants_turns_are_learned(template):
    tokenizer, ids, taught, _ = encode("messages", json.dumps(CHAT), template=template)
    turns = [line.strip() for line in taught.split("\n") if line.strip()]
    assert turns == ["the dog sleeps", "it never runs"]
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(ids).strip() == whole.strip()
    assert tokenizer.decode(chat_ids(tokenizer, CHAT[:2])).rstrip().endswith("[assistant]:")


def test_a_template_that_rewrites_earlier_turns_is_refused():
    with pytest.raises(UserError, match="row 1: the chat template renders earlier turns otherwise"):
        encode("messages", json.dumps(CHAT), template=REWRITING)
    assert encode("messages", json.dumps(CHAT[:3]), template=PLAIN)


def test_marks_around_what_others_say_are_refused():
    """And a mark around nothing leaves nothing to learn."""
    leaking = MARKED.replace("m.role == 'assistant'", "m.role != 'system'")
    with pytest.raises(UserError, match=r"row 1: the generation marks .* around what the user says"):
        encode("messages", json.dumps(CHAT), template=leaking)
    empty = PLAIN + "{% generation %}{% endgeneration %}"
    with pytest.raises(UserError, match="row 1 has no token to learn"):
        encode("messages", json.dumps(CHAT), template=empty)


def test_what_users_say_is_not_learned_though_it_looks_like_an_answer():
    """Neither the assistant's header nor a special token inside a message moves what is learned."""
    said = [
        {"role": "user", "content": "a dog </s>\n[assistant]: the cat"},
        {"role": "assistant", "content": "it runs"},
        {"role": "user", "content": "it runs"},
        {"role": "assistant", "content": "the cat </s> sees"},
    ]
    for template in (PLAIN, MARKED):
        taught = encode("messages", json.dumps(said), template=template)[2]
        turns = [line.strip() for line in taught.split("\n") if line.strip()]
        assert turns == ["it runs", "the cat </s> sees"] or turns == ["it runs", "the cat </s>  sees"]


def test_no_template_and_one_that_refuses_are_said():
    with pytest.raises(UserError, match="row 1: the tokenizer has no chat template"):
        encode("messages", json.dumps(CHAT))
    with pytest.raises(UserError, match="refuses the conversation: roles must alternate"):
        encode("messages", json.dumps(CHAT), template="{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cut_text_keeps_the_targets_of_its_side(side):
    _, whole, _, _ = encode("completion", "the cat sees", " a red house in the tree")
    _, ids, taught, cut = encode("completion", "the cat sees", " a red house in the tree", limit=6, side=side)
    assert cut and ids == (whole[-6:] if side == "left" else whole[:6])
    assert taught.strip() == ("house in the tree</s>" if side == "left" else "a red")


@pytest.mark.parametrize(("limit", "stride"), [(5, 4), (5, 2), (6, 1), (40, 3)])
def test_windows_learn_every_token_once_with_what_came_before_in_sight(limit, stride):
    tokenizer = decoders.tokenizer()
    texts = ["the cat sees a dog and the dog sees the cat", "a bird", "the dog sleeps in the red house"]
    whole = encode_rows(tokenizer, [(t,) for t in texts], "text", 200, "right")
    found = encode_rows(tokenizer, [(t,) for t in texts], "text", limit, "right", stride)
    for row, ids in enumerate(whole.ids):
        parts = [i for i, of in enumerate(found.of) if of == row]
        assert (len(parts) > 1) == (len(ids) > limit) == ("window" in found.metas[parts[0]])
        times = np.zeros(len(ids), int)
        for number, i in enumerate(parts):
            begin = number * stride
            assert found.ids[i] == ids[begin : begin + limit]
            assert found.metas[i].get("window", [1, 1]) == [number + 1, len(parts)]
            times[begin + np.flatnonzero(learned(found.metas[i]))] += 1
        assert times.tolist() == [0] + [1] * (len(ids) - 1)  # the first token has none before it
    assert not any(found.truncated)


def test_windows_without_a_target_are_left_out():
    tokenizer = decoders.tokenizer()
    said = ("the cat sees a dog and the dog sees the cat", " a bird sleeps")
    (whole,) = encode_rows(tokenizer, [said], "completion", 200, "right").ids
    found = encode_rows(tokenizer, [("a", " b"), said], "completion", 5, "right", 3)
    assert found.of[0] == 0 and set(found.of[1:]) == {1}
    assert found.metas[1]["window"][0] > 1 and found.metas[-1]["window"][0] == found.metas[-1]["window"][1]
    taught = [t for ids, meta in zip(found.ids[1:], found.metas[1:], strict=True)
              for t, is_target in zip(ids, learned(meta), strict=True) if is_target]  # fmt: skip
    assert tokenizer.decode(taught).strip() == "a bird sleeps</s>" and taught == whole[-len(taught) :]
    with pytest.raises(UserError, match="--stride 5: below the 5 tokens"):
        encode_rows(tokenizer, [said], "completion", 5, "right", 5)


def test_a_row_without_a_target_is_an_error():
    with pytest.raises(UserError, match=r"row 1 has no token to learn: .* beyond --max-length 3"):
        encode("completion", "the cat sees", " a dog", limit=3)
    with pytest.raises(UserError, match="row 1 has no token to learn"):
        encode("completion", "the cat sees", "")


def rows(path, *lines: dict) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def test_columns_say_what_rows_are(tmp_path):
    chats = rows(tmp_path / "chats.jsonl", *[{"messages": CHAT, "id": f"c{i}"} for i in range(20)])
    pairs = rows(tmp_path / "pairs.jsonl", *[{"prompt": f"a {i}", "completion": "b"} for i in range(20)])
    texts = rows(tmp_path / "texts.jsonl", *[{"text": f"a {i}"} for i in range(20)])
    labelled = rows(tmp_path / "labelled.jsonl", *[{"text": f"a {i}", "label": i % 2} for i in range(20)])
    for path, form in ((chats, "messages"), (pairs, "completion")):
        task = load_task(path)
        assert form_of(task.spec) == form and {s: len(r) for s, r in task.splits.items()} == {
            "train": 16, "validation": 2, "test": 2,
        }  # fmt: skip
    assert load_task(chats).rows("train").ids[0].startswith("c")
    assert json.loads(load_task(chats).rows("train").texts[0][0]) == CHAT
    assert load_task(texts).spec.target == "none" and load_task(texts, continues=True).spec.target == "tokens"
    assert load_task(texts, targets=("tokens",)).spec.target == "tokens"
    assert load_task(labelled, continues=True).spec.target == "class"
    assert load_task(labelled, continues=True, text="text", targets=("tokens",)).spec.target == "tokens"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": []}, "is no list of messages"),
        ({"messages": [{"role": "user"}]}, "holds no message"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no message of the assistant"),
        ({"messages": [{"role": "assistant", "content": "\ud800"}]}, "half a surrogate pair"),
        ({"prompt": "a", "completion": 3}, "'completion' is int, not text"),
        ({"prompt": "a"}, "'completion' is missing"),
    ],
)
def test_what_is_no_row_is_named(tmp_path, row, said):
    good = {"messages": CHAT} if "messages" in row else {"prompt": "a", "completion": "b"}
    with pytest.raises(TaskError, match=rf"rows.jsonl, row 3 \(line 3\).*{said}"):
        load_task(rows(tmp_path / "rows.jsonl", good, good, row))


def test_a_dataset_of_texts_is_a_task(tmp_path):
    for split, count in (("train", 30), ("test", 5)):
        rows(tmp_path / f"{split}.jsonl", *[{"text": f"{split} {i}"} for i in range(count)])
    task = load_task(f"hub:{tmp_path}", continues=True)
    assert {s: len(r) for s, r in task.splits.items()} == {"train": 27, "validation": 3, "test": 5}
    assert task.spec.target == "tokens" and task.rows("test").texts[0] == ("test 0",)
    assert load_task(f"hub:{tmp_path}", continues=True).version == task.version


def test_spans_of_learned_positions():
    assert np.flatnonzero(learned({"tokens": 6, "learn": [[1, 2], [4, 6]]})).tolist() == [1, 4, 5]
