"""Conversations become the tokens that transformers makes of them, whole in a row, and the assistant's are learned."""

import itertools
import json
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import bookcorpus
import longctx.data.chats
from longctx.data.chats import read_chat
from longctx.data.packing import find_boundaries
from longctx.data.rows import IGNORE_INDEX, load_row, open_dataset
from longctx.data.tokens import tokenize_chats
from longctx.errors import UserError

datasets = pytest.importorskip("datasets", reason="bookcorpus.py saves rows with the package datasets")

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
THINKING_ONCE = (  # as Qwen3's: what the assistant thought is left out once it was answered
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>so</think>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"llama3": LLAMA3, "chatml": CHATML, "marked": MARKED, "mistral": MISTRAL}


@pytest.fixture(scope="module")
def tokenizer(llama3_tokenizer_path):
    loaded = AutoTokenizer.from_pretrained(llama3_tokenizer_path)
    loaded.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return loaded


@pytest.fixture
def chat_tokenizer(tokenizer, monkeypatch):
    """The real tokenizer with one of the templates."""

    def with_template(template):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return tokenizer

    return with_template


@pytest.fixture
def run(tmp_path, monkeypatch, chat_tokenizer):
    """Runs bookcorpus.main in this process; returns the folder written."""

    def run_main(data, template=LLAMA3, sequence_length=64, **options):
        monkeypatch.setattr(bookcorpus, "load_tokenizer", lambda name: chat_tokenizer(template))
        save_path = tmp_path / f"rows{len(list(tmp_path.glob('rows*')))}"
        given = {"data_path_or_name": data, "tokenizer_path_or_name": "chat", "save_path": save_path, "num_proc": 1}
        given |= {"sequence_length": sequence_length} | options
        (tmp_path / "chat").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path)
        bookcorpus.main([word for key, value in given.items() for word in (f"--{key}", str(value)) if word != "True"])
        return save_path

    return run_main


def by_transformers(tokenizer, messages) -> tuple[list[int], list[int]] | None:
    """A conversation's tokens and which are learned; None if, token by token, an answer does not follow its prompt."""
    write = partial(tokenizer.apply_chat_template, return_dict=True)
    if "{% generation %}" in tokenizer.chat_template:
        whole = write(messages, return_assistant_tokens_mask=True)
        return whole["input_ids"], whole["assistant_masks"]
    ids = write(messages)["input_ids"]
    learned = [0] * len(ids)
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            before = write(messages[:n], add_generation_prompt=True)["input_ids"]
            answered = write(messages[: n + 1])["input_ids"]
            if ids[: len(before)] != before or ids[: len(answered)] != answered:
                return None
            learned[len(before) : len(answered)] = [1] * (len(answered) - len(before))
    return ids, learned


def documents_of(ids, begins, learned, sequence_length) -> list[tuple[list[int], list[int]]]:
    """The tokens of each document in rows, and which are learned, in the order of their tokens."""
    cuts = sorted({*begins.tolist(), *range(0, len(ids), sequence_length), len(ids)})
    spans = [slice(*cut) for cut in itertools.pairwise(cuts)]
    return sorted((ids[span].tolist(), learned[span].astype(int).tolist()) for span in spans)


texts = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20)
words = st.sampled_from(["To be, or not to be", "é\U0001f600 漢字", "(so)", "\nNo", "  Two\n\n", "Nay. ", "1,234"])
turns = st.lists(st.tuples(texts | words, texts | words), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.lists(turns, min_size=1, max_size=6),
    kind=st.sampled_from(list(TEMPLATES)),
    sequence_length=st.integers(100, 300),
    open_rows=st.integers(1, 3),
)
def test_rows_have_the_tokens_and_masks_of_transformers_each_conversation_whole_and_all_of_them(
    chat_tokenizer, data, kind, sequence_length, open_rows
):
    tokenizer = chat_tokenizer(TEMPLATES[kind])
    expected, chats = [], []
    for turns in data:
        said = [("user", "assistant")] * len(turns)
        messages = [
            {"role": role, "content": text}
            for roles, pair in zip(said, turns, strict=True)
            for role, text in zip(roles, pair, strict=True)
        ]
        chats.append((read_chat(tokenizer, messages, "messages"), 1))
        expected.append(by_transformers(tokenizer, messages))
    tokens = list(tokenize_chats(iter(chats), tokenizer, 1))
    assert sum(len(some.bad) for some in tokens) == expected.count(None)
    whole = [chat for chat in expected if chat is not None and len(chat[0]) <= sequence_length]
    n_split, padding = len(expected) - expected.count(None) - len(whole), tokenizer.eos_token_id
    counts = {"largest_token": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(longctx.data.chats, "OPEN_ROWS", open_rows)
        blocks = list(bookcorpus.packed_whole(iter(tokens), sequence_length, padding, counts))
    found = [chat for block in blocks for chat in documents_of(block.ids, block.begins, block.learned, sequence_length)]
    for chat in whole:
        found.remove(chat)
    rest = [(ids, learned) for ids, learned in found if set(ids) != {padding}]
    assert counts["split_conversations"] == n_split
    assert (not rest) == (n_split == 0)
    assert all(not any(learned) for ids, learned in found if set(ids) == {padding})


CONVERSATION = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "To be?"},
    {"role": "assistant", "content": "Or\n\n"},
    {"role": "user", "content": "Or what?"},
    {"role": "assistant", "content": "Not \U0001f600"},
]
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = [{"from": NAMES[message["role"]], "value": message["content"]} for message in CONVERSATION]


def saved(folder: Path) -> list[dict]:
    return datasets.load_from_disk(str(folder)).to_list()


@pytest.mark.parametrize("template", [LLAMA3, CHATML, MARKED], ids=["llama3", "chatml", "marked"])
def test_both_forms_of_the_column_in_every_kind_of_data_become_the_same_rows(run, tmp_path, tokenizer, template):
    for kind in ("messages", "conversations"):
        rows = [{"id": n, kind: CONVERSATION if kind == "messages" else SHAREGPT} for n in range(3)]
        (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{kind}.parquet")
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / f"{kind} saved")
    (tmp_path / "named.jsonl").write_text(json.dumps({"text": "not this", "chat": CONVERSATION}) + "\n")
    data = [f"{kind}{of}" for kind in ("messages", "conversations") for of in (".jsonl", ".parquet", " saved")]
    made = [run(tmp_path / name, template, num_proc=1 + (name == "messages.jsonl")) for name in data]
    ids, learned = by_transformers(tokenizer, CONVERSATION)
    left = 64 - len(ids)
    row = {"input_ids": ids + [tokenizer.eos_token_id] * left, "assistant_masks": learned + [0] * left}
    expected = row | {"document_starts": [0, len(ids)]}
    for folder in made:
        assert saved(folder) == [expected] * 3
    assert saved(run(tmp_path / "named.jsonl", template, text_key="chat")) == [expected]


def test_training_learns_what_the_assistant_says_and_nothing_else(run, tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CONVERSATION}) + "\n")
    rows = open_dataset(str(run(tmp_path / "a.jsonl")))
    tokens, labels = load_row(rows, 0, 64, len(tokenizer))
    assert tokenizer.decode(labels[labels != IGNORE_INDEX]) == "Or<|eot_id|>Not \U0001f600<|eot_id|>"
    after = tokens.roll(-1)
    assert (labels == after)[labels != IGNORE_INDEX].all()
    ids, _ = by_transformers(tokenizer, CONVERSATION)
    assert find_boundaries(str(tmp_path), rows, 64, None).starts(0) == (0, len(ids))


def test_a_conversation_longer_than_a_row_is_split_and_that_and_the_padding_are_said(run, tmp_path, tokenizer, capsys):
    long = [{"role": "user", "content": "Again"}, {"role": "assistant", "content": "and again " * 60}]
    chats = [CONVERSATION, long, CONVERSATION]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    folder = run(tmp_path / "a.jsonl", sequence_length=50)
    ids, learned = by_transformers(tokenizer, long)
    parts = [(ids[at : at + 50], [0] * bool(at) + learned[at + bool(at) : at + 50]) for at in range(0, len(ids), 50)]
    rows = [(row["input_ids"], row["assistant_masks"]) for row in saved(folder)]
    assert len(parts) == 3 and all(part in rows for part in parts[:2])
    record = json.loads((folder / "corpus.json").read_text())
    short, n_learned = by_transformers(tokenizer, CONVERSATION)
    assert record["tokens"] == len(ids) + 2 * len(short)
    assert record["padding"] == 50 * record["rows"] - record["tokens"]
    assert record["learned_tokens"] == sum(learned) - 2 + 2 * sum(n_learned)
    assert (record["split_conversations"], record["chat_template"]) == (1, LLAMA3)
    said = capsys.readouterr().out
    assert (
        f"written by the chat template: {record['learned_tokens']} tokens are learned, those of the assistant" in said
    )
    assert f"{record['padding']} tokens of the rows ({record['padding'] / 50 / record['rows']:.1%}) are padding" in said
    assert "1 conversations are longer than a row and were split" in said


def test_what_messages_have_besides_reaches_the_template_as_it_is(chat_tokenizer):
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }};{% endfor %}"
    )
    call = [{"type": "function", "function": {"name": "f", "arguments": {"x": [1, None, "é"]}}}]
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "", "tool_calls": call}]
    messages += [{"role": "tool", "content": "4", "name": None}]
    tokenizer = chat_tokenizer(template)
    chat = read_chat(tokenizer, messages, "messages")
    assert chat.text == f"user:u;assistant:{json.dumps(call, ensure_ascii=False)};tool:4;"
    assert [chat.text[begin:end] for begin, end in chat.learned] == [chat.text[len("user:u;") : -len("tool:4;")]]


# What is wrong, in one sentence


@pytest.mark.parametrize(
    ("messages", "template", "sentence"),
    [
        (
            [{"role": "narrator", "content": "a"}],
            LLAMA3,
            "message 0 has the role 'narrator', which is none of system, dev",
        ),
        ([{"from": "bard", "value": "a"}], LLAMA3, "message 0 has the role 'bard', which is none of system, developer"),
        (
            [{"content": "a"}],
            LLAMA3,
            "message 0 has the role None, which is none of system, developer, user, assistant",
        ),
        (["a"], LLAMA3, "message 0 is 'a', no object with a role"),
        (CONVERSATION[:2], LLAMA3, "the assistant says nothing in it, so that nothing could be learned"),
        (CONVERSATION[2:], LLAMA3, "it begins with the assistant, and there is nothing that would be answered"),
        (CONVERSATION, MISTRAL, "the chat template does not take it: Conversation roles must alternate user/assistant"),
        (
            [*CONVERSATION[:2], {"role": "assistant", "content": 3}],
            CHATML,
            "the chat template does not take it: can only",
        ),
        (CONVERSATION, THINKING_ONCE, "the chat template writes the messages before message 2, or those up to it, in "),
    ],
)
def test_a_conversation_that_cannot_be_written_is_named_with_the_reason(run, tmp_path, messages, template, sentence):
    rows = [{"messages": CONVERSATION[1:] if template != THINKING_ONCE else CONVERSATION[:3]}, {"messages": messages}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as error:
        run(tmp_path / "a.jsonl", template)
    assert str(error.value).startswith(f"--data_path_or_name {tmp_path / 'a.jsonl'}: line 2: {sentence}")
    assert str(error.value).endswith("--skip_bad_documents")
    record = json.loads((run(tmp_path / "a.jsonl", template, skip_bad_documents=True) / "corpus.json").read_text())
    assert record["documents"] == 1
    assert record["bad_documents"][0].startswith(f"line 2: {sentence}")


def test_an_answer_that_begins_within_a_token_of_its_prompt_is_refused_or_left_out(run, tmp_path, tokenizer):
    joined = [CONVERSATION[1], {"role": "assistant", "content": "\nNo"}]  # "\n\n" is one token, and ends the header
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in (CONVERSATION, joined)))
    with pytest.raises(
        UserError, match="the conversation that begins with .*: a token is partly the assistant's; mend"
    ):
        run(tmp_path / "a.jsonl", CHATML)
    folder = run(tmp_path / "a.jsonl", CHATML, skip_bad_documents=True)
    assert len(json.loads((folder / "corpus.json").read_text())["bad_documents"]) == 1
    assert saved(folder)[0]["document_starts"] == [0, len(by_transformers(tokenizer, CONVERSATION)[0])]


def test_a_tokenizer_whose_template_cannot_write_conversations_is_refused(run, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CONVERSATION}) + "\n")
    for template, sentence in {
        None: "it has no chat template, by which to write conversations",
        "{% for m in messages %}{{ m.content }}{% endfor %}": "its chat template has no roles, so that one can't see",
    }.items():
        with pytest.raises(
            UserError, match=f"^--tokenizer_path_or_name chat: {sentence}.*; name that of a chat model$"
        ):
            run(tmp_path / "a.jsonl", template)


def test_conversations_where_text_is_asked_for_and_the_other_way_round_are_refused(run, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CONVERSATION}) + "\n" + json.dumps({"messages": "a"}))
    with pytest.raises(UserError, match="line 2: messages holds 'a', not a list of messages; name a column of text"):
        run(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="line 1: no column text, only messages; name a column"):
        run(tmp_path / "a.jsonl", group_by="repo,path")
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "a.jsonl").write_text(json.dumps({"messages": CONVERSATION}))
    (tmp_path / "both" / "b.txt").write_text("To be")
    with pytest.raises(UserError, match="both: b.txt: a file of text has no conversations; mend it, or leave out"):
        run(tmp_path / "both")
    (tmp_path / "c.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "a\0"}, *CONVERSATION[2:3]]})
    )
    with pytest.raises(UserError, match="line 1: its text has a NUL, which is no text; mend it"):
        run(tmp_path / "c.jsonl")


def test_empty_conversations_are_counted_and_left_out(chat_tokenizer):
    tokenizer = chat_tokenizer(LLAMA3)
    chats = [(read_chat(tokenizer, value, "messages"), 1) for value in ([], None)]
    (tokens,) = tokenize_chats(iter(chats), tokenizer, 1)
    assert (tokens.empty_documents, tokens.documents, tokens.ids.dtype) == (2, 0, np.int32)
