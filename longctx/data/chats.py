"""Conversations: a list of messages as the tokenizer's chat template writes it, and rows in which each is whole.

Only what the assistant says is learned. Where the template marks it with {% generation %}, transformers tells which
characters these are. Otherwise they are found by prefix: the template writes the messages before an answer, and the
header that asks for one, as the beginning of what it writes with the answer. Where that does not hold, what the model
is asked at inference is not what it is trained on, and the conversation can't be read.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from longctx.data.documents import Chat
from longctx.data.tokens import Tokens
from longctx.errors import BadDocument, ChatTemplateError, ColumnError, DocumentsError, one_line

ASSISTANT = "assistant"
# The role of a message by the name that it comes under. human and gpt are what ShareGPT's conversations have.
ROLES = {role: role for role in ("system", "developer", "user", ASSISTANT, "tool")} | {
    "human": "user",
    "gpt": ASSISTANT,
}
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for them
OPEN_ROWS = 64  # that are filled side by side; with more, less of them is padding


# --- from messages to text -------------------------------------------------------------------------------------------


def read_chat(tokenizer: PreTrainedTokenizerFast, value: Any, column: str) -> Chat:
    """The conversation that a row has in a column.

    Raises:
        ColumnError: it is no list of messages.
        BadDocument: a message has no role that is known, the template refuses it, or nothing in it can be learned.
        ChatTemplateError: the tokenizer has no chat template that is fit for conversations.
    """
    messages = [read_message(message, n) for n, message in enumerate(list_of(value, column))]
    if not messages:
        return Chat("")
    has_marks = MARKS.search(chat_template(tokenizer)) is not None
    try:
        chat = chat_by_marks(tokenizer, messages) if has_marks else chat_by_prefix(tokenizer, messages)
    except DocumentsError:
        raise
    except Exception as error:  # of Jinja, of Python within it, or what the template raises itself
        raise BadDocument(f"the chat template does not take it: {one_line(error)}") from error
    if not chat.learned:
        raise BadDocument("the assistant says nothing in it, so that nothing could be learned")
    return chat


def list_of(value: Any, column: str) -> list:
    if not isinstance(value, list | None):
        raise ColumnError(f"{column} holds {value!r:.20}, not a list of messages")
    return value or []


def read_message(message: Any, number: int) -> dict[str, Any]:
    """A message as chat templates take it, from that or from ShareGPT's form, which has `from` and `value`.

    All else that it has is left as it is. A null is what Arrow has for a key that other messages have.
    """
    if not isinstance(message, dict):
        raise BadDocument(f"message {number} is {message!r:.20}, no object with a role")
    named: dict[str, Any] = {key: value for key, value in message.items() if value is not None}
    if "role" not in named and "from" in named:
        sharegpt = {"from": "role", "value": "content"}
        named = {sharegpt.get(key, key): value for key, value in named.items()}
    role = named.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise BadDocument(f"message {number} has the role {role!r:.20}, which is none of {', '.join(ROLES)}")
    return named | {"role": ROLES[role]}


def chat_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """The template that transformers takes; raises ChatTemplateError if there is none, or it doesn't show roles."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise ChatTemplateError("it has no chat template, by which to write conversations") from error
    if "role" not in template:
        raise ChatTemplateError("its chat template has no roles, so that one can't see who says what")
    return template


def chat_by_marks(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> Chat:
    special: dict[str, Any] = tokenizer.special_tokens_map
    rendered: Any = render_jinja_template(
        [messages], chat_template=chat_template(tokenizer), return_assistant_tokens_mask=True, **special
    )
    (text,), (learned,) = rendered
    return Chat(text, tuple((begin, end) for begin, end in learned if begin < end))


def chat_by_prefix(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> Chat:
    write = partial(tokenizer.apply_chat_template, tokenize=False)
    whole, learned = str(write(messages)), []
    for n, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        if n == 0:
            raise BadDocument("it begins with the assistant, and there is nothing that would be answered")
        before = str(write(messages[:n], add_generation_prompt=True))
        answered = str(write(messages[: n + 1]))
        if not (answered.startswith(before) and whole.startswith(answered)):
            raise BadDocument(
                f"the chat template writes the messages before message {n}, or those up to it, in another way than "
                "within the whole conversation, so that the answer can't be told; {% generation %} in it would mark it"
            )
        learned.append((len(before), len(answered)))
    borders = tuple(place for span in learned for place in span)
    return Chat(whole, tuple((begin, end) for begin, end in learned if begin < end), borders)


# --- from tokens to rows ---------------------------------------------------------------------------------------------


@dataclass
class OpenRow:
    """A row that is being filled. `learned` is a part of Tokens, and never None here."""

    parts: list[Tokens] = field(default_factory=list)
    size: int = 0


def parts_of_rows(tokens: Iterator[Tokens], sequence_length: int, counts: dict) -> Iterator[Tokens]:
    """Each conversation by itself, if it fits in a row; otherwise in parts that do, and `counts` says how many were.

    The first token of a part that is not the conversation's first is not learned: what it follows is not in its row.
    """
    for some in tokens:
        assert some.learned is not None
        for ids, learned in zip(*(np.split(of, some.begins[1:]) for of in (some.ids, some.learned)), strict=True):
            counts["split_conversations"] += len(ids) > sequence_length
            for begin in range(0, len(ids), sequence_length):
                part = slice(begin, begin + sequence_length)
                if begin:
                    learned[begin] = False
                yield replace(some, ids=ids[part], learned=learned[part])


def fill_rows(parts: Iterator[Tokens], sequence_length: int) -> Iterator[list[Tokens]]:
    """What is in each row: each part is put into the fullest of OPEN_ROWS rows that has room for it."""
    rows: list[OpenRow] = []
    for part in parts:
        size = len(part.ids)
        row = max((row for row in rows if row.size + size <= sequence_length), key=lambda row: row.size, default=None)
        if row is None:
            if len(rows) == OPEN_ROWS:
                yield taken(rows, max(rows, key=lambda row: row.size))
            row = OpenRow()
            rows.append(row)
        row.parts.append(part)
        row.size += size
        if row.size == sequence_length:
            yield taken(rows, row)
    yield from (row.parts for row in rows)


def taken(rows: list[OpenRow], row: OpenRow) -> list[Tokens]:
    del rows[next(n for n, other in enumerate(rows) if other is row)]
    return row.parts


def padded(parts: list[Tokens], sequence_length: int, padding: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A row of its parts: its token ids, int32; where parts begin, int64; and which tokens are learned, bool.

    The row is filled up with the token `padding`, of which none is learned. It is a document of its own.
    """
    sizes = [len(part.ids) for part in parts]
    left = sequence_length - sum(sizes)
    ids = np.concatenate([part.ids for part in parts] + [np.full(left, padding, np.int32)])
    learned = np.concatenate([part.learned for part in parts if part.learned is not None] + [np.zeros(left, bool)])
    begins = np.cumsum([0, *sizes], dtype=np.int64)
    return ids, begins[begins < sequence_length], learned
