"""Grammars compiled by llguidance, the only file that imports the library.

llguidance parses a grammar while the text grows, so compiling costs next to nothing. It refuses a JSON schema with a
keyword that it does not enforce, and bounds its own work in each step.
"""

import json
import time
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftcore.errors import MissingExtraError, require_extra
from peftcore.serving.errors import BadRequestError, GrammarError
from peftcore.serving.grammar import Compile, GrammarSpec

WHITESPACE = r"[ \n\r\t]{1,20}"
"""White space between the tokens of JSON, which has an end, because small models repeat spaces without one."""
MASK_SECONDS = 0.5
"""Most CPU time of one mask; far above what a usable grammar takes."""
LIMITS = {"max_grammar_size": 100_000, "step_max_items": 20_000, "verbose_errors": False}
"""Limits of llguidance; the defaults for the other ones."""


@cache
def _llguidance() -> Any:
    require_extra("structured", "structured output", "llguidance")
    return import_module("llguidance")


def load(tokenizer: Any, vocabulary: int, eos_tokens: frozenset[int]) -> Compile:
    """Return the function that compiles grammars for a tokenizer.

    Args:
        tokenizer: A fast tokenizer of transformers.
        vocabulary: Width of the model's logits (count).
        eos_tokens: Token ids that end a completion.

    Raises:
        BadRequestError: llguidance is not installed, or the tokenizer is not a fast one.
    """
    try:
        _llguidance()
    except MissingExtraError as error:
        raise BadRequestError(f"this server has no structured output: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise BadRequestError(f"structured output needs a fast tokenizer, and {type(tokenizer).__name__} is not one")
    eos = sorted(eos_tokens, key=lambda token: token != tokenizer.eos_token_id)
    wrapped = import_module("llguidance.hf").from_tokenizer(tokenizer, max(vocabulary, len(tokenizer)), eos)

    def compile_one(spec: GrammarSpec) -> "LlguidanceGrammar":
        return LlguidanceGrammar(wrapped, spec, vocabulary)

    return compile_one


class LlguidanceGrammar:
    """A compiled grammar.

    Args:
        tokenizer: The tokenizer as llguidance needs it.
        spec: The grammar.
        vocabulary: Width of the masks (count).

    Raises:
        GrammarError: The grammar is invalid, has unsupported parts, or needs too much time.
    """

    def __init__(self, tokenizer: Any, spec: GrammarSpec, vocabulary: int):
        library = _llguidance()
        limits = library.LLParserLimits(**LIMITS)
        self._start = library.LLMatcher(tokenizer, _serialised(spec), log_level=0, limits=limits)
        self._param, self._vocabulary = spec.param, vocabulary
        if self._start.is_error():
            raise GrammarError(f"{spec.param}: {_reason(self._start)}", spec.param)
        self.matcher().allowed()  # so that a grammar that is too complex from its beginning is refused

    def matcher(self) -> "LlguidanceMatcher":
        """Return a matcher at the start of the grammar."""
        return LlguidanceMatcher(self._start.deep_copy(), self._param, self._vocabulary)


class LlguidanceMatcher:
    """State of one completion.

    Args:
        state: llguidance's matcher.
        param: Field of the request, for errors.
        vocabulary: Width of the masks (count).
    """

    def __init__(self, state: Any, param: str, vocabulary: int):
        self._state, self._param, self._vocabulary = state, param, vocabulary

    def allowed(self) -> Tensor:
        """Return the tokens that may follow as a mask (V,). Raise GrammarError if a limit is exceeded."""
        started = time.thread_time()
        bits = np.frombuffer(self._state.compute_bitmask(), np.uint8)
        self._check()
        if time.thread_time() - started > MASK_SECONDS:
            raise GrammarError(
                f"{self._param}: the grammar is too complex: one token takes more than {MASK_SECONDS} s; simplify it",
                self._param,
            )
        mask = np.unpackbits(bits, bitorder="little")[: self._vocabulary].astype(bool)
        if not mask.any():
            raise GrammarError(f"{self._param}: no token can follow in the grammar", self._param)
        return torch.from_numpy(np.pad(mask, (0, self._vocabulary - len(mask))))

    def accept(self, token: int) -> None:
        """Move on by one token. Raise GrammarError if the grammar does not allow it."""
        if not self._state.consume_token(token):
            self._check()

    @property
    def complete(self) -> bool:
        """True if nothing may follow."""
        return self._state.is_stopped()

    def _check(self) -> None:
        if self._state.is_error():
            raise GrammarError(f"{self._param}: {_reason(self._state)}", self._param)


def _serialised(spec: GrammarSpec) -> str:
    """Return a grammar in llguidance's form. Raise GrammarError if it is not even of the right type."""
    matcher = _llguidance().LLMatcher
    try:
        match spec.kind:
            case "json_schema":
                return matcher.grammar_from_json_schema(spec.text, overrides=_json_options(spec))
            case "regex":
                return matcher.grammar_from_regex(spec.text)
            case "choice":
                return matcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(spec.text))))
            case "grammar":
                return matcher.grammar_from_lark(import_module("llguidance.gbnf_to_lark").any_to_lark(spec.text))
    except Exception as error:  # the converter of GBNF raises errors of any type
        raise GrammarError(f"{spec.param}: {error}", spec.param) from error


def _json_options(spec: GrammarSpec) -> dict[str, Any]:
    """Return llguidance's options for a JSON schema."""
    options: dict[str, Any] = {"lenient": spec.lenient, "whitespace_pattern": spec.whitespace or WHITESPACE}
    if spec.whitespace == "":
        options = {"lenient": spec.lenient, "whitespace_flexible": False}
    return options


def _reason(state: Any) -> str:
    reason = state.get_error().replace("<non-verbose/>", "").strip()
    if reason.startswith("Unimplemented keys: "):
        names = ", ".join(json.loads(reason.removeprefix("Unimplemented keys: ")))
        return f"the JSON schema has keywords that cannot be enforced: {names}; remove them"
    return reason
