"""Incremental decoding of tokens into text. Emitted text never changes, and never contains part of a stop text."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

UNFINISHED = "�"
"""Character that a tokenizer returns for an incomplete UTF-8 sequence."""


class TextStream:
    """Growing text of one completion.

    Args:
        tokenizer: Decodes the tokens.
        stop: Texts that end the completion.
        markers: {special token id: its text} of special tokens that are part of the text; other ones are left out.
        before: Tokens of the text that this one continues; SentencePiece drops a space at the beginning of a text.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        markers: Mapping[int, str] = MappingProxyType({}),
        before: Sequence[int] = (),
    ):
        self._tokenizer, self._stop, self._markers = tokenizer, stop, markers
        self._tokens = list(before)
        if self._decode(0).endswith(UNFINISHED):  # a part of a character would hide the rest of that character
            self._tokens = []
        self._context, self._read = 0, len(self._tokens)
        """Tokens before `_read` were emitted. Decoding starts at `_context`: spaces depend on earlier tokens."""
        self._withheld = ""
        self.stopped = False
        """True after a stop text, which is not part of the text."""

    def push(self, token: int) -> str:
        """Return the text after a token; '' inside a character, or while the text may begin a stop text."""
        if token in self._markers:
            rest = self._rest()
            self._tokens, self._context, self._read = [], 0, 0
            return self._emit(rest + self._markers[token])
        self._tokens.append(token)
        before, whole = self._decode(self._context, self._read), self._decode(self._context)
        if whole.endswith(UNFINISHED) or len(whole) <= len(before):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return self._emit(whole[len(before) :])

    def finish(self) -> str:
        """Return the remaining text after the last token."""
        text = self._emit(self._rest())
        return text if self.stopped else text + self._withheld

    def _rest(self) -> str:
        """Return the text of the last tokens that is not read yet, such as a part of a character."""
        return self._decode(self._context)[len(self._decode(self._context, self._read)) :]

    def _emit(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._withheld + text
        positions = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if positions:
            self.stopped = True
            return text[: min(positions)]
        overlap = max((partial_match(text, stop) for stop in self._stop), default=0)
        self._withheld = text[len(text) - overlap :]
        return text[: len(text) - overlap]

    def _decode(self, start: int, end: int | None = None) -> str:
        return self._tokenizer.decode(
            self._tokens[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def partial_match(text: str, stop: str) -> int:
    """Return the number of characters at the end of a text that begin a stop text."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
