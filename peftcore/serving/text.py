"""From tokens to text, a piece at a time: what has been given never changes, and nothing of a stop text is given."""

from collections.abc import Sequence
from typing import Any

UNFINISHED = "�"
"""What a tokenizer gives for bytes that are no character (yet)."""


class TextStream:
    """The text of one answer as it grows."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens: list[int] = []
        self._context = self._read = 0
        """Tokens before `_read` have been given as text; decoding starts at `_context`, for what a space hangs on."""
        self._held = ""
        self.stopped = False
        """Whether a stop text has come; it and what is after it are left out."""

    def push(self, token: int) -> str:
        """The text that a token makes certain; often '' where it ends inside a character or may begin a stop text."""
        self._tokens.append(token)
        before, whole = self._decode(self._context, self._read), self._decode(self._context)
        if whole.endswith(UNFINISHED) or len(whole) <= len(before):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return self._give(whole[len(before) :])

    def finish(self) -> str:
        """What is left once no more tokens come."""
        rest = self._decode(self._context)[len(self._decode(self._context, self._read)) :]
        text = self._give(rest)
        return text if self.stopped else text + self._held

    def _give(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _decode(self, start: int, end: int | None = None) -> str:
        return self._tokenizer.decode(
            self._tokens[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text begin a stop text."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
