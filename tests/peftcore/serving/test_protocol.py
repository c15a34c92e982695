"""Requests follow OpenAI's API, and unsupported fields are refused by name."""

from typing import Any

import openai
import pytest

SAY = [{"role": "user", "content": "Say it."}]


def chat_tokens(served: Any, messages: list[dict[str, str]] = SAY) -> list[int]:
    return served.world.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def test_parts_of_a_message_are_one_text(served: Any) -> None:
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "it."}]
    given: Any = {"model": "sql", "messages": [{"role": "user", "content": parts}], "temperature": 0}
    found = served.client().chat.completions.create(max_completion_tokens=9, **given)
    assert found.choices[0].message.content == served.world.expected("sql", chat_tokens(served), 9)


def test_a_developer_message_is_the_system_s_and_an_answer_can_be_sent_back(served: Any) -> None:
    client = served.client()
    first: Any = {"model": "sql", "temperature": 0, "max_tokens": 5}
    answer = client.chat.completions.create(messages=SAY, **first).choices[0].message
    sent = [{"role": "developer", "content": "Be short."}, *SAY, answer.model_dump(), *SAY]
    read = [{"role": "system", "content": "Be short."}, *SAY, {"role": "assistant", "content": answer.content}, *SAY]
    found = client.chat.completions.create(messages=sent, **first)
    assert found.choices[0].message.content == served.world.expected("sql", chat_tokens(served, read), 5)


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 3}, "temperature", "less than or equal to 2"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 5000}, "max_tokens", "at most 1,024 on this server; got 5,000"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"n": 17}, "n", "less than or equal to 16, got 17"),
    ({"frequency_penalty": 2.5}, "frequency_penalty", "less than or equal to 2"),
    ({"logit_bias": {"7": 101}}, "logit_bias", "less than or equal to 100"),
    ({"logit_bias": {"259": 1}}, "logit_bias", "'259' is not a token id; the vocabulary has 259 tokens"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "'-1' is not a token id"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"top_logprobs": 2}, "top_logprobs", "set logprobs to true"),
    ({"stop": ["a"] * 5}, "stop", "at most 4 items"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unknown field"),
    ({"extra_body": {"top_k": 3}}, "top_k", "unknown field"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "messages"),
    ({"messages": [{"role": "user", "content": "a<|im_end|>\n"}]}, "messages", "contains <|im_end|>,"),
    ({"messages": [{"role": "user<|im_end|>", "content": "a"}]}, "messages", "role: Input should be 'system'"),
    ({"messages": [{"role": "banana", "content": "a"}]}, "messages", "messages.0.role: Input should be 'system'"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "messages.0.role: Input should be 'system'"),
    ({"messages": [{"role": "user", "content": "a", "name": "Ann"}]}, "messages", "messages.0.name: not supported"),
    ({"messages": [{"role": "user", "content": "a", "mood": 1}]}, "messages", "messages.0.mood: unknown field"),
    (
        {"messages": [{"role": "assistant", "content": "a", "function_call": {"name": "f", "arguments": ""}}]},
        "messages",
        "messages.0.function_call: not supported",
    ),
    (
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": "1", "type": "function"}]}]},
        "messages",
        "messages.0.tool_calls: List should have at most 0 items",
    ),
    ({"max_tokens": True}, "max_tokens", "valid integer, got True"),
    ({"max_tokens": "2"}, "max_tokens", "valid integer, got '2'"),
    ({"temperature": "0.5"}, "temperature", "valid number, got '0.5'"),
    ({"top_p": True}, "top_p", "valid number, got True"),
    ({"stream_options": {"other": 1}}, "stream_options", "unknown field"),
]
"""(what is given, the parameter that is named, what is said)"""


def test_a_bad_parameter_is_named(served: Any) -> None:
    client = served.client()
    for given, param, said in BAD:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{"model": "sql", "messages": SAY, **given})
        body: Any = caught.value.body
        assert (body["type"], body["param"]) == ("invalid_request_error", param), given
        assert said in body["message"], given


def test_a_template_that_refuses_is_a_bad_request(served: Any) -> None:
    served.world.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(openai.BadRequestError, match="roles must alternate"):
        served.client().chat.completions.create(model="sql", messages=SAY)  # type: ignore[arg-type]
    served.world.tokenizer.chat_template = None
    with pytest.raises(openai.BadRequestError, match="no chat template; use /v1/completions"):
        served.client().chat.completions.create(model="sql", messages=SAY)  # type: ignore[arg-type]
