"""Grammars of the library llguidance: what follows them, what is refused and why, and answers of a model."""

import json
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="the extra `structured` is not installed")

import jsonschema
import openai
from tool_template import TOOL_TEMPLATE

from peftcore.serving import llguidance_grammars
from peftcore.serving.errors import BadRequestError, GrammarError
from peftcore.serving.grammar import Compile, GrammarSpec
from peftcore.serving.llguidance_grammars import load
from peftcore.serving.structured_output import json_grammar
from peftcore.serving.tool_formats import FORMATS
from peftcore.serving.tools import Function

END = 2


@pytest.fixture
def compile_one(tokenizer: Any) -> Compile:
    return load(tokenizer, len(tokenizer) + 5, frozenset([END]))  # as many models, with more logits than tokens


def follow(compile_one: Compile, tokenizer: Any, spec: GrammarSpec, text: str) -> str:
    """Whether a text is whole ("end"), may go on ("more") or must ("part"); otherwise where it is wrong."""
    matcher = compile_one(spec).matcher()
    for place, token in enumerate(tokenizer(text)["input_ids"]):
        mask = matcher.allowed()
        assert mask.shape == (len(tokenizer) + 5,) and not mask[len(tokenizer) :].any()
        if not mask[token]:
            return f"wrong at {place}"
        matcher.accept(token)
    return "end" if matcher.complete else "more" if matcher.allowed()[END] else "part"


def schema(value: Any, **options: Any) -> GrammarSpec:
    return json_grammar(value, "response_format", **options)


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FOLLOWING: list[tuple[GrammarSpec, str, str]] = [
    (schema(PERSON), '{"name": "Zoë", "age": 34}', "end"),
    (schema(PERSON), '{"name": "Zoë", "age": 341', "wrong at 26"),
    (schema(PERSON), '{"age"', "wrong at 2"),
    (schema({"type": "object"}), '{"a": [1, {"b": null}]', "part"),
    (schema({"type": "object"}), '{"a":' + " " * 21, "wrong at 25"),
    (schema({"type": "object"}, whitespace=""), '{"a": 1', "wrong at 5"),
    (schema({"type": "object"}, whitespace=" ?"), '{"a": 1}', "end"),
    (schema('{"type": "integer"}'), "12", "more"),
    (schema({"type": "array", "uniqueItems": True}, lenient=True), "[1]", "end"),
    (schema({"$ref": "#/$defs/a", "$defs": {"a": {"enum": ["x", 1]}}}), '"x"', "end"),
    (GrammarSpec("regex", r"[0-9]{2}-[a-z]+", "guided_regex"), "12-ab", "more"),
    (GrammarSpec("regex", r"a|b", "guided_regex"), "c", "wrong at 0"),
    (GrammarSpec("choice", '["yes", "y\\"es"]', "guided_choice"), 'y"es', "end"),
    (GrammarSpec("choice", '["a", "ab"]', "guided_choice"), "a", "more"),
    (GrammarSpec("grammar", 'start: "a" start | "b"', "guided_grammar"), "aab", "end"),
    (GrammarSpec("grammar", 'root ::= "a" root | "b"', "guided_grammar"), "aab", "end"),
]


@pytest.mark.parametrize(("spec", "text", "expected"), FOLLOWING)
def test_text_follows_the_grammar(compile_one: Compile, tokenizer: Any, spec: GrammarSpec, text: str, expected: str):
    assert follow(compile_one, tokenizer, spec, text) == expected


BAD: list[tuple[GrammarSpec, str]] = [
    (schema({"type": "array", "uniqueItems": True}), "keywords that cannot be enforced: uniqueItems; remove them"),
    (schema({"if": {}, "then": {}}), "cannot be enforced: if, then"),
    (schema({"type": "objekt"}), "Invalid type: objekt"),
    (schema({"$ref": "#/$defs/x"}), "does not exist"),
    (schema({"type": "string", "pattern": "(a"}), "unclosed group"),
    (schema("{"), "EOF"),
    (GrammarSpec("regex", "(a", "guided_regex"), "unclosed group"),
    (GrammarSpec("grammar", "start: x", "guided_grammar"), "unknown name"),
    (GrammarSpec("grammar", "zork", "guided_grammar"), "Expected ::="),
    (GrammarSpec("regex", "\ud800", "guided_regex"), "surrogates not allowed"),
]


@pytest.mark.parametrize(("spec", "said"), BAD)
def test_a_bad_grammar_is_refused_with_the_reason(compile_one: Compile, spec: GrammarSpec, said: str) -> None:
    with pytest.raises(GrammarError, match=said) as caught:
        compile_one(spec)
    assert str(caught.value).startswith(f"{spec.param}: ") and caught.value.param == spec.param


def test_a_schema_that_would_grow_without_bound_is_refused(compile_one: Compile) -> None:
    nested: Any = {"allOf": [{"anyOf": [{"properties": {f"{n} {k}": {}}} for k in range(6)]} for n in range(12)]}
    with pytest.raises(GrammarError, match="schema too large"):
        compile_one(schema(nested))


def test_a_mask_that_takes_too_long_ends_the_request(compile_one: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = compile_one(schema(PERSON)).matcher()
    monkeypatch.setattr(llguidance_grammars, "MASK_SECONDS", -1.0)
    with pytest.raises(GrammarError, match="response_format: the grammar is too complex: one token takes more than"):
        matcher.allowed()
    with pytest.raises(GrammarError, match="too complex"):  # its first mask is computed with it
        compile_one(schema(PERSON))


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(BadRequestError, match="needs a fast tokenizer"):
        load(object(), 10, frozenset())


CITY = {
    "properties": {"city": {"$ref": "#/$defs/city"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"type": "string", "maxLength": 9}},
}
FUNCTIONS = [Function(name="weather", parameters=CITY, strict=True), Function(name="now")]
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
PLAIN = '{"name": "now", "parameters": {}}'
CALLS = [
    ("hermes", False, True, f"{NOW}\n{NOW}", "more"),
    ("hermes", False, False, NOW, "end"),
    ("hermes", False, False, '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>', "end"),
    ("hermes", False, True, "Well", "wrong at 0"),
    ("hermes", True, True, f"Well {NOW} and {NOW} so", "more"),
    ("hermes", True, True, '<tool_call>\n{"name": "weather", "arguments": {"town', "wrong at 47"),
    ("hermes", True, True, '<tool_call>\n{"name": "nox', "wrong at 24"),
    ("llama3_json", False, True, f"{PLAIN}; {PLAIN}", "more"),
    ("llama3_json", False, False, PLAIN, "end"),
    ("llama3_json", True, True, "Well {", "more"),
    ("llama3_json", True, True, '{"a', "wrong at 2"),
    (
        "mistral",
        False,
        True,
        '[TOOL_CALLS] [{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]',
        "end",
    ),
    ("mistral", False, False, '[TOOL_CALLS][{"name": "now", "arguments": {}},', "wrong at 45"),
    ("mistral", True, False, 'Well [TOOL_CALLS] [{"name": "now", "arguments": {}}]', "more"),
]


@pytest.mark.parametrize(("form", "is_free", "is_parallel", "text", "expected"), CALLS)
def test_calls_follow_the_grammar_of_their_form(
    compile_one: Compile, tokenizer: Any, form: str, is_free: bool, is_parallel: bool, text: str, expected: str
) -> None:
    spec = FORMATS[form].grammar(FUNCTIONS, is_free, is_parallel, tokenizer)
    assert follow(compile_one, tokenizer, spec, text) == expected


def test_a_marker_that_is_a_special_token_is_that_token(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    compile_one = load(tokenizer, len(tokenizer), frozenset([END]))
    spec = FORMATS["mistral"].grammar(FUNCTIONS, False, False, tokenizer)
    matcher = compile_one(spec).matcher()
    (marker,) = matcher.allowed().nonzero().flatten().tolist()
    assert tokenizer.convert_ids_to_tokens(marker) == "[TOOL_CALLS]"


def test_answers_of_a_model_fit_their_schema(served: Any) -> None:
    """The model has random weights, so only the grammar makes its answers valid."""
    served.world.tokenizer.chat_template = TOOL_TEMPLATE
    client = served.client()
    limited: Any = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["a", "b"]},
            "count": {"type": "integer", "minimum": 1, "maximum": 9},
            "names": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
        },
        "required": ["kind", "count", "names"],
        "additionalProperties": False,
    }
    for model in ("base", "sql", "mix"):
        reply = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "x"}],
            n=2,
            seed=1,
            max_tokens=300,
            response_format={"type": "json_schema", "json_schema": {"name": "one", "strict": True, "schema": limited}},
        )
        for choice in reply.choices:
            assert choice.finish_reason == "stop"
            jsonschema.validate(json.loads(choice.message.content or ""), limited)
    few: Any = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": few}}
    called = client.chat.completions.create(
        model="sql",
        messages=[{"role": "user", "content": "x"}],
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=150,
        seed=1,
    ).choices[0]
    assert called.finish_reason == "tool_calls"
    (call,) = called.message.tool_calls or ()
    assert call.type == "function"
    jsonschema.validate(json.loads(call.function.arguments), few)
    unsupported: Any = {"name": "one", "schema": {"type": "array", "uniqueItems": True}}
    with pytest.raises(openai.BadRequestError, match=r"response_format: .* cannot be enforced: uniqueItems"):
        client.chat.completions.create(
            model="sql",
            messages=[{"role": "user", "content": "x"}],
            response_format={"type": "json_schema", "json_schema": unsupported},
        )
