"""Incremental parsing of an answer with tool calls into OpenAI's deltas. No text is lost: the rest is content."""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from peftcore.serving.text import partial_match
from peftcore.serving.tool_formats import ToolFormat

HEAD = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*'
)
"""A call up to its arguments."""


@dataclass
class ParsedCall:
    """A call of the answer; the arguments are a JSON text, incomplete if the answer ended within them."""

    index: int
    id: str
    name: str
    arguments: str = ""

    def plain(self) -> dict[str, Any]:
        """Return the call as in the message of a response."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class ToolCallStream:
    """Content and tool calls of one growing answer.

    Args:
        form: The form of the calls.
        names: Functions that may be called; a call of another one is content.
        is_parallel: Parse several calls. False: `done` is true after the first one.
    """

    def __init__(self, form: ToolFormat, names: Collection[str], is_parallel: bool):
        self._form, self._names, self._is_parallel = form, names, is_parallel
        self._parse = self._text
        self._buffer = ""
        """Text that is not parsed yet."""
        self._space = ""
        """White space that is dropped if a call follows, or the end after a call."""
        self._raw = ""
        """Text of the present call before its object, such as the marker."""
        self._object = _Object()
        self._call: ParsedCall | None = None
        """The present call, from the beginning of its arguments on."""
        self._index = 0
        self._deltas: list[dict[str, Any]] = []
        self.content = ""
        self.calls: list[ParsedCall] = []
        """The calls so far."""
        self.done = False
        """True if the answer must end here, because it has its only call."""

    def push(self, text: str) -> list[dict[str, Any]]:
        """Return the deltas after more text: of content, or of a call's beginning or next part."""
        self._buffer += text
        while not self.done and self._parse():
            pass
        deltas, self._deltas = self._deltas, []
        return deltas

    def finish(self, is_cut: bool) -> list[dict[str, Any]]:
        """Return the deltas of the remaining text.

        Args:
            is_cut: The answer was cut by its token limit; a call whose arguments have begun then stays a call.
        """
        if not self.done:
            if self._parse == self._call_text and not (is_cut and self._call):
                self._give_up()
            elif self._parse == self._opening:
                self._say(self._raw + self._buffer)
            elif self._parse != self._call_text:
                self._say(self._buffer)
            self._buffer = ""
            if not self.calls:
                self._emit(self._space)
        deltas, self._deltas = self._deltas, []
        return deltas

    # each parser returns True if it made progress, and False if it needs more text

    def _text(self) -> bool:
        """Parse content up to the next marker."""
        marker, text = self._form.marker, self._buffer
        if self._form.bare and not (self.content or self.calls):
            if not (begun := text.lstrip()):
                return False
            if begun.startswith("{"):
                self._begin("")
                return True
        position = text.find(marker)
        if position >= 0:
            self._say(text[:position])
            self._buffer = text[position + len(marker) :]
            self._begin(marker)
            return True
        withheld = partial_match(text, marker)
        self._say(text[: len(text) - withheld])
        self._buffer = text[len(text) - withheld :]
        return False

    def _begin(self, marker: str) -> None:
        self._raw, self._object, self._call = marker, _Object(), None
        self._parse = self._opening if marker and self._form.opening else self._call_text

    def _opening(self) -> bool:
        """Parse the text between the marker and the first call."""
        begun, opening = self._buffer.lstrip(), self._form.opening
        if begun.startswith(opening):
            spaces = len(self._buffer) - len(begun)
            self._raw += self._buffer[: spaces + len(opening)]
            self._buffer = begun[len(opening) :]
            self._parse = self._call_text
            return True
        if not opening.startswith(begun):
            self._give_up()
            return True
        return False

    def _call_text(self) -> bool:
        """Parse the JSON object of a call."""
        one = self._object
        self._buffer = one.feed(self._buffer)
        if self._call is None and one.name in self._names and one.state != "broken":
            self._open(str(one.name))
        if self._call is not None:
            self._extend(one.arguments())
        if one.state == "open":
            return False
        parsed = _checked(one.raw, self._names) if one.state == "complete" else None
        if parsed is None:
            self._give_up()
            return True
        name, arguments = parsed
        if self._call is None:  # keys in another order, or arguments as text
            self._extend(arguments, self._open(name))
        self._call, self._space = None, ""
        self.done = not self._is_parallel
        self._parse = self._after
        return True

    def _after(self) -> bool:
        """Parse the text after a call: the next call, or the end of calls."""
        form, begun = self._form, self._buffer.lstrip()
        for text, following in ((form.closing, self._text), (form.separator, self._call_text)):
            if text and begun.startswith(text):
                self._buffer = begun[len(text) :]
                self._raw, self._object = text if following == self._call_text else "", _Object()
                self._parse = following
                return True
        if not begun or form.closing.startswith(begun):
            return False
        self._parse = self._text
        return True

    def _open(self, name: str) -> ParsedCall:
        self._call = ParsedCall(self._index, self._form.call_id(), name)
        self._index += 1
        self._space = ""
        self.calls.append(self._call)
        head = {"id": self._call.id, "type": "function", "function": {"name": name, "arguments": ""}}
        self._deltas.append({"tool_calls": [{"index": self._call.index, **head}]})
        return self._call

    def _extend(self, arguments: str, call: ParsedCall | None = None) -> None:
        call = call or self._call
        assert call is not None
        if more := arguments[len(call.arguments) :]:
            call.arguments = arguments
            self._deltas.append({"tool_calls": [{"index": call.index, "function": {"arguments": more}}]})

    def _give_up(self) -> None:
        """Return the text of the present call as content; deltas that were sent stay with the client."""
        raw, sent = self._raw + self._object.raw, 0
        if self._call is not None:
            self.calls.remove(self._call)
            sent = len(self._raw) + self._object.start + len(self._call.arguments)
        self._call, self._parse = None, self._text
        # `content` gets the whole text, for a response in one piece, and the delta what was not sent as arguments
        before = len(self._deltas)
        self._say(raw)
        if sent:
            unsent = raw[sent : len(raw) - len(self._space)]
            self._deltas[before:] = [{"content": unsent}] if unsent else []
        self._object = _Object()

    def _say(self, text: str) -> None:
        """Add content; white space at its end waits for more."""
        text = self._space + text
        stripped = text.rstrip()
        self._space = text[len(stripped) :]
        self._emit(stripped)

    def _emit(self, text: str) -> None:
        if text:
            self.content += text
            self._deltas.append({"content": text})


class _Object:
    """A JSON object of which text arrives piece by piece; it ends with the bracket that closes it."""

    def __init__(self) -> None:
        self.raw = ""
        self.state = "open"
        """open, complete, or broken if the text is no object."""
        self.name: str | None = None
        """Name of the function, once the arguments have begun."""
        self.start = 0
        self._end: int | None = None
        """Place of the arguments in `raw`."""
        self._depth = 0
        self._in_string = self._is_escaped = False

    def arguments(self) -> str:
        """Return the arguments so far, if `name` is known."""
        return self.raw[self.start : self._end]

    def feed(self, text: str) -> str:
        """Take more text, and return the text after the object."""
        for position, character in enumerate(text):
            if self.state != "open":
                self.raw += text[:position]
                return text[position:]
            self._take(character, text, position)
        self.raw += text
        return ""

    def _take(self, character: str, text: str, position: int) -> None:
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            else:
                self._is_escaped, self._in_string = character == "\\", character != '"'
        elif self._depth == 0 and character != "{":
            self.state = "open" if character.isspace() else "broken"
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            if self._depth == 1 and character == "{" and self.name is None:
                self._read_head(self.raw + text[:position])
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            if self._depth == 1 and self.name is not None and self._end is None:
                self._end = len(self.raw) + position + 1
            if self._depth == 0:
                self.state = "complete"

    def _read_head(self, before: str) -> None:
        if (match := HEAD.fullmatch(before)) is not None:
            try:
                self.name = json.loads(match[1])
            except ValueError:
                return
            self.start = len(before)


def _checked(raw: str, names: Collection[str]) -> tuple[str, str] | None:
    """Return name and arguments of a call, or None if the text is no call of one of the functions."""
    try:
        call = json.loads(raw)
        name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(name, str) or name not in names or not isinstance(parsed, dict):
        return None
    return name, json.dumps(parsed, ensure_ascii=False)
