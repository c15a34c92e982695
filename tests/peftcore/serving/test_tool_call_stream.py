"""Answers with tool calls: whatever pieces the text arrives in, calls become calls, and all other text is content."""

import itertools
import json
from typing import Any

import pytest

from peftcore.serving.tool_call_stream import ToolCallStream
from peftcore.serving.tool_formats import FORMATS, HERMES, LLAMA3, MISTRAL, ToolFormat

NAMES = {"add", "weather"}
CITY = {"city": 'Köln "am" Rhein {}', "days": [1, {"a": "}"}]}
WEATHER = json.dumps(CITY, ensure_ascii=False)


def parse(
    form: ToolFormat, text: str, size: int = 1, is_parallel: bool = True, is_cut: bool = False
) -> tuple[ToolCallStream, list[dict[str, Any]]]:
    """Parse a text that arrives in pieces of `size` characters; return the parser and its deltas."""
    stream, deltas = ToolCallStream(form, NAMES, is_parallel), []
    for start in range(0, len(text), size):
        deltas += stream.push(text[start : start + size])
        if stream.done:
            break
    return stream, deltas + stream.finish(is_cut)


def joined(deltas: list[dict[str, Any]]) -> tuple[str, list[tuple[str, str]]]:
    """What a client makes of deltas: content, and (name, arguments) of each call."""
    content, calls = "", dict[int, list[str]]()
    for delta in deltas:
        content += delta.get("content", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["type"] == "function" and call["index"] == len(calls)
                calls[call["index"]] = [call["function"]["name"], ""]
            calls[call["index"]][1] += call["function"]["arguments"]
    return content, [(name, arguments) for name, arguments in calls.values()]


ANSWERS: list[tuple[ToolFormat, str, str, list[tuple[str, str]]]] = [
    (HERMES, "Hello  you\n", "Hello  you\n", []),
    (
        HERMES,
        f'<tool_call>\n{{"name": "weather", "arguments": {WEATHER}}}\n</tool_call>',
        "",
        [("weather", WEATHER)],
    ),
    (
        HERMES,
        'Let me see. \n<tool_call>{"name":"add","arguments":{}}</tool_call>\n'
        f'<tool_call>\n{{"name": "weather", "arguments": {WEATHER}}}\n</tool_call>\n',
        "Let me see.",
        [("add", "{}"), ("weather", WEATHER)],
    ),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "", [("add", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("add", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "add"}</tool_call> Done.', " Done.", [("add", "{}")]),
    (HERMES, '<tool_call>{"name": "add", "arguments": {}} and more', " and more", [("add", "{}")]),
    (LLAMA3, '{"name": "add", "parameters": {"a": 1}}', "", [("add", '{"a": 1}')]),
    (LLAMA3, ' {"type": "function", "name": "add", "parameters": {"a": 1}}', "", [("add", '{"a": 1}')]),
    (
        LLAMA3,
        '<|python_tag|>{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {}}',
        "",
        [("add", '{"a": 1}'), ("add", "{}")],
    ),
    (LLAMA3, 'I say {"name": "add", "parameters": {}}', 'I say {"name": "add", "parameters": {}}', []),
    (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": [1]}}, {"name": "weather", "arguments": {}}]',
        "",
        [("add", '{"a": [1]}'), ("weather", "{}")],
    ),
    (MISTRAL, "a [TOOL list] [", "a [TOOL list] [", []),
]
"""(form, answer, its content, its calls)"""


@pytest.mark.parametrize(("form", "answer", "content", "calls"), ANSWERS)
def test_deltas_add_up_to_the_calls_whatever_the_pieces(
    form: ToolFormat, answer: str, content: str, calls: list[tuple[str, str]]
) -> None:
    for size in (1, 2, 3, 7, 1000):
        stream, deltas = parse(form, answer, size)
        assert joined(deltas) == (content, calls), size
        assert (stream.content, [(one.name, one.arguments) for one in stream.calls]) == (content, calls)


def test_arguments_arrive_in_pieces_as_the_model_writes_them() -> None:
    _, deltas = parse(HERMES, f'<tool_call>{{"name": "weather", "arguments": {WEATHER}}}</tool_call>', 5)
    head, *pieces = [delta["tool_calls"][0] for delta in deltas]
    assert head["function"] == {"name": "weather", "arguments": ""} and head["id"].startswith("call_")
    assert len(pieces) > 5 and all(set(piece) == {"index", "function"} for piece in pieces)


MALFORMED = [
    (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    (HERMES, "<tool_call>add(1)</tool_call>"),
    (HERMES, '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
    (HERMES, "<tool_call>"),
    (HERMES, "<tool_ca"),
    (HERMES, '<tool_call>{"name": 3}</tool_call>'),
    (LLAMA3, '{"a": 1}'),
    (LLAMA3, '{"name": "add", "para'),
    (LLAMA3, "  \n"),
    (MISTRAL, "[TOOL_CALLS] add"),
    (MISTRAL, "[TOOL_CALLS] "),
    (MISTRAL, '[TOOL_CALLS] [{"name": "unknown", "arguments": {}}]'),
]


@pytest.mark.parametrize(("form", "answer"), MALFORMED)
def test_a_malformed_call_is_content(form: ToolFormat, answer: str) -> None:
    for size in (1, 4, 1000):
        stream, deltas = parse(form, answer, size)
        assert stream.content == answer and not stream.calls
        assert joined(deltas) == (answer, [])


@pytest.mark.parametrize("answer", ['<tool_call>{"name": "add", "arguments": {"a": 1,}}</tool_call> Yes.', "<tool_call>"
                                    '{"name": "add", "arguments": {"a": 1'])  # fmt: skip
def test_a_call_that_turns_out_malformed_is_lost_in_no_way(answer: str) -> None:
    """Deltas that were sent cannot be taken back, so a client that streams has one part as arguments."""
    stream, deltas = parse(HERMES, answer)
    assert stream.content == answer and not stream.calls
    content, [(_, arguments)] = joined(deltas)
    assert answer.endswith(arguments + content)


def test_a_call_that_the_token_limit_cuts_stays_a_call() -> None:
    stream, deltas = parse(HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1', is_cut=True)
    assert joined(deltas) == ("", [("add", '{"a": 1')])
    assert [one.arguments for one in stream.calls] == ['{"a": 1'] and not stream.content


def test_without_parallel_calls_the_first_call_is_the_last() -> None:
    call = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    stream, deltas = parse(HERMES, call + call, is_parallel=False)
    assert stream.done and joined(deltas) == ("", [("add", "{}")])


@pytest.mark.parametrize("form", FORMATS.values())
def test_no_text_is_lost(form: ToolFormat) -> None:
    """All sequences of pieces of calls: content has every text that no call took."""
    marker = form.marker
    pieces = [marker, '{"name": "add", ', f'"{form.arguments}": {{}}}}', form.opening or " ", form.closing or "x", "ö"]
    for chosen in itertools.product(pieces, repeat=4):
        answer = "".join(chosen)
        stream, _ = parse(form, answer, 3)
        if not stream.calls:
            assert stream.content == answer
        else:
            assert stream.content.count("ö") == answer.count("ö")
