"""When the calls of an answer are constrained by a grammar."""

from typing import Any

import pytest
from tool_template import TOOL_TEMPLATE

from peftcore.serving.errors import BadRequestError
from peftcore.serving.tool_calling import ToolCalling
from peftcore.serving.tool_formats import HERMES, MISTRAL
from peftcore.serving.tools import Function


def calling(tokenizer: Any, is_free: bool, strict: bool | None = None, form: Any = None) -> ToolCalling:
    return ToolCalling.of(tokenizer, form, [Function(name="add", strict=strict), Function(name="now")], is_free, True)


def test_calls_are_constrained_where_they_must_be_valid(tokenizer: Any) -> None:
    tokenizer.chat_template = TOOL_TEMPLATE
    assert calling(tokenizer, is_free=True).grammar(tokenizer) is None
    must, strict = calling(tokenizer, is_free=False), calling(tokenizer, is_free=True, strict=True)
    for one in (must, strict):
        spec = one.grammar(tokenizer)
        assert spec is not None and spec.kind == "grammar" and spec.param == "tools"
    assert must.form is HERMES and calling(tokenizer, True, form=MISTRAL).form is MISTRAL
    parsed = must.stream()
    parsed.push('<tool_call>{"name": "now", "arguments": {}}</tool_call>')
    assert [one.name for one in parsed.calls] == ["now"]


def test_a_template_without_tools_is_refused_whatever_the_form(tokenizer: Any) -> None:
    for form in (None, HERMES):
        with pytest.raises(BadRequestError, match="has no notion of tools"):
            calling(tokenizer, True, form=form)
    tokenizer.chat_template = None
    with pytest.raises(BadRequestError, match="has no chat template"):
        calling(tokenizer, True)
