"""Formats of a row: chats in the formats of OpenAI, ShareGPT and Alpaca, preferences, and labelled texts.

Each function takes a row's columns and raises FaultyRow with the problem and what fits. A null column counts as absent,
because Parquet gives every row all columns.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

from flows.data.examples import Message

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT = {
    **{role: role for role in ROLES},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "function_call": "assistant"},
    **{"observation": "tool", "function_response": "tool"},
}
"""{`from` of a ShareGPT turn: role}"""
ONE_TURN = {"prompt": "completion", "question": "answer", "instruction": "output"}
"""{column of the question: column of the answer}; an `instruction` may have an `input`, as in Alpaca."""
_DEEPEST = 32
"""Maximum nesting of tools and tool calls (levels)."""
_UNREAD = ("reasoning_content", "reasoning", "thinking", "thoughts", "function_call", "refusal", "audio", "images")
"""Keys of a turn that hold reasoning or media, which no template here shows."""
_OTHER_KINDS = {"preference": ("chosen", "rejected"), "classification": ("text", "label")}
"""{data.kind: columns that only rows of this kind have}"""


class FaultyRow(Exception):
    """A row that cannot be used."""


def chat(row: dict[str, Any]) -> list[Message]:
    """Return the row's chat: an optional system turn first, a user turn before the first answer, an answer last."""
    for column in ("messages", "conversations"):
        if row.get(column) is not None:
            return _whole(_listed(row[column], f"its {column} are"))
    for question, answer in ONE_TURN.items():
        if row.get(question) is not None and answer in row:
            return _one_turn(row, question, answer)
        if row.get(question) is not None:
            raise FaultyRow(f"it has no {answer}{spelled_otherwise(row, [answer])}")
    for kind, columns in _OTHER_KINDS.items():
        if all(column in row for column in columns):
            raise FaultyRow(f"it has {' and '.join(columns)}; set data.kind to {kind}")
    known = ["messages", "conversations", *ONE_TURN, *ONE_TURN.values()]
    raise FaultyRow(
        f"it has neither messages nor prompt and completion, but {', '.join(row) or 'nothing'}"
        + spelled_otherwise(row, known)
    )


def preference(row: dict[str, Any]) -> tuple[list[Message], list[Message], list[Message]]:
    """Return the chat up to the answer, the chosen continuation, and the rejected one.

    In the row, `chosen` and `rejected` are texts, lists of turns, or whole chats. Whole chats share their first turns,
    which are then returned as the chat up to the answer.
    """
    for column in ("chosen", "rejected"):
        if row.get(column) is None:
            raise FaultyRow(
                f"it has no {column}; a row of data.kind preference has prompt, chosen and rejected"
                + spelled_otherwise(row, ["prompt", "chosen", "rejected"])
            )
    prompt = _turns_of(row, "prompt", "user") if row.get("prompt") is not None else []
    chosen, rejected = (_turns_of(row, column, "assistant") for column in ("chosen", "rejected"))
    if chosen[0]["role"] == "assistant" and rejected[0]["role"] == "assistant":
        if not prompt:
            raise FaultyRow("it has no prompt, and chosen and rejected do not hold it")
    else:
        common = _common(chosen, rejected)
        begins = [turn for turn in common if turn["role"] != "system"][: len(prompt)]
        if prompt not in (begins, common[: len(prompt)]):
            raise FaultyRow("its chosen and rejected are whole chats that do not both begin with its prompt")
        prompt, chosen, rejected = common, chosen[len(common) :], rejected[len(common) :]
    for answer in (chosen, rejected):
        _check_order([*prompt, *answer])
        if answer[0]["role"] != "assistant":
            raise FaultyRow("its chosen and rejected differ before an assistant turn; only answers may differ")
    return prompt, chosen, rejected


def unpaired_preference(row: dict[str, Any]) -> tuple[list[Message], list[Message], bool]:
    """Return the chat up to the answer, the answer, and True if its label says that the answer is a good one.

    The answer is `completion`, text or turns after `prompt`; in whole chats it is the last turn.
    """
    if row.get("label") is None:
        if all(row.get(column) is not None for column in _OTHER_KINDS["preference"]):
            raise FaultyRow("it has chosen and rejected; set data.kind to preference")
        raise FaultyRow(
            "it has no label; a row of data.kind unpaired_preference has prompt, completion and label (true for a good "
            "answer, false for a bad one)" + spelled_otherwise(row, ["label"])
        )
    desirable = _flag(row["label"])
    if row.get("prompt") is None or row.get("completion") is None:
        turns = chat(row)
        return turns[:-1], turns[-1:], desirable
    prompt, completion = _turns_of(row, "prompt", "user"), _turns_of(row, "completion", "assistant")
    if row.get("system"):
        prompt = [{"role": "system", "content": _text(row, "system")}, *prompt]
    _check_order([*prompt, *completion])
    if completion[0]["role"] != "assistant":
        raise FaultyRow("its completion does not begin with an assistant turn")
    return prompt, completion, desirable


def _flag(label: Any) -> bool:
    """Return a label as True or False; CSV holds it as text."""
    flag = {"true": True, "1": True, "false": False, "0": False}.get(str(label).strip().lower())
    if flag is None:
        raise FaultyRow(f"its label is {label!r:.80}; give true for a good answer, or false for a bad one")
    return flag


def labelled(row: dict[str, Any]) -> tuple[str, str]:
    """Return the text and the name of its class; integers are names too."""
    for column in ("text", "label"):
        if row.get(column) is None:
            raise FaultyRow(
                f"it has no {column}; a row of data.kind classification has text and label"
                + spelled_otherwise(row, ["text", "label"])
            )
    label = row["label"]
    _check_data(label, "its label")
    if not isinstance(label, str | int) or not str(label).strip():
        raise FaultyRow(f"its label is {label!r:.80}; give a name or a whole number")
    return _text(row, "text"), str(label).strip()


def spelled_otherwise(row: dict[str, Any], known: Iterable[str]) -> str:
    """Return a hint at columns that differ from known ones only in capitals or spaces; "" if there are none."""
    columns = {column.strip().lower(): column for column in row if isinstance(column, str) and column not in known}
    matches = [column for column in known if column in columns]
    if not matches:
        return ""
    named = ", ".join(f"{columns[column]!r}" for column in matches)
    return f"; write {named} as {', '.join(matches)}: capitals and spaces count"


def weight(row: dict[str, Any]) -> float:
    """Return the factor of the row's loss; 1 without a `weight`."""
    number = row.get("weight")
    if number is None:
        return 1.0
    try:
        value = math.nan if isinstance(number, bool) else float(number)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise FaultyRow(f"its weight is {number!r:.80}; give a number of at least 0")
    return value


def tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the functions that the chat may call."""
    if row.get("tools") is None:
        return None
    functions = _listed(row["tools"], "its tools are")
    _check_data(functions, "its tools")
    return functions


def _one_turn(row: dict[str, Any], question: str, answer: str) -> list[Message]:
    prompt = _text(row, question)
    if question == "instruction" and row.get("input"):
        prompt = f"{prompt}\n\n{_text(row, 'input')}"
    system = [] if not row.get("system") else [{"role": "system", "content": _text(row, "system")}]
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": _text(row, answer)}]
    return [*system, *turns]


def _text(row: dict[str, Any], column: str) -> str:
    if not isinstance(row[column], str) or not row[column].strip():
        raise FaultyRow(f"its {column} is {'empty' if not row[column] else 'no text'}")
    _check_characters(row[column], f"its {column}")
    return row[column]


def _check_characters(text: str, subject: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may escape one half of a pair
        raise FaultyRow(f"{subject} has half a character at {error.start} ({text[error.start]!r}); fix it") from error


def _check_data(value: Any, subject: str) -> None:
    """Refuse values that JSON cannot write again: half characters, integers beyond 63 bits, deep nesting."""
    level = [value]
    for _ in range(_DEEPEST):
        for item in level:
            if isinstance(item, str):
                _check_characters(item, subject)
            if isinstance(item, int) and abs(item) >= 2**63:
                raise FaultyRow(f"{subject} has a number of more than 63 bits; write it as text")
        level = [part for item in level for part in _parts(item)]
        if not level:
            return
    raise FaultyRow(f"{subject} is nested more than {_DEEPEST} levels deep; make it flatter")


def _parts(value: Any) -> Iterable[Any]:
    return (*value.keys(), *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()


def _turns_of(row: dict[str, Any], column: str, role: str) -> list[Message]:
    """Return a list of messages, or text as one turn of `role`. CSV holds a list as JSON."""
    value = row[column]
    if isinstance(value, str) and not value.lstrip().startswith("[{"):
        return [{"role": role, "content": _text(row, column)}]
    turns = list(_turns(_listed(value, f"its {column} is text, or")))
    if not turns:
        raise FaultyRow(f"its {column} is empty")
    return turns


def _common(one: list[Message], other: list[Message]) -> list[Message]:
    """Return the turns with which both chats begin, except for the last turn of either, which is an answer."""
    count = 0
    while count < min(len(one), len(other)) - 1 and one[count] == other[count]:
        count += 1
    return one[:count]


def _listed(value: Any, subject: str) -> list[dict[str, Any]]:
    if isinstance(value, str):  # CSV has no lists
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise FaultyRow(f"{subject} no JSON: {error}") from error
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise FaultyRow(f'{subject} no list of {{"role": ..., "content": ...}}')
    return value


def _whole(value: list[dict[str, Any]]) -> list[Message]:
    messages = list(_turns(value))
    _check_order(messages)
    return messages


def _check_order(messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise FaultyRow("it has a system turn that is not the first")
    if not roles or roles[-1] != "assistant":
        raise FaultyRow("it has no completion: its last turn is not the assistant's")
    if "user" not in roles[: roles.index("assistant")]:
        raise FaultyRow("it has no user turn before the assistant's first")
    for before, role in itertools.pairwise(roles):
        if role == "tool" and before not in ("assistant", "tool"):
            raise FaultyRow(f"it has a tool turn after one of {before}; a tool answers the assistant")


def _turns(value: list[dict[str, Any]]) -> Iterator[Message]:
    for number, message in enumerate(value, start=1):
        name = message.get("role", message.get("from"))
        role = SHAREGPT.get(str(name), name) if "from" in message else name
        if role not in ROLES:
            raise FaultyRow(f"turn {number} has the role {name!r:.80}; give one of {', '.join(ROLES)}")
        _refuse_unread(message, number, role)
        content = _content(message.get("content") if message.get("content") is not None else message.get("value"))
        calls = message.get("tool_calls") if role == "assistant" else None
        if content is None or not (content.strip() or role == "system" or calls):
            raise FaultyRow(f"turn {number} ({role}) has no text as its content")
        _check_characters(content, f"turn {number} ({role})")
        turn: Message = {"role": role, "content": content}
        if calls:
            turn["tool_calls"] = calls
        for key in ("name", "tool_call_id"):
            if message.get(key) is not None:
                turn[key] = message[key]
        _check_data({key: turn[key] for key in turn if key not in ("role", "content")}, f"turn {number} ({role})")
        if not _is_trained(message, role, number):
            turn["train"] = False
        yield turn


def _refuse_unread(message: dict[str, Any], number: int, role: str) -> None:
    """Refuse keys that would be lost silently; templates differ in how they render them."""
    for key in _UNREAD:
        if message.get(key) in (None, "", [], {}):
            continue
        advice = {
            "function_call": "write it as tool_calls",
            "refusal": "write it as the content",
            "audio": "only text can be trained on; remove it, or the row",
            "images": "only text can be trained on; remove it, or the row",
        }.get(key, "put it into the content as the base's template has it, such as <think>...</think>, or remove it")
        raise FaultyRow(f"turn {number} ({role}) has {key}, which is not read; {advice}")


def _content(value: Any) -> str | None:
    """Return text, or the text of OpenAI's list of parts; "" for a turn that only calls tools."""
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        return "".join(str(part.get("text", "")) for part in value)
    return value if isinstance(value, str) else None


def _is_trained(message: dict[str, Any], role: str, number: int) -> bool:
    flag = message.get("train")
    if flag is None and message.get("weight") is not None:
        value = message["weight"]
        flag = bool(value) if isinstance(value, int | float) and value in (0, 1) else value
    if not isinstance(flag, bool | None):
        raise FaultyRow(f"turn {number} has the weight {flag!r:.80}; a turn's is 0 or 1, and `train` true or false")
    if flag and role != "assistant":
        raise FaultyRow(f"turn {number} ({role}) has `train`: true; only assistant turns can be trained on")
    return flag is not False
