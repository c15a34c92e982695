"""Turns of a chat as OpenAI and ShareGPT write them, with every field that they have.

A turn keeps its fields. Fields with another name or form than templates expect are renamed: `from` and `value`,
`function_call`, the role `developer`, reasoning under any of its names. A field that no template shows is found later,
when the chat is rendered (`flows.data.chat`); nothing is dropped here but what `data.ignored_fields` names.
"""

import itertools
import json
from collections.abc import Collection, Iterable, Iterator
from difflib import get_close_matches
from typing import Any

from flows.data.examples import REASONING_FIELD, Message

ROLES = ("system", "user", "assistant", "tool")
_OPENAI = {"developer": "system", "function": "tool"}
"""{role of newer or older OpenAI formats: role}"""
_SHAREGPT = {
    **{role: role for role in ROLES},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "function_call": "assistant"},
    **{"observation": "tool", "function_response": "tool"},
}
"""{`from` of a ShareGPT turn: role}"""
REASONING = (REASONING_FIELD, "thinking", "reasoning", "thoughts")
"""Names of the field with an assistant turn's reasoning; the first is that of this package."""
KNOWN = ("role", "from", "content", "value", "tool_calls", "tool_call_id", "name", "train", "weight", *REASONING)
"""Fields that have a meaning of their own."""
TURN = '{"role": ..., "content": ...}'
TOOL = '{"type": "function", "function": {"name": ..., ...}}'
FUNCTION = '{"name": ..., "parameters": ...}'
PAIR = "[question, answer]"
"""Items of lists, as errors name them."""
_MEDIA = ("audio", "images", "image", "video", "videos")
_DEEPEST = 32
"""Maximum nesting of tools and tool calls (levels)."""


class FaultyRow(Exception):
    """A row that cannot be used."""


def read_turns(value: list[dict[str, Any]], ignored: Collection[str], first: int = 1) -> Iterator[Message]:
    """Yield the turns of a list of messages.

    Args:
        value: The messages.
        ignored: Fields that are left out; `thinking` also leaves out content parts of this type.
        first: Number of the first turn, for errors.

    Raises:
        FaultyRow: A turn has no text, an unknown role, or a field that cannot be used.
    """
    for number, message in enumerate(value, start=first):
        fields = {key: item for key, item in message.items() if key not in ignored and not _is_empty(item)}
        role = _role(message, number)
        subject = f"turn {number} ({role})"
        content, thoughts = _content(fields, subject)
        calls = _calls(fields, message, content, role, subject)
        if calls and message.get("from") == "function_call":
            content = ""
        if not (content.strip() or role == "system" or calls):
            raise FaultyRow(f"{subject} has no text as its content; give it text, or remove the turn")
        check_characters(content, subject)
        turn: Message = {"role": role, "content": content}
        if calls:
            turn["tool_calls"] = calls
        reasoning = _reasoning(fields, [] if "thinking" in ignored else thoughts, role, subject)
        if reasoning:
            turn[REASONING_FIELD] = reasoning
        turn |= {key: fields[key] for key in ("name", "tool_call_id") if key in fields}
        turn |= _others(fields, subject)
        check_data({key: turn[key] for key in turn if key not in ("role", "content")}, subject)
        if not _is_trained(fields, role, number):
            turn["train"] = False
        yield turn


def listed(value: Any, subject: str, like: str = TURN, of: type = dict) -> list[Any]:
    """Return a list of objects, which CSV holds as JSON. Raises FaultyRow, which names `like`, for anything else."""
    if isinstance(value, str):  # CSV has no lists
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise FaultyRow(f"{subject} no JSON: {error}; write a list of {like}") from error
    if not isinstance(value, list) or not all(isinstance(item, of) for item in value):
        raise FaultyRow(f"{subject} no list of {like}")
    return value


def check_order(messages: list[Message]) -> None:
    """Raise FaultyRow if the order of the roles is no chat that ends with an answer."""
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise FaultyRow("it has a system turn that is not the first; move it to the beginning, or remove it")
    if not roles or roles[-1] != "assistant":
        raise FaultyRow(
            "it has no completion: its last turn is not the assistant's; add the answer, or remove the turn"
        )
    if "user" not in roles[: roles.index("assistant")]:
        raise FaultyRow("it has no user turn before the assistant's first; add the question, or remove the row")
    for before, role in itertools.pairwise(roles):
        if role == "tool" and before not in ("assistant", "tool"):
            raise FaultyRow(f"it has a tool turn after one of {before}; a tool answers the assistant")


def check_characters(text: str, subject: str) -> None:
    """Raise FaultyRow for text that cannot be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may escape one half of a pair
        raise FaultyRow(f"{subject} has half a character at {error.start} ({text[error.start]!r}); fix it") from error


def check_data(value: Any, subject: str) -> None:
    """Refuse values that JSON cannot write again: other types, half characters, integers over 63 bits, deep nesting."""
    level = [value]
    for _ in range(_DEEPEST):
        for item in level:
            if isinstance(item, str):
                check_characters(item, subject)
            if not isinstance(item, str | int | float | dict | list | None):
                raise FaultyRow(f"{subject} has a {type(item).__name__}, which is not of JSON; write it as text")
            if isinstance(item, int) and abs(item) >= 2**63:
                raise FaultyRow(f"{subject} has a number of more than 63 bits; write it as text")
        level = [part for item in level for part in _parts(item)]
        if not level:
            return
    raise FaultyRow(f"{subject} is nested more than {_DEEPEST} levels deep; make it flatter")


def close_to_known(field: str) -> str:
    """Return a hint at the known field that a name may misspell; "" if none is near."""
    near = get_close_matches(field.strip().lower(), KNOWN, n=1)
    return f"; did you mean {near[0]}?" if near and near[0] != field else ""


def _parts(value: Any) -> Iterable[Any]:
    return (*value.keys(), *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()


def _is_empty(value: Any) -> bool:
    """Return True for a value without content; Parquet gives absent fields null, also inside objects."""
    level = [value]
    while level:
        if any(item not in (None, "") for item in level if not isinstance(item, dict | list)):
            return False
        level = [part for item in level for part in _values(item)]
    return True


def _values(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _role(message: dict[str, Any], number: int) -> str:
    names = [(message.get("role"), _OPENAI), (message.get("from"), _SHAREGPT)]
    roles = [renamed.get(str(name), name) for name, renamed in names if name is not None]
    if len(set(map(str, roles))) > 1:
        raise FaultyRow(f"turn {number} has the role {roles[0]!r:.80} and is from {roles[1]!r:.80}; leave one out")
    role = roles[0] if roles else None
    if role not in ROLES:
        given = message.get("role", message.get("from"))
        raise FaultyRow(f"turn {number} has the role {given!r:.80}; give one of {', '.join(ROLES)}")
    return role


def _content(fields: dict[str, Any], subject: str) -> tuple[str, list[str]]:
    """Return a turn's text, and the texts of its parts of the type thinking."""
    texts = [fields[key] for key in ("content", "value", "refusal") if key in fields]
    if any(text != texts[0] for text in texts):
        raise FaultyRow(f"{subject} has content beside a value or refusal that differs; leave one out")
    if not texts:
        return "", []
    value = texts[0]
    if isinstance(value, str):
        return value, []
    text, thoughts = "", []
    if not isinstance(value, list):
        raise FaultyRow(f"{subject} has no text as its content, but {value!r:.80}; write it as text")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "refusal", "thinking") or not isinstance(part.get(kind, ""), str):
            raise FaultyRow(
                f"{subject} has no text as its content, but the part {part!r:.80}; only parts of the type text, "
                "refusal or thinking can be trained on, with text under this name"
            )
        if others := sorted(key for key, item in part.items() if key not in ("type", kind) and item):
            raise FaultyRow(f"{subject} has {', '.join(others)} in a part of its content, which is not read; remove it")
        if kind == "thinking":
            thoughts.append(part.get(kind, ""))
        else:
            text += part.get(kind, "")
    return text, thoughts


def _calls(fields: dict[str, Any], message: dict[str, Any], content: str, role: str, subject: str) -> Any:
    """Return the tool calls of a turn as templates expect them; None if there are none."""
    calls = fields.get("tool_calls")
    if "function_call" in fields:
        if calls:
            raise FaultyRow(f"{subject} has tool_calls and function_call; write all of them as tool_calls")
        calls = [{"type": "function", "function": fields["function_call"]}]
    if message.get("from") == "function_call" and not calls:
        calls = _sharegpt_calls(content)
    if not calls:
        return None
    if role != "assistant":
        raise FaultyRow(f"{subject} has tool_calls; only the assistant calls tools")
    return [_with_arguments(call) for call in calls] if isinstance(calls, list) else calls


def _sharegpt_calls(content: str) -> Any:
    """Return the calls of a ShareGPT turn from function_call; None if its text is no call as JSON."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    functions = value if isinstance(value, list) else [value]
    if not functions or not all(isinstance(one, dict) and "name" in one for one in functions):
        return None
    return [{"type": "function", "function": one} for one in functions]


def _with_arguments(call: Any) -> Any:
    """Return a tool call whose arguments are an object; OpenAI writes them as the text of one."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call


def _reasoning(fields: dict[str, Any], thoughts: list[str], role: str, subject: str) -> str | None:
    texts = [fields[name] for name in REASONING if name in fields] + (["".join(thoughts)] if thoughts else [])
    if not texts:
        return None
    name = next((name for name in REASONING if name in fields), "thinking")
    if role != "assistant":
        raise FaultyRow(f"{subject} has {name}; only the assistant's turns have reasoning")
    if not all(isinstance(text, str) for text in texts):
        raise FaultyRow(f"{subject} has {name} that is no text; write it as text, or name it in data.ignored_fields")
    if any(text != texts[0] for text in texts):
        raise FaultyRow(f"{subject} has reasoning under two names that differs; leave one out by data.ignored_fields")
    return texts[0]


def _others(fields: dict[str, Any], subject: str) -> dict[str, Any]:
    """Return the fields without a meaning here, which the chat template may show."""
    for name in _MEDIA:
        if name in fields:
            raise FaultyRow(f"{subject} has {name}, and only text can be trained on; remove it, or the row")
    return {key: value for key, value in fields.items() if key not in (*KNOWN, "refusal", "function_call")}


def _is_trained(fields: dict[str, Any], role: str, number: int) -> bool:
    flag = fields.get("train")
    if flag is None and "weight" in fields:
        value = fields["weight"]
        flag = bool(value) if isinstance(value, int | float) and value in (0, 1) else value
    if not isinstance(flag, bool | None):
        raise FaultyRow(f"turn {number} has the weight {flag!r:.80}; a turn's is 0 or 1, and `train` true or false")
    if flag and role != "assistant":
        raise FaultyRow(f"turn {number} ({role}) has `train`: true; only assistant turns can be trained on")
    return flag is not False
