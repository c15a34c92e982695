"""The grammar that the fields of a request ask for."""

import json
from typing import Any

import pytest

from peftcore.serving.errors import BadRequestError
from peftcore.serving.grammar import GrammarSpec
from peftcore.serving.structured_output import ResponseFormat, StructuredOutputs, json_grammar, json_text

SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}


def of_format(**fields: Any) -> GrammarSpec | None:
    return ResponseFormat.model_validate(fields).grammar()


def test_response_formats() -> None:
    assert of_format(type="text") is None
    assert of_format(type="json_object") == GrammarSpec("json_schema", '{"type": "object"}', "response_format")
    for strict, lenient in ((None, False), (True, False), (False, True)):
        spec = of_format(type="json_schema", json_schema={"name": "a", "schema": SCHEMA, "strict": strict})
        assert spec is not None and (spec.kind, spec.lenient) == ("json_schema", lenient)
        assert list(json.loads(spec.text)["properties"]) == ["b", "a"]  # in the order of the request


def test_a_type_and_a_schema_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BadRequestError, match="the type json_schema needs json_schema"):
        of_format(type="json_schema")
    with pytest.raises(BadRequestError, match="the type text excludes json_schema"):
        of_format(type="text", json_schema={"name": "a", "schema": {}})


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"json": SCHEMA}, "json_schema", json.dumps(SCHEMA)),
        ({"json": '{"type":"null"}'}, "json_schema", '{"type":"null"}'),
        ({"json_object": True}, "json_schema", '{"type": "object"}'),
        ({"regex": "a+"}, "regex", "a+"),
        ({"choice": ["a", "b"]}, "choice", '["a", "b"]'),
        ({"grammar": "start: /a/"}, "grammar", "start: /a/"),
    ],
)
def test_vllm_s_structured_outputs(fields: dict[str, Any], kind: str, text: str) -> None:
    spec = StructuredOutputs.model_validate(fields).grammar()
    assert (spec.kind, spec.text, spec.param) == (kind, text, "structured_outputs")


def test_white_space_of_json() -> None:
    assert StructuredOutputs.model_validate({"json": {}, "disable_any_whitespace": True}).grammar().whitespace == ""
    assert StructuredOutputs.model_validate({"json": {}, "whitespace_pattern": " ?"}).grammar().whitespace == " ?"
    for fields, said in (
        ({"json": {}, "disable_any_whitespace": True, "whitespace_pattern": " "}, "excludes whitespace_pattern"),
        ({"regex": "a", "whitespace_pattern": " "}, "need json or json_object"),
        ({"regex": "a", "json": {}}, "exactly one of json, regex, choice, grammar and json_object; got 2"),
        ({}, "got 0"),
        ({"json_object": False}, "got 0"),
    ):
        with pytest.raises(BadRequestError, match=said):
            StructuredOutputs.model_validate(fields).grammar()


def test_a_schema_that_is_no_json_is_refused() -> None:
    deep: Any = {}
    for _ in range(100_000):
        deep = {"items": deep}
    with pytest.raises(BadRequestError, match="tools: it is nested too deeply"):
        json_text(deep, "tools")
    with pytest.raises(BadRequestError, match="guided_json: Out of range float"):
        json_grammar({"minimum": float("nan")}, "guided_json")
