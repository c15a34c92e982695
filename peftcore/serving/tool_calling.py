"""The tools that the answer to one request may call, and the form of the calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftcore.serving.errors import BadRequestError
from peftcore.serving.grammar import GrammarSpec
from peftcore.serving.tool_call_stream import ToolCallStream
from peftcore.serving.tool_formats import ToolFormat, format_of_template, require_tools
from peftcore.serving.tools import Function


@dataclass(frozen=True)
class ToolCalling:
    """Functions that an answer may call, and the form of the calls."""

    form: ToolFormat
    functions: Sequence[Function]
    is_free: bool
    """True if the model chooses whether to call."""
    is_parallel: bool
    """True if the answer may have several calls."""

    @classmethod
    def of(
        cls, tokenizer: Any, form: ToolFormat | None, functions: Sequence[Function], is_free: bool, is_parallel: bool
    ) -> "ToolCalling":
        """Return the calling of a chat request.

        Args:
            tokenizer: Has the chat template.
            form: The form of the calls; None: that of the chat template.
            functions: Functions that may be called.
            is_free: The model chooses whether to call.
            is_parallel: The answer may have several calls.

        Raises:
            BadRequestError: There is no chat template, or it has no notion of tools.
        """
        if not tokenizer.chat_template:
            raise BadRequestError("the base model has no chat template, so it has no notion of tools", "tools")
        template = tokenizer.get_chat_template(tools=[{}])
        if form is None:
            form = format_of_template(template)
        else:
            require_tools(template, "tools", "tools")
        return cls(form, functions, is_free, is_parallel)

    def grammar(self, tokenizer: Any) -> GrammarSpec | None:
        """Return the grammar of the calls; None if the model chooses freely and no function is strict."""
        if self.is_free and not any(function.strict for function in self.functions):
            return None
        return self.form.grammar(self.functions, self.is_free, self.is_parallel, tokenizer)

    def stream(self) -> ToolCallStream:
        """Return a parser for one answer."""
        return ToolCallStream(self.form, {function.name for function in self.functions}, self.is_parallel)
