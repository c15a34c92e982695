"""Forms in which models write tool calls: how to recognise one in a chat template, and the grammar of its calls.

| name | answer |
|---|---|
| hermes (Hermes, Qwen) | `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` |
| llama3_json | `{"name": ..., "parameters": {...}}`, the whole answer |
| mistral | `[TOOL_CALLS] [{"name": ..., "arguments": {...}}]` |
"""

import json
import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftcore.errors import ConfigError, suggestion
from peftcore.serving.errors import BadRequestError
from peftcore.serving.grammar import GrammarSpec
from peftcore.serving.structured_output import json_text
from peftcore.serving.tools import Function


@dataclass(frozen=True)
class ToolFormat:
    """A form of tool calls."""

    name: str
    marker: str
    """Text before the calls."""
    opening: str
    """Text between the marker and the first call."""
    separator: str
    """Text between two calls without a marker; "" if each call has a marker of its own."""
    closing: str
    """Text after the calls."""
    arguments: str
    """Key of the arguments."""
    template: str
    """Regular expression of a chat template with this form."""
    bare: bool = False
    """True if an answer that begins with `{` is a call, too, without the marker."""
    short_ids: bool = False
    """True if the chat template accepts only call ids of nine letters and digits."""

    def markers(self, tokenizer: Any) -> dict[int, str]:
        """Return {token id: its text} of the marker if it is a special token, otherwise nothing."""
        special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        return {special[self.marker]: self.marker} if self.marker in special else {}

    def call_id(self) -> str:
        """Return the id of a new call."""
        letters = string.ascii_letters + string.digits
        chosen = "".join(random.SystemRandom().choices(letters, k=9 if self.short_ids else 24))
        return chosen if self.short_ids else f"call_{chosen}"

    def grammar(self, functions: Sequence[Function], is_free: bool, is_parallel: bool, tokenizer: Any) -> GrammarSpec:
        """Return the grammar of an answer with calls.

        Args:
            functions: Functions that may be called.
            is_free: Any text may stand before a call, and the answer may be text alone.
            is_parallel: Allow several calls.
            tokenizer: Says whether the marker is a special token.

        Raises:
            BadRequestError: A schema cannot be written as JSON.
        """
        special = next(iter(self.markers(tokenizer)), None)
        marker = json.dumps(self.marker) if special is None else f"<[{special}]>"
        calls = " | ".join(f"call{number}" for number in range(len(functions)))
        rules = [self._rule(number, function) for number, function in enumerate(functions)]
        repeated = "*" if is_parallel else "?"
        space = 'space: " "?'
        if self.separator:
            more = f"(space {json.dumps(self.separator)} space call)*" if is_parallel else ""
            opening, closing = (json.dumps(text) if text else "" for text in (self.opening, self.closing))
            block = f"block: space {opening} call {more} {closing}"
        else:
            block = f'block: "\\n" call "\\n" {json.dumps(self.closing)}'
        if self.bare:
            head = "start: block | TEXT\nTEXT: /([^{\\s](.|\\n)*)?/" if is_free else "start: block"
            block = block.replace("block: space", "block:")
        elif is_free:
            lead = f"lead: TEXT {marker}" if special is not None else f"lead[lazy]: TEXT {marker}"
            # where a separator stands between calls, one block holds all of them
            times = "?" if self.separator else repeated
            head = f"start: (lead block){times} TEXT\n{lead}\nTEXT: /(.|\\n)*/"
        elif self.separator:
            head = f"start: {marker} block"
        else:
            more = f'("\\n" {marker} block)*' if is_parallel else ""
            head = f"start: {marker} block {more}"
        return GrammarSpec(
            "grammar", "\n".join(["%llguidance {}", head, block, space, f"call: {calls}", *rules]), "tools"
        )

    def _rule(self, number: int, function: Function) -> str:
        """Return the rule of one function's calls. Each schema is a document of its own, for its `$ref`."""
        options = {"lenient": function.strict is False, "whitespace_pattern": r"[ \n\r\t]{1,20}"}
        schema = json_text({**function.schema_of_arguments, "x-guidance": options}, "tools")
        head = json.dumps(f'{{"name": {json.dumps(function.name)}, "{self.arguments}": ')
        return f'call{number}: {head} %json {schema} "}}"'


HERMES = ToolFormat("hermes", "<tool_call>", "", "", "</tool_call>", "arguments", r"<tool_call>(?!.*<function=)")
LLAMA3 = ToolFormat(
    "llama3_json", "<|python_tag|>", "", ";", "", "parameters", r"(?=.*\bipython\b).*\"parameters\"", bare=True
)
MISTRAL = ToolFormat(
    "mistral", "[TOOL_CALLS]", "[", ",", "]", "arguments", r"\[TOOL_CALLS\](?!.*\[ARGS\])", short_ids=True
)
FORMATS = {one.name: one for one in (HERMES, LLAMA3, MISTRAL)}


def format_of_name(name: str) -> ToolFormat:
    """Return the form of a name. Raise ConfigError if there is none."""
    if name not in FORMATS:
        raise ConfigError(
            f"there is no parser of tool calls {name!r}{suggestion(name, FORMATS)}; choose one of {', '.join(FORMATS)}"
        )
    return FORMATS[name]


def format_of_template(template: str) -> ToolFormat:
    """Return the form of calls that a chat template has.

    Raises:
        BadRequestError: The template has no notion of tools, or an unknown form of calls.
    """
    require_tools(template, "tools", "tools")
    for one in FORMATS.values():
        if re.search(one.template, template, re.DOTALL):
            return one
    raise BadRequestError(
        "tools: the chat template has tools, but the form of its calls is not known; start the server with "
        f"--tool-call-parser and one of {', '.join(FORMATS)}",
        "tools",
    )


def require_tools(template: str, variable: str, param: str) -> None:
    """Raise BadRequestError if a chat template does not use a variable: `tools`, or a message's `tool_calls`."""
    if not re.search(rf"\b{variable}\b", template):
        raise BadRequestError(
            f"the chat template of this model has no notion of {variable}; serve a model whose template has it, or "
            "start the server with --chat-template",
            param,
        )
