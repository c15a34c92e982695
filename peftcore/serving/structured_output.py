"""Fields of a request that constrain the form of an answer: OpenAI's `response_format`, and those of vLLM.

vLLM has `structured_outputs`, and had `guided_json`, `guided_regex`, `guided_choice`, `guided_grammar` and
`guided_whitespace_pattern` before; both forms are accepted.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from peftcore.serving.errors import BadRequestError
from peftcore.serving.grammar import GrammarSpec
from peftcore.serving.strict_model import StrictModel

Choices = Annotated[list[str], Field(min_length=1)]


class JsonSchema(StrictModel):
    """The schema of `response_format`. Name and description are labels; the schema alone constrains the answer."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    """False: keywords that cannot be enforced are not enforced; otherwise they are an error."""


class ResponseFormat(StrictModel):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> GrammarSpec | None:
        """Return the grammar, or None for text. Raise BadRequestError if type and schema do not fit each other."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            needs = "needs" if self.json_schema is None else "excludes"
            raise BadRequestError(f"response_format: the type {self.type} {needs} json_schema", "response_format")
        if self.type == "text":
            return None
        if self.json_schema is None:
            return json_grammar({"type": "object"}, "response_format")
        return json_grammar(self.json_schema.schema_, "response_format", self.json_schema.strict is False)


class StructuredOutputs(StrictModel):
    """vLLM's `structured_outputs`: one of json, regex, choice, grammar, json_object, and options for JSON."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    grammar_: Annotated[str | None, Field(alias="grammar")] = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: None = None
    structural_tag: None = None

    def grammar(self) -> GrammarSpec:
        """Return the grammar. Raise BadRequestError unless exactly one is given."""
        whitespace = "" if self.disable_any_whitespace else self.whitespace_pattern
        field = "structured_outputs"
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise BadRequestError(f"{field}: disable_any_whitespace excludes whitespace_pattern", field)
        schema: dict[str, Any] | str | None = {"type": "object"} if self.json_object else None
        specs = [
            *vllm_grammars(self.json_, self.regex, self.choice, self.grammar_, whitespace, (field,) * 4),
            *([] if schema is None else [json_grammar(schema, field, whitespace=whitespace)]),
        ]
        if len(specs) != 1:
            raise BadRequestError(
                f"{field}: give exactly one of json, regex, choice, grammar and json_object; got {len(specs)}", field
            )
        if whitespace is not None and specs[0].kind != "json_schema":
            raise BadRequestError(f"{field}: options of white space need json or json_object", field)
        return specs[0]


def vllm_grammars(
    schema: dict[str, Any] | str | None,
    regex: str | None,
    choice: Sequence[str] | None,
    grammar: str | None,
    whitespace: str | None,
    fields: Sequence[str],
) -> list[GrammarSpec]:
    """Return the grammars of those of vLLM's four fields that are given.

    Args:
        schema: JSON schema, as an object or as its text.
        regex: Regular expression.
        choice: Texts, one of which is the answer.
        grammar: Context-free grammar in Lark's or GBNF's form.
        whitespace: Regular expression of white space in JSON.
        fields: Names of the four fields, for errors.
    """
    specs: list[GrammarSpec] = []
    if schema is not None:
        specs.append(json_grammar(schema, fields[0], whitespace=whitespace))
    if regex is not None:
        specs.append(GrammarSpec("regex", regex, fields[1]))
    if choice is not None:
        specs.append(GrammarSpec("choice", json.dumps(list(choice)), fields[2]))
    if grammar is not None:
        specs.append(GrammarSpec("grammar", grammar, fields[3]))
    return specs


def json_grammar(
    schema: dict[str, Any] | str, field: str, lenient: bool = False, whitespace: str | None = None
) -> GrammarSpec:
    """Return the grammar of a JSON schema.

    Args:
        schema: The schema, or its text.
        field: Field of the request, for errors.
        lenient: Do not enforce keywords that the backend does not know, instead of refusing the schema.
        whitespace: Regular expression of white space between tokens of JSON; "" for none; None: the default.

    Raises:
        BadRequestError: The schema cannot be written as JSON.
    """
    return GrammarSpec(
        "json_schema", schema if isinstance(schema, str) else json_text(schema, field), field, lenient, whitespace
    )


def json_text(value: Any, field: str) -> str:
    """Return a part of a request as JSON. Raise BadRequestError if it is nested too deeply or has NaN."""
    try:
        return json.dumps(value, allow_nan=False)
    except RecursionError:
        raise BadRequestError(f"{field}: it is nested too deeply", field) from None
    except ValueError as error:
        raise BadRequestError(f"{field}: {error}", field) from error
