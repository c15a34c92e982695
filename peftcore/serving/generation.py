"""One request on its way through the engine, and what its client is told of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peftcore.serving.catalog import Held
from peftcore.serving.errors import ServingError
from peftcore.serving.sampling import Sampling
from peftcore.serving.text import TextStream

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """Text that has become certain. tokens: generated so far (count); finish: why no more come, None where more do."""

    text: str
    tokens: int
    finish: Finish | None = None


Event = Piece | ServingError


class Generation:
    """prompt: token ids. sink: called by the engine's thread with each event; the last one is an error or finishes."""

    def __init__(
        self,
        model: str,
        prompt: Sequence[int],
        sampling: Sampling,
        tokenizer: Any,
        ends: frozenset[int],
        sink: Callable[[Event], None],
    ):
        self.model, self.prompt, self.sampling = model, list(prompt), sampling
        self.generator = sampling.generator()
        self.arrived = time.monotonic()
        self.tokens = 0
        """Generated so far (count), one that ends the answer included."""
        self.last = 0
        """The last token, which the next step reads."""
        self.held: Held | None = None
        self.gone = False
        """Whether nobody waits for it any more."""
        self.over = False
        """Whether its last event has been given."""
        self._text, self._ends, self._sink = TextStream(tokenizer, sampling.stop), ends, sink

    def push(self, token: int) -> None:
        """Take the next token, and tell of the text that it makes certain."""
        self.tokens, self.last = self.tokens + 1, token
        ended = token in self._ends
        text = "" if ended else self._text.push(token)
        full = self.tokens >= self.sampling.max_tokens
        if (ended or full) and not self._text.stopped:
            text += self._text.finish()
        finish: Finish | None = "stop" if ended or self._text.stopped else "length" if full else None
        self._tell(Piece(text, self.tokens, finish), finish is not None)

    def fail(self, error: ServingError) -> None:
        """Tell of an error, which is the end."""
        self._tell(error, True)

    def release(self) -> None:
        """Give its adapters back."""
        if self.held is not None:
            self.held.release()
            self.held = None

    def _tell(self, event: Event, last: bool) -> None:
        if self.over:
            return
        self.over = last
        if last:
            self.release()  # before the client knows, who may look whether its adapter is free
        try:
            self._sink(event)
        except RuntimeError:  # the client's event loop is closed
            self.gone = True
