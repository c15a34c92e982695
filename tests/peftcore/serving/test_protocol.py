"""Requests follow OpenAI's API, and unsupported fields are refused by name."""

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from choice_grammar import choice_compiler
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from pydantic import ValidationError
from tool_template import TOOL_TEMPLATE

from peftcore.serving import Limits
from peftcore.serving.grammar import GrammarSpec
from peftcore.serving.protocol import ChatRequest, CompletionRequest, GenerationRequest, refusal
from peftcore.serving.sampling import TokenLogprobs

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
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "has no notion of tools; serve a model"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools", "tools.0.type: Input should be 'function'"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "tools.0.function.name: String should"),
    ({"tool_choice": "auto"}, "tool_choice", "tool_choice needs tools"),
    ({"parallel_tool_calls": True}, "parallel_tool_calls", "parallel_tool_calls needs tools"),
    ({"response_format": {"type": "xml"}}, "response_format", "response_format.type: Input should be 'text'"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "the type json_schema needs json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format",
        "response_format.json_schema.schema: Field required",
    ),
    ({"extra_body": {"structured_outputs": {}}}, "structured_outputs", "give exactly one of json, regex, choice"),
    (
        {"extra_body": {"structured_outputs": {"structural_tag": "x"}}},
        "structured_outputs",
        "structured_outputs.structural_tag: not supported, got 'x'",
    ),
    (
        {"extra_body": {"guided_choice": ["a"]}, "response_format": {"type": "json_object"}},
        "guided_choice",
        "an answer can have one grammar, but response_format and guided_choice give 2",
    ),
    ({"extra_body": {"guided_choice": []}}, "guided_choice", "at least 1 item"),
    ({"extra_body": {"guided_whitespace_pattern": " "}}, "guided_whitespace_pattern", "needs guided_json"),
    ({"extra_body": {"top_k": 3}}, "top_k", "unknown field"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "messages"),
    ({"messages": [{"role": "user", "content": "a<|im_end|>\n"}]}, "messages", "contains <|im_end|>,"),
    ({"messages": [{"role": "user<|im_end|>", "content": "a"}]}, "messages", "role: Input should be 'system'"),
    ({"messages": [{"role": "banana", "content": "a"}]}, "messages", "messages.0.role: Input should be 'system'"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "messages.0.tool_call_id: needed for the role tool"),
    ({"messages": [{"role": "user"}]}, "messages", "messages.0.content: needed"),
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
        "messages.0.tool_calls.0.function: Field required",
    ),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "is not a token id; the vocabulary has"),
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


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"model": "sql", "prompt": "half \\ud83d"}', "prompt: a text contains half of a surrogate pair"),
        ('{"model": "sql", "prompt": ', "the body is not valid JSON: Expecting value at character 27"),
    ],
)
def test_a_body_that_is_no_text_is_a_bad_request(served: Any, body: str, said: str) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{served.url}/v1/completions", content=body, headers=headers)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]


def test_log_probabilities_name_the_texts_of_which_the_completion_consists(sentencepiece: Any) -> None:
    tokens = sentencepiece.convert_tokens_to_ids(["▁the", "▁cat", "s"])
    top = [(tokens[0], -1.0), (sentencepiece.convert_tokens_to_ids("the"), -2.0)]
    reported = [TokenLogprobs(token, -1.0, top) for token in tokens]
    request = CompletionRequest(model="sql", prompt="x", logprobs=2)
    found = request.logprobs_object(sentencepiece, reported, 5)
    assert found["tokens"] == [" the", " cat", "s"] and found["text_offset"] == [5, 9, 13]
    assert found["top_logprobs"][0] == {" the": -1.0, "the": -2.0}  # two tokens, not one
    assert request.logprobs_object(sentencepiece, [], 5)["text_offset"] == []


def test_a_template_that_refuses_is_a_bad_request(served: Any) -> None:
    served.world.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(openai.BadRequestError, match="roles must alternate"):
        served.client().chat.completions.create(model="sql", messages=SAY)  # type: ignore[arg-type]
    served.world.tokenizer.chat_template = None
    with pytest.raises(openai.BadRequestError, match="no chat template; use /v1/completions"):
        served.client().chat.completions.create(model="sql", messages=SAY)  # type: ignore[arg-type]


# -- the lists of OpenAI's fields ------------------------------------------------------------------------------------

TEXT = {"type": "text"}
HONOURED: dict[str, Any] = {
    "frequency_penalty": 0.5,
    "logit_bias": {"7": 1},
    "logprobs": True,
    "max_completion_tokens": 5,
    "max_tokens": 5,
    "messages": SAY,
    "modalities": ["text"],
    "model": "sql",
    "n": 2,
    "parallel_tool_calls": False,
    "presence_penalty": 0.5,
    "reasoning_effort": "none",
    "response_format": TEXT,
    "seed": 1,
    "service_tier": "auto",
    "stop": ["a"],
    "store": False,
    "stream_options": {"include_usage": True},
    "temperature": 0.5,
    "tool_choice": "none",
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "top_logprobs": 1,
    "top_p": 0.5,
    "user": "ann",
    "verbosity": "medium",
}
"""{field of a chat request: a value that this server takes}"""
REFUSED: dict[str, Any] = {
    "audio": {"format": "mp3", "voice": "alloy"},
    "function_call": "auto",
    "functions": [{"name": "f"}],
    "metadata": {"a": "b"},
    "modalities": ["audio"],
    "moderation": {"model": "m"},
    "prediction": {"type": "content", "content": "a"},
    "prompt_cache_key": "a",
    "prompt_cache_options": {"ttl": "1h"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "high",
    "safety_identifier": "a",
    "service_tier": "flex",
    "store": True,
    "verbosity": "low",
    "web_search_options": {},
}
"""{field of a chat request: a value that is refused}"""
COMPLETION: dict[str, Any] = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0.5,
    "logit_bias": {"7": 1},
    "logprobs": 2,
    "max_tokens": 5,
    "model": "sql",
    "n": 2,
    "presence_penalty": 0.5,
    "prompt": "a",
    "seed": 1,
    "stop": "a",
    "stream_options": {"include_usage": True},
    "temperature": 0.5,
    "top_p": 0.5,
    "user": "ann",
}
COMPLETION_REFUSED: dict[str, Any] = {"best_of": 2, "echo": True, "suffix": "a"}


def accepts(kind: type[GenerationRequest], field: str, value: Any) -> bool:
    """True if a field is accepted; a refusal must name it."""
    needed = {"model": "sql", "messages": SAY} if kind is ChatRequest else {"model": "sql", "prompt": "a"}
    try:
        kind.model_validate({**needed, field: value})
    except ValidationError as error:
        refused = refusal([dict(one) for one in error.errors()])
        assert refused.param == field and str(refused).startswith(field)
        return False
    return True


def test_each_field_of_openai_s_chat_interface_is_honoured_or_refused_by_name() -> None:
    fields = set(chat_params.CompletionCreateParamsBase.__annotations__)
    assert fields == {*HONOURED, *REFUSED}, "a new version of the package openai has other fields"
    assert [field for field, value in HONOURED.items() if not accepts(ChatRequest, field, value)] == []
    assert [field for field, value in REFUSED.items() if accepts(ChatRequest, field, value)] == []
    assert [
        field for field in {*HONOURED, *REFUSED} - {"model", "messages"} if not accepts(ChatRequest, field, None)
    ] == []


def test_each_field_of_openai_s_completions_is_honoured_or_refused_by_name() -> None:
    fields = set(completion_params.CompletionCreateParamsBase.__annotations__)
    assert fields == {*COMPLETION, *COMPLETION_REFUSED}, "a new version of the package openai has other fields"
    assert [field for field, value in COMPLETION.items() if not accepts(CompletionRequest, field, value)] == []
    assert [field for field, value in COMPLETION_REFUSED.items() if accepts(CompletionRequest, field, value)] == []


# -- grammars and tools over HTTP, with the tests' own grammars -------------------------------------------------------


def test_an_answer_follows_its_grammar_streamed_and_with_several_completions(
    serving: Callable[..., Any], world: Any
) -> None:
    specs: list[GrammarSpec] = []
    served = serving(http=True, compile_grammar=choice_compiler(world.tokenizer, specs))
    client = served.client()
    given: Any = {"messages": SAY, "n": 3, "extra_body": {"structured_outputs": {"choice": ["yes", "no"]}}}
    for model in ("base", "sql", "mix"):
        reply = client.chat.completions.create(model=model, **given)
        assert {choice.message.content for choice in reply.choices} <= {"yes", "no"}
        assert {choice.finish_reason for choice in reply.choices} == {"stop"}
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model="sql", stream=True, **given):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert set(texts) <= {"yes", "no"}
    completion = client.completions.create(model="sql", prompt="a", extra_body={"guided_choice": ["abc"]}, max_tokens=2)
    assert (completion.choices[0].text, completion.choices[0].finish_reason) == ("ab", "length")
    assert specs == [
        GrammarSpec("choice", '["yes", "no"]', "structured_outputs"),
        GrammarSpec("choice", '["abc"]', "guided_choice"),
    ]
    assert served.metric("peftcore_grammars_total", kind="choice", result="cached") == 3


def test_a_grammar_that_is_refused_is_a_bad_request(serving: Callable[..., Any], world: Any) -> None:
    served = serving(http=True, compile_grammar=choice_compiler(world.tokenizer))
    with pytest.raises(openai.BadRequestError) as caught:
        served.client().chat.completions.create(
            model="sql",
            messages=SAY,
            response_format={"type": "json_object"},  # type: ignore[arg-type]
        )
    body: Any = caught.value.body
    assert body == {
        "message": "response_format: json_schema is not supported",
        "type": "invalid_request_error",
        "param": "response_format",
        "code": "invalid_grammar",
    }


@pytest.mark.skipif(find_spec("llguidance") is not None, reason="llguidance is installed")
def test_without_the_extra_an_error_names_it(served: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=r"pip install 'peftcore\[structured\]'"):
        served.client().completions.create(model="sql", prompt="a", extra_body={"guided_regex": "a"})


WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def test_a_required_tool_is_called_and_its_answer_goes_back(serving: Callable[..., Any], world: Any) -> None:
    world.tokenizer.chat_template = TOOL_TEMPLATE
    specs: list[GrammarSpec] = []
    served = serving(http=True, compile_grammar=choice_compiler(world.tokenizer, specs, [CALL]))
    client = served.client()
    given: Any = {"model": "sql", "tools": [WEATHER], "tool_choice": "required", "max_tokens": 200}
    choice = client.chat.completions.create(messages=SAY, **given).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls or ()
    assert (call.type, call.function.name, call.function.arguments) == ("function", "weather", '{"city": "Rome"}')

    heads, arguments, finish = [], "", None
    for chunk in client.chat.completions.create(messages=SAY, stream=True, **given):
        delta, finish = chunk.choices[0].delta, chunk.choices[0].finish_reason
        for part in delta.tool_calls or ():
            heads += [(part.index, part.type, part.function.name)] if part.id else []
            arguments += part.function.arguments
        assert not delta.content
    assert (heads, arguments, finish) == ([(0, "function", "weather")], '{"city": "Rome"}', "tool_calls")
    named = {"type": "function", "function": {"name": "weather"}}
    assert client.chat.completions.create(messages=SAY, **{**given, "tool_choice": named}).choices[0].message.tool_calls
    assert {spec.kind for spec in specs} == {"grammar"} and '\\"weather\\"' in specs[0].text
    # counted after the response has been sent
    served.wait(lambda: served.metric("peftcore_tool_calls_total") == 3)

    answer = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    sent: Any = [*SAY, choice.message.model_dump(), answer]
    told = client.chat.completions.create(model="sql", messages=sent, max_tokens=5, temperature=0)
    read: Any = [
        *SAY,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}],
        },
        {"role": "tool", "content": "sunny", "name": "weather"},
    ]
    assert told.choices[0].message.content == served.world.expected("sql", chat_tokens(served, read), 5)


def test_without_a_call_the_answer_is_the_model_s_own(served: Any) -> None:
    served.world.tokenizer.chat_template = TOOL_TEMPLATE
    client = served.client()
    given: Any = {"model": "sql", "messages": SAY, "temperature": 0, "max_tokens": 9}
    prompt = served.world.tokenizer.apply_chat_template(SAY, tools=[WEATHER], add_generation_prompt=True)["input_ids"]
    answer = client.chat.completions.create(tools=[WEATHER], **given).choices[0]
    assert answer.message.content == served.world.expected("sql", prompt, 9) and answer.message.tool_calls is None
    without = client.chat.completions.create(tools=[WEATHER], tool_choice="none", **given).choices[0]
    assert without.message.content == served.world.expected("sql", chat_tokens(served), 9)
    with pytest.raises(openai.BadRequestError, match='would allow no call of a tool; set tool_choice to "none"'):
        client.chat.completions.create(tools=[WEATHER], response_format={"type": "json_object"}, **given)


def test_the_examples_of_the_documentation_run(serving: Callable[..., Any], world: Any) -> None:
    world.tokenizer.chat_template = TOOL_TEMPLATE
    person = '{"name": "Ann", "age": 3}'

    def compile_one(spec: GrammarSpec) -> Any:
        return choice_compiler(world.tokenizer, texts=[CALL if spec.param == "tools" else person])(spec)

    served = serving(http=True, compile_grammar=compile_one, limits=Limits(max_tokens=90))
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "structured-output.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(example, {"client": served.client()})
