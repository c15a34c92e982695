"""Fields of a chat request about tools: OpenAI's `tools`, `tool_choice`, and the calls of earlier turns."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from peftcore.serving.errors import BadRequestError
from peftcore.serving.strict_model import StrictModel

FunctionName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class Function(StrictModel):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments, an object. None: no arguments."""
    strict: bool | None = None
    """True: calls are constrained to the schema even if the model chooses freely whether to call. False: keywords that
    cannot be enforced are not enforced where calls are constrained; otherwise they are an error."""

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        """JSON schema of the arguments."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object", **self.parameters}


class Tool(StrictModel):
    """A tool of a request; only functions are supported."""

    type: Literal["function"]
    function: Function


class NamedFunction(StrictModel):
    """Name of the function that must be called."""

    name: str


class NamedTool(StrictModel):
    """A `tool_choice` that names a function."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(StrictModel):
    """Name and arguments of a call."""

    name: str
    arguments: str


class ToolCall(StrictModel):
    """A call in an earlier turn of the assistant."""

    id: str
    type: Literal["function"]
    function: CalledFunction

    def plain(self, field: str) -> dict[str, Any]:
        """Return the call for a chat template, which takes the arguments as an object.

        Args:
            field: Place of the call in the request, for errors.

        Raises:
            BadRequestError: The arguments are not a JSON object.
        """
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise BadRequestError(
                f"{field}.function.arguments: not a JSON object, got {self.function.arguments!r:.100}", "messages"
            )
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


def callable_functions(
    tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool | None
) -> list[Function]:
    """Return the functions that the answer may call; none for `tool_choice` none and for requests without tools.

    Raises:
        BadRequestError: Two tools have one name, the choice names no tool, or an option needs tools.
    """
    if not tools:
        if choice not in (None, "none"):
            raise BadRequestError("tool_choice needs tools", "tool_choice")
        if parallel is not None:
            raise BadRequestError("parallel_tool_calls needs tools", "parallel_tool_calls")
        return []
    functions = {tool.function.name: tool.function for tool in tools}
    if len(functions) < len(tools):
        raise BadRequestError("tools: two functions have the same name", "tools")
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in functions:
            raise BadRequestError(
                f"tool_choice: there is no tool {name!r:.80}; tools: {', '.join(functions)}", "tool_choice"
            )
        return [functions[name]]
    return [] if choice == "none" else list(functions.values())
