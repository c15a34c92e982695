"""Which functions an answer may call."""

from typing import Any

import pytest

from peftcore.serving.errors import BadRequestError
from peftcore.serving.tools import Function, NamedTool, Tool, ToolCall, callable_functions


def tool(name: str) -> Tool:
    return Tool.model_validate({"type": "function", "function": {"name": name}})


TOOLS = [tool("add"), tool("now")]


def test_the_choice_of_tools() -> None:
    named = NamedTool.model_validate({"type": "function", "function": {"name": "now"}})
    for choice, names in ((None, ["add", "now"]), ("auto", ["add", "now"]), ("required", ["add", "now"]), ("none", [])):
        assert [one.name for one in callable_functions(TOOLS, choice, None)] == names  # type: ignore[arg-type]
    assert [one.name for one in callable_functions(TOOLS, named, True)] == ["now"]
    assert callable_functions(None, "none", None) == callable_functions([], None, None) == []


@pytest.mark.parametrize(
    ("tools", "choice", "parallel", "said"),
    [
        (None, "required", None, "tool_choice needs tools"),
        (None, None, False, "parallel_tool_calls needs tools"),
        ([*TOOLS, tool("add")], None, None, "two functions have the same name"),
    ],
)
def test_options_that_do_not_fit_are_refused(tools: Any, choice: Any, parallel: Any, said: str) -> None:
    with pytest.raises(BadRequestError, match=said):
        callable_functions(tools, choice, parallel)


def test_a_choice_that_is_no_tool_names_the_tools() -> None:
    other = NamedTool.model_validate({"type": "function", "function": {"name": "sub"}})
    with pytest.raises(BadRequestError, match="there is no tool 'sub'; tools: add, now"):
        callable_functions(TOOLS, other, None)


def test_a_function_without_parameters_has_no_arguments() -> None:
    assert Function(name="now").schema_of_arguments["additionalProperties"] is False
    assert Function(name="now", parameters={"properties": {}}).schema_of_arguments == {
        "type": "object",
        "properties": {},
    }


def test_a_template_gets_the_arguments_as_an_object() -> None:
    def call(arguments: str) -> ToolCall:
        function = {"name": "add", "arguments": arguments}
        return ToolCall.model_validate({"id": "1", "type": "function", "function": function})

    assert call('{"a": 1}').plain("here")["function"] == {"name": "add", "arguments": {"a": 1}}
    assert call("").plain("here")["function"]["arguments"] == {}
    for wrong in ("[1]", "{"):
        with pytest.raises(BadRequestError, match=r"here\.function\.arguments: not a JSON object, got"):
            call(wrong).plain("here")
