"""Conversations with tools, as the chat template gets them."""

from typing import Any

import pytest
from tool_template import TOOL_TEMPLATE

from peftcore.serving.errors import BadRequestError
from peftcore.serving.messages import Message, rendered_prompt
from peftcore.serving.tools import Function, Tool

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "1 "}, {"type": "text", "text": "+ 1?"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "c1"},
]
DEEP = '{"a": ' * 100_000
ADD = Tool.model_validate({"type": "function", "function": {"name": "add", "description": "Adds."}})


def rendered(tokenizer: Any, talk: list[dict[str, Any]], *tools: Tool) -> str:
    tokens = rendered_prompt(tokenizer, [Message.model_validate(one) for one in talk], tools)
    return tokenizer.decode(tokens)


def test_calls_and_their_answers_are_in_the_prompt(tokenizer: Any) -> None:
    tokenizer.chat_template = TOOL_TEMPLATE
    text = rendered(tokenizer, TALK, ADD)
    assert '"description": "Adds."' in text and "1 + 1?" in text
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in text
    assert "tool add\n2<|im_end|>" in text  # with the name of the function that was called


@pytest.mark.parametrize(
    ("talk", "said"),
    [
        ([TALK[0], TALK[2]], "messages.1.tool_call_id: no earlier message calls 'c1'"),
        (
            [{"role": "user", "content": "a", "tool_calls": [CALL]}],
            "messages.0.tool_calls: only for the role assistant",
        ),
        ([{"role": "user", "content": "a", "tool_call_id": "c1"}], "messages.0.tool_call_id: only for the role tool"),
        ([{"role": "assistant", "content": None}], "messages.0.content: needed"),
        (
            [TALK[0], {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{"}}]}],
            "messages.1.tool_calls.0.function.arguments: not a JSON object",
        ),
        (
            [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "<|im_end|>", "arguments": ""}}]}],
            "a message contains <|im_end|>",
        ),
        ([{"role": "user", "content": "half \ud83d"}], "half of a surrogate pair, '\\ud83d'"),
        (
            [TALK[0], {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": DEEP}}]}],
            "messages.1.tool_calls.0.function.arguments: not a JSON object",
        ),
    ],
)
def test_a_conversation_that_cannot_be_is_refused(tokenizer: Any, talk: list[dict[str, Any]], said: str) -> None:
    tokenizer.chat_template = TOOL_TEMPLATE
    with pytest.raises(BadRequestError) as caught:
        rendered(tokenizer, talk)
    assert said in str(caught.value) and caught.value.param == "messages"


def test_a_tool_cannot_hide_special_tokens(tokenizer: Any) -> None:
    tokenizer.chat_template = TOOL_TEMPLATE
    tool = Tool.model_validate({"type": "function", "function": {"name": "f", "description": "a<|im_end|>"}})
    with pytest.raises(BadRequestError, match="a tool contains") as caught:
        rendered(tokenizer, TALK[:1], tool)
    assert caught.value.param == "tools"


def test_a_tool_that_no_template_can_show_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = TOOL_TEMPLATE
    nested: dict[str, Any] = {}
    for _ in range(5000):
        nested = {"a": nested}
    for parameters, said in ((nested, "nested too deeply"), ({"\ud83d": 1}, "half of a surrogate pair")):
        tool = Tool.model_construct(type="function", function=Function.model_construct(name="f", parameters=parameters))
        with pytest.raises(BadRequestError, match=said):
            rendered(tokenizer, TALK[:1], tool)


def test_calls_need_a_template_that_shows_them(tokenizer: Any) -> None:
    with pytest.raises(BadRequestError, match="has no notion of tool_calls"):
        rendered(tokenizer, TALK)
