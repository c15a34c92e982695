"""One request in the engine, and the events for its client."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peftcore.serving.catalog import ModelLease
from peftcore.serving.errors import ServingError
from peftcore.serving.grammar import TokenMatcher
from peftcore.serving.sampling import SampledRow, Sampling, TokenLogprobs
from peftcore.serving.text import TextStream

Finish = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Chunk:
    """Text that will not change any more, and the finish reason of the last chunk."""

    text: str
    tokens: int
    """Tokens generated so far (count)."""
    finish: Finish | None = None
    logprobs: TokenLogprobs | None = None
    """Of the token that gave this chunk, if the request asks for them; None for the end-of-sequence token."""


Event = Chunk | ServingError


class Generation:
    """State of one request.

    Args:
        model: Name of the requested model.
        prompt: Token ids.
        sampling: Sampling options.
        tokenizer: Decodes the generated tokens.
        eos_tokens: Token ids that end the text.
        sink: The engine's thread calls it with each event; the last event is an error or has a finish reason.
        matcher: Constrains the tokens to a grammar. None: every token is allowed.
        markers: {special token id: its text} of special tokens that are part of the text; other ones are left out.
        continues: The text continues the prompt's text; False: it is a text of its own, such as a message.
    """

    def __init__(
        self,
        model: str,
        prompt: Sequence[int],
        sampling: Sampling,
        tokenizer: Any,
        eos_tokens: frozenset[int],
        sink: Callable[[Event], None],
        matcher: TokenMatcher | None = None,
        markers: Mapping[int, str] | None = None,
        continues: bool = False,
    ):
        self.model, self.prompt, self.sampling = model, list(prompt), sampling
        self.row = SampledRow(sampling, sampling.generator(), Counter(), matcher)
        self.arrived = time.monotonic()
        self.tokens = 0
        """Tokens generated so far (count), the EOS token included."""
        self.last = 0
        """Last generated token, the input of the next step."""
        self.lease: ModelLease | None = None
        self.version: str | None = None
        """Directories of the adapters that computed the answer, once the lease is released; None: the base model."""
        self.abandoned = False
        """True if the client has gone or timed out."""
        self.finished = False
        """True after the last event."""
        self._text = TextStream(tokenizer, sampling.stop, markers or {}, self.prompt[-1:] if continues else ())
        self._eos_tokens = eos_tokens
        self._sink = sink

    def push(self, token: int, logprobs: TokenLogprobs | None = None) -> None:
        """Append a token, and emit the text that will not change any more.

        Raises:
            GrammarError: The grammar cannot go on after this token.
        """
        self.tokens, self.last = self.tokens + 1, token
        self.row.counts[token] += 1
        ended = token in self._eos_tokens
        complete = ended
        if (matcher := self.row.matcher) is not None and not ended:
            matcher.accept(token)
            complete = matcher.complete
        text = "" if ended else self._text.push(token)
        full = self.tokens >= self.sampling.max_tokens
        if (complete or full) and not self._text.stopped:
            text += self._text.finish()
        finish: Finish | None = "stop" if complete or self._text.stopped else "length" if full else None
        self._emit(Chunk(text, self.tokens, finish, None if ended else logprobs), finish is not None)

    def fail(self, error: ServingError) -> None:
        """End the request with an error."""
        self._emit(error, True)

    def release(self) -> None:
        """Give up this request's lease on its adapters; a second call does nothing."""
        if self.lease is not None:
            self.version = self.lease.version
            self.lease.release()
            self.lease = None

    def _emit(self, event: Event, last: bool) -> None:
        if self.finished:
            return
        self.finished = last
        if last:
            self.release()  # before the client is told, because it may check at once that its adapter is free
        try:
            self._sink(event)
        except RuntimeError:  # the client's event loop is closed
            self.abandoned = True
